"""held-out preferences → the scale of a log-ratio score: P(a ≻ b) = σ(a·Δs), one scalar by logistic regression.

A policy that was trained too long, or with another β than the configuration gives, may order responses as people do
and still be too sure, or not sure enough. The scale a converts its score to the units of the labels σ(s_a − s_b).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import expit

from can_dist.errors import DataError
from can_dist.modeling.precision import run_precision
from can_dist.reporting.figures.reliability import draw_reliability
from can_dist.scoring.kinds import scorer_identity
from can_dist.scoring.protocol import LogProb, PolicyRatio
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact, atomic_file, write_json, write_part
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE, RESPONSES
from can_dist.workspace import Workspace

CALIBRATION, PLOT = "calibration.json", "reliability.svg"
Z_95 = 1.959964
MAX_STEPS = 100


@dataclass(frozen=True)
class Calibration:
    """The fitted scale a, its standard error over prompts, and how it changed the mean log-loss per pair (nats)."""

    scale: float
    scale_se: float
    num_pairs: int
    num_prompts: int
    accuracy: float
    log_loss_before: float
    log_loss: float


def calibrate(work: Workspace, name: str, preferences: Artifact, ratio: PolicyRatio) -> Artifact:
    """Return the artifact of a scorer's calibration on the validation pairs of ``preferences``.

    It holds ``calibration.json`` and ``reliability.svg``; its info has ``scale`` and ``scale_se``.

    Raises:
        DataError: There are too few held-out pairs, or a's 95 % interval is not above 0.
    """
    pairs = _held_out_pairs(work, name, preferences)
    logps = {LOGP_POLICY: LogProb(model=ratio.policy), LOGP_REFERENCE: LogProb(model=ratio.reference)}
    scores = score(work, pairs, logps, role=f"held-out pairs of {name}")
    identity_keys = {"scorer": scorer_identity(ratio, run_precision(work.config))}
    stage = work.open("calibrate", name, identity_keys, {"pairs": pairs, "scores": scores, **ratio.made_from})
    if stage.finished:
        return stage.finished
    with work.timed("calibrate", name, pairs=len(pairs.table) // 2):
        ratio_N = scores.table.column(LOGP_POLICY).to_numpy() - scores.table.column(LOGP_REFERENCE).to_numpy()
        gap_N = ratio.beta * (ratio_N[::2] - ratio_N[1::2])
        preferred_N = pairs.table.column("preferred").to_numpy()[::2] == 1
        prompt_N = pairs.table.column("prompt_id").to_numpy()[::2]
        fit = fit_scale(gap_N, preferred_N, prompt_N, name)
        write_json(stage.path / CALIBRATION, asdict(fit))
        with atomic_file(stage.path / PLOT) as temporary:
            draw_reliability(gap_N, preferred_N, fit.scale, fit.scale_se, temporary)
        work.say(
            f"calibrate: {name} times a = {fit.scale:.4g} ± {fit.scale_se:.2g} on {fit.num_pairs} held-out "
            f"pairs, {fit.accuracy:.1%} ordered as people do; log-loss {fit.log_loss_before:.4f}, "
            f"calibrated {fit.log_loss:.4f}"
        )
        return stage.commit([CALIBRATION, PLOT], info=asdict(fit))


def fit_scale(gap_N: np.ndarray, preferred_N: np.ndarray, prompt_N: np.ndarray, name: str) -> Calibration:
    """Fit a in P(first ≻ second) = σ(a·gap) by maximum likelihood; its SE is clustered by prompt.

    Args:
        gap_N: (N,) float64, s(first) − s(second) of each pair, in score units.
        preferred_N: (N,) bool, whether people preferred the first.
        prompt_N: (N,) the prompt of each pair, the unit of replication.
        name: Name of the scorer, for messages.

    Raises:
        DataError: There is nothing to fit, every pair is ordered right (a is unbounded), or a's 95 % interval is not
            above 0.
    """
    margin_N = np.where(preferred_N, gap_N, -gap_N)  # positive where the score agrees with people
    prompts, cluster_N = np.unique(prompt_N, return_inverse=True)
    if reason := _nothing_to_fit(margin_N, len(prompts)):
        raise DataError(
            f"scorer {name!r}: cannot be calibrated: {reason}. Bring more preferences, raise "
            "label.validation_fraction, or leave out calibrate."
        )
    accuracy = float(np.mean(0.5 + 0.5 * np.sign(margin_N)))
    scale = _maximise(margin_N)
    residual_N = expit(-scale * margin_N) * margin_N
    curvature = float((expit(scale * margin_N) * expit(-scale * margin_N) * margin_N**2).sum())
    se = float(np.sqrt((np.bincount(cluster_N, weights=residual_N) ** 2).sum()) / curvature)
    low, high = scale - Z_95 * se, scale + Z_95 * se
    if not low > 0:
        raise DataError(
            f"scorer {name!r}: its policy does not order people's preferences: {accuracy:.1%} of {margin_N.size} "
            f"held-out pairs are ordered right, and the 95 % interval of a is {low:.3g} to {high:.3g}, expected above "
            "0. Train it longer or on more preferences, check its criterion, or raise label.validation_fraction."
        )
    losses = [float(np.logaddexp(0.0, -a * margin_N).mean()) for a in (1.0, scale)]
    return Calibration(scale, se, int(margin_N.size), len(prompts), accuracy, *losses)


def _nothing_to_fit(margin_N: np.ndarray, num_prompts: int) -> str:
    """Return why no finite a can be fitted, or ''."""
    if num_prompts < 2:
        return f"{margin_N.size} held-out pair(s) of {num_prompts} prompt(s) are too few"
    if not margin_N.any():
        return f"the scores of both responses are equal in each of {margin_N.size} held-out pairs"
    if (margin_N >= 0).all() or (margin_N <= 0).all():
        kind = "right, so the larger a the better" if (margin_N >= 0).all() else "wrong"
        return f"each of {margin_N.size} held-out pairs is ordered {kind}"
    return ""


def _maximise(margin_N: np.ndarray) -> float:
    """Maximise the concave Σ ln σ(a·margin) over a by Newton's method, halving steps that overshoot."""
    unit = float(np.abs(margin_N).max())
    x_N = margin_N / unit
    a = 0.0
    value = np.logaddexp(0.0, -a * x_N).sum()
    for _ in range(MAX_STEPS):
        slope = (expit(-a * x_N) * x_N).sum()
        step = slope / (expit(a * x_N) * expit(-a * x_N) * x_N**2).sum()
        while (after := np.logaddexp(0.0, -(a + step) * x_N).sum()) > value + 1e-12 * abs(value):
            step /= 2
        a, value = a + step, after
        if abs(step) <= 1e-12 * max(1.0, abs(a)):
            break
    return float(a / unit)


