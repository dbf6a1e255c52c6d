"""Columns of any size: the fused pass against the readable one, and the same solution whichever way a table comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from can_dist.dual import (
    Block,
    ColumnScores,
    DualSolution,
    Margin,
    ScoreTable,
    Status,
    partial_sums,
    predict,
    run_pass,
    solve_dual,
    solve_table,
)
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint


def make_scores(seed: int, num_prompts: int, num_constraints: int, dtype: Any = np.float64) -> tuple[Any, ...]:
    """Ragged, correlated scores far from zero: rewards (N,), utilities (J, N), K_i (P,), prompt numbers (N,)."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, num_prompts)
    num_rows = int(counts.sum())
    reward = (40 + 3 * rng.standard_normal(num_rows)).astype(dtype)
    utility = rng.standard_normal((num_constraints, num_rows)) - 0.2 * (reward - 40) + 7
    return reward, utility.astype(dtype), counts, np.repeat(np.arange(num_prompts), counts)


def both(scores: tuple[Any, ...]) -> tuple[ScoreTable, ColumnScores]:
    reward, utility, counts, prompt = scores
    table = ScoreTable.build(reward.astype(np.float64), utility.T.astype(np.float64), prompt)
    return table, ColumnScores.from_arrays(reward, list(utility), counts)


