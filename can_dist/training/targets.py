"""Scores → targets: what a loss is told of the responses of one example (CAN, arXiv 2405.19544, eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def combined_score(reward_N: FloatArray, utility_NJ: FloatArray, lam_J: Sequence[float]) -> FloatArray:
    """Return s = r + ⟨λ, g⟩ of every response, (N,), summed in the order of the constraints."""
    total_N = reward_N
    for utility_N, lam in zip(utility_NJ.T, lam_J, strict=True):
        total_N = total_N + lam * utility_N
    return total_N


def score_targets(loss: str, score_N: Sequence[float] | FloatArray, beta: float = 1.0) -> list[float]:
    """Return one target per response of an example; with them the loss has the minimiser π ∝ π_ref exp(s/β).

    Args:
        loss: ``sigmoid``: (p, 1 − p) with p = σ(s_a − s_b); ``regression``: the scores; ``pairwise``: the scores less
            the best, since only differences count and float32 holds small numbers better; ``listwise``: softmax(s/β).
        score_N: s of each response, two for ``sigmoid``.
        beta: KL weight β, of ``listwise`` alone: the other losses have it in their log-ratios.
    """
    score = np.asarray(score_N, dtype=np.float64)
    if loss in ("regression", "pairwise"):
        return [float(value) for value in (score if loss == "regression" else score - score.max())]
    if loss == "sigmoid":
        p = float(0.5 * (1.0 + np.tanh(0.5 * (score[0] - score[1]))))  # never overflows
        return [p, 1.0 - p]
    assert loss == "listwise", loss
    logit = score / beta
    weight = np.exp(logit - logit.max())
    targets: list[float] = (weight / weight.sum()).tolist()
    return targets
