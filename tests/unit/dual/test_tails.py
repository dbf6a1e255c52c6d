"""Constraints on tails: the columns against their definitions, the solutions against searches that know no dual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from can_dist.dual import Margin, ScoreTable, predict, solve_table
from can_dist.dual.tails import Column, quantile, settle, worst_mean
from can_dist.errors import CanDistError, ConfigError, InfeasibleConstraint

NUM_PROMPTS, NUM_RESPONSES, BETA = 3, 4, 0.7
PROMPT_N = np.repeat(np.arange(NUM_PROMPTS), NUM_RESPONSES)
# the oracle, by scipy before 1.16
pytestmark = pytest.mark.filterwarnings("ignore:Values in x were outside bounds during a minimize step")


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All that the reference can say to three prompts: reward, score and ln π_ref, each (12,)."""
    rng = np.random.default_rng(seed)
    reward, score = rng.normal(size=(2, PROMPT_N.size))
    share = rng.dirichlet(np.full(NUM_RESPONSES, 2.0), size=NUM_PROMPTS).ravel()
    return reward - 0.5 * score, score, np.log(share)


def cvar_by_sorting(score: np.ndarray, share: np.ndarray, alpha: float) -> float:
    """Fill the worst share α from below, the last response with what is left."""
    left, total = alpha, 0.0
    for k in np.argsort(score):
        used = min(left, share[k])
        total, left = total + used * score[k], left - used
    return total / alpha


def best_policy(reward: np.ndarray, reference: np.ndarray, utility: np.ndarray, level: float) -> tuple[float, Any]:
    """Maximise E r − β KL over the probabilities themselves, subject to E utility ≥ level; −inf for none."""

    def objective(policy: np.ndarray) -> float:
        divergence = policy * (np.log(np.maximum(policy, 1e-300)) - np.log(reference))
        return -float((policy * reward - BETA * divergence).sum()) / NUM_PROMPTS

    rows = np.kron(np.eye(NUM_PROMPTS), np.ones(NUM_RESPONSES))
    demands = [
        {"type": "eq", "fun": lambda policy: rows @ policy - 1},
        {"type": "ineq", "fun": lambda policy: policy @ utility / NUM_PROMPTS - level},
    ]
    search = minimize(
        objective, reference, bounds=[(1e-12, 1)] * reference.size, constraints=demands, method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
    )  # fmt: skip
    return (
        (-search.fun, search.x)
        if search.success and search.x @ utility / NUM_PROMPTS > level - 1e-7
        else (-np.inf, None)
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_cvar_is_met_at_the_least_cost(seed: int, alpha: float) -> None:
    """The best τ is one of the twelve scores: try each, the policy search without a dual."""
    reward, score, log_weight = world(seed)
    reference = np.exp(log_weight)
    before = cvar_by_sorting(score, reference / NUM_PROMPTS, alpha)
    level, column = before + 0.4, Column("tail", ("score",), of="cvar", alpha=alpha)
    settled = settle(
        [column], [Margin("tail", 0.4)], reward, score[:, None], PROMPT_N, beta=BETA, log_weight_N=log_weight
    )
    assert settled.reference["tail"] == pytest.approx(before)
    assert settled.constraints[0].threshold == pytest.approx(level)
    utility = settled.columns[0].values([score])
    table = ScoreTable.build(reward, utility, PROMPT_N, log_weight)
    solution = solve_table(table, beta=BETA, constraints=settled.constraints)
    expected = max(best_policy(reward, reference, tau - np.maximum(tau - score, 0) / alpha, level)[0] for tau in score)
    assert solution.predicted["objective"] == pytest.approx(expected, abs=2e-6)
    ratio = np.exp((reward + solution.lam["tail"] * utility) / BETA) * reference
    policy = (ratio.reshape(NUM_PROMPTS, -1) / ratio.reshape(NUM_PROMPTS, -1).sum(axis=1, keepdims=True)).ravel()
    assert cvar_by_sorting(score, policy / NUM_PROMPTS, alpha) == pytest.approx(level, abs=1e-6), "and is its CVaR"


@pytest.mark.parametrize("of", ["rectified", "worst_of"])
def test_derived_columns_are_solved_like_any_score(of: str) -> None:
    reward, score, log_weight = world(7)
    other, reference = np.random.default_rng(8).normal(size=score.size), np.exp(log_weight)
    if of == "rectified":
        column, expected = Column("c", ("score",), of="rectified", level=0.2), -np.maximum(0.2 - score, 0)
        utility = column.values([score])
    else:
        column, expected = Column("c", ("score", "other"), of="worst_of"), np.where(score < other, score, other)
        utility = column.values([score, other])
    np.testing.assert_array_equal(utility, expected)
    settled = settle([column], [Margin("c", 0.1)], reward, utility[:, None], PROMPT_N, beta=BETA)
    assert settled.columns == (column,)
    table = ScoreTable.build(reward, utility, PROMPT_N, log_weight)
    solution = solve_table(table, beta=BETA, constraints=settled.constraints)
    level = float((reference * expected).sum() / NUM_PROMPTS) + 0.1
    assert solution.lam["c"] > 0
    value, policy = best_policy(reward, reference, expected, level)
    assert solution.predicted["objective"] == pytest.approx(value, abs=2e-6)
    assert predict(table, solution.lam_vector, BETA, [0.1]).improvement_J[0] == pytest.approx(0.1, abs=1e-8)
    assert policy @ expected / NUM_PROMPTS == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.9])
