"""The frontier against solves, against its own envelope theorem, and against the spread over tables."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest

from can_dist import dual, frontier
from can_dist.dual import Frontier, Margin, ScoreTable, frontier_table
from can_dist.dual.frontier import REACH
from can_dist.errors import ConfigError

solve_dual = partial(dual.solve_dual, estimator="empirical")  # the paper's, which has closed forms


def scores(seed: int, num_prompts: int = 40, num_constraints: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), generator.integers(3, 12, size=num_prompts))
    mixing = np.eye(num_constraints + 1) + 0.4 * generator.normal(size=(num_constraints + 1, num_constraints + 1))
    score = generator.normal(size=(prompt.size, num_constraints + 1)) @ mixing
    return score[:, 0], score[:, 1:], prompt


def curve(seed: int = 0, **change: object) -> Frontier:
    arguments: dict[str, object] = {"beta": 0.8, "names": ["g"], "num_points": 25} | change
    return frontier(*scores(seed), **arguments)  # type: ignore[arg-type]


class TestCurve:
    def test_every_point_is_the_solution_for_its_margin(self) -> None:
        reward, utility, prompt = scores(1)
        found = curve(1)
        assert len(found.points) == 25
        for point in found.points[1:]:
            margin = float(point.margin_J[0])
            solution = solve_dual(reward, utility, prompt, beta=0.8, constraints=[Margin("g", margin)])
            assert solution.lam["g"] == pytest.approx(point.lam_J[0], rel=1e-7)
            assert solution.lam_se["g"] == pytest.approx(point.lam_se_J[0], rel=1e-6)
            assert solution.predicted["reward_improvement"] == pytest.approx(point.reward_improvement, abs=1e-9)
            assert solution.predicted["kl"] == pytest.approx(point.kl, abs=1e-9)
            assert solution.predicted["improvement"]["g"]["se"] == pytest.approx(point.improvement_se_J[0], rel=1e-6)
            assert solution.diagnostics["ess"]["median"] == pytest.approx(point.ess, rel=1e-7)

    def test_it_starts_without_the_constraint_and_ends_near_the_attainable(self) -> None:
        reward, utility, prompt = scores(2)
        found = curve(2)
        most = float(ScoreTable.build(reward, utility, prompt).attainable_J[0])
        first, last = found.points[0], found.points[-1]
        assert first.lam_J[0] == 0.0
        assert math.isnan(first.lam_se_J[0])
        start = float(first.improvement_J[0])
        assert start + REACH * (most - start) <= last.improvement_J[0] < most
        assert found.attainable["g"] == pytest.approx(most)

    @pytest.mark.parametrize("seed", range(4))
    def test_margins_move_in_even_steps(self, seed: int) -> None:
        margins = np.array([point.margin_J[0] for point in curve(seed, num_points=50).points])
        steps = np.diff(margins)
        assert (steps > 0).all()
        assert steps.max() < 2.0 * steps.mean()

    def test_the_slope_of_the_objective_is_minus_lambda(self) -> None:
        """Shadow price: d(E r − β KL)/db = −λ, so the objective falls as the margin grows."""
        points = curve(3, num_points=200).points
        margin = np.array([point.margin_J[0] for point in points])
        value = np.array([point.reward_improvement - 0.8 * point.kl for point in points])
        middle = np.array([point.lam_J[0] for point in points])
        slope = np.diff(value) / np.diff(margin)
        assert np.all(-slope >= middle[:-1] - 1e-9)
        assert np.all(-slope <= middle[1:] + 1e-9)
        assert np.all(np.diff(value) < 0)

    def test_margins_asked_for(self) -> None:
        reward, utility, prompt = scores(4)
        found = frontier(reward, utility, prompt, beta=0.8, names=["g"], margins=[-9.0, 0.2, 0.5, 99.0])
        assert [point.feasible for point in found.points] == [True, True, True, False]
        assert found.points[0].lam_J[0] == 0.0
        assert found.points[0].improvement_J[0] > -9.0
        solution = solve_dual(reward, utility, prompt, beta=0.8, constraints=[Margin("g", 0.5)])
        assert found.points[2].lam_J[0] == solution.lam["g"]
        assert found.points[2].lam_se_J[0] == pytest.approx(solution.lam_se["g"], rel=1e-9)
        assert math.isnan(found.points[3].kl)

    def test_a_utility_that_never_varies_is_one_point(self) -> None:
        reward, _, prompt = scores(5)
        found = frontier(reward, np.ones(reward.size), prompt, beta=1.0, names=["g"])
        assert len(found.points) == 1
        assert found.points[0].improvement_J[0] == 0.0


def test_bands_match_the_spread_over_tables() -> None:
    """Standard errors at fixed margin, against 300 independent tables: λ̂ moves with the prompts, and they know it."""
    generator = np.random.default_rng(6)
    prompt = np.repeat(np.arange(50), 8)
    values, errors = [], []
    for _ in range(300):
        scale = np.repeat(generator.uniform(0.5, 1.5, size=50), 8)
        utility = scale * generator.normal(size=prompt.size)
        reward = scale * generator.normal(size=prompt.size) - 0.5 * utility
        row = frontier(reward, utility, prompt, beta=1.5, names=["g"], margins=[0.3]).rows()[0]
        values.append([row["lam.g"], row["reward_improvement"], row["kl"]])
        errors.append([row["lam.g_se"], row["reward_improvement_se"], row["kl_se"]])
    assert np.mean(errors, axis=0) == pytest.approx(np.std(values, axis=0), rel=0.12)


class TestGrid:
    def test_every_point_of_two_constraints_is_a_solution(self) -> None:
        reward, utility, prompt = scores(7, num_constraints=2)
        found = frontier(reward, utility, prompt, beta=0.8, names=["a", "b"], num_points=25)
        assert found.shape == (5, 5)
        assert len(found.points) == 25
        for point in found.points:
            constraints = [Margin(name, float(b)) for name, b in zip("ab", point.margin_J, strict=True)]
            solution = solve_dual(reward, utility, prompt, beta=0.8, constraints=constraints)
            assert solution.lam_vector == pytest.approx(point.lam_J, rel=1e-6, abs=1e-7)
        lams = np.array([point.lam_J for point in found.points]).reshape(5, 5, 2)
        assert (lams[:, :, 0] == lams[:, :1, 0]).all()
        assert (lams[:, :, 1] == lams[:1, :, 1]).all()

    def test_product_of_margins(self) -> None:
        reward, utility, prompt = scores(8, num_constraints=2)
        found = frontier(reward, utility, prompt, beta=0.8, names=["a", "b"], margins=[[0.1, 0.3], [0.0, 0.2, 50.0]])
        assert found.shape == (2, 3)
        assert [point.feasible for point in found.points] == [True, True, False] * 2
        assert [list(point.margin_J) for point in found.points][3:5] == [[0.3, 0.0], [0.3, 0.2]]


def test_rows_and_json() -> None:
    found = curve(9, num_points=6, confidence=0.9)
    row = found.rows()[3]
    assert row["lam.g_high"] - row["lam.g"] == pytest.approx(1.6448536 * row["lam.g_se"])
    assert row["lam.g"] - row["lam.g_low"] == pytest.approx(1.6448536 * row["lam.g_se"])
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["shape"] == [6]
    assert record["points"][0]["lam.g_se"] is None
    assert record["points"][3]["kl"] == row["kl"]


def test_no_band_goes_below_zero_where_the_quantity_cannot() -> None:
    """Of few prompts the standard errors of KL and of lambda are larger than they are."""
    cut = {"kl": 0, "lam.g": 0}
    for seed in range(6):
        found = frontier(*scores(seed, num_prompts=3), beta=0.8, names=["g"], num_points=6)
        for row in found.rows():
            for name in cut:
                if math.isnan(row[f"{name}_se"]):
                    assert math.isnan(row[f"{name}_low"])
                    continue
                symmetric = 2 * row[name] - row[f"{name}_high"]
                assert row[f"{name}_low"] == pytest.approx(max(symmetric, 0.0), abs=1e-12)
                cut[name] += symmetric < 0
    assert min(cut.values()) > 0, "bands that would have gone below zero"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta: found 0.0"),
        ({"num_points": 1}, "num_points = 1"),
        ({"confidence": 1.0}, "confidence = 1.0"),
        ({"margins": [math.nan]}, "one vector of finite"),
        ({"names": ["a", "b"]}, "2 constraints"),
    ],
)
def test_arguments_that_cannot_mean_anything(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        curve(0, **change)


def test_names_must_match_the_table() -> None:
    table = ScoreTable.build(*scores(0))
    with pytest.raises(ConfigError, match="names: 0 given"):
        frontier_table(table, beta=1.0, names=[])
    with pytest.raises(ConfigError, match="names: 2 given"):
        frontier_table(table, beta=1.0, names=["a", "b"])
