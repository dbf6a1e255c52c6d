"""The numbers that the CAN authors published, and the rules of their solver, against ours.

Their score tensors are not public; what is (cell outputs of their notebooks) is: the mean (helpfulness, safety) of the
reference, of π_λ at λ = 0 and of λ → ∞, the safety that nine λ give, and the λ that their solver found for five other
thresholds. The tests below rebuild from one part of these numbers a table of which the rest must follow:

- at β = 0.1 the scores are so far apart that π_λ takes the best response of each prompt, so safety(λ) is a step in each
  prompt and its published curve says at which λ the prompts switch. A table with those switches is the surrogate;
- the λ of the five thresholds, and the helpfulness of λ → ∞ (by the envelope theorem, dE r/dλ = −λ dE g/dλ), are then
  predictions of ours that the published numbers can contradict.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published_dual import Comparison, comparison_text, published_pgd, solve_as_published
from scipy.interpolate import PchipInterpolator

from can_dist import dual
from can_dist.dual import Frontier, Margin, ScoreTable, frontier_table
from can_dist.errors import ConfigError, InfeasibleConstraint, NumericalError

solve_table = partial(dual.solve_table, estimator="empirical")  # the paper's, which has closed forms

NUM_PROMPTS = 1500


@pytest.fixture(scope="module")
def numbers(shared_data: Path) -> dict[str, Any]:
    path = shared_data / "scores" / "can_published_dual_numbers.json"
    if not path.is_file():
        pytest.skip(f"no published numbers at {path}")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_based"]
    return found


def curve_of(numbers: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The published λ and the mean safety there, λ = 0 included."""
    pairs = sorted((float(lam), level) for lam, level in numbers["lambda_to_threshold"].items())
    lam, level = np.array([(0.0, numbers["helpfulness_only"][1]), *pairs]).T
    return lam, level


@pytest.fixture(scope="module")
def surrogate(numbers: dict[str, Any]) -> ScoreTable:
    """Three responses per prompt: the helpful one, the safe one, and a bad one that gives the reference its means.

    Prompt i switches from the helpful to the safe response at λ_i, quantile of the published curve; those that have not
    switched at its last λ switch there, the earliest that the curve allows.
    """
    lam, level = curve_of(numbers)
    helpful, unsafe = numbers["helpfulness_only"]
    safe = numbers["safety_only"][1]
    mean_reward, mean_safety = numbers["reference_helpfulness_safety"]["both"]
    at = unsafe + (safe - unsafe) * (np.arange(NUM_PROMPTS) + 0.5) / NUM_PROMPTS
    switch = PchipInterpolator(level, lam)(np.minimum(at, level[-1]))
    reward = np.full((NUM_PROMPTS, 3), helpful)
    reward[:, 1] -= switch * (safe - unsafe)
    reward[:, 2] = 3 * mean_reward - reward[:, :2].mean(axis=0).sum()
    utility = np.tile([unsafe, safe, 3 * mean_safety - safe - unsafe], NUM_PROMPTS)
    return ScoreTable.build(reward.ravel(), utility, np.repeat(np.arange(NUM_PROMPTS), 3), names=["safety"])


@pytest.fixture(scope="module")
def frontier(surrogate: ScoreTable, numbers: dict[str, Any]) -> Frontier:
    return frontier_table(surrogate, beta=numbers["kl_coeff"], names=["safety"], num_points=200)


def at_threshold(table: ScoreTable, threshold: float, beta: float) -> Comparison:
    return solve_as_published(table, beta=beta, constraints=[Margin("safety", threshold=threshold)])


