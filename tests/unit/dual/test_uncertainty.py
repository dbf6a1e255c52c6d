"""Bootstrap, cross-fitting, conservative margins: against loops, against each other, and (slow) by coverage."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest
from dual_worlds import World
from scipy.stats import norm

from can_dist import dual
from can_dist.dual import (
    DualSolution,
    Margin,
    ScoreTable,
    Status,
    bootstrap,
    lam_interval,
    mean_interval,
    predict,
)
from can_dist.errors import ConfigError, InfeasibleConstraint

cross_fit = partial(dual.cross_fit, estimator="empirical")  # the paper's, which has closed forms
solve_dual = partial(dual.solve_dual, estimator="empirical")
solve_table = partial(dual.solve_table, estimator="empirical")


def scores(seed: int, num_prompts: int = 60, num_constraints: int = 1) -> ScoreTable:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), generator.integers(3, 12, size=num_prompts))
    level = generator.normal(size=(num_prompts, num_constraints + 1))[prompt]
    score = generator.normal(size=(prompt.size, num_constraints + 1)) + level
    return ScoreTable.build(score[:, 0], score[:, 1:], prompt)


def solved(table: ScoreTable, *constraints: Margin, beta: float = 1.0, **change: object) -> DualSolution:
    return solve_table(table, beta=beta, constraints=constraints or [Margin("g", 0.3)], **change)  # type: ignore[arg-type]


class TestBootstrap:
    def test_one_step_against_a_loop(self) -> None:
        """Replicate by replicate: the counts drawn again, the Newton step written out."""
        table = scores(0)
        solution = solved(table)
        found = bootstrap(table, solution, num_replicates=5, seed=3)
        lam = solution.lam["g"]
        drawn = np.random.default_rng(3).integers(60, size=(5, 60))
        for replicate in range(5):
            slope = curvature = 0.0
            for i in drawn[replicate]:
                rows = table.row_prompt_N == i
                g = table.utility_JN[0, rows]
                weight = np.exp(table.reward_N[rows] + lam * g)
                weight /= weight.sum()
                slope += (weight @ g - 0.3) / 60
                curvature += (weight @ g**2 - (weight @ g) ** 2) / 60
            assert found.lam_RJ[replicate, 0] == pytest.approx(max(0.0, lam - slope / curvature), abs=1e-12)

    def test_one_step_is_close_to_exact(self) -> None:
        table = scores(1, num_prompts=150)
        solution = solved(table)
        step = bootstrap(table, solution, num_replicates=60, seed=1)
        exact = bootstrap(table, solution, num_replicates=60, seed=1, exact=True)
        assert np.corrcoef(step.lam_RJ[:, 0], exact.lam_RJ[:, 0])[0, 1] > 0.995
        assert step.lam_se["g"] == pytest.approx(exact.lam_se["g"], rel=0.06)

    def test_exact_replicates_are_solves_of_resampled_prompts(self) -> None:
        """ḡ is recomputed: with a threshold the replicate's margin moves with its reference mean."""
        table = scores(2)
        constraint = Margin("g", threshold=float(table.centre_J[0]) + 0.3)
        found = bootstrap(table, solved(table, constraint), num_replicates=3, seed=7, exact=True)
        drawn = np.random.default_rng(7).integers(60, size=(3, 60))
        for replicate in range(3):
            copies = [np.flatnonzero(table.row_prompt_N == i) for i in drawn[replicate]]
            rows = np.concatenate(copies)
            prompt = np.repeat(np.arange(60), [copy.size for copy in copies])
            reward = (table.reward_N + table.spread(table.mean_reward_P))[rows]
            utility = (table.utility_JN[0] + table.spread(table.mean_utility_JP[0]))[rows]
            again = solve_dual(reward, utility, prompt, beta=1.0, constraints=[constraint])
            assert found.lam_RJ[replicate, 0] == pytest.approx(again.lam["g"], rel=1e-8)

    @pytest.mark.parametrize("weights", ["multinomial", "poisson"])
    @pytest.mark.parametrize("kind", ["margin", "threshold"])
    def test_standard_error_agrees_with_the_sandwich(self, weights: str, kind: str) -> None:
        table = scores(3, num_prompts=200)
        constraint = Margin("g", 0.3) if kind == "margin" else Margin("g", threshold=float(table.centre_J[0]) + 0.3)
        solution = solved(table, constraint)
        found = bootstrap(table, solution, num_replicates=2000, weights=weights)
        assert found.lam_se["g"] == pytest.approx(solution.lam_se["g"], rel=0.1)
        assert found.lam_low["g"] < solution.lam["g"] < found.lam_high["g"]
        assert found.lam_high["g"] - found.lam_low["g"] == pytest.approx(3.92 * solution.lam_se["g"], rel=0.15)

    def test_a_threshold_is_less_certain_than_the_same_margin(self) -> None:
        table = scores(4)
        margin = solved(table)
        threshold = solved(table, Margin("g", threshold=float(table.centre_J[0]) + 0.3))
        assert threshold.lam["g"] == pytest.approx(margin.lam["g"], rel=1e-9)
        assert threshold.lam_se["g"] > 1.5 * margin.lam_se["g"]

    def test_several_constraints_stay_in_the_orthant(self) -> None:
        table = scores(5, num_constraints=2)
        solution = solved(table, Margin("a", 0.3), Margin("b", 0.05))
        found = bootstrap(table, solution, num_replicates=300)
        assert found.lam_RJ.shape == (300, 2)
        assert (found.lam_RJ >= 0).all()
        assert (found.lam_RJ[:, 1] == 0).any()
        assert (found.lam_RJ[:, 1] > 0).any()
        exact = bootstrap(table, solution, num_replicates=40, exact=True)
        assert np.abs(found.lam_RJ[:40] - exact.lam_RJ).mean() < 0.2 * found.lam_RJ.std(axis=0).max()

    def test_replicates_that_cannot_meet_the_margin_count_as_infinite(self) -> None:
        table = scores(6, num_prompts=8)
        most = solved(table).feasibility["attainable"]["g"]
        found = bootstrap(table, solved(table, Margin("g", 0.97 * most)), num_replicates=40, exact=True)
        share = np.isnan(found.lam_RJ).mean()
        assert 0.05 < share < 0.9
        assert found.lam_high["g"] == math.inf
        assert math.isfinite(found.lam_se["g"])

    def test_chunks_do_not_show(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table = scores(7)
        solution = solved(table)
        whole = bootstrap(table, solution, num_replicates=50)
        monkeypatch.setattr("can_dist.dual.belief.uncertainty._CHUNK", 60 * 7)
        assert bootstrap(table, solution, num_replicates=50).lam_RJ == pytest.approx(whole.lam_RJ, rel=1e-12)

    def test_arguments(self) -> None:
        table = scores(8)
        solution = solved(table)
        for change in ({"num_replicates": 1}, {"weights": "jackknife"}, {"confidence": 0.0}):
            with pytest.raises(ConfigError):
                bootstrap(table, solution, **change)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="no finite lambda"):
            bootstrap(table, solved(table, Margin("g", 99.0), throw=False))


