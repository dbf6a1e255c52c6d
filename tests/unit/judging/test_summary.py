"""Win rates from verdicts: counts, intervals that cover, and the win rate at equal length recovered in simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from can_dist.errors import DataError
from can_dist.judging.judge import ORDERS, Judgement
from can_dist.judging.summary import flip_rate, length_controlled_win_rate, summarise


def row(prompt_id: str, order: int, verdict: Any, length: int = 0, failure: Any = "") -> Judgement:
    return Judgement(prompt_id, ORDERS[order], verdict, failure, "", 1, 10, 2, False, length)


def pair(prompt_id: str, first: Any, second: Any, length: int = 0) -> list[Judgement]:
    return [row(prompt_id, 0, first, length), row(prompt_id, 1, second, length)]


def test_ties_are_kept_and_count_half() -> None:
    summary = summarise([*pair("a", "win", "win"), *pair("b", "tie", "loss"), *pair("c", "win", "loss")])
    assert (summary.wins, summary.ties, summary.losses) == (3, 1, 2)
    assert summary.win_rate.mean == pytest.approx((1.0 + 0.25 + 0.5) / 3)
    assert summary.flip_rate == pytest.approx(2 / 3)
    # decided for the response shown first: once of a, b (a loss with the baseline first), and c in both orders
    assert summary.first_rate == pytest.approx(4 / 5)


def test_failures_are_no_ties() -> None:
    failed = [row("c", 0, None, failure="no verdict"), row("c", 1, None, failure="rejected")]
    summary = summarise([*pair("a", "win", "win"), *pair("b", "loss", "loss"), *failed])
    assert (summary.no_verdict, summary.rejected, summary.ties) == (1, 1, 0)
    assert summary.win_rate.mean == 0.5
    assert summary.num_prompts == 2


def test_flip_rate_needs_pairs() -> None:
    assert flip_rate([row("a", 0, "win"), row("a", 1, None, failure="no verdict")]) is None


def test_win_rate_interval_covers_prompts_that_differ() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        rate_P = rng.beta(1.8, 1.2, size=60)
        rows = [r for i, p in enumerate(rate_P) for r in pair(str(i), *np.where(rng.random(2) < p, "win", "loss"))]
        interval = summarise(rows).win_rate
        covered += interval.low <= 0.6 <= interval.high
    assert 0.92 <= covered / 300 <= 0.99


def simulate(rng: np.random.Generator, theta: float, phi: float, num_prompts: int) -> tuple[Any, Any, list[str]]:
    """Verdicts in both orders of a judge who likes length; the candidate's responses are longer."""
    delta_N = np.repeat(rng.normal(300.0, 200.0, num_prompts), 2)
    chance_N = expit(theta + phi * np.tanh(delta_N / delta_N.std()))
    return (
        (rng.random(2 * num_prompts) < chance_N).astype(float),
        delta_N,
        [str(i) for i in range(num_prompts) for _ in range(2)],
    )


def test_length_controlled_rate_is_that_at_equal_length() -> None:
    rng = np.random.default_rng(1)
    score_N, delta_N, prompts = simulate(rng, theta=-0.4, phi=1.5, num_prompts=8000)
    interval = length_controlled_win_rate(score_N, delta_N, prompts)
    assert score_N.mean() > 0.6  # length alone
    assert interval.mean == pytest.approx(expit(-0.4), abs=0.02)
    assert interval.low < expit(-0.4) < interval.high


def test_length_controlled_interval_covers() -> None:
    rng, covered = np.random.default_rng(2), 0
    for _ in range(300):
        interval = length_controlled_win_rate(*simulate(rng, theta=0.3, phi=1.0, num_prompts=150))
        covered += interval.low <= expit(0.3) <= interval.high
    assert 0.92 <= covered / 300 <= 0.99


def test_without_length_differences_it_is_the_win_rate() -> None:
    score_N = np.array([1.0, 1.0, 0.5, 0.0] * 50)
    interval = length_controlled_win_rate(score_N, np.zeros(200), [str(i) for i in range(200)])
    assert interval.mean == pytest.approx((score_N.sum() + 0.5) / 201, abs=1e-6)


def test_swapping_the_sides_mirrors_it() -> None:
    score_N, delta_N, prompts = simulate(np.random.default_rng(3), theta=0.5, phi=1.0, num_prompts=100)
    ours, theirs = (
        length_controlled_win_rate(*args, prompts) for args in ((score_N, delta_N), (1 - score_N, -delta_N))
    )
    assert ours.mean + theirs.mean == pytest.approx(1.0, abs=1e-5)
    assert ours.low + theirs.high == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("separated", [False, True])
def test_one_sided_and_separated_verdicts_stay_finite(separated: bool) -> None:
    delta_N = np.linspace(-100, 100, 100)
    score_N = (delta_N > 0).astype(float) if separated else np.ones(100)
    interval = length_controlled_win_rate(score_N, delta_N, [str(i) for i in range(100)])
    assert np.isfinite([interval.mean, interval.se, interval.low, interval.high]).all()
    assert (interval.mean == pytest.approx(0.5, abs=1e-4)) if separated else (0.95 < interval.mean < 1.0)
    assert interval.low < interval.mean < interval.high
    if not separated:
        assert interval.low < 0.97  # 100 wins do not show more


@pytest.mark.parametrize(
    "rows", [[row("a", 0, "win")], pair("a", "win", "tie")[::-1], [row("a", 0, "win"), row("b", 1, "win")]]
)
def test_rows_that_are_no_pairs_are_refused(rows: list[Judgement]) -> None:
    with pytest.raises(DataError, match=r"not two rows per comparison, one per order\. Pass all rows that judge_pairs"):
        flip_rate(rows)


def test_too_few_prompts_are_named() -> None:
    with pytest.raises(
        DataError, match=r"verdicts on 1 prompt\(s\) in 2 rows; an interval needs at least 2\. Judge more"
    ):
        summarise(pair("a", "win", "win"))
    with pytest.raises(DataError, match=r"\(2,\) scores, \(1,\) length differences, 2 prompts; expected one finite"):
        length_controlled_win_rate([1.0, 0.0], [1.0], ["a", "b"])