def _held_out_pairs(work: Workspace, name: str, preferences: Artifact) -> Artifact:
    """Return the responses of the validation pairs as a table to score: two rows per pair, with people's choice."""
    stage = work.open("pairs", f"held-out pairs of {name}", {}, {"preferences": preferences})
    if stage.finished:
        return stage.finished
    table = preferences.table.filter(pc.equal(preferences.table.column("split"), "validation"))
    if not table.num_rows:
        raise DataError(
            f"scorer {name!r}: cannot be calibrated: none of {preferences.table.num_rows} pairs is held out. Raise "
            "label.validation_fraction, bring more preferences, or leave out calibrate."
        )
    rows: list[dict[str, Any]] = [
        {
            "prompt_id": pair["prompt_id"],
            "response_id": response_id,
            "messages": pair["messages"],
            "text": text,
            "token_ids": tokens,
            "num_tokens": len(tokens),
            "finish_reason": "given",
            "preferred": int(target > 0.5),
        }
        for pair in table.to_pylist()
        for response_id, text, tokens, target in zip(
            pair["response_ids"], pair["texts"], pair["token_ids"], pair["target"], strict=True
        )
    ]
    schema = pa.schema([*RESPONSES, ("preferred", pa.int8())])
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=schema))
    return stage.commit()
