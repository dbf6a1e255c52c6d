"""Mixtures of policies: against what they must be by construction, other code's closed form, and constrained search."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from policy_world import PolicyWorld, make_world
from scipy.optimize import brentq, minimize

from can_dist.dual import Demand, ScoreTable, choose_strength, estimate_policy, mix, mixing_correlation
from can_dist.dual.basis import MIXING, basis_of, largest_margins, mixes, mixture_of, outside, reachable
from can_dist.errors import ConfigError, DataError, NumericalError

BETA = 0.5


def noisy_basis(world: PolicyWorld, seed: int = 0) -> dict[str, np.ndarray]:
    """A policy towards s and one towards each g, all short of length and off their direction."""
    generator = np.random.default_rng(seed)
    targets = {"s": world.reward_PM + 0.7 * world.utility_JPM.sum(axis=0)}
    targets |= {f"g{j}": utility for j, utility in enumerate(world.utility_JPM)}
    return {
        name: world.tilted(0.3 * target + 0.2 * generator.normal(size=target.shape)) for name, target in targets.items()
    }


def mixed(world: PolicyWorld, basis: dict[str, np.ndarray], demands: list[Demand]) -> dict[str, float]:
    table, columns = world.enumerated(*basis.values())
    result = mix(table, columns[0], dict(zip(basis, columns[1:], strict=True)), demands, beta=BETA)
    assert result.num_prompts == table.num_prompts
    assert list(result.improvement) == [demand.name for demand in demands]
    return result.coefficient


def covariances(world: PolicyWorld, basis: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ratios = [policy - world.log_ref_PM for policy in basis.values()]
    sigma = np.array([[world.covariance(first, second) for second in ratios] for first in ratios])
    reward = np.array([world.covariance(ratio, world.reward_PM) for ratio in ratios])
    utility = np.array([[world.covariance(ratio, g) for g in world.utility_JPM] for ratio in ratios])
    return sigma, reward, utility


class TestCoefficients:
    def test_two_exact_policies_span_every_lambda(self) -> None:
        """ℓ₁ = .4 (r + .7 g)/β and ℓ₂ = .3 g/β: the mixture is (r + μ g)/β, so a = (1/.4, (μ − .7)/.3)."""
        world = make_world(1, num_prompts=50)
        score = world.reward_PM + 0.7 * world.utility_JPM[0]
        basis = {"s": world.tilted(0.4 * score / BETA), "g": world.tilted(0.3 * world.utility_JPM[0] / BETA)}
        table, columns = world.enumerated(*basis.values())
        result = mix(table, columns[0], dict(zip(basis, columns[1:], strict=True)), [Demand("a", 1.5)], beta=BETA)
        assert result.coefficient["s"] == pytest.approx(1 / 0.4, abs=1e-10)
        assert result.coefficient["g"] == pytest.approx((result.mu["a"] - 0.7) / 0.3, abs=1e-10)
        assert result.improvement["a"].mean == pytest.approx(1.5, abs=1e-10)
        target = (world.reward_PM + result.mu["a"] * world.utility_JPM[0]) / BETA
        assert result.kl.mean == pytest.approx(world.covariance(target, target) / 2, abs=1e-10)
        assert result.reward_improvement.mean == pytest.approx(world.covariance(target, world.reward_PM), abs=1e-10)

    def test_the_closed_form_by_a_root(self) -> None:
        world = make_world(2, num_prompts=50)
        basis = noisy_basis(world)
        sigma, reward, utility = covariances(world, basis)

        def coefficients(mu: float) -> np.ndarray:
            return np.linalg.inv(sigma) @ (reward + mu * utility[:, 0]) / BETA

        mu = brentq(lambda mu: coefficients(mu) @ utility[:, 0] - 0.9, -10, 10, xtol=1e-14)
        assert mu > 0
        result = mixed(world, basis, [Demand("a", 0.9)])
        assert list(result.values()) == pytest.approx(coefficients(mu), abs=1e-9)

    @pytest.mark.parametrize(
        "demands",
        [
            [Demand("a", 0.4), Demand("b", 0.6)],
            [Demand("a", 0.4), Demand("b", -3.0)],  # the second does not bind
            [Demand("a", -3.0), Demand("b", -3.0)],
            [Demand("a", 0.4), Demand("b", -0.2, equal=True)],
        ],
    )
    def test_several_constraints_by_constrained_search(self, demands: list[Demand]) -> None:
        world = make_world(3, num_prompts=50, num_constraints=2)
        basis = noisy_basis(world)
        sigma, reward, utility = covariances(world, basis)
        constraints = [
            {
                "type": "eq" if demand.equal else "ineq",
                "fun": lambda a, j=j, b=demand.margin: utility[:, j] @ a - b,
                "jac": lambda a, j=j: utility[:, j],
            }
            for j, demand in enumerate(demands)
        ]
        best = minimize(
            lambda a: BETA / 2 * a @ sigma @ a - reward @ a,
            np.zeros(3),
            jac=lambda a: BETA * sigma @ a - reward,
            constraints=constraints,
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert best.success
        assert list(mixed(world, basis, demands).values()) == pytest.approx(best.x, abs=1e-5)

    def test_one_policy_is_the_ray(self) -> None:
        world = make_world(4, num_prompts=50)
        basis = {"s": noisy_basis(world)["s"]}
        _, _, utility = covariances(world, basis)
        free = mixed(world, basis, [Demand("a", -9.0)])["s"]
        assert mixed(world, basis, [Demand("a", free * utility[0, 0] + 0.3)])["s"] == pytest.approx(
            free + 0.3 / utility[0, 0], rel=1e-10
        )

    def test_without_constraints(self) -> None:
        world = make_world(4, num_prompts=50, num_constraints=0)
        basis = noisy_basis(world) | {"r": world.tilted(0.5 * world.reward_PM)}
        sigma, reward, _ = covariances(world, basis)
        assert list(mixed(world, basis, []).values()) == pytest.approx(np.linalg.solve(sigma, reward) / BETA)


def test_the_mixture_beats_the_ray_and_one_scalar_meets_the_margin() -> None:
    """At the same exact gain the mixture has more E r − βKL than the stretched policy; sampled validation table."""
    world = make_world(5)
    basis = noisy_basis(world)
    table, columns = world.sampled(np.random.default_rng(0), 128, 8, *basis.values())
    demands = [Demand("a", 0.5)]
    result = mix(table, columns[0], dict(zip(basis, columns[1:], strict=True)), demands, beta=2.0)
    ratios = {name: policy - world.log_ref_PM for name, policy in basis.items()}

    def realised(coefficient: dict[str, float]) -> np.ndarray:
        return world.tilted(sum(weight * ratios[name] for name, weight in coefficient.items()))

    def objective(coefficient: dict[str, float]) -> float:
        def at(size: float) -> np.ndarray:
            return realised({name: size * weight for name, weight in coefficient.items()})

        size = brentq(lambda size: world.gain(at(size), world.utility_JPM[0]) - 0.5, 0, 20)
        policy = at(size)
        return world.gain(policy, world.reward_PM) - 2.0 * world.kl(policy)

    assert objective(result.coefficient) > objective({"s": 1.0}) + 0.02
    dialled, (ref_N, policy_N) = world.sampled(np.random.default_rng(1), 500, 16, realised(result.coefficient))
    again = estimate_policy(dialled, ref_N, policy_N, lam={"a": result.mu["a"]}, beta=2.0)
    alpha = choose_strength(again, demands).alpha
    assert world.gain(realised(result.scaled(alpha)), world.utility_JPM[0]) == pytest.approx(0.5, rel=0.15)


COEFFICIENT = {"s": 0.6, "g0": -0.2}


class TestMixing:
    world = make_world(6, num_prompts=50)

    def measured(self, mixture_PM: np.ndarray) -> float:
        basis = noisy_basis(self.world)
        table, columns = self.world.enumerated(*basis.values(), self.world.tilted(mixture_PM))
        policies = dict(zip(basis, columns[1:-1], strict=True))
        return mixing_correlation(table, columns[0], policies, columns[-1], COEFFICIENT)

    def test_exact_and_nearly(self) -> None:
        ratios = [policy - self.world.log_ref_PM for policy in noisy_basis(self.world).values()]
        mixture = 0.6 * ratios[0] - 0.2 * ratios[1]
        assert self.measured(mixture) == pytest.approx(1.0, abs=1e-12)
        noise = np.random.default_rng(5).normal(size=mixture.shape)
        noisy = mixture + 0.1 * np.sqrt(self.world.covariance(mixture, mixture)) * noise
        expected = self.world.covariance(noisy, mixture) / np.sqrt(
            self.world.covariance(noisy, noisy) * self.world.covariance(mixture, mixture)
        )
        assert self.measured(noisy) == pytest.approx(expected, abs=1e-10)

    def test_outside(self) -> None:
        ratios = [policy - self.world.log_ref_PM for policy in noisy_basis(self.world).values()]
        correlation = self.measured(0.6 * ratios[0] + 0.4 * ratios[1])
        assert not mixes(correlation)
        refusal = str(outside(COEFFICIENT, correlation, {}))
        assert "mixture (s +0.60, g0 -0.20) lies outside the range" in refusal
        assert f"correlation is {correlation:.4f}" in refusal
        assert not mixes(self.measured(np.zeros_like(ratios[0])))
        assert not mixes(float("nan"))


class TestRefusals:
    world = make_world(7, num_prompts=40)

    def test_two_policies_that_say_the_same(self) -> None:
        basis = noisy_basis(self.world)
        nudge = 1e-3 * np.random.default_rng(0).normal(size=self.world.reward_PM.shape)
        ratio = basis["s"] - self.world.log_ref_PM
        basis["again"] = self.world.tilted(1.7 * ratio + nudge)
        with pytest.raises(
            NumericalError, match=r"^s and again say the same \(correlation 0\.99999\d\), so their mixture"
        ):
            mixed(self.world, basis, [Demand("a", 0.5)])

    def test_a_policy_that_is_the_reference(self) -> None:
        basis = noisy_basis(self.world) | {"idle": self.world.log_ref_PM}
        with pytest.raises(NumericalError, match=r"^idle: no variance within prompts, so their mixture"):
            mixed(self.world, basis, [Demand("a", 0.5)])

    def test_fewer_policies_than_constraints(self) -> None:
        world = make_world(8, num_prompts=40, num_constraints=2)
        basis = {"s": noisy_basis(world)["s"]}
        with pytest.raises(
            NumericalError, match=r"^a and b say the same .* 1 policies cannot meet their margins separately"
        ):
            mixed(world, basis, [Demand("a", 0.5), Demand("b", 0.5)])

    def test_arguments(self) -> None:
        table, columns = self.world.enumerated(*noisy_basis(self.world).values())
        policies = {"s": columns[1], "g0": columns[2]}
        with pytest.raises(ConfigError, match="2 demands and 2 policies for a table of 1 utilities"):
            mix(table, columns[0], policies, [Demand("a", 0.5)] * 2, beta=BETA)
        with pytest.raises(ConfigError, match="at least one policy"):
            mix(table, columns[0], {}, [Demand("a", 0.5)], beta=BETA)
        with pytest.raises(ConfigError, match="log-probabilities of g0: shape"):
            mix(table, columns[0], {"s": columns[1], "g0": [-1.0]}, [Demand("a", 0.5)], beta=BETA)
        few = ScoreTable.build(np.arange(62.0), np.arange(62.0), np.repeat(np.arange(31), 2))
        logp = -np.ones(62)
        with pytest.raises(DataError, match="31 prompts"):
            mix(few, logp, {"s": logp - np.arange(62)}, [Demand("a", 0.5)], beta=BETA)

    def test_json(self) -> None:
        table, columns = self.world.enumerated(*noisy_basis(self.world).values())
        result = mix(table, columns[0], {"s": columns[1], "g0": columns[2]}, [Demand("a", 0.5)], beta=BETA)
        record = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert record["coefficient"] == result.coefficient
        assert record["improvement"]["a"]["mean"] == result.improvement["a"].mean


class TestReach:
    """Which margins are within the range, told from one mixture that was measured."""

    world = make_world(9, num_prompts=50, num_constraints=2)

    def test_largest_margins_are_where_the_cost_is(self) -> None:
        table, columns = self.world.enumerated(*noisy_basis(self.world).values())
        basis = basis_of(table, columns[0], dict(zip(("s", "g0", "g1"), columns[1:], strict=True)), beta=BETA)
        demands = [Demand("a", 0.4), Demand("b", 0.3)]
        here = mixture_of(basis, demands).kl.mean
        for kl in (here * 1.01, here * 1.5, here * 6):
            largest = largest_margins(basis, demands, kl)
            assert largest.keys() == {"a", "b"}
            for index, name in enumerate("ab"):
                at = [replace(d, margin=largest[name]) if d.name == name else d for d in demands]
                assert mixture_of(basis, at).kl.mean == pytest.approx(kl, rel=1e-9)
                above = [replace(at[index], margin=largest[name] + step) for step in (0.01, 0.3, 3.0)]
                for demand in above:
                    costs = mixture_of(basis, [demand if d.name == name else d for d in demands]).kl.mean
                    assert costs > kl
        assert largest_margins(basis, demands, 1e-6) == {}

    def test_refusal_names_them_and_none_that_is_larger(self) -> None:
        refusal = str(outside({"s": 2.0}, 0.95, {"a": 0.6171, "b": -1.0, "c": 1.59, "d": -0.0126, "e": 0.62}))
        assert refusal.endswith(
            "nearer to those trained for: at most about a +0.61 or b -1 or c +1.5 or d -0.013 or e +0.62."
        )

    def test_what_is_missing_grows_as_the_cost(self) -> None:
        table, columns = self.world.enumerated(*noisy_basis(self.world).values())
        basis = basis_of(table, columns[0], dict(zip(("s", "g0", "g1"), columns[1:], strict=True)), beta=BETA)
        demands = [Demand("a", 0.4), Demand("b", 0.3)]
        mixture = mixture_of(basis, demands)
        kl = mixture.kl.mean
        reach = reachable(basis, demands, mixture, 1 - (1 - MIXING) * 4)
        assert reach == pytest.approx(largest_margins(basis, demands, kl / 4), rel=1e-9)
        assert reachable(basis, demands, mixture, 1.0) == {}
