"""The steps of dual ascent that the loops on λ share, λ ← [λ − η·slack]_+, and when they have come to an end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from can_dist.stages.trajectory import Round


def next_lam(last: Round, step_size: Mapping[str, float]) -> dict[str, float]:
    """Return [λ − η·slack]_+, one η per constraint; an equality's λ may have either sign."""
    return moved(last.lam, last.constraints, step_size)


def moved(
    lam: Mapping[str, float],
    constraints: Mapping[str, Mapping[str, Any]],
    step_size: Mapping[str, float],
    *,
    form: str = "linear",
) -> dict[str, float]:
    """Return λ after a step on the measured slack: [λ − η·slack]_+, or in the form 'log' λ·exp(−η·λ·slack).

    The logarithmic one is the gradient's step on ln λ (Safe-RLHF, arXiv 2310.12773), by a factor of e at most.
    """
    steps = {name: step_size[name] * row["slack"] for name, row in constraints.items()}
    if form == "log":
        return {name: lam[name] * math.exp(-min(1.0, max(-1.0, lam[name] * step))) for name, step in steps.items()}
    stepped = {name: lam[name] - step for name, step in steps.items()}
    return {name: value if constraints[name]["equal"] else max(0.0, value) for name, value in stepped.items()}


def settled(last: Round, tolerance: float, standard_errors: float) -> bool:
    """Return whether every slack is zero within the tolerance or its error, or positive where λ is zero already."""
    return all(
        abs(row["slack"]) <= max(tolerance, standard_errors * row["se"])
        or (row["slack"] > 0 and last.lam[name] == 0 and not row["equal"])
        for name, row in last.constraints.items()
    )


SWINGS, SHRINKS = 3, 0.95
"""So many swings of λ in a row, of which none is smaller than SHRINKS of the one before, will not end."""
ERRORS = 3.0
"""A swing counts when its slack is so many standard errors from 0; a λ that has settled swings with the samples."""


def swings(rounds: Sequence[Round], name: str) -> list[float]:
    """Return how far one λ went between its turns, in order; the last turn is where it is now.

    A swing whose slack, added up over its rounds, may be an error of the samples ends the list before it.
    """
    lam = [turn.lam[name] for turn in rounds]
    moves = [after - before for before, after in pairwise(lam)]
    runs: list[list[int]] = []  # rounds after which λ moved in one direction
    for number, move in enumerate(moves):
        if runs and (move == 0 or (move > 0) == (lam[runs[-1][0] + 1] > lam[runs[-1][0]])):
            runs[-1].append(number)
        else:
            runs.append([number])
    lengths: list[float] = []
    for run in runs:
        measured = [rounds[number].constraints[name] for number in run]
        noise = math.sqrt(sum(row["se"] ** 2 for row in measured))
        is_sure = abs(sum(row["slack"] for row in measured)) > ERRORS * noise
        lengths = [*lengths, abs(lam[run[-1] + 1] - lam[run[0]])] if is_sure else []
    return lengths


def diverges(rounds: Sequence[Round]) -> str:
    """Return the constraint whose λ is no finite number, or swings without an end; '' where there is none."""
    for name in rounds[-1].lam:
        last = swings(rounds, name)[-SWINGS:]
        grows = len(last) == SWINGS and all(after >= SHRINKS * before for before, after in pairwise(last))
        if grows or not math.isfinite(rounds[-1].lam[name]):
            return name
    return ""
