"""What a trained policy does, estimated without generating: exact sums, brute force, and (slow) coverage."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from policy_world import PolicyWorld, make_world

from can_dist.dual import Margin, PolicyEstimate, ScoreTable, estimate_policy, predict, solve_table
from can_dist.dual.estimate import (
    covariance_gain,
    effective_sample_size,
    first_order_gain,
    self_normalised_gain,
)
from can_dist.dual.interval import Interval
from can_dist.errors import ConfigError, DataError


def policy_of(world: PolicyWorld, size: float = 0.5, lam: float = 0.7) -> np.ndarray:
    """A policy that goes part of the way in a direction that is partly its own."""
    noise = np.random.default_rng(99).normal(size=world.reward_PM.shape)
    return world.tilted(size * (world.reward_PM + lam * world.utility_JPM[0] + 0.8 * noise))


def sampled_estimate(world: PolicyWorld, seed: int, log_policy_PM: np.ndarray, **shape: int) -> PolicyEstimate:
    size = {"num_prompts": 128, "num_responses": 8} | shape
    table, columns = world.sampled(
        np.random.default_rng(seed), size["num_prompts"], size["num_responses"], log_policy_PM
    )
    return estimate_policy(table, columns[0], columns[1], lam={"g": 0.7}, beta=1.0)


class TestExact:
    """All responses listed with their weights: the sums over the support, written out by other code."""

    world = make_world(0, num_prompts=40, num_constraints=2)

    @pytest.mark.parametrize("size", [0.01, 0.5, 2.0])
    def test_gains_kl_length_and_direction(self, size: float) -> None:
        world, policy = self.world, policy_of(self.world, size)
        table, (log_ref_N, log_policy_N) = world.enumerated(policy)
        result = estimate_policy(table, log_ref_N, log_policy_N, lam={"a": 0.7, "b": 0.2}, beta=0.5)
        assert result.estimator == "exact"
        assert result.reward_improvement.mean == pytest.approx(world.gain(policy, world.reward_PM), abs=1e-10)
        for name, utility_PM in zip("ab", world.utility_JPM, strict=True):
            assert result.improvement[name].mean == pytest.approx(world.gain(policy, utility_PM), abs=1e-10)
        assert result.kl.mean == pytest.approx(world.kl(policy), abs=1e-10)
        ratio = policy - world.log_ref_PM
        target = (world.reward_PM + 0.7 * world.utility_JPM[0] + 0.2 * world.utility_JPM[1]) / 0.5
        cross = world.covariance(ratio, target)
        assert result.length.mean == pytest.approx(cross / world.covariance(target, target), abs=1e-10)
        spread = math.sqrt(world.covariance(ratio, ratio) * world.covariance(target, target))
        assert result.direction.mean == pytest.approx(cross / spread, abs=1e-10)

    def test_the_optimal_policy_goes_all_the_way_and_meets_its_margins(self) -> None:
        table, (log_ref_N,) = self.world.enumerated()
        margins = [Margin("a", 0.5), Margin("b", 0.4)]
        solution = solve_table(table, beta=0.5, constraints=margins)
        score = self.world.reward_PM + np.tensordot(solution.lam_vector, self.world.utility_JPM, axes=1)
        policy = self.world.tilted(score / 0.5)
        table, (log_ref_N, log_policy_N) = self.world.enumerated(policy)
        result = estimate_policy(table, log_ref_N, log_policy_N, lam=solution.lam, beta=0.5)
        assert result.length.mean == pytest.approx(1.0, abs=1e-10)
        assert result.direction.mean == pytest.approx(1.0, abs=1e-10)
        predicted = predict(table, solution.lam_vector, 0.5, solution.margin_vector)
        assert [gain.mean for gain in result.improvement.values()] == pytest.approx(predicted.improvement_J, abs=1e-10)
        assert [gain.se for gain in result.improvement.values()] == pytest.approx(predicted.improvement_se_J, abs=1e-10)
        assert result.improvement["a"].mean == pytest.approx(0.5, abs=1e-7)
        assert result.kl.mean == pytest.approx(predicted.kl, abs=1e-10)

    def test_responses_listed_in_proportion(self) -> None:
        """A table of 8 rows with π_ref = (4, 2, 1, 1)/8: the sums, times K/(K−1) of what is taken as a sample."""
        rows = np.array([0, 0, 0, 0, 1, 1, 2, 3])
        log_ref = np.log(np.array([4, 2, 1, 1]) / 8)
        utility = np.array([0.3, -1.0, 2.0, 0.7])
        log_policy = np.log(np.array([0.3, 0.3, 0.25, 0.15]))
        table = ScoreTable.build(np.zeros(8), utility[rows], np.zeros(8, dtype=int))
        ratio_N = (log_policy - log_ref)[rows]
        exact = (np.exp(log_policy) - np.exp(log_ref)) @ utility
        assert covariance_gain(table, ratio_N, table.utility_JN[0])[0] == pytest.approx(8 / 7 * exact, abs=1e-14)


class TestEstimators:
    """Ragged tables against loops over prompts and responses."""

    @staticmethod
    def ragged() -> tuple[ScoreTable, np.ndarray]:
        generator = np.random.default_rng(5)
        prompt = generator.permutation(np.repeat(np.arange(12), generator.integers(2, 9, size=12)))
        table = ScoreTable.build(
            generator.normal(size=prompt.size), generator.normal(size=prompt.size) + prompt, prompt
        )
        return table, generator.normal(size=prompt.size)

    def test_covariance(self) -> None:
        table, ratio_N = self.ragged()
        result = covariance_gain(table, ratio_N, table.utility_JN[0])
        for i in range(table.num_prompts):
            rows = table.row_prompt_N == i
            assert result[i] == pytest.approx(np.cov(np.exp(ratio_N[rows]), table.utility_JN[0, rows])[0, 1], abs=1e-12)

    def test_jackknife_by_leaving_one_response_out(self) -> None:
        table, ratio_N = self.ragged()
        result = self_normalised_gain(table, ratio_N, table.utility_JN[0])
        for i in range(table.num_prompts):
            weight = np.exp(ratio_N[table.row_prompt_N == i])
            value = (table.utility_JN[0] + table.spread(table.mean_utility_JP[0]))[table.row_prompt_N == i]

            def statistic(weight: np.ndarray, value: np.ndarray) -> float:
                return float(weight @ value / weight.sum() - value.mean())

            count = weight.size
            left_out = [statistic(np.delete(weight, k), np.delete(value, k)) for k in range(count)]
            brute = count * statistic(weight, value) - (count - 1) * np.mean(left_out)
            assert result[i] == pytest.approx(brute, abs=1e-10)

    def test_first_order_and_effective_sample_size(self) -> None:
        table, ratio_N = self.ragged()
        first = first_order_gain(table, ratio_N, table.utility_JN[0])
        ess = effective_sample_size(table, ratio_N)
        for i in range(table.num_prompts):
            rows = table.row_prompt_N == i
            weight = np.exp(ratio_N[rows])
            assert first[i] == pytest.approx(np.cov(ratio_N[rows], table.utility_JN[0, rows])[0, 1], abs=1e-12)
            assert ess[i] == pytest.approx(weight.sum() ** 2 / (weight**2).sum(), abs=1e-12)

    def test_kl_and_its_error(self) -> None:
        table, ratio_N = self.ragged()
        ratio_N = 0.3 * ratio_N
        base_N = np.full(ratio_N.size, -20.0)
        caller_N = np.empty(ratio_N.size)
        caller_N[table.order_N] = base_N + ratio_N
        result = estimate_policy(table, base_N, caller_N, lam={"g": 0.7}, beta=1.0)
        rows = [ratio_N[table.row_prompt_N == i] for i in range(table.num_prompts)]
        kl_P = np.array([np.mean(np.exp(ratio) * ratio - np.exp(ratio) + 1) for ratio in rows])
        assert result.kl.mean == pytest.approx(kl_P.mean(), abs=1e-12)
        assert result.kl.se == pytest.approx(kl_P.std(ddof=1) / math.sqrt(12), abs=1e-12)

    def test_length_and_its_errors_against_leaving_prompts_out(self) -> None:
        """The delta method against the jackknife over prompts, which needs no derivative."""
        world = make_world(3)
        policy = policy_of(world)
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(1), 200, 8, policy)
        whole = estimate_policy(table, ref_N, policy_N, lam={"g": 0.7}, beta=1.0)
        parts = []
        for i in range(200):
            rows = table.row_prompt_N != i
            reward_N = (table.reward_N + table.spread(table.mean_reward_P))[rows]
            rest = ScoreTable.build(reward_N, table.utility_JN[0, rows], table.row_prompt_N[rows])
            parts.append(estimate_policy(rest, ref_N[rows], policy_N[rows], lam={"g": 0.7}, beta=1.0))
        for name in ("length", "direction", "kl", "reward_improvement"):
            values = np.array([getattr(part, name).mean for part in parts])
            jackknife = math.sqrt(199 / 200 * ((values - values.mean()) ** 2).sum())
            assert getattr(whole, name).se == pytest.approx(jackknife, rel=0.03), name


class TestChoice:
    def test_a_policy_near_the_reference_is_averaged(self) -> None:
        world = make_world(1)
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(0), 64, 8, policy_of(world))
        result = estimate_policy(table, ref_N, policy_N, lam={"g": 0.7}, beta=1.0)
        pair = (
            covariance_gain(table, policy_N - ref_N, table.utility_JN[0]),
            self_normalised_gain(table, policy_N - ref_N, table.utility_JN[0]),
        )
        assert result.estimator == "average"
        assert result.improvement["g"].mean == pytest.approx(np.mean(pair), abs=1e-14)
        assert result.sentence.startswith("Estimated from the policy's weights (median effective sample size ")

    def test_a_far_policy_is_estimated_to_first_order_and_says_so(self) -> None:
        world = make_world(1)
        far = policy_of(world, size=3.5)
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(0), 64, 8, far)
        result = estimate_policy(table, ref_N, policy_N, lam={"g": 0.7}, beta=1.0)
        assert result.ess < 3
        assert result.estimator == "first_order"
        first_P = first_order_gain(table, policy_N - ref_N, table.utility_JN[0])
        assert result.improvement["g"].mean == pytest.approx(first_P.mean(), abs=1e-14)
        variance = np.var((policy_N - ref_N).reshape(64, 8), axis=1, ddof=1).mean()
        assert result.kl.mean == pytest.approx(variance / 2, rel=1e-12)
        assert "to first order: the policy is too far from the reference for its weights" in result.sentence

    def test_a_weight_that_overflows_is_not_used(self) -> None:
        world = make_world(1)
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(0), 64, 8, policy_of(world))
        ref_N = ref_N - 1000.0
        policy_N = policy_N - 1000.0
        policy_N[3] = -1.0
        result = estimate_policy(table, ref_N, policy_N, lam={"g": 0.7}, beta=1.0)
        assert result.estimator == "first_order"
        assert "a log-ratio of 1e+03 nats" in result.sentence
        assert math.isfinite(result.improvement["g"].mean)

    def test_single_responses_are_counted_and_left_out(self) -> None:
        world = make_world(1)
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(0), 50, 6, policy_of(world))
        whole = estimate_policy(table, ref_N, policy_N, lam={"g": 0.7}, beta=1.0)
        prompt = np.concatenate([np.arange(50, 55), table.row_prompt_N])
        more = ScoreTable.build(
            np.concatenate([np.ones(5), table.reward_N]), np.concatenate([np.ones(5), table.utility_JN[0]]), prompt
        )
        alone = np.full(5, -2.0)
        result = estimate_policy(
            more, np.append(alone, ref_N), np.append(alone - 1, policy_N), lam={"g": 0.7}, beta=1.0
        )
        assert (result.num_prompts, result.num_single_response_prompts) == (50, 5)
        for name in ("reward_improvement", "kl", "length", "direction"):
            ours, theirs = getattr(result, name), getattr(whole, name)
            assert vars(ours) == pytest.approx(vars(theirs), abs=1e-12)

    def test_the_reference_itself(self) -> None:
        world = make_world(1)
        table, (ref_N,) = world.sampled(np.random.default_rng(0), 40, 8)
        result = estimate_policy(table, ref_N, ref_N, lam={"g": 0.7}, beta=1.0)
        assert (result.kl.mean, result.length.mean) == (0.0, 0.0)
        assert result.ess == pytest.approx(8.0)
        assert result.improvement["g"] == Interval(*[pytest.approx(0.0, abs=1e-15)] * 4)
        assert math.isnan(result.direction.mean)


class TestArguments:
    table = ScoreTable.build([0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 1.0], [0, 0, 1, 1])
    logp = np.array([-1.0, -2.0, -3.0, -4.0])

    def test_one_response_everywhere(self) -> None:
        table = ScoreTable.build([0.0, 1.0], [1.0, 0.0], [0, 1])
        with pytest.raises(DataError, match=r"every prompt has one response \(K = 1\)"):
            estimate_policy(table, [-1.0, -1.0], [-1.0, -2.0], lam={"g": 1.0}, beta=1.0)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"log_prob_policy_N": [-1.0] * 3}, ConfigError, r"of the policy: shape \(3,\), expected \(4,\)"),
            ({"log_prob_policy_N": [-1, -1, math.nan, -1]}, DataError, "first at row 2: nan"),
            ({"log_prob_ref_N": [-1, 2.5, -1, -1]}, DataError, "of the reference: 1 of 4 .* first at row 1: 2.5"),
            ({"lam": {"a": 1.0, "b": 1.0}}, ConfigError, "expected 1 finite numbers"),
            ({"beta": 0.0}, ConfigError, "beta"),
            ({"confidence": 1.0}, ConfigError, "confidence = 1.0"),
        ],
    )
    def test_refused(self, change: dict, error: type[Exception], message: str) -> None:
        values = {"log_prob_ref_N": self.logp, "log_prob_policy_N": self.logp, "lam": {"g": 1.0}, "beta": 1.0} | change
        with pytest.raises(error, match=message):
            estimate_policy(self.table, **values)

    def test_one_prompt_has_no_error_and_json_says_null(self) -> None:
        table = ScoreTable.build([0.0, 1.0], [1.0, 0.0], [0, 0])
        result = estimate_policy(table, [-1.0, -2.0], [-1.1, -1.8], lam={"g": 1.0}, beta=1.0)
        text = json.dumps(result.to_dict(), allow_nan=False)
        again = PolicyEstimate.from_dict(json.loads(text))
        assert json.loads(text)["improvement"]["g"]["se"] is None
        assert again.to_dict() == result.to_dict()
        assert again.improvement["g"].mean == result.improvement["g"].mean
        with pytest.raises(DataError, match="fields missing: kl"):
            PolicyEstimate.from_dict({name: value for name, value in result.to_dict().items() if name != "kl"})


def coverage(world: PolicyWorld, num_tables: int) -> dict[str, float]:
    """How often the 95 % intervals of tables of 128 × 8 cover, and (asserted) that no mean is off by over 3 %."""
    policy = policy_of(world, 0.45)
    target = world.reward_PM + 0.7 * world.utility_JPM[0]
    ratio = policy - world.log_ref_PM
    cross, variance = world.covariance(ratio, target), world.covariance(target, target)
    truth = {
        "g": world.gain(policy, world.utility_JPM[0]),
        "r": world.gain(policy, world.reward_PM),
        "kl": world.kl(policy),
        "length": cross / variance,
        "direction": cross / math.sqrt(variance * world.covariance(ratio, ratio)),
    }
    means: dict[str, list[float]] = {name: [] for name in truth}
    covered: dict[str, list[bool]] = {name: [] for name in truth}
    for seed in range(num_tables):
        result = sampled_estimate(world, seed, policy)
        assert result.estimator == "average"
        intervals = {"g": result.improvement["g"], "r": result.reward_improvement, "kl": result.kl}
        intervals |= {"length": result.length, "direction": result.direction}
        for name, interval in intervals.items():
            means[name].append(interval.mean / truth[name] - 1)
            covered[name].append(interval.low <= truth[name] <= interval.high)
    for name, values in means.items():
        print(name, np.mean(values), np.std(values) / math.sqrt(num_tables), np.mean(covered[name]))
        assert abs(np.mean(values)) < 0.03 + 3 * np.std(values) / math.sqrt(num_tables), name
    return {name: float(np.mean(hits)) for name, hits in covered.items()}


def test_little_bias_and_honest_intervals() -> None:
    for name, share in coverage(make_world(7), 400).items():
        assert 0.91 <= share <= 0.98, name


@pytest.mark.slow
def test_little_bias_and_honest_intervals_on_many_tables() -> None:
    for name, share in coverage(make_world(7), 5000).items():
        assert 0.93 <= share <= 0.97, name


@pytest.mark.slow
def test_intervals_of_a_skewed_reward_cover_less() -> None:
    """Skewness 3 over prompts: 128 of them are few for a t-interval (docs/dual.md says so)."""
    for name, share in coverage(make_world(7, skewed=True), 3000).items():
        assert 0.91 <= share <= 0.97, name


def test_the_covariance_is_unbiased_from_two_responses_on() -> None:
    """10,000 prompts × K: within four standard errors of the sum over all responses; plain weights are not."""
    world = make_world(8)
    policy = policy_of(world, 0.45)
    truth = world.gain(policy, world.utility_JPM[0])
    for num_responses in (2, 4, 8):
        table, (ref_N, policy_N) = world.sampled(np.random.default_rng(0), 10_000, num_responses, policy)
        gain_P = covariance_gain(table, policy_N - ref_N, table.utility_JN[0])
        assert abs(gain_P.mean() - truth) < 4 * gain_P.std() / 100
        weight_N = np.exp(policy_N - ref_N)
        plain = table.sum_rows(weight_N * table.utility_JN[0]) / table.sum_rows(weight_N)
        assert plain.mean() < truth - 4 * gain_P.std() / 100
