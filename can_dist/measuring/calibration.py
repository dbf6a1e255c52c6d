"""How often a scorer is right, and whether it is as sure as it is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

FloatArray = npt.NDArray[np.float64]

NUM_BINS = 10


def wilson(right: float, number: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share of ``right`` among ``number`` independent trials (Wilson 1927)."""
    z2 = float(ndtri(0.5 + confidence / 2)) ** 2
    share = right / number
    centre, reach = share + z2 / (2 * number), (z2 * (share * (1 - share) + z2 / (4 * number)) / number) ** 0.5
    return (centre - reach) / (1 + z2 / number), (centre + reach) / (1 + z2 / number)


def reliability(logit_N: FloatArray, label_N: FloatArray) -> dict[str, Any]:
    """Return accuracy with its interval, and the expected calibration error of σ(logit) with its bins.

    A row is right where its logit has the side of its label; a logit of 0 counts half. Its confidence is
    σ(|logit|), from ½ to 1, in NUM_BINS bins of equal width; the error is Σ_b n_b/N |right_b − confidence_b| (Guo et
    al., arXiv 1706.04599, eq. 3).

    Args:
        logit_N: For pairs the difference of two scores, for labelled responses the score.
        label_N: 1 or 0: what the logit should be above 0 for.
    """
    number = logit_N.shape[0]
    right_N = 0.5 + 0.5 * np.sign(logit_N) * (2.0 * label_N - 1.0)
    confidence_N = 1.0 / (1.0 + np.exp(-np.abs(logit_N)))
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = [
        {
            "from": 0.5 + index / (2 * NUM_BINS),
            "number": int((bin_N == index).sum()),
            "confidence": float(confidence_N[bin_N == index].mean()),
            "right": float(right_N[bin_N == index].mean()),
        }
        for index in sorted(set(bin_N.tolist()))
    ]
    low, high = wilson(float(right_N.sum()), number)
    ece = sum(entry["number"] / number * abs(entry["right"] - entry["confidence"]) for entry in bins)
    return {"number": number, "accuracy": float(right_N.mean()), "low": low, "high": high, "ece": ece, "bins": bins}