@pytest.mark.real_data
class TestPublishedNumbers:
    def test_the_surrogate_has_the_published_means(
        self, surrogate: ScoreTable, numbers: dict[str, Any], frontier: Frontier
    ) -> None:
        assert (surrogate.mean_reward, surrogate.centre_J[0]) == pytest.approx(
            numbers["reference_helpfulness_safety"]["both"]
        )
        first = frontier.points[0]
        helpful, unsafe = numbers["helpfulness_only"]
        assert first.reward_improvement + surrogate.mean_reward == pytest.approx(helpful, abs=0.08)
        assert first.improvement_J[0] + surrogate.centre_J[0] == pytest.approx(unsafe, abs=0.08)
        assert frontier.attainable["safety"] + surrogate.centre_J[0] == pytest.approx(numbers["safety_only"][1])

    def test_the_frontier_goes_through_the_published_curve(
        self, surrogate: ScoreTable, numbers: dict[str, Any], frontier: Frontier
    ) -> None:
        lam, level = curve_of(numbers)
        found_lam = np.array([point.lam_J[0] for point in frontier.points])
        found_level = np.array([point.margin_J[0] for point in frontier.points]) + surrogate.centre_J[0]
        inside = lam < 2.5  # its last λ is where the surrogate puts all that is left
        assert np.interp(lam[inside], found_lam, found_level) == pytest.approx(level[inside], abs=0.08)

    def test_our_lambda_for_the_other_thresholds_is_the_published_one(
        self, surrogate: ScoreTable, numbers: dict[str, Any]
    ) -> None:
        """The two published lists come from different solves on slightly different tensors (v1, v2, both)."""
        pairs = [(float(level), lam) for level, lam in numbers["threshold_to_lambda"].items()]
        found = [at_threshold(surrogate, level, numbers["kl_coeff"]) for level, _ in pairs]
        published = [lam for _, lam in pairs]
        assert [one.exact.lam["safety"] for one in found] == pytest.approx(published, abs=0.025)
        assert [one.lam for one in found] == pytest.approx(published, abs=0.025)
        assert np.all(np.diff([one.exact.lam["safety"] for one in found]) > 0)

    def test_their_solver_and_ours_agree(self, surrogate: ScoreTable, numbers: dict[str, Any]) -> None:
        for level in map(float, numbers["threshold_to_lambda"]):
            found = at_threshold(surrogate, level, numbers["kl_coeff"])
            assert found.lam == pytest.approx(found.exact.lam["safety"], abs=1e-4)
            assert found.exact.kkt_residual < 1e-9
            assert found.kkt_residual < 1e-4

    def test_the_envelope_theorem_ties_the_published_helpfulness_to_the_published_safety(
        self, surrogate: ScoreTable, numbers: dict[str, Any], frontier: Frontier
    ) -> None:
        """Our λ → ∞ switches every prompt as early as the curve allows, so it is at least as helpful as theirs."""
        last = surrogate.mean_reward + frontier.points[-1].reward_improvement
        assert frontier.points[-1].improvement_J[0] > 0.95 * frontier.attainable["safety"]
        theirs = numbers["safety_only"][0]
        assert theirs - 0.05 < last < theirs + 0.8

    def test_the_price_rises_and_the_objective_is_concave(self, numbers: dict[str, Any], frontier: Frontier) -> None:
        margin = np.array([point.margin_J[0] for point in frontier.points])
        value = np.array([p.reward_improvement - numbers["kl_coeff"] * p.kl for p in frontier.points])
        slope = np.diff(value) / np.diff(margin)
        assert np.all(slope <= 1e-9)
        assert np.all(np.diff(slope) <= 1e-6)

    def test_thresholds_at_and_beyond_the_published_limits(
        self, surrogate: ScoreTable, numbers: dict[str, Any]
    ) -> None:
        beta = numbers["kl_coeff"]
        unsafe, safe = numbers["helpfulness_only"][1], numbers["safety_only"][1]
        levels = [float(level) for level in numbers["threshold_to_lambda"]] + [*numbers["lambda_to_threshold"].values()]
        assert all(unsafe < level < safe for level in levels)
        below = solve_table(surrogate, beta=beta, constraints=[Margin("safety", threshold=unsafe - 0.1)])
        assert below.lam["safety"] == 0.0
        beyond = [Margin("safety", threshold=safe + 0.1)]
        with pytest.raises(
            InfeasibleConstraint, match=r"margin 6\.66 over the reference mean .* at most 6\.56 attainable"
        ):
            solve_table(surrogate, beta=beta, constraints=beyond)

    def test_a_published_threshold_taken_for_a_margin_is_another_problem(
        self, surrogate: ScoreTable, numbers: dict[str, Any]
    ) -> None:
        """5 is no level that any response reaches, and is a margin that they do."""
        beta = numbers["kl_coeff"]
        with pytest.raises(InfeasibleConstraint, match=r"if you meant an improvement of 5, write margin=5\."):
            solve_table(surrogate, beta=beta, constraints=[Margin("safety", threshold=5.0)])
        right = solve_table(surrogate, beta=beta, constraints=[Margin("safety", threshold=3.0)])
        wrong = solve_table(surrogate, beta=beta, constraints=[Margin("safety", margin=3.0)])
        assert right.lam["safety"] / wrong.lam["safety"] > 1.5

    def test_a_gaussian_table_with_the_published_ends_has_their_order(self, numbers: dict[str, Any]) -> None:
        """Only the means of the reference, of λ = 0 and of λ → ∞ are matched; the law between them is assumed."""
        generator = np.random.default_rng(0)
        num_prompts, num_responses = 120, 64
        mean_reward, mean_safety = numbers["reference_helpfulness_safety"]["both"]
        gains = [
            numbers["helpfulness_only"][0] - mean_reward,
            numbers["helpfulness_only"][1] - mean_safety,
            numbers["safety_only"][1] - mean_safety,
        ]
        normal = generator.normal(size=(2, num_prompts, num_responses))
        correlation = gains[1] / gains[2]  # of the best of K: E[g | best r] = ρ E[max g]
        reward, utility = normal[0], correlation * normal[0] + np.sqrt(1 - correlation**2) * normal[1]
        reward, utility = (x - x.mean(axis=1, keepdims=True) for x in (reward, utility))
        reward = mean_reward + reward * gains[0] / reward.max(axis=1).mean()
        utility = mean_safety + utility * gains[2] / utility.max(axis=1).mean()
        prompt = np.repeat(np.arange(num_prompts), num_responses)
        table = ScoreTable.build(reward.ravel(), utility.ravel(), prompt, names=["safety"])
        pairs = [(float(level), lam) for level, lam in numbers["threshold_to_lambda"].items()]
        found = [at_threshold(table, level, numbers["kl_coeff"]) for level, _ in pairs]
        exact = np.array([one.exact.lam["safety"] for one in found])
        published = np.array([lam for _, lam in pairs])
        assert [one.lam for one in found] == pytest.approx(exact.tolist(), abs=1e-3)
        assert np.argsort(exact).tolist() == np.argsort(published).tolist()
        assert np.abs(exact / published - 1).max() < 0.5  # measured: 0.23 to 0.41, what the Gaussian law gets wrong


