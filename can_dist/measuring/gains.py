"""Measurements of a policy: its scores against the reference's on the same prompts, as JSON-safe numbers.

Tables of scores have ``prompt_id`` and a float column per score. The unit that was sampled is the prompt: a prompt's
responses are averaged first, and every interval is over the P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from can_dist.config.sections import Constraint
from can_dist.dual import Interval, mean_interval
from can_dist.measuring.tails import cvar, fraction_unsafe, over_refusal_rate, prompt_mean, prompt_share
from can_dist.measuring.verdicts import prompts_to_decide, verdict

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
WORST_SHARE = 0.1
SIDES = ("reference", "policy")


def interval(value_P: FloatArray, confidence: float = CONFIDENCE, *, least: float = -math.inf) -> dict[str, float]:
    """Return mean, standard error and interval of one value per prompt (:func:`can_dist.dual.mean_interval`)."""
    return record(mean_interval(value_P, confidence, least=least))


def joint_confidence(num_constraints: int) -> float:
    """Return the confidence of each constraint's interval with which all of them hold together at 95 % (Bonferroni)."""
    return 1.0 - (1.0 - CONFIDENCE) / max(num_constraints, 1)


def joint_sentence(constraints: Sequence[Mapping[str, Any]]) -> str:
    """Say that several rows of :func:`constraint_row` are judged together; nothing of one alone."""
    levels = {row["confidence"] for row in constraints if "confidence" in row}
    if len(constraints) < 2 or len(levels) != 1:
        return ""
    return (
        f"The {len(constraints)} constraints are judged together at {100 * CONFIDENCE:g}%: each has an interval of "
        f"{100 * levels.pop():.3g}% (Bonferroni)."
    )


def improvement(before: pa.Table, after: pa.Table, name: str, confidence: float = CONFIDENCE) -> dict[str, float]:
    """Return the paired improvement of a score's mean, policy minus reference, clustered by prompt."""
    prompts, before_P = by_prompt(before, column(before, name))
    same, after_P = by_prompt(after, column(after, name))
    assert np.array_equal(prompts, same)
    return interval(after_P - before_P, confidence)


def constraint_row(
    name: str, constraint: Constraint, before: pa.Table, after: pa.Table, confidence: float = CONFIDENCE
) -> dict[str, Any]:
    """Set the realised value of one constraint beside the demand of the configuration.

    A margin is judged by the paired improvement, a threshold by the policy's own mean (``policy_mean``): the
    reference's mean on the held-out prompts is an estimate too. ``margin`` of a threshold is measured from that mean.
    ``confidence`` is that of both intervals: :func:`joint_confidence` of the constraints judged together.
    ``prompts_to_decide`` is null where the verdict is no "undecided", and where no number of prompts would decide.
    """
    realised = improvement(before, after, name, confidence)
    before_P, after_P = (by_prompt(table, column(table, name))[1] for table in (before, after))
    centre, policy_mean = float(before_P.mean()), interval(after_P, confidence)
    if constraint.margin is not None:
        margin, (judged, demand) = constraint.margin, (realised, constraint.margin)
    else:
        assert constraint.threshold is not None
        margin, (judged, demand) = constraint.threshold - centre, (policy_mean, constraint.threshold)
    word, equal = verdict(judged, demand, equal=constraint.equal), constraint.equal
    needed = prompts_to_decide(judged, demand, before_P.size, confidence=confidence, equal=equal)
    return {
        "name": name,
        "margin": margin,
        "threshold": constraint.threshold,
        "centre": centre,
        "realised": realised,
        "policy_mean": policy_mean,
        "confidence": confidence,
        "equal": equal,
        "verdict": word,
        "prompts_to_decide": needed if word == "undecided" else None,
    }


def win_rate(before: pa.Table, after: pa.Table, name: str) -> dict[str, float]:
    """Return how often a policy's response scores above a reference's to the same prompt; ties count half.

    The interval stays in [0, 1] (:func:`~can_dist.measuring.tails.prompt_share`).
    """
    groups_before, groups_after = _groups(before, column(before, name)), _groups(after, column(after, name))
    rates = []
    for prompt_id, theirs in groups_before.items():
        difference = groups_after[prompt_id][:, None] - theirs[None, :]
        rates.append(float(np.mean(0.5 + 0.5 * np.sign(difference))))
    return record(prompt_share(rates, np.arange(len(rates))))


