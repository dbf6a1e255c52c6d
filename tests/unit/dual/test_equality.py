"""Equality constraints: multipliers of either sign, against a closed form and an unbounded independent minimiser."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from can_dist import dual
from can_dist.dual import Margin, ScoreTable, Status, bootstrap, diagnose, predict
from can_dist.errors import ConfigError, InfeasibleConstraint

cross_fit = partial(dual.cross_fit, estimator="empirical")  # the paper's, which has closed forms
solve_dual = partial(dual.solve_dual, estimator="empirical")
solve_table = partial(dual.solve_table, estimator="empirical")


def scores(seed: int, num_constraints: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(20), generator.integers(3, 9, size=20))
    mixing = generator.normal(size=(num_constraints + 1, num_constraints + 1))
    score = generator.normal(size=(prompt.size, num_constraints + 1)) @ mixing
    return score[:, 0], score[:, 1:], prompt


def attained(table: ScoreTable, seed: int) -> np.ndarray:
    """Improvements of a tilted policy: an interior target, whatever its sign."""
    lam = np.random.default_rng(seed + 100).normal(size=table.num_constraints)
    return predict(table, lam, 1.5, np.zeros(lam.size)).improvement_J


@pytest.mark.parametrize("num_constraints", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_against_an_unbounded_minimiser(seed: int, num_constraints: int) -> None:
    reward, utility, prompt = scores(seed, num_constraints)
    table = ScoreTable.build(reward, utility, prompt)
    margin = attained(table, seed)
    equal = [j != 1 for j in range(num_constraints)]
    constraints = [Margin(f"c{j}", float(b), equal=equal[j]) for j, b in enumerate(margin)]
    solution = solve_table(table, beta=1.0, constraints=constraints)

    def dual(lam: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope = -lam @ margin, -margin.copy()
        for i in range(20):
            rows = table.row_prompt_N == i
            score = table.reward_N[rows] + lam @ table.utility_JN[:, rows]
            value += (logsumexp(score) - np.log(rows.sum())) / 20
            slope += table.utility_JN[:, rows] @ np.exp(score - logsumexp(score)) / 20
        return float(value), slope

    bounds = [(None, None) if free else (0, None) for free in equal]
    best = minimize(dual, np.zeros(num_constraints), jac=True, bounds=bounds, options={"ftol": 1e-15, "gtol": 1e-11})
    assert solution.status is Status.OPTIMAL
    assert solution.lam_vector == pytest.approx(best.x, abs=1e-5 * (1 + np.abs(best.x).max()))
    slack = np.array(list(solution.slack.values()))
    assert slack[equal] == pytest.approx(0.0, abs=1e-8)
    means = [row["mean"] for row in solution.predicted["improvement"].values()]
    assert means == pytest.approx(predict(table, solution.lam_vector, 1.0, margin).improvement_J, abs=1e-10)
    assert list(solution.margin.values()) == pytest.approx(margin)


def test_signs_do_occur() -> None:
    signs = set()
    for seed in range(6):
        table = ScoreTable.build(*scores(seed, 1))
        margin = float(attained(table, seed)[0])
        signs.add(np.sign(solve_table(table, beta=1.0, constraints=[Margin("g", margin, equal=True)]).lam["g"]))
    assert signs == {-1.0, 1.0}


def test_two_responses_in_closed_form() -> None:
    """Oracle 8.2 without the maximum: λ = β[logit(p+b) − logit p] − Δ, here below zero."""
    arguments = {"beta": 0.5, "log_weight_N": np.log([0.7, 0.3])}
    lam = 0.5 * (np.log(0.25 / 0.75) - np.log(0.3 / 0.7)) + 0.05
    for kind in ({"margin": -0.05}, {"threshold": 0.25}):
        solution = solve_dual(
            [0.0, -0.05], [0.0, 1.0], ["x", "x"], constraints=[Margin("g", equal=True, **kind)], **arguments
        )
        assert solution.lam["g"] == pytest.approx(lam, abs=1e-10)
        assert solution.lam["g"] < 0
        assert solution.threshold["g"] == kind.get("threshold")
        assert solution.centre["g"] == pytest.approx(0.3)


@pytest.mark.parametrize("margin", [0.71, -0.31])
def test_out_of_reach_on_either_side(margin: float) -> None:
    arguments = {"beta": 0.5, "log_weight_N": np.log([0.7, 0.3]), "constraints": [Margin("g", margin, equal=True)]}
    with pytest.raises(InfeasibleConstraint, match=r"exactly .* alone attainable from -0\.3 to 0\.7"):
        solve_dual([0.0, -0.5], [0.0, 1.0], ["x", "x"], **arguments)
    assert solve_dual([0.0, -0.5], [0.0, 1.0], ["x", "x"], throw=False, **arguments).status is Status.INFEASIBLE


def test_what_does_not_go_with_it() -> None:
    table = ScoreTable.build(*scores(0, 1))
    low = [Margin("g", float(predict(table, [-0.5], 1.0, [0.0]).improvement_J[0]), equal=True)]
    solution = solve_table(table, beta=1.0, constraints=low)
    assert solution.lam["g"] == pytest.approx(-0.5, abs=1e-8)
    with pytest.raises(ConfigError, match="no safe side"):
        solve_table(table, beta=1.0, constraints=low, confidence=0.9)
    for function in (bootstrap, diagnose):
        with pytest.raises(ConfigError, match="negative multiplier"):
            function(table, solution)
    fitted = cross_fit(table, beta=1.0, constraints=low, num_folds=4)
    assert fitted.improvement["g"].low < solution.margin["g"] < fitted.improvement["g"].high