# ------------------------------------------------------------------------------------------ the rules of their solver

REWARD = np.array([[0.0, 0.5, 0.2], [1.0, 0.0, 0.4]])
UTILITY = np.array([[1.0, 0.0, 0.3], [0.2, 1.4, 0.1]])


def slope(lam: float, threshold: float, beta: float, utility: np.ndarray = UTILITY) -> float:
    """∂D/∂λ = E_π g − threshold at λ, from the definition."""
    weight = np.exp((REWARD + lam * utility) / beta)
    weight /= weight.sum(axis=1, keepdims=True)
    return float((weight * utility).sum(axis=1).mean() - threshold)


class TestRules:
    @pytest.mark.parametrize(("num_rounds", "step"), [(1, 4.0), (2, 2.0), (3, 0.5), (4, 0.0625), (5, 0.0625 / 16)])
    def test_each_round_starts_at_one_with_a_step_whose_division_compounds(self, num_rounds: int, step: float) -> None:
        found = published_pgd(REWARD, UTILITY, 0.6, 0.5, num_iters=1, max_rounds=num_rounds)
        assert (found.lam, found.num_steps, found.num_rounds) == (None, num_rounds, num_rounds)
        assert found.last_lam == pytest.approx(max(0.0, 1.0 - step * slope(1.0, 0.6, 0.5)), rel=1e-12)

    def test_without_a_learning_rate_the_step_is_one(self) -> None:
        found = published_pgd(REWARD, UTILITY, 0.6, 0.5, lr=None, num_iters=1, max_rounds=1)
        assert found.last_lam == pytest.approx(1.0 - slope(1.0, 0.6, 0.5), rel=1e-12)

    def test_it_never_stops_before_the_eleventh_step(self) -> None:
        """A threshold that the policy of λ = 0 exceeds by far: λ = 0 from the first step on."""
        found = published_pgd(REWARD, UTILITY, -9.0, 0.5)
        assert (found.lam, found.num_steps, found.num_rounds) == (0.0, 11, 1)

    def test_two_hundred_steps_a_round_and_five_rounds(self) -> None:
        found = published_pgd(REWARD, 1000 * UTILITY, 620.0, 0.5)
        assert (found.lam, found.num_steps, found.num_rounds) == (None, 1000, 5)

    def test_a_response_that_is_not_there_has_reward_minus_infinity(self) -> None:
        """Prompts of two and three responses against the same descent written for lists."""
        rows = [(0, 0.0, 1.0), (0, 0.5, 0.0), (1, 1.0, 0.2), (1, 0.0, 1.4), (1, 0.4, 0.1)]
        prompt, reward, utility = (np.array(column) for column in zip(*rows, strict=True))
        table = ScoreTable.build(reward, utility, prompt.astype(int), names=["safety"])
        found = at_threshold(table, 0.75, 0.5)
        lam = 1.0
        for _ in range(found.num_steps - 200):
            gradient = 0.0
            for one in (0, 1):
                score = np.exp((reward + lam * utility)[prompt == one] / 0.5)
                gradient += float(score @ (utility[prompt == one] - 0.75) / score.sum()) / 2
            lam = max(0.0, lam - 2.0 * gradient)
        assert found.num_rounds == 2  # with 4 it circles for 200 steps
        assert found.lam == pytest.approx(lam, abs=1e-10)
        assert found.exact.lam["safety"] == pytest.approx(lam, abs=1e-4)


