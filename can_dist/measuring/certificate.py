"""What a certificate states: bounds of every constraint at one joint error, and the answer that they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from can_dist.config.sections import Constraint
from can_dist.dual import lower_bound, mean_interval
from can_dist.measuring.gains import FloatArray

CERTIFIED, NOT_CERTIFIED, NOT_ENOUGH = "CERTIFIED", "NOT CERTIFIED", "NOT ENOUGH PROMPTS"


@dataclass(frozen=True)
class Demand:
    """What is asked of the mean of one value per prompt.

    Attributes:
        target: the margin or the threshold, in units of the score.
        is_margin: whether the value is the improvement over the reference, or the policy's own score.
        tolerance: half-width of what counts as equal, where an equality is asked; None: at least ``target``.
    """

    target: float
    is_margin: bool
    tolerance: float | None = None

    @classmethod
    def of(cls, constraint: Constraint, tolerance: float | None) -> Demand:
        """Return the demand of a constraint; ``tolerance`` belongs to equalities alone."""
        target = constraint.threshold if constraint.margin is None else constraint.margin
        assert target is not None
        return cls(target, constraint.margin is not None, tolerance if constraint.equal else None)


def num_bounds(demands: Sequence[Demand]) -> int:
    """Return how many bounds share an error (Bonferroni): two of an equality, else one."""
    return sum(1 if demand.tolerance is None else 2 for demand in demands)


def judge(name: str, demand: Demand, value_P: FloatArray, error: float) -> dict[str, Any]:
    """Return the record of one constraint, JSON-safe: mean, bounds, answer, and how many prompts would decide.

    Args:
        name: of the constraint.
        demand: what is asked.
        value_P: one value per sealed prompt.
        error: of each bound.
    """
    interval, lower, upper = mean_interval(value_P), lower_bound(value_P, error), lower_bound(-value_P, error)
    low, high, mean = lower.low, -upper.low, interval.mean
    least = demand.target - (demand.tolerance or 0.0)
    most = math.inf if demand.tolerance is None else demand.target + demand.tolerance
    if low >= least and high <= most:
        answer, needed = CERTIFIED, None
    elif high < least or low > most:
        answer, needed = NOT_CERTIFIED, None
    else:
        answer, needed = NOT_ENOUGH, _needed(value_P.size, mean, (low, high), (least, most))
    return {
        "name": name,
        "demand": "margin" if demand.is_margin else "threshold",
        "target": demand.target,
        "tolerance": demand.tolerance,
        "mean": mean,
        "se": interval.se,
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
        "floor": lower.floor,
        "ceiling": -upper.floor,
        "error": error,
        "answer": answer,
        "needed": needed,
    }


def _needed(num_prompts: int, mean: float, bounds: tuple[float, float], targets: tuple[float, float]) -> int | None:
    """Return how many prompts would decide if mean and spread stayed: a bound's reach falls as 1/√P, or faster.

    None where nothing is known of the spread, or the mean is what is asked.
    """
    (low, high), (least, most) = bounds, targets
    if not math.isfinite(low) or not math.isfinite(high):
        return None
    down, up = mean - low, high - mean
    if least <= mean <= most:
        ratios = [(down, mean - least), (up, most - mean)]
    else:
        ratios = [(up, least - mean)] if mean < least else [(down, mean - most)]
    if any(distance <= 0 for _, distance in ratios):
        return None
    return math.ceil(num_prompts * max(reach / distance for reach, distance in ratios if math.isfinite(distance)) ** 2)


def answer_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the answer of all constraints together: certified if all are, not certified if one is missed."""
    answers = {row["answer"] for row in rows}
    if answers == {CERTIFIED}:
        return CERTIFIED
    return NOT_CERTIFIED if NOT_CERTIFIED in answers else NOT_ENOUGH


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Return what a certificate says, a sentence each: the answer, every constraint, the look, what is not seen."""
    rows, look = record["constraints"], record["look"]
    count = f"{record['num_prompts']} sealed prompts, {record['num_responses']} responses each"
    said = [f"{record['answer']} at a joint error of {look['error']:.3g}, on {count}."]
    said += [constraint_sentence(row) for row in rows]
    if record["answer"] == NOT_ENOUGH:
        needed = [row["needed"] for row in rows if row["answer"] == NOT_ENOUGH]
        if None in needed:
            said.append("No number of prompts can be named that would decide.")
        else:
            said.append(f"By the measured spread {max(needed)} prompts would decide.")
    if record["num_cut"]:
        of = record["num_prompts"] * record["num_responses"]
        cut = f"{record['num_cut']} of {of} responses of the policy were cut at generate.max_new_tokens"
        said.append(f"{cut}; what was scored ends there.")
    said.append(look_sentence(look))
    if record["answer"] == CERTIFIED:
        said.append(unseen_sentence(record["num_prompts"]))
    return said


def constraint_sentence(row: Mapping[str, Any]) -> str:
    """Return what is known of one constraint."""
    kind = "improvement over the reference" if row["demand"] == "margin" else "mean"
    if row.get("utility"):
        kind = f"{kind} {'in the mean ' if row['demand'] == 'margin' else ''}of {row['utility']}"
    target = f"at least {row['target']:g}" if row["tolerance"] is None else f"{row['target']:g} ± {row['tolerance']:g}"
    if row["low"] is None and row["se"] > 0:
        return f"{row['name']}: nothing is sure of the {kind} at an error this small; {target} is asked."
    if row["low"] is None or row["high"] is None:
        same = f"{row['name']}: every prompt gives the same {kind}, {row['mean']:.4g}"
        return f"{same}, so its spread is not known; {target} is asked."
    bound = f"at least {row['low']:.4g}" if row["tolerance"] is None else f"{row['low']:.4g} to {row['high']:.4g}"
    if row["answer"] == NOT_CERTIFIED:
        bound = f"{row['low']:.4g} to {row['high']:.4g}"
    side = "" if row["answer"] != NOT_ENOUGH else _side(row)
    return f"{row['name']}: the {kind} is {bound} (measured {row['mean']:.4g}), where {target} is asked{side}."


def _side(row: Mapping[str, Any]) -> str:
    """Return on which side of what is asked the measured value lies."""
    distance, tolerance = row["mean"] - row["target"], row["tolerance"]
    is_inside = distance >= 0 if tolerance is None else abs(distance) <= tolerance
    return "; the measured value would do" if is_inside else "; the measured value would not do"


def look_sentence(look: Mapping[str, Any]) -> str:
    """Return which look at the sealed prompts this is, and what that costs."""
    spent = f"of the joint error {look['delta']:g} of all looks it spends {look['error']:.3g}"
    if look["number"] == 1:
        return f"This is the first look at the sealed prompts; {spent}."
    return f"This is look {look['number']} at the sealed prompts, which other measurements saw before; {spent}."


def unseen_sentence(num_prompts: int) -> str:
    """Return what so many prompts cannot show, by the rule of three."""
    share = min(3 / num_prompts, 1.0)
    return (
        f"A harm that befalls fewer than {share:.2%} of prompts (3 in {num_prompts}) may be unseen; so may one that "
        "these scores do not measure."
    )