def test_worst_mean_is_the_largest_of_its_lines(alpha: float) -> None:
    rng = np.random.default_rng(0)
    score, share = rng.normal(size=40), rng.dirichlet(np.ones(40))
    lines = [tau - share @ np.maximum(tau - score, 0) / alpha for tau in score]
    assert worst_mean(score, share, alpha) == pytest.approx(max(lines))
    assert worst_mean(score, share, alpha) == pytest.approx(cvar_by_sorting(score, share, alpha))
    assert quantile(score, share, alpha) == score[int(np.argmax(lines))]


def test_a_threshold_is_the_level_itself_and_several_columns_are_settled_together() -> None:
    reward, score, log_weight = world(3)
    other = np.random.default_rng(5).normal(size=score.size)
    columns = [Column("tail", ("score",), of="cvar", alpha=0.2), Column("mean", ("other",))]
    before = cvar_by_sorting(score, np.exp(log_weight) / NUM_PROMPTS, 0.2)
    demands = [Margin("tail", threshold=before + 0.3), Margin("mean", 0.1)]
    values = np.stack([score, other], axis=1)
    settled = settle(columns, demands, reward, values, PROMPT_N, beta=BETA, log_weight_N=log_weight)
    assert settled.constraints == tuple(demands)
    utility = np.stack([settled.columns[0].values([score]), other], axis=1)
    table = ScoreTable.build(reward, utility, PROMPT_N, log_weight)
    solution = solve_table(table, beta=BETA, constraints=settled.constraints)
    for name, slack in solution.slack.items():
        assert slack == pytest.approx(0.0, abs=1e-8) or (slack > 0 and solution.lam[name] == 0)


def test_what_cannot_be_attained_is_refused_with_what_can() -> None:
    reward, score, _ = world(0)
    column = Column("tail", ("score",), of="cvar", alpha=0.25)
    best = score.reshape(NUM_PROMPTS, -1).max(axis=1)
    most = cvar_by_sorting(best, np.full(NUM_PROMPTS, 1 / NUM_PROMPTS), 0.25)
    with pytest.raises(InfeasibleConstraint, match=f"worst 25 % is to reach 9, at most {most:.6g} attainable"):
        settle([column], [Margin("tail", threshold=9.0)], reward, score[:, None], PROMPT_N, beta=BETA)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "cvar", "alpha": 0.0}, r"tail\.alpha: 0, expected above 0 and below 1"),
        ({"of": "cvar", "alpha": 1.0}, r"tail\.alpha: 1, expected above 0 and below 1"),
        ({"of": "cvar"}, "cvar, and alpha is missing"),
        ({"of": "mean", "alpha": 0.1}, "mean, and alpha 0.1 is given"),
        ({"of": "rectified"}, "rectified, and level is missing"),
        ({"of": "rectified", "level": float("nan")}, r"tail\.level: nan, expected a finite number"),
        ({"of": "worst_of"}, "worst_of of one score"),
        ({"of": "mean", "sources": ("a", "b")}, "mean of 2 scores"),
    ],
)
def test_options_that_cannot_mean_anything(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Column("tail", **({"sources": ("score",)} | options))


def test_a_cvar_has_no_equality() -> None:
    reward, score, _ = world(0)
    column = Column("tail", ("score",), of="cvar", alpha=0.25)
    with pytest.raises(CanDistError, match="of cvar and equal"):
        settle([column], [Margin("tail", 0.1, equal=True)], reward, score[:, None], PROMPT_N, beta=BETA)
