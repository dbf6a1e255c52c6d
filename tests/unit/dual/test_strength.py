"""The strength that meets the margins: by hand, on exact policies, against the linear law, and (slow) by its rates."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from policy_world import PolicyWorld, estimate, make_world
from scipy.optimize import brentq
from scipy.stats import t

from can_dist.dual import (
    Demand,
    Margin,
    PolicyEstimate,
    ScoreTable,
    Strength,
    at_strength,
    choose_strength,
    demands_of,
    estimate_policy,
    solve_table,
)
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint


class TestRule:
    def test_the_largest_need_decides(self) -> None:
        result = choose_strength(estimate(0.25, 0.4), [Demand("a", 0.5), Demand("b", 0.6)])
        assert (result.alpha, result.limiting) == (2.0, "a")
        assert result.needed == pytest.approx({"a": 2.0, "b": 1.5})
        assert result.predicted.improvement["b"].mean == pytest.approx(0.8)
        assert result.predicted.improvement["b"].se == pytest.approx(0.04)
        assert result.predicted.reward_improvement.mean == pytest.approx(0.2)
        assert result.predicted.kl.mean == pytest.approx(0.4)
        assert result.alpha_se == pytest.approx(2.0 * 0.02 / 0.25)
        assert result.notes == ()

    def test_a_policy_that_overshoots_is_shrunk_where_a_constraint_binds(self) -> None:
        assert choose_strength(estimate(0.8), [Demand("a", 0.5)]).alpha == pytest.approx(0.625)

    def test_a_policy_stays_as_trained_where_none_binds(self) -> None:
        """λ = 0: the reward alone brings more than the margin, and shrinking would give reward away."""
        result = choose_strength(estimate(0.8, lam=0.0), [Demand("a", 0.5)])
        assert (result.alpha, result.limiting) == (1.0, None)
        assert math.isnan(result.alpha_se)
        assert choose_strength(estimate(0.4, lam=0.0), [Demand("a", 0.5)]).alpha == pytest.approx(1.25)

    @pytest.mark.parametrize("margin", [0.0, -0.3])
    def test_a_margin_that_the_reference_meets_needs_no_strength(self, margin: float) -> None:
        result = choose_strength(estimate(0.8), [Demand("a", margin)])
        assert (result.alpha, result.limiting, result.needed) == (1.0, None, {"a": 0.0})

    def test_a_loss_larger_than_allowed_is_shrunk(self) -> None:
        result = choose_strength(estimate(-0.4), [Demand("a", -0.3)])
        assert (result.alpha, result.limiting) == (pytest.approx(0.75), "a")
        assert choose_strength(estimate(-0.2), [Demand("a", -0.3)]).alpha == 1.0
        # within the interval of the gain nothing is known to be wrong; with a confidence everything must be
        assert choose_strength(estimate(-0.31), [Demand("a", -0.3)]).alpha == 1.0
        sure = choose_strength(estimate(-0.31), [Demand("a", -0.3)], confidence=0.95)
        assert sure.alpha == pytest.approx(0.3 / (0.31 + t.ppf(0.95, 199) * 0.02))

    def test_confidence(self) -> None:
        result = choose_strength(estimate(0.25, 0.4), [Demand("a", 0.5), Demand("b", 0.6)], confidence=0.9)
        quantile = t.ppf(0.95, 199)
        assert result.needed["a"] == pytest.approx(0.5 / (0.25 - quantile * 0.02), rel=1e-12)
        assert result.needed["b"] == pytest.approx(0.6 / (0.4 - quantile * 0.02), rel=1e-12)
        assert result.confidence == 0.9

    def test_a_threshold_brings_the_error_of_the_reference_mean(self) -> None:
        """α Ĝ − z √(α² SE² + SE_b²) = b, by a bracketing root."""
        result = choose_strength(estimate(0.25), [Demand("a", 0.5, error=0.05)], confidence=0.95)
        quantile = t.ppf(0.95, 199)
        root = brentq(lambda a: a * 0.25 - quantile * math.hypot(a * 0.02, 0.05) - 0.5, 1, 9, xtol=1e-14)
        assert result.alpha == pytest.approx(root, rel=1e-12)
        plain = choose_strength(estimate(0.25), [Demand("a", 0.5, error=0.05)])
        assert plain.alpha == pytest.approx(2.0, rel=1e-14)
        assert plain.alpha_se == pytest.approx(math.hypot(2.0 * 0.02, 0.05) / 0.25)

    def test_a_threshold_just_met_by_the_reference_is_asked_for_with_confidence(self) -> None:
        result = choose_strength(estimate(0.25), [Demand("a", -0.01, error=0.05)], confidence=0.95)
        quantile = t.ppf(0.95, 199)
        root = brentq(lambda a: a * 0.25 - quantile * math.hypot(a * 0.02, 0.05) + 0.01, 0, 9, xtol=1e-14)
        assert result.alpha == pytest.approx(root, rel=1e-12)

    def test_equalities(self) -> None:
        assert choose_strength(estimate(0.8), [Demand("a", 0.4, equal=True)]).alpha == pytest.approx(0.5)
        assert choose_strength(estimate(-0.2), [Demand("a", -0.4, equal=True)]).needed == pytest.approx({"a": 2.0})
        sure = choose_strength(estimate(0.8), [Demand("a", 0.4, equal=True)], confidence=0.95)
        assert sure.alpha == pytest.approx(0.5)
        both = [Demand("a", 0.5), Demand("b", 0.0, equal=True)]
        assert choose_strength(estimate(0.25, 0.01), both).alpha == pytest.approx(2.0)
        with pytest.raises(InfeasibleConstraint, match=r"strength 2, which a needs, brings b to \+0\.2 ± .* exactly"):
            choose_strength(estimate(0.25, 0.1), both)

    def test_without_constraints(self) -> None:
        assert choose_strength(estimate(), []).alpha == 1.0


class TestRefusals:
    def test_wrong_direction(self) -> None:
        with pytest.raises(InfeasibleConstraint) as refused:
            choose_strength(estimate(-0.1), [Demand("a", 0.5)])
        assert "a: the policy gains -0.1 ± 0.039 where +0.5 is asked" in str(refused.value)
        assert "direction is wrong (direction 0.60)" in str(refused.value)

    def test_no_loss_allowed(self) -> None:
        with pytest.raises(InfeasibleConstraint, match="no loss is allowed"):
            choose_strength(estimate(-0.1), [Demand("a", 0.0)])
        assert choose_strength(estimate(-0.03), [Demand("a", 0.0)]).alpha == 1.0

    def test_a_gain_that_may_be_zero(self) -> None:
        with pytest.raises(DataError, match=r"200 prompts cannot tell it from zero.*\n.*about 357 would do"):
            choose_strength(estimate(0.03), [Demand("a", 0.5)])
        assert choose_strength(estimate(0.041), [Demand("a", 0.5)]).alpha > 12
        with pytest.raises(DataError, match=r"cannot vouch for it with confidence 0\.999"):
            choose_strength(estimate(0.05), [Demand("a", 0.5)], confidence=0.999)

    def test_bounds(self) -> None:
        with pytest.raises(
            InfeasibleConstraint, match=r"a needs strength 5 \(gain \+0\.1 ± .*above strength.max = 4\."
        ):
            choose_strength(estimate(0.1), [Demand("a", 0.5)], max_strength=4)
        with pytest.raises(InfeasibleConstraint, match=r"2\.5 nats \(0\.1 at strength 1\), above strength.max_kl = 2"):
            choose_strength(estimate(0.1), [Demand("a", 0.5)], max_kl=2)
        assert choose_strength(estimate(0.1), [Demand("a", 0.5)], max_strength=5.1, max_kl=2.6).alpha == 5.0

    def test_one_strength_cannot_meet_both(self) -> None:
        with pytest.raises(InfeasibleConstraint, match=r"strength 2, which a needs, brings b to -0\.4"):
            choose_strength(estimate(0.25, -0.2), [Demand("a", 0.5), Demand("b", -0.3)])

    def test_too_few_prompts(self) -> None:
        with pytest.raises(DataError, match=r"31 prompts .* at least 32"):
            choose_strength(estimate(0.3, num_prompts=31), [Demand("a", 0.5)])

    def test_few_prompts_and_the_width_they_cost(self) -> None:
        result = choose_strength(estimate(0.25, se=0.05, num_prompts=64), [Demand("a", 0.5), Demand("b", -1.0)][:1])
        reach, fewer = t.ppf(0.95, 63) * 0.2, t.ppf(0.95, 127) * 0.2 / math.sqrt(2)
        assert result.notes == (
            f"64 validation prompts leave the gain of a between {0.5 - 0.5 * reach:.3g} and {0.5 + 0.5 * reach:.3g} "
            f"(90%) where 0.5 is asked; 128 would leave it between {0.5 - 0.5 * fewer:.3g} and "
            f"{0.5 + 0.5 * fewer:.3g}.",
        )
        assert choose_strength(estimate(0.25, num_prompts=128), [Demand("a", 0.5)]).notes == ()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"demands": [Demand("b", 0.5)]}, "demands: found b, expected those of the estimate: a"),
            ({"confidence": 0.4}, "strength.confidence = 0.4"),
            ({"confidence": 1.0}, "strength.confidence = 1.0"),
            ({"max_strength": 0.0}, "strength.max = 0.0"),
            ({"max_kl": math.nan}, "strength.max_kl = nan"),
        ],
    )
    def test_arguments(self, change: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            choose_strength(estimate(0.3), **({"demands": [Demand("a", 0.5)]} | change))

    def test_json(self) -> None:
        for result in (choose_strength(estimate(0.3), [Demand("a", 0.5)]), choose_strength(estimate(), [])):
            text = json.dumps(result.to_dict(), allow_nan=False)
            assert json.loads(text)["predicted"]["kl"]["mean"] == pytest.approx(result.predicted.kl.mean)
        assert json.loads(text)["alpha_se"] is None


def test_demands_of_margins_thresholds_and_equalities() -> None:
    generator = np.random.default_rng(0)
    prompt = np.repeat(np.arange(50), 4)
    utility_NJ = generator.normal(size=(200, 3)) + generator.normal(size=(50, 3))[prompt]
    table = ScoreTable.build(generator.normal(size=200), utility_NJ, prompt)
    constraints = [Margin("a", 0.5), Margin("b", threshold=1.0), Margin("c", threshold=0.2, equal=True)]
    result = demands_of(table, constraints)
    level_P3 = utility_NJ.reshape(50, 4, 3).mean(axis=1)
    assert result[0] == Demand("a", 0.5)
    for demand, level_P, threshold in zip(result[1:], level_P3.T[1:], (1.0, 0.2), strict=True):
        assert demand.margin == pytest.approx(threshold - level_P.mean())
        assert demand.error == pytest.approx(level_P.std(ddof=1) / math.sqrt(50))
    assert [demand.equal for demand in result] == [False, False, True]


class TestExactPolicies:
    """Policies that are where the dual sends them need no strength."""

    @pytest.mark.parametrize(
        "margins",
        [
            [Margin("a", 0.5)],
            [Margin("a", 0.5), Margin("b", 0.4)],
            [Margin("a", 0.5), Margin("b", -2.0)],  # the second does not bind
            [Margin("a", -2.0), Margin("b", -2.0)],  # none binds
            [Margin("a", threshold=0.8)],
            [Margin("a", -0.3, equal=True), Margin("b", 0.2)],
        ],
    )
    def test_strength_is_one(self, margins: list[Margin]) -> None:
        world = make_world(2, num_prompts=60, num_constraints=len(margins))
        table, _ = world.enumerated()
        solution = solve_table(table, beta=0.5, constraints=margins)
        score = world.reward_PM + np.tensordot(solution.lam_vector, world.utility_JPM, axes=1)
        table, (log_ref_N, log_policy_N) = world.enumerated(world.tilted(score / 0.5))
        result = estimate_policy(table, log_ref_N, log_policy_N, lam=solution.lam, beta=0.5)
        assert choose_strength(result, demands_of(table, margins)).alpha == pytest.approx(1.0, abs=1e-6)


def gaussian_estimate(generator: np.random.Generator, num_prompts: int, size: float = 0.5) -> PolicyEstimate:
    """ℓ = a z − a²/2 with a around ``size`` by prompt, g = .6 z + .8 z′: gain .6 a, KL a²/2, and linear in α."""
    a_P = size * generator.uniform(0.6, 1.4, size=(num_prompts, 1))
    first, second = generator.normal(size=(2, num_prompts, 8))
    log_ratio, utility = a_P * first - a_P**2 / 2, 0.6 * first + 0.8 * second
    table = ScoreTable.build(np.zeros(first.size), utility.ravel(), np.repeat(np.arange(num_prompts), 8))
    base = np.full(first.size, -40.0)
    return estimate_policy(table, base, base + log_ratio.ravel(), lam={"a": 1.0}, beta=1.0)


def test_the_linear_law_where_it_holds_exactly() -> None:
    generator = np.random.default_rng(3)
    result = gaussian_estimate(generator, 20_000)
    assert result.estimator == "average"
    assert result.improvement["a"].mean == pytest.approx(0.3, abs=4 * result.improvement["a"].se)
    point = at_strength(result, 1.7)
    assert point.improvement["a"].mean == pytest.approx(1.7 * 0.3, abs=4 * point.improvement["a"].se)
    mean_square = 0.25 * (1 + 0.8**2 / 12)
    assert point.kl.mean == pytest.approx(1.7**2 * mean_square / 2, abs=4 * point.kl.se)


def shortfall(world: PolicyWorld, alpha: float, tilt_PM: np.ndarray) -> float:
    """Gain of π ∝ π_ref e^{α t} over α times that of π ∝ π_ref e^t."""
    utility = world.utility_JPM[0]
    return world.gain(world.tilted(alpha * tilt_PM), utility) / (alpha * world.gain(world.tilted(tilt_PM), utility))


def test_the_linear_law_near_the_reference() -> None:
    """Mixed logits of a categorical world: within 6 % where the policy gains half a standard deviation."""
    world = make_world(4)
    noise = np.random.default_rng(1).normal(size=world.reward_PM.shape)
    tilt_PM = 0.25 * (world.reward_PM + world.utility_JPM[0] + noise)
    assert 0.94 < shortfall(world, 2.0, tilt_PM) < 1.06
    assert shortfall(world, 20.0, tilt_PM) < 0.5  # and not for ever


def choices(num_tables: int, num_prompts: int, confidence: float | None) -> tuple[np.ndarray, list[Strength]]:
    """Realised over asked gain of strengths chosen on tables of their own, in the Gaussian world."""
    result = []
    for seed in range(num_tables):
        try:
            chosen = choose_strength(
                gaussian_estimate(np.random.default_rng(seed), num_prompts), [Demand("a", 0.5)], confidence=confidence
            )
        except DataError:
            continue
        result.append(chosen)
    return np.array([0.3 * chosen.alpha / 0.5 for chosen in result]), result


def check_choices(num_tables: int, tolerance: float) -> None:
    for num_prompts in (32, 64):
        realised, result = choices(num_tables, num_prompts, None)
        inside = []
        for ratio, chosen in zip(realised, result, strict=True):
            low, high = (float(word) for word in chosen.notes[0].split("between ")[1].split(" (")[0].split(" and "))
            inside.append(low <= 0.5 * ratio <= high)
        assert np.mean(inside) == pytest.approx(0.9, abs=tolerance), num_prompts
        assert np.median(realised) == pytest.approx(1.0, abs=tolerance)
    realised, result = choices(num_tables, 128, 0.95)
    assert len(result) == num_tables
    assert 0.95 - tolerance <= np.mean(realised >= 1) <= 0.99  # 0.976: the gain's error is skewed to the safe side


def test_a_choice_keeps_what_it_says() -> None:
    """The range of the realised gain at its rate, and margins met with the confidence asked for."""
    check_choices(300, 0.05)


@pytest.mark.slow
def test_a_choice_keeps_what_it_says_on_many_tables() -> None:
    check_choices(4000, 0.025)
