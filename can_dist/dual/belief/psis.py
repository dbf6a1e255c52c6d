"""The tail of importance weights: generalised Pareto shape k̂ by Zhang and Stephens, as in PSIS (Vehtari et al.).

k̂ < 0.5: the weights have a variance and means under them converge as usual. k̂ > 0.7: they are set by a few rare values
and more responses will change them.
"""

from __future__ import annotations

import math

import numpy as np

from can_dist.dual.columns import largest_of
from can_dist.dual.table import FloatArray, ScoreTable

MIN_TAIL = 5
"""Fewest exceedances a shape is fitted to."""

_PRIOR_WEIGHT = 10.0


def pareto_shape(exceedance_BM: FloatArray) -> FloatArray:
    """Return k̂ of each row of M exceedances over a threshold, smallest first; NaN where they do not vary.

    The profile posterior mean of Zhang and Stephens (2009) with the weak prior towards 0.5 that PSIS adds.
    """
    num_rows, size = exceedance_BM.shape
    shape = np.full(num_rows, math.nan)
    if size < MIN_TAIL:
        return shape
    valid = (exceedance_BM[:, -1] > 0) & (exceedance_BM[:, -1] > exceedance_BM[:, 0])
    value_BM = exceedance_BM[valid]
    if not valid.any():
        return shape
    num_grid = 30 + int(math.sqrt(size))
    quarter = value_BM[:, int(size / 4 + 0.5) - 1]
    top = value_BM[:, -1]
    quarter = np.where(quarter > 0, quarter, top * 1e-12)
    index = np.arange(1, num_grid + 1)
    grid_BG = 1 / top[:, None] + (1 - np.sqrt(num_grid / (index - 0.5))) / (3 * quarter[:, None])
    k_BG = np.log1p(-grid_BG[:, :, None] * value_BM[:, None, :]).mean(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_likelihood = size * (np.log(-grid_BG / k_BG) - k_BG - 1)
    log_likelihood = np.where(np.isfinite(log_likelihood), log_likelihood, -np.inf)
    weight_BG = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    weight_BG /= weight_BG.sum(axis=1, keepdims=True)
    slope = (grid_BG * weight_BG).sum(axis=1)
    fitted = np.log1p(-slope[:, None] * value_BM).mean(axis=1)
    shape[valid] = (fitted * size + _PRIOR_WEIGHT * 0.5) / (size + _PRIOR_WEIGHT)
    return shape


def tail_size(count: int) -> int:
    """Return how many of ``count`` weights are the tail: min(count/5, 3√count)."""
    return int(min(count / 5, 3 * math.sqrt(count)))


def prompt_shapes(table: ScoreTable, weight_N: FloatArray) -> FloatArray:
    """Return k̂ of the weights of each prompt, NaN where the tail has fewer than five of them; shape (P,)."""
    shape_P = np.full(table.num_prompts, math.nan)
    for count in np.unique(table.num_responses_P).tolist():
        size = tail_size(count)
        if size < MIN_TAIL:
            continue
        prompts = np.flatnonzero(table.num_responses_P == count)
        for chunk in np.array_split(prompts, max(1, prompts.size * size // 100_000)):
            rows = table.start_P[chunk][:, None] + np.arange(count)
            ordered = np.sort(weight_N[rows], axis=1)
            shape_P[chunk] = pareto_shape(ordered[:, -size:] - ordered[:, -size - 1 : -size])
    return shape_P


def pooled_shape(table: ScoreTable, weight_N: FloatArray) -> float:
    """Return k̂ of the density ratios w_ik/π_ref(k) of all prompts together: what one prompt's K cannot show."""
    return tail_shape(weight_N * np.exp(-table.log_weight_N))


def tail_shape(value_N: FloatArray) -> float:
    """Return k̂ of the largest of N positive values taken as one sample; NaN where they are too few."""
    return shape_above(largest_of(value_N, pooled_tail_size(value_N.size) + 1), value_N.size)


def pooled_tail_size(count: int) -> int:
    """Return how many of ``count`` weights of all prompts are the tail: the rule of a sample, and at most 5,000."""
    return min(tail_size(count), 5_000)


def shape_above(largest_M: FloatArray, count: int) -> float:
    """Return k̂ of a sample of ``count`` values of which the tail and its threshold are given, ascending."""
    if pooled_tail_size(count) < MIN_TAIL:
        return math.nan
    return float(pareto_shape((largest_M[1:] - largest_M[0])[None, :])[0])
