"""Verdicts in three words, and the number of prompts that would decide: held against simulated evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from can_dist.measuring.gains import interval
from can_dist.measuring.verdicts import current, prompts_to_decide, verdict, verdict_line, verdict_text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.0, "met"),
        (0.5, 1.5, "undecided"),
        (0.5, 1.0, "undecided"),
        (0, 0.9, "not met"),
        (0.0, 0.0, "undecided"),
        (2.0, 2.0, "undecided"),
        (-9.0, 9.0, "undecided"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert verdict({"low": low, "high": high}, 1.0) == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.5, 1.5, "undecided"), (1.1, 2, "not met"), (0.1, 0.9, "not met")]
)
def test_an_equality_is_missed_on_either_side(low: float, high: float, expected: str) -> None:
    assert verdict({"low": low, "high": high}, 1.0, equal=True) == expected


@pytest.mark.parametrize(
    ("margin", "confidence", "word"), [(0.4, 0.95, "met"), (0.6, 0.95, "not met"), (0.4, 0.975, "met")]
)
def test_so_many_prompts_decide_four_times_in_five(margin: float, confidence: float, word: str) -> None:
    """Gains with mean 0.5 and sd 1: of evaluations with the number of prompts that 30 of them ask for, 80 % decide."""
    generator = np.random.default_rng(0)
    first_P = generator.normal(size=30)
    first_P = 0.5 + (first_P - first_P.mean()) / first_P.std(ddof=1)
    needed = prompts_to_decide(interval(first_P, confidence), margin, 30, confidence=confidence)
    assert needed is not None
    again = [interval(generator.normal(0.5, 1.0, size=needed), confidence) for _ in range(400)]
    decided = np.mean([verdict(value, margin) == word for value in again])
    assert 0.75 < decided < 0.9  # the first arm is Student's, a little longer than the last ones


@pytest.mark.parametrize(
    ("mean", "low", "high", "equal", "expected"),
    [
        (0.0, -9.0, 9.0, False, 43000),  # 64 ((9/1.96)(1.96 + 0.84)/0.5)² = 42 350, rounded up
        (0.5, -9.0, 9.0, False, None),  # on the margin
        (0.499999, -9.0, 9.0, False, None),  # more than anybody holds out
        (0.0, -9.0, 9.0, True, None),
        (0.0, 0.0, 0.0, False, None),
    ],
)
def test_a_number_is_given_where_there_is_any(
    mean: float, low: float, high: float, equal: bool, expected: int | None
) -> None:
    realised = {"mean": mean, "low": low, "high": high}
    assert prompts_to_decide(realised, 0.5, 64, confidence=0.95, equal=equal) == expected


def row(**changes: Any) -> dict[str, Any]:
    realised = {"mean": 0.0, "low": -9.0, "high": 9.0}
    return {"name": "safety", "margin": 0.5, "threshold": None, "realised": realised, "verdict": "undecided"} | changes


def test_an_undecided_row_says_what_would_decide_it() -> None:
    assert (
        verdict_text(row(prompts_to_decide=42000))
        == "undecided (about 42,000 held-out prompts would decide 4 times in 5, were this the true mean)"
    )
    assert "no number of prompts would decide" in verdict_text(row(prompts_to_decide=None))
    assert "refute" in verdict_text(row(prompts_to_decide=None, equal=True))
    assert verdict_text(row(realised={"mean": 1.0, "low": 1.0, "high": 1.0})) == (
        "undecided (every prompt changed by the same amount)"
    )
    assert verdict_text(row(verdict="met")) == "met"


def test_reports_of_older_code_are_read_in_the_words_of_today() -> None:
    assert verdict_text(row(verdict="met within the interval")) == "undecided"
    assert [current(word) for word in ("met", "not met", "not decided")] == ["met", "not met", "undecided"]
    with pytest.raises(KeyError):
        current("mostly met")


def test_a_line_compares_the_value_that_was_judged() -> None:
    assert verdict_line(row(verdict="not met", realised={"mean": 0.1, "low": 0.0, "high": 0.2})) == (
        "safety not met: +0.1 [+0, +0.2] against a margin of +0.5"
    )
    level = row(verdict="met", threshold=0.25, policy_mean={"mean": 0.5, "low": 0.3, "high": 0.7})
    assert verdict_line(level) == "safety met: +0.5 [+0.3, +0.7] against a threshold of +0.25"
