"""The verdict on a constraint in one of three words, and how many held-out prompts would decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from scipy.special import ndtri

Verdict = Literal["met", "not met", "undecided"]

OLDER_WORDS: dict[str, Verdict] = {"met within the interval": "undecided", "not decided": "undecided"}
"""What reports said before there were three words."""

POWER = 0.8
"""Chance with which so many prompts would decide, if the mean is what it seems."""

MOST_PROMPTS = 10_000_000
"""Beyond, nobody holds out as many: the mean lies on the margin."""


def verdict(realised: Mapping[str, float], margin: float, *, equal: bool = False) -> Verdict:
    """Say whether a margin was met, given the realised value's interval; ``equal``: exactly, on both sides.

    Met: the whole interval is at or above the margin. Not met: it lies below, or with ``equal`` outside. Undecided: it
    holds the margin; or it has no width, since every prompt gave the same value, which shows neither a rarer loss nor a
    rarer gain. An exact demand can be refuted by an interval and never proved.
    """
    if realised["low"] == realised["high"]:
        return "undecided"
    if realised["high"] < margin or (equal and realised["low"] > margin):
        return "not met"
    return "met" if realised["low"] >= margin and not equal else "undecided"


def prompts_to_decide(
    realised: Mapping[str, float], margin: float, num_prompts: int, *, confidence: float, equal: bool = False
) -> int | None:
    """Return how many prompts would decide an undecided verdict with a chance of ``POWER``, if the mean is as it seems.

    The arm towards the margin shrinks as 1/√P, and the mean of other prompts varies by as much: the distance is to be
    z + z_power standard errors, P' = P ((arm/z) (z + z_power) / |mean − margin|)², z of the interval's confidence.

    Args:
        realised: mean and interval over ``num_prompts`` prompts.
        margin: that the mean is compared with.
        num_prompts: P.
        confidence: of the interval.
        equal: whether the margin is to be met exactly.

    Returns:
        The number of prompts in all, rounded up to two digits; None where no number decides.
    """
    distance = realised["mean"] - margin
    arm = realised["mean"] - realised["low"] if distance > 0 else realised["high"] - realised["mean"]
    if equal or distance == 0 or not 0 < arm < math.inf:
        return None
    level = float(ndtri(0.5 + confidence / 2))
    needed = num_prompts * (arm / level * (level + float(ndtri(POWER))) / distance) ** 2
    if needed > MOST_PROMPTS:
        return None
    digit = 10 ** max(math.floor(math.log10(needed)) - 1, 0)
    return int(math.ceil(needed / digit) * digit)


def current(word: str) -> Verdict:
    """Return a verdict in the words of today, whichever code wrote the report.

    Raises:
        KeyError: no code ever wrote it.
    """
    words: dict[str, Verdict] = {"met": "met", "not met": "not met", "undecided": "undecided", **OLDER_WORDS}
    return words[word]


def verdict_text(row: Mapping[str, Any]) -> str:
    """Return the verdict of a row of :func:`~can_dist.measuring.gains.constraint_row` as everybody shows it."""
    word = current(row["verdict"])
    reason = undecided_because(row) if word == "undecided" else ""
    return f"{word} ({reason})" if reason else word


def verdict_line(row: Mapping[str, Any]) -> str:
    """Return a row as a line for people: 'safety met: +0.57 [+0.51, +0.64] against a margin of +0.5'."""
    level = row.get("threshold")
    judged, demand = (row["realised"], row["margin"]) if level is None else (row["policy_mean"], level)
    numbers = f"{judged['mean']:+.3g} [{judged['low']:+.3g}, {judged['high']:+.3g}]"
    kind = "margin" if level is None else "threshold"
    return f"{row['name']} {verdict_text(row)}: {numbers} against a {kind} of {demand:+.3g}"


def undecided_because(row: Mapping[str, Any]) -> str:
    """Say what would decide an undecided row, or why nothing would; '' where its report does not tell."""
    judged = row["realised"] if row.get("threshold") is None else row["policy_mean"]
    if judged["low"] == judged["high"]:
        return "every prompt changed by the same amount"
    if row.get("equal"):
        return "an interval can refute an exact demand, not prove it"
    if "prompts_to_decide" not in row:
        return ""
    needed = row["prompts_to_decide"]
    if needed is None:
        return "the mean lies on the margin: no number of prompts would decide"
    return f"about {needed:,} held-out prompts would decide 4 times in 5, were this the true mean"
