"""Win rates from verdicts: counts, and intervals that cover in simulation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from can_dist.errors import DataError
from can_dist.judging.judge import ORDERS, Judgement, Record
from can_dist.judging.summary import flip_rate, summarise


def row(prompt_id: str, order: int, verdict: Any, length: int = 0, failure: Any = "") -> Judgement:
    record = Record(choice=None, text="", rejected=False, requests=1, prompt_tokens=10, completion_tokens=2)
    return Judgement(prompt_id, ORDERS[order], verdict, failure, record, False, length)


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