def safety_tails(before: pa.Table, after: pa.Table, constraints: Mapping[str, Constraint]) -> dict[str, Any]:
    """Return by constraint the share of unsafe responses, and the mean of the worst ones.

    Unsafe is a score below the constraint's threshold, or below 0 where a margin is asked for; below the level of a
    constraint on what lies below it. ``worst`` is the mean of the lowest ``WORST_SHARE`` of the responses (CVaR), or of
    the share that the constraint is on.
    """
    tables = dict(zip(SIDES, (before, after), strict=True))
    tails: dict[str, Any] = {}
    for name, constraint in constraints.items():
        border = 0.0 if constraint.threshold is None else constraint.threshold
        border, share = border if constraint.level is None else constraint.level, constraint.alpha or WORST_SHARE
        scored = {side: (column(table, name), ids(table)) for side, table in tables.items()}
        tails[name] = {
            "border": border,
            "worst_share": share,
            "unsafe": {side: record(fraction_unsafe(*columns, threshold=border)) for side, columns in scored.items()},
            "worst": {side: record(cvar(*columns, share)) for side, columns in scored.items()},
        }
    return tails


def lengths(table: pa.Table) -> dict[str, float]:
    """Return the mean tokens of a response with its interval, and the share that was cut at the limit."""
    cut = np.mean([reason == "length" for reason in table.column("finish_reason").to_pylist()])
    return {**record(prompt_mean(column(table, "num_tokens"), ids(table))), "truncated_fraction": float(cut)}


def refusals(responses: pa.Table) -> dict[str, float]:
    """Return how often responses to benign prompts open like a refusal, with its interval."""
    return record(over_refusal_rate(responses.column("text").to_pylist(), ids(responses)))


def gains_table(before: pa.Table, after: pa.Table, names: list[str], kl_N: FloatArray) -> pa.Table:
    """Return one row per prompt, in order of their ids: the mean of each score under reference and policy, and the KL.

    Columns: ``prompt_id``, ``<score>.reference``, ``<score>.policy`` and ``kl``; ``kl_N`` belongs to ``after``.
    """
    prompts, kl_P = by_prompt(after, kl_N)
    columns: dict[str, Any] = {"prompt_id": [str(prompt) for prompt in prompts]}
    for name in names:
        for side, table in zip(SIDES, (before, after), strict=True):
            same, columns[f"{name}.{side}"] = by_prompt(table, column(table, name))
            assert np.array_equal(prompts, same)
    return pa.table({**columns, "kl": kl_P})


def column(table: pa.Table, name: str) -> FloatArray:
    """Return a column's numbers."""
    values: FloatArray = table.column(name).to_numpy()
    return values


def ids(table: pa.Table) -> npt.NDArray[Any]:
    """Return each row's prompt id."""
    prompt_N: npt.NDArray[Any] = table.column("prompt_id").to_numpy(zero_copy_only=False)
    return prompt_N


def by_prompt(table: pa.Table, values_N: FloatArray) -> tuple[npt.NDArray[Any], FloatArray]:
    """Return (prompt ids sorted, mean of the values of each)."""
    prompts, index_N = np.unique(ids(table), return_inverse=True)
    return prompts, np.bincount(index_N, weights=values_N) / np.bincount(index_N)


def record(estimate: Interval) -> dict[str, float]:
    """Return an interval as JSON-safe numbers."""
    return asdict(estimate)


def _groups(table: pa.Table, values_N: FloatArray) -> dict[str, FloatArray]:
    groups: dict[str, list[float]] = {}
    for prompt_id, value in zip(ids(table).tolist(), values_N.tolist(), strict=True):
        groups.setdefault(prompt_id, []).append(value)
    return {prompt_id: np.array(values) for prompt_id, values in groups.items()}
