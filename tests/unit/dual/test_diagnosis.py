"""Pareto shapes, influence, K-stability, scorer summaries and the verdict."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
from dual_worlds import World
from scipy.stats import kurtosis, skew

from can_dist import dual
from can_dist.dual import Margin, ScoreTable, diagnose
from can_dist.dual.belief.psis import pareto_shape, pooled_shape, prompt_shapes, tail_size
from can_dist.dual.objective import tilt
from can_dist.errors import ConfigError

solve_table = partial(dual.solve_table, estimator="empirical")  # the paper's, which the tables here are about


def table_of(world: World, seed: int = 0) -> ScoreTable:
    return ScoreTable.build(*world.sample(seed))


def ragged(seed: int, num_prompts: int = 25, num_constraints: int = 1) -> ScoreTable:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), generator.integers(1, 60, size=num_prompts))
    score = generator.normal(size=(prompt.size, num_constraints + 1)) + 3
    return ScoreTable.build(score[:, 0], score[:, 1:], prompt)


class TestParetoShape:
    @pytest.mark.parametrize("k", [-0.4, 0.0, 0.3, 0.7, 1.2])
    def test_recovers_the_shape(self, k: float) -> None:
        uniform = np.random.default_rng(0).uniform(size=(50, 1000))
        sample = -np.log(uniform) if k == 0 else (uniform**-k - 1) / k
        found = pareto_shape(np.sort(3.7 * sample, axis=1))
        assert found.mean() == pytest.approx(k, abs=0.03)
        assert found.std() < 0.08

    def test_scale_does_not_matter(self) -> None:
        sample = np.sort(np.random.default_rng(1).exponential(size=(4, 60)), axis=1)
        assert pareto_shape(1e-9 * sample) == pytest.approx(pareto_shape(sample), rel=1e-9)

    def test_nothing_to_fit(self) -> None:
        assert np.isnan(pareto_shape(np.ones((2, 20)))).all()
        assert np.isnan(pareto_shape(np.zeros((2, 20)))).all()
        assert np.isnan(pareto_shape(np.array([[1.0, 2.0, 3.0]]))).all()

    def test_a_small_sample_is_drawn_to_one_half(self) -> None:
        """The prior of PSIS: weight 10 at 0.5."""
        sample = np.sort(np.random.default_rng(2).uniform(size=(200, 10)), axis=1)
        assert -0.4 < pareto_shape(sample).mean() < 0.4

    def test_tail_size(self) -> None:
        assert [tail_size(count) for count in (8, 25, 128, 10_000)] == [1, 5, 25, 300]


class TestShapesOfATable:
    def test_each_prompt_by_itself(self) -> None:
        table = ragged(0)
        weight = tilt(table, np.array([0.5]), 1.0).weight_N
        found = prompt_shapes(table, weight)
        for i in range(table.num_prompts):
            own = np.sort(weight[table.row_prompt_N == i])
            size = tail_size(own.size)
            if size < 5:
                assert math.isnan(found[i])
            else:
                assert found[i] == pytest.approx(pareto_shape((own[-size:] - own[-size - 1])[None])[0], rel=1e-9)
        assert np.isfinite(found).any()
        assert np.isnan(found).any()

    def test_heavier_scores_have_heavier_weights(self) -> None:
        shapes = []
        for law in ("uniform", "gaussian", "t3"):
            world = World(law, 1.0, num_prompts=200)
            table = table_of(world)
            shapes.append(pooled_shape(table, tilt(table, np.array([1.0]), 1.0).weight_N))
        assert shapes[0] < 0 < shapes[1] < 0.5 < shapes[2]


class TestDiagnose:
    def test_influence_is_the_change_without_the_prompt(self) -> None:
        table = ragged(1, num_prompts=40)
        constraints = [Margin("g", 0.6)]
        solution = solve_table(table, beta=1.0, constraints=constraints)
        found = diagnose(table, solution, num_influential=40)
        actual = {}
        for i in range(40):
            others = solve_table(table.take(np.arange(40) != i), beta=1.0, constraints=constraints)
            actual[str(i)] = others.lam["g"] - solution.lam["g"]
        predicted = {item.prompt: item.lam_change["g"] for item in found.influence}
        one, other = (np.array([values[key] for key in sorted(actual)]) for values in (predicted, actual))
        assert np.corrcoef(one, other)[0, 1] > 0.99
        assert np.abs(one - other).max() < 0.02 * np.abs(other).max()
        sizes = [abs(item.lam_change["g"]) for item in found.influence]
        assert sizes == sorted(sizes, reverse=True)
        assert found.influence[0].standard_errors == pytest.approx(sizes[0] / np.linalg.norm(sizes), rel=1e-9)

    def test_an_outlying_prompt_is_named(self) -> None:
        generator = np.random.default_rng(2)
        prompt = np.repeat([f"p{i}" for i in range(50)], 20)
        utility = generator.normal(size=1000)
        utility[prompt == "p7"] *= 40
        table = ScoreTable.build(generator.normal(size=1000), utility, prompt)
        found = diagnose(table, solve_table(table, beta=4.0, constraints=[Margin("g", 0.9)]))
        assert found.influence[0].prompt == "p7"
        assert "one prompt, p7, moves lambda by" in found.verdict
        assert found.scorers["g"].kurtosis > 20

    def test_fewer_responses_bias_lambda_upwards(self) -> None:
        world = World("gaussian", 1.0, num_responses=64, num_prompts=300)
        table = table_of(world)
        solution = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)])
        found = diagnose(table, solution)
        quarter, half, whole = (found.k_stability[part]["g"] for part in ("K/4", "K/2", "K"))
        assert quarter > half > whole == solution.lam["g"]
        assert quarter == pytest.approx(1.085, abs=0.05)
        assert diagnose(table, solution).to_dict() == found.to_dict()
        assert diagnose(table, solution, seed=1).k_stability["K/2"] != found.k_stability["K/2"]

    def test_parts_are_disjoint_and_averaged(self) -> None:
        """The split written as a loop: each prompt's responses in random order, dealt out in turn."""
        table = ragged(5, num_prompts=60)
        constraints = [Margin("g", 0.3)]
        found = diagnose(table, solve_table(table, beta=1.0, constraints=constraints), seed=9).k_stability
        draw = np.random.default_rng(9).random(table.num_rows)
        for label, parts in (("K/4", 4), ("K/2", 2)):
            lams = []
            for part in range(parts):
                rows = []
                for i in range(60):
                    own = np.flatnonzero(table.row_prompt_N == i)
                    if own.size >= 2 * parts:
                        rows += own[np.argsort(draw[own])][part::parts].tolist()
                small = ScoreTable.build(table.reward_N[rows], table.utility_JN[0, rows], table.row_prompt_N[rows])
                lams.append(solve_table(small, beta=1.0, constraints=constraints).lam["g"])
            assert found[label]["g"] == pytest.approx(np.mean(lams), rel=1e-8)
            assert len(set(lams)) == parts

    def test_too_few_responses_to_split(self) -> None:
        table = ScoreTable.build([0.0, 1.0, 0.0, 1.0] * 3, [0.0, 1.0, 0.0, 1.0] * 3, np.repeat([0, 1, 2], 4))
        found = diagnose(table, solve_table(table, beta=1.0, constraints=[Margin("g", 0.3)]))
        assert math.isnan(found.k_stability["K/4"]["g"])

    def test_equal_scores_of_different_prompts_are_no_ties(self) -> None:
        table = ScoreTable.build([0.0, 1.0, 1.0, 2.0, 5.0, 5.0], [0.0, 1, 1, 2, 2, 3], ["a", "a", "b", "b", "c", "c"])
        found = diagnose(table, solve_table(table, beta=1.0, constraints=[Margin("g", 0.3)])).scorers
        assert found["reward"].tied == pytest.approx(2 / 6)
        assert found["g"].tied == 0.0

    def test_scorer_summaries(self) -> None:
        generator = np.random.default_rng(3)
        reward = generator.exponential(size=(30, 40)) + generator.normal(size=(30, 1))
        utility = np.round(reward + generator.normal(size=(30, 40)))
        table = ScoreTable.build(reward.ravel(), utility.ravel(), np.repeat(np.arange(30), 40))
        found = diagnose(table, solve_table(table, beta=2.0, constraints=[Margin("g", 0.6)]), reward_name="r").scorers
        assert list(found) == ["r", "g"]
        within = reward - reward.mean(axis=1, keepdims=True)
        assert found["r"].mean == pytest.approx(reward.mean())
        assert found["r"].within_sd == pytest.approx(math.sqrt(reward.var(axis=1, ddof=1).mean()))
        assert found["r"].between_sd == pytest.approx(reward.mean(axis=1).std(ddof=1))
        assert found["r"].skewness == pytest.approx(skew(within.ravel()), rel=1e-6)
        assert found["r"].kurtosis == pytest.approx(kurtosis(within.ravel()), rel=1e-6)
        assert found["r"].correlation == pytest.approx(1.0)
        assert found["r"].tied == 0.0
        assert (found["g"].low, found["g"].high) == (utility.min(), utility.max())
        shared = np.mean([np.cov(a, b)[0, 1] for a, b in zip(reward, utility, strict=True)])
        assert found["g"].correlation == pytest.approx(shared / found["r"].within_sd / found["g"].within_sd)
        ties = np.mean([[np.sum(row == value) > 1 for value in row] for row in utility])
        assert found["g"].tied == pytest.approx(ties)

    @pytest.mark.parametrize(
        ("world", "start"),
        [
            (World("gaussian", 1.0), "On new prompts the policy of this lambda changes g by +0.4"),
            (World("gaussian", 50.0, num_prompts=200), "Do not trust the prediction or lambda: 1.1 of 128 responses"),
            (World("t3", 1.0, num_prompts=200), "Do not trust the prediction or lambda: "),
        ],
    )
    def test_verdict(self, world: World, start: str) -> None:
        table = table_of(world)
        solution = solve_table(table, beta=world.beta, constraints=[Margin("g", world.margin)])
        found = diagnose(table, solution)
        assert found.verdict.startswith(start)
        assert found.verdict.startswith(solution.diagnostics["verdict"])
        assert found.judgement == solution.diagnostics["judgement"]
        json.dumps(found.to_dict(), allow_nan=False)

    def test_only_the_judgement_depends_on_the_estimator_that_was_used(self) -> None:
        table = table_of(World("gaussian", 1.0, num_prompts=200))
        plain, other = (
            solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator=name)
            for name in ("empirical", "gaussian")
        )
        records = [diagnose(table, solution).to_dict() for solution in (plain, other)]
        judged = [record.pop("judgement") for record in records]
        assert judged[0]["delivered"] != judged[1]["delivered"]
        assert {**records[0], "verdict": ""} == {**records[1], "verdict": ""}
        assert diagnose(table, plain).lam["gaussian"] == other.lam

    def test_disagreement(self) -> None:
        table = table_of(World("gaussian", 10.0, num_prompts=100))
        found = diagnose(table, solve_table(table, beta=0.1, constraints=[Margin("g", 0.5)]))
        lams = [row["g"] for row in found.lam.values() if math.isfinite(row["g"])]
        assert found.disagreement == pytest.approx((max(lams) - min(lams)) / max(lams))
        assert f"the estimators differ by {100 * found.disagreement:.2g}%" in found.verdict

    def test_a_weighted_table_and_two_constraints(self) -> None:
        table = ScoreTable.build([0.0, 1.0, 2.0], [[0.0, 1], [1, 0], [2, 3]], ["x"] * 3, np.log([0.5, 0.3, 0.2]))
        solution = solve_table(table, beta=1.0, constraints=[Margin("a", 0.9), Margin("b", 0.5)])
        found = diagnose(table, solution)
        assert found.verdict.startswith("Exact if the weighted table enumerates")
        assert found.influence == ()
        json.dumps(found.to_dict(), allow_nan=False)

    def test_arguments(self) -> None:
        table = ragged(4)
        bad = solve_table(table, beta=1.0, constraints=[Margin("g", 99.0)], throw=False)
        with pytest.raises(ConfigError, match="status INFEASIBLE"):
            diagnose(table, bad)