def table_of(scale: float = 1.0, **weights: Any) -> ScoreTable:
    return ScoreTable.build(
        REWARD.ravel(), scale * UTILITY.ravel(), np.repeat([0, 1], 3), weights.get("log_weight"), names=["safety"]
    )


class TestComparison:
    def test_record_has_both(self) -> None:
        found = at_threshold(table_of(), 0.6, 0.5)
        record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert record["published"]["lam"]["safety"] == found.lam
        assert record["published"]["difference"]["safety"] == found.lam - record["exact"]["lam"]["safety"]
        assert record["exact"]["threshold"] == {"safety": 0.6}

    def test_residual_is_in_the_unit_of_ours(self) -> None:
        """At a λ that is off by δ the residual is D''(λ)·δ over the power of two above the standard deviation of g."""
        found = at_threshold(table_of(), 0.6, 0.5)
        spread = float(np.sqrt(UTILITY.var(axis=1, ddof=1).mean()))
        unit = 2.0 ** np.floor(np.log2(spread) + 1)
        assert found.kkt_residual == pytest.approx(abs(slope(found.lam, 0.6, 0.5)) / unit, rel=1e-6, abs=1e-15)

    @pytest.mark.parametrize("threshold", [-9.0, 0.6])
    def test_a_slack_constraint_has_no_residual_at_zero(self, threshold: float) -> None:
        found = at_threshold(table_of(), threshold, 0.5)
        assert (found.lam == 0.0) == (threshold < 0)
        assert found.kkt_residual < 1e-4

    def test_it_says_when_it_gives_up_and_what_the_exact_solver_has(self) -> None:
        exact = solve_table(table_of(1000.0), beta=0.5, constraints=[Margin("safety", threshold=620.0)])
        with pytest.raises(NumericalError) as caught:
            at_threshold(table_of(1000.0), 620.0, 0.5)
        message = str(caught.value)
        assert "the published projected gradient descent gave up on safety: no convergence in 5 rounds" in message
        assert "(1000 gradient steps; it stood at lambda = " in message
        assert f"The exact solver has lambda* = {exact.lam['safety']:.6g}, KKT residual " in message

    def test_infeasible_thresholds_are_ours_to_refuse(self) -> None:
        with pytest.raises(InfeasibleConstraint, match="threshold 9 requested"):
            at_threshold(table_of(), 9.0, 0.5)

    @pytest.mark.parametrize(
        ("constraints", "found"),
        [
            ([Margin("safety", 0.1)], "found safety with margin 0.1"),
            ([Margin("safety", 0.1, equal=True)], "found safety with an exact margin 0.1"),
            ([Margin("safety", threshold=0.1, equal=True)], "found safety with an exact threshold 0.1"),
            ([Margin("a", threshold=0.1), Margin("b", threshold=0.2)], "found a with threshold 0.1, b with threshold"),
            ([], "found none"),
        ],
    )
    def test_anything_but_one_threshold_is_refused(self, constraints: list[Margin], found: str) -> None:
        with pytest.raises(ConfigError, match=f"takes one constraint, an absolute level .*{found}"):
            solve_as_published(table_of(), beta=0.5, constraints=constraints)

    def test_reference_weights_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="the published solver has no reference weights"):
            at_threshold(table_of(log_weight=np.zeros(6)), 0.6, 0.5)

    @pytest.mark.parametrize("beta", [0.0, -1.0])
    def test_beta(self, beta: float) -> None:
        with pytest.raises(ConfigError, match="beta: found"):
            at_threshold(table_of(), 0.6, beta)


def test_the_text_sets_their_lambda_beside_ours() -> None:
    comparison = at_threshold(table_of(), 0.6, 0.5)
    lines = comparison_text(comparison).splitlines()
    assert lines[0].startswith("threshold 0.6 on safety, the absolute level of the published code: margin ")
    assert lines[1].startswith(f"published lambda  {comparison.lam:.9g}, KKT residual ")
    assert lines[2].startswith(f"exact     lambda* {comparison.exact.lam['safety']:.9g}, KKT residual ")
    assert lines[3].startswith(f"difference {comparison.difference:+.1e}, ")