class TestCrossFit:
    def test_leave_one_prompt_out(self) -> None:
        table = scores(0, num_prompts=12)
        found = cross_fit(table, beta=1.0, constraints=[Margin("g", 0.3)], num_folds=12)
        gains, rewards, kls = [], [], []
        for i in range(12):
            others = solved(table.take(np.arange(12) != i))
            alone = predict(table.take(np.array([i])), others.lam_vector, 1.0, [0.3])
            gains.append(alone.improvement_J[0])
            rewards.append(alone.reward_improvement)
            kls.append(alone.kl)
        assert found.improvement["g"].mean == pytest.approx(np.mean(gains), abs=1e-12)
        assert found.improvement["g"].se == pytest.approx(np.std(gains, ddof=1) / math.sqrt(12), rel=1e-9)
        assert asdict(found.improvement["g"]) == pytest.approx(asdict(mean_interval(np.array(gains))))
        assert found.reward_improvement.mean == pytest.approx(np.mean(rewards), abs=1e-12)
        assert found.kl.mean == pytest.approx(np.mean(kls), abs=1e-12)
        assert found.lam_FJ.shape == (12, 1)

    def test_levels_and_thresholds(self) -> None:
        table = scores(1)
        target = float(table.centre_J[0]) + 0.3
        found = cross_fit(table, beta=1.0, constraints=[Margin("g", threshold=target)])
        assert found.level["g"].mean == pytest.approx(found.improvement["g"].mean + table.centre_J[0], abs=1e-12)
        assert found.level["g"].low < target < found.level["g"].high
        assert found.level["g"].se > found.improvement["g"].se

    def test_arguments(self) -> None:
        table = scores(2)
        with pytest.raises(ConfigError, match="num_folds = 1"):
            cross_fit(table, beta=1.0, constraints=[Margin("g", 0.1)], num_folds=1)
        with pytest.raises(InfeasibleConstraint):
            cross_fit(table, beta=1.0, constraints=[Margin("g", 99.0)])


