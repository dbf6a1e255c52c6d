"""What ray and basis reach: against the closed form on enumerated worlds, and the exact policies of small steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_world import estimate, make_world

from can_dist.dual import Demand, ScoreTable, estimate_policy, mix
from can_dist.measuring.reach import basis_reach, ray_reach

BETA = 0.5


def small_basis(size: float) -> tuple:
    world = make_world(3, num_prompts=60, num_constraints=2)
    noise = np.random.default_rng(0).normal(size=(3, *world.reward_PM.shape))
    targets = (world.reward_PM + 0.7 * world.utility_JPM.sum(axis=0), *world.utility_JPM)
    ratios = {
        name: size * (target + 0.5 * wrong) for name, target, wrong in zip(("s", "a", "b"), targets, noise, strict=True)
    }
    table, columns = world.enumerated(*(world.tilted(ratio) for ratio in ratios.values()))
    return world, ratios, table, columns[0], dict(zip(ratios, columns[1:], strict=True))


def test_points_of_small_steps_are_the_second_order_mixture() -> None:
    """Policies a thousandth of the way: the estimates are first order, so nothing is left for the scalar."""
    _, _, table, ref_N, policies = small_basis(1e-4)
    demands = [Demand("a", 0.4), Demand("b", 0.3)]
    margins = [0.2, 0.4, 0.6]
    points = basis_reach(table, ref_N, policies, demands, "a", margins, beta=BETA)
    for margin, point in zip(margins, points, strict=True):
        expected = mix(table, ref_N, policies, [Demand("a", margin), Demand("b", 0.3)], beta=BETA)
        assert point.alpha == pytest.approx(1.0, abs=2e-3)
        assert point.kl.mean == pytest.approx(expected.kl.mean, rel=5e-3)
        assert point.kl.se == pytest.approx(expected.kl.se, rel=5e-3)
        assert point.reward_improvement.mean == pytest.approx(expected.reward_improvement.mean, rel=5e-3)
        assert point.improvement["a"].mean == pytest.approx(margin, rel=2e-3)


def test_exact_policies_of_the_mixture_pay_what_is_said() -> None:
    """The tilted policy with the mixture's log-ratio at the scalar, summed over all responses; β large, so near."""
    world, ratios, table, ref_N, policies = small_basis(0.1)
    demands = [Demand("a", 0.15), Demand("b", 0.1)]
    (point,) = basis_reach(table, ref_N, policies, demands, "a", [0.15], beta=4.0)
    mixture = mix(table, ref_N, policies, demands, beta=4.0)
    exact = world.tilted(sum(point.alpha * a * ratios[name] for name, a in mixture.coefficient.items()))
    assert world.gain(exact, world.utility_JPM[0]) == pytest.approx(0.15, rel=0.1)
    assert world.gain(exact, world.reward_PM) == pytest.approx(point.reward_improvement.mean, abs=0.01)
    assert world.kl(exact) == pytest.approx(point.kl.mean, rel=0.1)


def test_one_policy_is_the_ray() -> None:
    _, _, table, ref_N, policies = small_basis(0.3)
    alone = {"s": policies["s"]}
    one = make_one(table)
    told = estimate_policy(one, ref_N, policies["s"], lam={"a": 0.7}, beta=BETA)
    margins = [1.5, 2.0]
    mixed = basis_reach(one, ref_N, alone, [Demand("a", 1.0)], "a", margins, beta=BETA)
    for point, along in zip(mixed, ray_reach(told, "a", margins), strict=True):
        assert point.kl.mean == pytest.approx(along.kl.mean, rel=1e-9)
        assert point.kl.se == pytest.approx(along.kl.se, rel=0.3), "of half the variance, not of the weights"
        assert point.reward_improvement.mean == pytest.approx(along.reward_improvement.mean, rel=1e-9)
        assert point.reward_improvement.high == pytest.approx(along.reward_improvement.high, rel=1e-9)


def make_one(table: ScoreTable) -> ScoreTable:
    """The table of the first utility alone."""
    return replace(table, utility_JN=table.utility_JN[:1], mean_utility_JP=table.mean_utility_JP[:1])


def test_a_direction_that_is_wrong_reaches_nothing() -> None:
    assert ray_reach(estimate(-0.1), "a", [0.1, 0.2]) == []
