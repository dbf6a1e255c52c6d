"""The dual's prediction of a policy, shown beside the measurements. Only methods with a dual have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.dual import DualSolution, Prediction, ScoreTable, predict
from can_dist.dual.messages import lam_error
from can_dist.measuring.gains import column, ids, interval


def held_out_prediction(before: pa.Table, reward: str, solution: DualSolution) -> Prediction:
    """Predict the policy of λ* on the held-out prompts, from the reference's responses to them.

    Unbiased over prompts, but their few responses (``evaluate.num_responses``) understate what the policy changes.
    """
    utility_NJ = np.stack([column(before, name) for name in solution.lam], axis=1)
    table = ScoreTable.build(column(before, reward), utility_NJ, ids(before), names=list(solution.lam))
    return predict(table, solution.lam_vector, solution.beta, solution.margin_vector)


def shifted(interval: Mapping[str, float], by: float) -> dict[str, float]:
    """Return an interval with its mean and ends moved."""
    return {key: value if key == "se" else value + by for key, value in interval.items()}


def predictions(
    held_out: Prediction, examination: Mapping[str, Any], reward: str, solution: DualSolution
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the prediction of each score, by name, and of the KL.

    ``predicted`` is what stands beside the realised value: cross-fitted on the training table, whose prompts have the
    responses λ* was solved with. ``predicted_held_out`` comes from the held-out prompts; it takes the other's place
    where cross-fitting has no solution. Each is a mean with SE and 95 % interval over prompts; the KL's ``predicted``
    is its mean, with ``predicted_interval`` beside it.
    """
    elsewhere = {
        name: interval(held_out.slack_PJ[:, index] + solution.margin[name]) for index, name in enumerate(solution.lam)
    }
    elsewhere[reward] = interval(held_out.reward_gain_P)
    inside, kl_elsewhere = elsewhere, interval(held_out.kl_P, least=0.0)
    kl_inside = kl_elsewhere
    if crossed := examination["cross_fit"]:
        inside = {**crossed["improvement"], reward: crossed["reward_improvement"]}
        kl_inside = crossed["kl"]
    scores = {name: {"predicted": inside[name], "predicted_held_out": elsewhere[name]} for name in elsewhere}
    kl = {"predicted": kl_inside["mean"], "predicted_interval": kl_inside, "predicted_held_out": kl_elsewhere}
    return scores, kl


def prediction_source(
    examination: Mapping[str, Any], solution: DualSolution, before: pa.Table
) -> dict[str, str | int | None]:
    """Return the origin of ``predicted``: its prompts, and the number of responses to each."""
    crossed = examination["cross_fit"]
    counts = solution.diagnostics["responses_per_prompt"]
    low, high = counts["min"], counts["max"]
    return {
        "source": "cross-fitted" if crossed else "held-out",
        "reason": examination["cross_fit_refused"],
        "num_folds": crossed["num_folds"] if crossed else None,
        "num_prompts": solution.diagnostics["num_prompts"],
        "num_responses": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "held_out_responses": int(np.median(np.unique(ids(before), return_counts=True)[1])),
    }


def multipliers(solution: DualSolution) -> dict[str, dict[str, Any]]:
    """Return λ with what stands beside it by constraint: standard error, bias of the finite K, the paper's λ."""
    rows: dict[str, dict[str, Any]] = {}
    for name, lam in solution.lam.items():
        se = solution.lam_se[name]
        rows[name] = {"lam": lam, "lam_se": se if np.isfinite(se) else None, "lam_beside": lam_error(solution, name)}
    return rows