class TestConservative:
    @pytest.mark.parametrize("kind", ["margin", "threshold"])
    def test_the_lower_bound_is_the_margin(self, kind: str) -> None:
        table = scores(0)
        centre = float(table.centre_J[0])
        constraint = Margin("g", 0.3) if kind == "margin" else Margin("g", threshold=centre + 0.3)
        found = solved(table, constraint, confidence=0.95)
        prediction = predict(table, found.lam_vector, 1.0, [0.3])
        level_P = prediction.slack_PJ[:, 0] + (0.0 if kind == "margin" else table.mean_utility_JP[0] - centre)
        error = level_P.std(ddof=1) / math.sqrt(60)
        assert prediction.improvement_J[0] - 1.6448536 * error == pytest.approx(0.3, abs=2e-3 * error)
        assert found.margin["g"] == pytest.approx(0.3 + found.safety_margin["g"])
        assert found.confidence == 0.95
        assert found.lam["g"] > solved(table, constraint).lam["g"]

    def test_bonferroni(self) -> None:
        table = scores(1, num_constraints=2)
        found = solved(table, Margin("a", 0.3), Margin("b", 0.2), confidence=0.9)
        prediction = predict(table, found.lam_vector, 1.0, [0.3, 0.2])
        low = prediction.improvement_J - norm.ppf(0.95) * prediction.improvement_se_J
        assert low == pytest.approx([0.3, 0.2], abs=2e-3 * prediction.improvement_se_J.max())

    def test_a_margin_out_of_reach_with_confidence(self) -> None:
        table = scores(2, num_prompts=10)
        most = solved(table).feasibility["attainable"]["g"]
        assert solved(table, Margin("g", 0.95 * most)).status is Status.OPTIMAL
        with pytest.raises(InfeasibleConstraint, match="at most"):
            solved(table, Margin("g", 0.95 * most), confidence=0.99)

    def test_arguments(self) -> None:
        with pytest.raises(ConfigError, match=r"confidence = 1\.0"):
            solved(scores(3), confidence=1.0)
        with pytest.raises(ConfigError, match="one prompt has no standard error"):
            solved(scores(3).take(np.array([0])), Margin("g", 0.1), confidence=0.9)
        assert solved(scores(3)).confidence is None
        assert solved(scores(3)).safety_margin == {}


def test_take_and_blocks() -> None:
    table = scores(9)
    part = table.take(np.array([5, 5, 2]))
    assert part.num_prompts == 3
    assert part.sum_rows(part.utility_JN[0] ** 2) == pytest.approx(table.sum_rows(table.utility_JN[0] ** 2)[[5, 5, 2]])
    assert list(part.row_prompt_N[: part.num_responses_P[0]]) == [0] * part.num_responses_P[0]
    for size in (1, 7, 50, 10_000):
        blocks = list(table.blocks(size))
        assert np.array_equal(np.concatenate([block.reward_N for block in blocks]), table.reward_N)
        assert np.array_equal(np.concatenate([block.prompt_P for block in blocks]), table.prompt_P)
        for block in blocks:
            assert block.start_P[0] == 0
            assert block.num_responses_P.sum() == block.num_rows