def assert_same(one: DualSolution, other: DualSolution) -> None:
    """Every number of two solutions agrees to 1e-8, and every word.

    Those of the judgement, which many solves add up to, each as near as its own tolerance, agree to 1e-3.
    """

    def compare(left: Any, right: Any, where: str) -> None:
        if isinstance(left, dict):
            assert left.keys() == right.keys(), where
            for key in left:
                compare(left[key], right[key], f"{where}/{key}")
        elif isinstance(left, float):
            close = 1e-3 if where.startswith("/diagnostics/judgement") else 1e-8
            assert right == pytest.approx(left, rel=close, abs=close, nan_ok=True), where
        elif where not in ("/num_steps",):
            assert left == right, where

    compare(one.to_dict(), other.to_dict(), "")


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("num_constraints", [1, 2])
def test_sums_and_predictions_are_those_of_the_readable_form(num_constraints: int, dtype: Any) -> None:
    table, columns = both(make_scores(1, 200, num_constraints, dtype))
    lam = np.array([0.7, 0.2])[:num_constraints]
    expected, found = partial_sums(table, lam, 0.8), partial_sums(columns, lam, 0.8)
    assert found.log_norm == pytest.approx(expected.log_norm, rel=1e-12)
    assert found.reward == pytest.approx(expected.reward, rel=1e-12)
    np.testing.assert_allclose(found.improvement_J, expected.improvement_J, rtol=1e-11)
    np.testing.assert_allclose(found.covariance_JJ, expected.covariance_JJ, rtol=1e-11, atol=1e-11)
    means, wanted = (
        predict(columns, lam, 0.8, np.zeros(num_constraints)),
        predict(table, lam, 0.8, np.zeros(num_constraints)),
    )
    for name in ("slack_PJ", "reward_gain_P", "kl_P", "ess_P"):
        np.testing.assert_allclose(getattr(means, name), getattr(wanted, name), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(columns.spread_J, table.spread_J, rtol=1e-12)
    np.testing.assert_allclose(columns.attainable_J, table.attainable_J, rtol=1e-12)
    mixture = np.full(num_constraints, 1 / num_constraints)
    np.testing.assert_allclose(columns.best(mixture)[0], table.best(mixture)[0], rtol=1e-12)
    assert columns.best(mixture)[1] == pytest.approx(table.best(mixture)[1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), margin=st.floats(-0.5, 0.8), beta=st.sampled_from([0.02, 0.5, 3.0]))
def test_solution_is_that_of_the_table_in_memory(seed: int, margin: float, beta: float) -> None:
    table, columns = both(make_scores(seed, 40, 2))
    constraints = [Margin("a", margin=margin), Margin("b", threshold=7.3)]
    one, other = (solve_table(t, beta=beta, constraints=constraints, throw=False) for t in (table, columns))
    assert one.status is other.status
    if one.status is Status.OPTIMAL:
        assert_same(one, other)


@pytest.mark.parametrize(("confidence", "equal"), [(None, False), (0.95, False), (None, True)])
def test_options_of_the_solver_hold_for_columns(confidence: float | None, equal: bool) -> None:
    table, columns = both(make_scores(3, 150, 1))
    constraints = [Margin("a", margin=-1.7 if equal else 0.5, equal=equal)]
    one, other = (solve_table(t, beta=1.0, constraints=constraints, confidence=confidence) for t in (table, columns))
    assert (one.lam["a"] < 0) is equal
    assert_same(one, other)


def test_utility_that_never_varies_is_left_out() -> None:
    reward, utility, counts, prompt = make_scores(5, 50, 2)
    utility[1] = 3.0 * prompt
    table, columns = both((reward, utility, counts, prompt))
    constraints = [Margin("a", margin=0.4), Margin("constant", margin=-0.1)]
    one, other = (solve_table(t, beta=1.0, constraints=constraints) for t in (table, columns))
    assert other.lam["constant"] == 0
    assert_same(one, other)


def test_joint_infeasibility_has_the_same_certificate() -> None:
    reward, utility, counts, prompt = make_scores(6, 80, 1)
    scores = reward, np.concatenate([utility, 14 - utility]), counts, prompt  # one up, the other down
    constraints = [Margin("up", margin=0.5), Margin("down", margin=0.5)]
    found = [solve_table(t, beta=1.0, constraints=constraints, throw=False) for t in both(scores)]
    assert [one.status for one in found] == [Status.INFEASIBLE] * 2
    assert found[1].feasibility["t_star"] == pytest.approx(found[0].feasibility["t_star"], abs=1e-8)
    with pytest.raises(InfeasibleConstraint, match="no policy supported on this table"):
        solve_table(both(scores)[1], beta=1.0, constraints=constraints)


def test_result_does_not_depend_on_blocks_or_threads() -> None:
    import numba

    reward, utility, counts, _ = make_scores(7, 700, 1)
    edge = int(counts[:300].sum())
    whole = [Block(counts, (reward, utility[0]))]
    parts = [
        Block(counts[:300], (reward[:edge], utility[0][:edge])),
        Block(counts[300:], (reward[edge:], utility[0][edge:])),
    ]
    answers = []
    threads = numba.get_num_threads()
    for blocks, num_threads in ((whole, 1), (whole, threads), (parts, threads)):
        numba.set_num_threads(num_threads)
        table = ColumnScores.survey(lambda asked, blocks=blocks: [run_pass(blocks, asked)], counts, 1)  # type: ignore[misc]
        answers.append(solve_table(table, beta=0.7, constraints=[Margin("a", margin=0.5)]))
    numba.set_num_threads(threads)
    assert answers[0].to_dict() == answers[1].to_dict(), "bit for bit: chunks are summed in their order"
    assert_same(answers[0], answers[2])


def test_scores_of_a_million_beta_do_not_overflow() -> None:
    reward, utility, counts, prompt = make_scores(8, 60, 1)
    table, columns = both((reward * 1e6, utility * 1e6, counts, prompt))
    constraints = [Margin("a", margin=0.5e6)]
    one, other = (solve_table(t, beta=1.0, constraints=constraints) for t in (table, columns))
    assert other.lam == pytest.approx(one.lam, rel=1e-8)
    assert other.lam_se == pytest.approx(one.lam_se, rel=1e-8)
    assert other.value == pytest.approx(one.value, rel=1e-12)
    assert other.slack["a"] / 1e6 == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(("estimator", "used"), [("auto", "jackknife"), ("jackknife",) * 2, ("empirical",) * 2])
def test_estimators_and_their_judgement_are_those_of_a_table(estimator: str, used: str) -> None:
    table, columns = both(make_scores(9, 220, 2))
    margins = [Margin("a", margin=0.1), Margin("b", threshold=7.2)]
    one, other = (solve_table(t, beta=6.0, constraints=margins, estimator=estimator) for t in (table, columns))
    assert other.estimator == used
    assert other.diagnostics["verdict"].startswith("On new prompts")
    assert_same(one, other)


def test_collapsed_weights_fall_back_to_the_papers_estimator() -> None:
    """The jackknife's KL there is below zero: its correction is larger than what it corrects."""
    constraints = [Margin("a", margin=0.25), Margin("b", threshold=7.3)]
    for table in both(make_scores(0, 40, 2)):
        solution = solve_table(table, beta=0.02, constraints=constraints)
        assert solution.estimator == "empirical"
        assert solution.estimator_reason.startswith("the jackknife has no solution")
        assert solution.predicted["kl"] > 0


def test_gaussian_estimator_needs_the_table() -> None:
    with pytest.raises(ConfigError, match="'gaussian' needs the table in memory"):
        solve_table(both(make_scores(9, 20, 1))[1], beta=1.0, constraints=[Margin("a", 0.1)], estimator="gaussian")


@pytest.mark.parametrize(
    ("reward", "utility", "counts", "error", "message"),
    [
        ([1.0, 2.0], [1.0], [2], ConfigError, r"utility\[0\]: shape \(1,\), expected \(2,\)"),
        ([1.0, 2.0], [1.0, np.nan], [2], DataError, r"column 'utility\[0\]': 1 of 2 values are not finite"),
        ([], [], [], DataError, "the score table has no rows"),
        ([1.0, 2.0], [1.0, 2.0], [2, 0], DataError, "a prompt without any"),
        ([1.0, 2.0], [1.0, 2.0], [1, 1], DataError, "every prompt has one response"),
    ],
)
def test_bad_columns_are_refused(reward: Any, utility: Any, counts: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ColumnScores.from_arrays(np.array(reward), [np.array(utility)], counts)


def test_table_that_fits_never_compiles_the_kernel() -> None:
    """A laptop table is solved in milliseconds: it must not wait for numba."""
    import subprocess
    import sys

    code = (
        "import sys, numpy as np; from can_dist.dual import solve_dual, Margin; r = np.random.default_rng(0);"
        "solve_dual(r.normal(size=64), r.normal(size=64), np.arange(64) // 8, beta=1.0,"
        " constraints=[Margin('a', margin=0.1)]); sys.exit('numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_solve_dual_agrees_too() -> None:
    scores = make_scores(11, 100, 1)
    reward, utility, _, prompt = scores
    one = solve_dual(reward, utility.T, prompt, beta=0.5, constraints=[Margin("a", margin=0.6)])
    assert_same(one, solve_table(both(scores)[1], beta=0.5, constraints=[Margin("a", margin=0.6)]))
