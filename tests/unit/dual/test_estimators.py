"""The estimators against closed forms and leave-one-out loops; ``auto`` against worlds whose λ* is known."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from dual_worlds import LAWS, World
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import kstat

from can_dist.dual import DualSolution, Margin, ScoreTable, choose, predict, solve_dual, solve_table
from can_dist.dual.belief.choice import TOLERANCE, higher_cumulants
from can_dist.dual.estimators import (
    estimate,
    estimator_moments,
    gaussian_moments,
    jackknife_moments,
    orthant_minimum,
)
from can_dist.dual.moments import prompt_moments
from can_dist.errors import ConfigError, InfeasibleConstraint, NumericalError


def ragged(seed: int, num_constraints: int = 2, num_prompts: int = 30) -> ScoreTable:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), generator.integers(1, 9, size=num_prompts))
    score = generator.normal(size=(prompt.size, num_constraints + 1))
    return ScoreTable.build(score[:, 0], score[:, 1:] + 5, prompt)


def world_table(world: World, seed: int = 0) -> ScoreTable:
    return ScoreTable.build(*world.sample(seed))


def quadrature(covariance: np.ndarray, nodes: int = 30) -> ScoreTable:
    """One prompt that enumerates a Gaussian (r, g...) with this covariance."""
    point, weight = np.polynomial.hermite_e.hermegauss(nodes)
    size = covariance.shape[0]
    mesh = np.array(list(product(point, repeat=size)))
    mass = np.array(list(product(weight, repeat=size))).prod(axis=1)
    score = mesh @ np.linalg.cholesky(covariance).T
    keep = mass > 1e-300
    return ScoreTable.build(score[keep, 0], score[keep, 1:], np.zeros(keep.sum(), int), np.log(mass[keep]))


class TestGaussian:
    def test_correlated_constraints(self) -> None:
        """Oracle 8.1: the clipped unconstrained minimiser would be (.67, 0)."""
        table = quadrature(np.array([[2.0, -0.2, 0.4], [-0.2, 1.0, 0.3], [0.4, 0.3, 0.5]]), nodes=12)
        found = estimate(table, 0.5, np.array([0.4, 0.3]), "gaussian", np.zeros(2))
        assert found.lam_J == pytest.approx([0.4, 0.0], abs=1e-9)
        gain = found.moments.gain_PJ[0]
        assert gain == pytest.approx([0.4, (0.4 + 0.4 * 0.3) / 0.5], abs=1e-9)
        assert found.moments.kl_P[0] == pytest.approx((2 - 2 * 0.4 * 0.2 + 0.4**2) / (2 * 0.25), abs=1e-9)
        assert found.moments.reward_gain_P[0] == pytest.approx((2 - 0.4 * 0.2) / 0.5, abs=1e-9)

    def test_it_is_unbiased_where_the_empirical_one_is_not(self) -> None:
        """The table of ALGORITHMS section 2: K = 8, sd/β = 1, λ* = 1, empirical about 1.17."""
        world = World("gaussian", 1.0, num_responses=8, num_prompts=4000)
        table = world_table(world)
        found = {
            name: solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator=name)
            for name in ("empirical", "jackknife", "gaussian")
        }
        assert found["empirical"].lam["g"] == pytest.approx(1.17, abs=0.03)
        assert found["jackknife"].lam["g"] == pytest.approx(1.03, abs=0.03)
        assert found["gaussian"].lam["g"] == pytest.approx(1.0, abs=4 * found["gaussian"].lam_se["g"])
        assert found["gaussian"].predicted["improvement"]["g"]["mean"] == pytest.approx(0.5, abs=1e-12)

    def test_value_and_slope(self) -> None:
        """D_G(λ) = mean[m + v/(2β)]: the moments are its derivatives."""
        table = ragged(0)
        lam, step = np.array([0.4, 0.3]), 1e-5

        def value(at: np.ndarray) -> float:
            return float(0.7 * gaussian_moments(table, at, 0.7).log_norm_P.mean())

        gain = gaussian_moments(table, lam, 0.7).gain_PJ.mean(axis=0)
        for j in range(2):
            shift = step * np.eye(2)[j]
            assert gain[j] == pytest.approx((value(lam + shift) - value(lam - shift)) / (2 * step), rel=1e-7)


class TestJackknife:
    @pytest.mark.parametrize("seed", range(3))
    def test_against_leaving_each_response_out(self, seed: int) -> None:
        table, beta = ragged(seed), 0.8
        lam = np.array([0.3, 0.5])
        found = jackknife_moments(table, lam, beta, prompt_moments(table, lam, beta))
        for i in range(table.num_prompts):
            rows = table.row_prompt_N == i
            reward, utility = table.reward_N[rows], table.utility_JN[:, rows]

            def statistics(keep: np.ndarray, reward=reward, utility=utility) -> np.ndarray:
                score = (reward[keep] + lam @ utility[:, keep]) / beta
                log_norm = logsumexp(score) - math.log(keep.size)
                weight = np.exp(score - logsumexp(score))
                mean = [weight @ utility[0, keep], weight @ utility[1, keep], weight @ reward[keep], log_norm]
                return np.array([*mean, weight @ score - log_norm])

            count = reward.size
            expected = statistics(np.arange(count))
            if count > 1:
                left = [statistics(np.delete(np.arange(count), k)) for k in range(count)]
                expected = count * expected - (count - 1) * np.mean(left, axis=0)
            actual = [*found.gain_PJ[i], found.reward_gain_P[i], found.log_norm_P[i], found.kl_P[i]]
            assert actual == pytest.approx(expected, abs=1e-10)

    def test_lambda_is_a_root(self) -> None:
        table = world_table(World("gaussian", 1.0, num_responses=32, num_prompts=100))
        solution = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="jackknife")
        moments = estimator_moments(table, solution.lam_vector, 1.0, "jackknife")
        assert moments.gain_PJ.mean() == pytest.approx(0.5, abs=1e-8)
        assert solution.slack["g"] == pytest.approx(0.0, abs=1e-8)
        assert solution.kkt_residual < 1e-8
        empirical = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)])
        assert solution.lam["g"] < empirical.lam["g"]

    def test_two_constraints_one_inactive(self) -> None:
        generator = np.random.default_rng(0)
        score = generator.normal(size=(100 * 40, 3))
        table = ScoreTable.build(score[:, 0], score[:, 1:], np.repeat(np.arange(100), 40))
        solution = solve_table(
            table, beta=1.0, constraints=[Margin("a", 0.3), Margin("b", -0.2)], estimator="jackknife"
        )
        assert solution.lam["b"] == 0.0
        assert solution.slack["b"] > 0
        assert solution.slack["a"] == pytest.approx(0.0, abs=1e-8)

    def test_collapsed_weights_have_no_solution(self) -> None:
        world = World("lognormal", 50.0, num_responses=8, num_prompts=50)
        table = world_table(world, 1)
        constraints = [
            Margin(
                "g",
                0.9
                * solve_table(table, beta=world.beta, constraints=[Margin("g", 0.1)]).feasibility["attainable"]["g"],
            )
        ]
        arguments = {"beta": world.beta, "constraints": constraints, "estimator": "jackknife"}
        with pytest.raises(NumericalError, match="no solution near the empirical lambda"):
            solve_table(table, **arguments)
        assert math.isnan(solve_table(table, throw=False, **arguments).lam["g"])


class TestSolve:
    def test_the_default_is_unchanged(self) -> None:
        table = ragged(3)
        constraints = [Margin("a", 0.1), Margin("b", 0.2)]
        first = solve_table(table, beta=1.0, constraints=constraints)
        assert first.estimator == "empirical"
        assert first.lam_vector == pytest.approx(
            solve_table(table, beta=1.0, constraints=constraints, estimator="empirical").lam_vector, abs=0
        )

    @pytest.mark.parametrize("estimator", ["jackknife", "gaussian", "auto"])
    def test_scaling_and_permuting(self, estimator: str) -> None:
        world = World("bimodal", 1.0, num_responses=32, num_prompts=50)
        reward, utility, prompt = world.sample(0)
        arguments = {"constraints": [Margin("g", 0.5)], "estimator": estimator}
        first = solve_dual(reward, utility, prompt, beta=1.0, **arguments)
        order = np.random.default_rng(0).permutation(prompt.size)
        moved = solve_dual(reward[order], utility[order], prompt[order], beta=1.0, **arguments)
        assert moved.lam["g"] == pytest.approx(first.lam["g"], rel=1e-8)
        scaled = solve_dual(
            1e4 * reward, 1e4 * utility, prompt, beta=1e4, constraints=[Margin("g", 5e3)], estimator=estimator
        )
        assert scaled.lam["g"] == pytest.approx(first.lam["g"], rel=1e-7)
        assert scaled.lam_se["g"] == pytest.approx(first.lam_se["g"], rel=1e-4)
        assert scaled.estimator == first.estimator

    def test_auto_reports_its_choice(self) -> None:
        table = world_table(World("gaussian", 1.0))
        solution = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="auto")
        assert solution.estimator == "gaussian"
        assert solution.estimator_reason.startswith("gaussian: its lambda is known to within")
        record = json.loads(json.dumps(solution.to_dict(), allow_nan=False))
        again = DualSolution.from_dict(record)
        assert again.estimator == "gaussian"
        assert again.confidence is None
        for key in ("estimator", "estimator_reason", "confidence", "safety_margin"):
            del record[key]
        assert DualSolution.from_dict(record).estimator == "empirical"

    def test_arguments(self) -> None:
        table = ragged(4)
        with pytest.raises(ConfigError, match="estimator: found 'best'"):
            solve_table(table, beta=1.0, constraints=[Margin("a", 0), Margin("b", 0)], estimator="best")
        enumerated = quadrature(np.eye(2), nodes=5)
        with pytest.raises(ConfigError, match="takes the responses as samples"):
            solve_table(enumerated, beta=1.0, constraints=[Margin("g", 0.1)], estimator="jackknife")
        auto = solve_table(enumerated, beta=1.0, constraints=[Margin("g", 0.1)], estimator="auto")
        assert auto.estimator == "empirical"
        with pytest.raises(InfeasibleConstraint):
            solve_table(table, beta=1.0, constraints=[Margin("a", 99.0), Margin("b", 0.0)], estimator="gaussian")


def test_orthant_minimum_against_scipy() -> None:
    generator = np.random.default_rng(0)
    at_bound = 0
    for _ in range(50):
        size = int(generator.integers(1, 5))
        factor = generator.normal(size=(size, size + 1))
        hessian, linear = factor @ factor.T, generator.normal(size=size)
        found = orthant_minimum(hessian, linear)
        best = minimize(
            lambda x, hessian=hessian, linear=linear: 0.5 * x @ hessian @ x + linear @ x,
            np.ones(size),
            jac=lambda x, hessian=hessian, linear=linear: hessian @ x + linear,
            bounds=[(0, None)] * size,
            options={"ftol": 1e-15, "gtol": 1e-12},
        )
        assert 0.5 * found @ hessian @ found + linear @ found == pytest.approx(best.fun, abs=1e-9)
        at_bound += int((found == 0).any())
    assert at_bound >= 10
    assert orthant_minimum(np.zeros((2, 2)), -np.ones(2)) == pytest.approx([0, 0])


def test_higher_cumulants_are_k_statistics() -> None:
    generator = np.random.default_rng(1)
    prompt = np.repeat(np.arange(20), generator.integers(4, 12, size=20))
    score = generator.exponential(size=prompt.size)
    table = ScoreTable.build(np.zeros(prompt.size), score, prompt)
    third, fourth = higher_cumulants(table, np.array([1.0]), 0.5)
    for i in range(20):
        values = score[prompt == i]
        assert third[i, 0] == pytest.approx(kstat(values, 3) / (2 * 0.5**2), rel=1e-9)
        assert fourth[i, 0] == pytest.approx(kstat(values, 4) / (6 * 0.5**3), rel=1e-9)


class TestAuto:
    def test_worlds_know_their_population(self) -> None:
        """The quadrature against the closed Gaussian form, and against one prompt of 300,000 responses."""
        assert World("gaussian", 4.0).population_lam() == pytest.approx(0.625, abs=1e-6)
        assert World("gaussian", 0.5, correlation=0.0, margin=0.3).population_lam() == pytest.approx(0.6, abs=1e-6)
        for law in LAWS:
            world = World(law, 0.5, num_prompts=1, num_responses=300_000)
            solution = solve_table(world_table(world), beta=world.beta, constraints=[Margin("g", 0.5)])
            assert solution.lam["g"] == pytest.approx(world.population_lam(), rel=0.04), law

    @pytest.mark.parametrize("law", list(LAWS))
    def test_never_trusts_a_wrong_answer(self, law: str) -> None:
        for scale, count in product((0.5, 1.0, 2.0), (8, 128)):
            world = World(law, scale, num_responses=count, num_prompts=1500 if count == 8 else 500)
            check(world, seed=2)

    @pytest.mark.parametrize(
        ("world", "estimator"),
        [
            (World("gaussian", 0.5), "gaussian"),
            (World("gaussian", 2.0, num_prompts=2000), "gaussian"),
            (World("gaussian", 0.5, num_responses=8, num_prompts=6000), "gaussian"),
            (World("uniform", 1.0), "jackknife"),
            (World("discrete", 2.0), "jackknife"),
            (World("bimodal", 0.5), "jackknife"),
            (World("skewed_down", 1.0, correlation=0.0, margin=0.5, num_prompts=4000), "jackknife"),
        ],
    )
    def test_trusts_what_is_right(self, world: World, estimator: str) -> None:
        trusted, chosen = check(world, seed=0)
        assert trusted
        assert chosen == estimator

    @pytest.mark.parametrize(
        ("world", "words"),
        [
            (World("gaussian", 50.0), "only 0 responses lie as far above"),
            (World("t3", 1.0), "tenth percentile"),
            (World("lognormal", 0.5), "heavy tail"),
            (World("gaussian", 2.0, num_responses=8, num_prompts=100), "no departure from normal scores"),
            (World("uniform", 10.0), "the scores are visibly not normal"),
            (World("gaussian", 0.3, num_responses=3), "fewer than four responses"),
        ],
    )
    def test_says_why_not(self, world: World, words: str) -> None:
        table = world_table(world)
        solution = solve_table(table, beta=world.beta, constraints=[Margin("g", world.margin)])
        choice = choose(table, world.beta, np.array([world.margin]), solution.lam_vector)
        assert not choice.trustworthy
        assert words in choice.reason

    def test_a_constraint_that_may_be_active_is_not_trusted(self) -> None:
        """λ̂ = 0 is certain only where the slack is clear of zero."""
        world = World("gaussian", 1.0, correlation=0.5)
        table = world_table(world)
        improvement = float(predict(table, [0.0], 1.0, [0.0]).improvement_J[0])
        for gap, expected in ((0.2, True), (0.001, False)):
            choice = choose(table, 1.0, np.array([improvement - gap]), np.zeros(1))
            assert choice.trustworthy is expected


def check(world: World, seed: int) -> tuple[bool, str]:
    """Assert that a trusted λ̂ is within 3 % of the population's; say whether it was trusted and whose it is."""
    table = world_table(world, seed)
    solution = solve_table(table, beta=world.beta, constraints=[Margin("g", world.margin)], throw=False)
    if not np.isfinite(solution.lam_vector).all():
        return False, "infeasible"
    choice = choose(table, world.beta, np.array([world.margin]), solution.lam_vector)
    error = choice.chosen.lam_J[0] / world.population_lam() - 1
    assert not choice.trustworthy or abs(error) <= TOLERANCE, (world, seed, error, choice.reason)
    return choice.trustworthy, choice.chosen.estimator


@pytest.mark.slow
@pytest.mark.parametrize("law", list(LAWS))
def test_never_trusts_a_wrong_answer_anywhere(law: str) -> None:
    """Every K, both correlations, and tables large enough for a bias to hide no longer behind a standard error."""
    trusted = 0
    for scale, count, (correlation, margin), num_prompts in product(
        (0.25, 0.5, 1.0, 2.0, 10.0), (8, 32, 128), ((-0.5, 0.5), (0.0, None)), (300, 1000, 5000)
    ):
        if num_prompts * count > 160_000:
            continue
        wanted = margin if margin is not None else min(0.3 * scale, 0.5)
        world = World(law, scale, correlation, wanted, num_prompts, count)
        trusted += check(world, seed=3)[0]
    assert trusted > 0 or law in ("t3", "lognormal", "rare")