def test_lam_interval_is_cut_at_zero() -> None:
    table = scores(10)
    unconstrained = float(predict(table, [0.0], 1.0, [0.0]).improvement_J[0])
    low, high = lam_interval(solved(table, Margin("g", unconstrained + 0.01)))["g"]
    assert low == 0.0
    assert high > 0.0


def population(world: World, lam: float) -> tuple[float, float, float]:
    """Improvement, reward improvement and KL of π_λ in a Gaussian world of sd 1 (docs/dual.md, the mathematics)."""
    rho, scale = world.correlation, world.sd_over_beta
    return (rho + lam) * scale, (1 + rho * lam) * scale, (1 + 2 * rho * lam + lam**2) * scale**2 / 2


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gaussian", "jackknife"])
def test_coverage_at_effective_sample_size_above_ten(estimator: str) -> None:
    """Nominal 95 % intervals cover between 93 and 97 % on the Gaussian world, 2,000 tables of 100 prompts × 128."""
    world = World("gaussian", 1.0, num_prompts=100)
    truth = world.population_lam()
    hits: dict[str, list[bool]] = {}
    smallest = math.inf
    for seed in range(2000):
        table = ScoreTable.build(*world.sample(seed))
        constraint = Margin("g", world.margin)
        solution = solved(table, constraint, beta=world.beta, estimator=estimator)
        smallest = min(smallest, solution.diagnostics["ess"]["median"])
        low, high = lam_interval(solution)["g"]
        hits.setdefault("lambda", []).append(low <= truth <= high)
        again = bootstrap(table, solution, num_replicates=400, seed=seed)
        hits.setdefault("bootstrap", []).append(again.lam_low["g"] <= truth <= again.lam_high["g"])
        fitted = cross_fit(table, beta=world.beta, constraints=[constraint], estimator=estimator, seed=seed)
        lam = float(fitted.lam_FJ.mean())
        intervals = (fitted.improvement["g"], fitted.reward_improvement, fitted.kl)
        for name, interval, value in zip(
            ("improvement", "reward", "kl"), intervals, population(world, lam), strict=True
        ):
            hits.setdefault(name, []).append(interval.low <= value <= interval.high)
    coverage = {name: float(np.mean(values)) for name, values in hits.items()}
    print(estimator, smallest, coverage)
    assert smallest >= 10
    for name, share in coverage.items():
        assert 0.93 <= share <= 0.97, (name, coverage)


@pytest.mark.slow
def test_coverage_of_a_threshold_and_of_conservative_margins() -> None:
    """λ̂ for an absolute level, whose ḡ is estimated; and how often a margin asked with 95 % is met."""
    world = World("gaussian", 1.0, num_prompts=100)
    truth = world.population_lam()
    covered, met, met_plain = [], [], []
    for seed in range(2000):
        reward, utility, prompt = world.sample(seed)
        level = np.random.default_rng(10_000 + seed).normal(size=world.num_prompts)[prompt]
        table = ScoreTable.build(reward, utility + level, prompt)
        solution = solved(table, Margin("g", threshold=world.margin), beta=world.beta, estimator="gaussian")
        covered.append(lam_interval(solution)["g"][0] <= truth <= lam_interval(solution)["g"][1])
        for values, confidence in ((met, 0.95), (met_plain, None)):
            lam = solved(
                table, Margin("g", world.margin), beta=world.beta, estimator="gaussian", confidence=confidence
            ).lam["g"]
            values.append(population(world, lam)[0] >= world.margin)
    print(np.mean(covered), np.mean(met), np.mean(met_plain))
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 0.93 <= np.mean(met) <= 0.97
    assert 0.45 <= np.mean(met_plain) <= 0.55
