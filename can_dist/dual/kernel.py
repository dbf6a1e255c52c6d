"""The fused pass: one visit of every score, all cores, no array of the table's size (numba).

Chosen over torch and over NumPy in blocks by measurement (benchmarks/results/dual_scale.md): torch has no fused form
of these sums and writes several arrays of the table's size; NumPy in cache-sized blocks is about as fast on one core
but shares out badly over several. :mod:`can_dist.dual.objective` is the readable form of the same sums, and what
tests compare these with.

A *column* is a 1-D float32 or float64 array of raw scores, rows of a prompt side by side; column 0 is the reward, the
others the utilities. Everything is centred per prompt and summed in float64. Prompts are taken in chunks of a fixed
size, so the result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Columns = tuple[npt.NDArray[Any], ...]

CHUNK = 128
"""Prompts per unit of work."""

# sums may be reordered and multiplications fused; infinities and NaNs keep their meaning
_MATH = {"reassoc", "contract", "nsz", "arcp"}
_ROUNDING = 8 * np.finfo(np.float64).eps


def _compiled(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, fastmath=_MATH, inline="never")(function)


def _parallel(function: Any) -> Any:
    return numba.njit(cache=True, nogil=True, fastmath=_MATH, parallel=True)(function)


@_compiled
def _centre(column_N: Any, begin: int, end: int, scale: float, out_K: FloatArray) -> float:
    """Write the scores of one prompt, scaled, minus their mean; returns the mean. Equal scores become exact zeros."""
    first = column_N[begin] * scale  # differences keep the digits that a large common part would cost
    total = low = high = 0.0
    count = end - begin
    for k in range(count):
        value = column_N[begin + k] * scale - first
        out_K[k] = value
        total += value
        low, high = min(low, value), max(high, value)
    if high - low <= _ROUNDING * max(abs(first + low), abs(first + high)):
        for k in range(count):
            out_K[k] = 0.0
        return float(first)
    mean = total / count
    for k in range(count):
        out_K[k] -= mean
    return float(first + mean)


@_compiled
def _load(columns: Columns, begin: int, end: int, scale_C: FloatArray, out_CK: FloatArray, mean_C: FloatArray) -> None:
    for c in range(len(columns)):
        mean_C[c] = _centre(columns[c], begin, end, scale_C[c], out_CK[c])


@_compiled
def _tilt(score_CK: FloatArray, count: int, lam_J: FloatArray, beta: float, weight_K: FloatArray) -> float:
    """Write w_k = softmax_k((r + ⟨λ,g⟩)/β); returns ln Σ_k exp(...)/K."""
    for k in range(count):
        weight_K[k] = score_CK[0, k]
    for j in range(lam_J.shape[0]):
        for k in range(count):
            weight_K[k] += lam_J[j] * score_CK[j + 1, k]
    peak = -np.inf
    for k in range(count):
        weight_K[k] /= beta
        peak = max(peak, weight_K[k])
    total = 0.0
    for k in range(count):
        weight_K[k] = np.exp(weight_K[k] - peak)
    for k in range(count):
        total += weight_K[k]
    for k in range(count):
        weight_K[k] /= total
    return float(peak + np.log(total / count))


@_compiled
def _mean(weight_K: FloatArray, value_K: FloatArray, count: int) -> float:
    total = 0.0
    for k in range(count):
        total += weight_K[k] * value_K[k]
    return total


@_parallel
def survey(start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int) -> tuple[FloatArray, FloatArray]:
    """Describe the table once, per prompt.

    Args:
        start_Q: first row of each prompt, and the number of rows at the end, shape (P+1,).
        columns: reward and utilities, each (N,).
        scale_C: factor of each column.
        longest: largest number of responses of a prompt.

    Returns:
        Per prompt and column its mean, its largest and its smallest centred score, shape (P, C, 3); per prompt the
        unbiased covariance of the columns within it, shape (P, C, C), zero for a single response.
    """
    num_prompts, num_columns = start_Q.shape[0] - 1, len(columns)
    stats_PC3 = np.empty((num_prompts, num_columns, 3))
    covariance_PCC = np.empty((num_prompts, num_columns, num_columns))
    for chunk in numba.prange((num_prompts + CHUNK - 1) // CHUNK):
        score_CK = np.empty((num_columns, longest))
        mean_C = np.empty(num_columns)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            for c in range(num_columns):
                top = low = score_CK[c, 0]
                for k in range(count):
                    top, low = max(top, score_CK[c, k]), min(low, score_CK[c, k])
                stats_PC3[i, c, 0], stats_PC3[i, c, 1], stats_PC3[i, c, 2] = mean_C[c], top, low
                for d in range(c + 1):
                    total = _mean(score_CK[c], score_CK[d], count) / max(count - 1, 1)
                    covariance_PCC[i, c, d] = covariance_PCC[i, d, c] = total
    return stats_PC3, covariance_PCC


@_parallel
def newton_sums(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float
) -> FloatArray:
    """Sum over prompts what one Newton step needs (docs/dual.md, 3 and 4).

    Returns:
        Σ_i of ln of the mean of exp((r+⟨λ,g⟩)/β), of E_w g (J numbers) and of Cov_w(g) (J² numbers), for each chunk of
        prompts: shape (chunks, 1 + J + J²).
    """
    num_prompts, num_constraints = start_Q.shape[0] - 1, len(columns) - 1
    num_chunks = (num_prompts + CHUNK - 1) // CHUNK
    sums = np.zeros((num_chunks, 1 + num_constraints + num_constraints**2))
    for chunk in numba.prange(num_chunks):
        score_CK = np.empty((num_constraints + 1, longest))
        weight_K, weighted_K = np.empty(longest), np.empty(longest)
        mean_C = np.empty(num_constraints + 1)
        total = np.zeros(sums.shape[1])
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            total[0] += _tilt(score_CK, count, lam_J, beta, weight_K)
            for j in range(num_constraints):
                mean = _mean(weight_K, score_CK[j + 1], count)
                total[1 + j] += mean
                for k in range(count):
                    score_CK[j + 1, k] -= mean
            for j in range(num_constraints):
                for k in range(count):
                    weighted_K[k] = weight_K[k] * score_CK[j + 1, k]
                for other in range(j + 1):
                    shared = _mean(weighted_K, score_CK[other + 1], count)
                    total[1 + num_constraints + j * num_constraints + other] += shared
                    if other < j:
                        total[1 + num_constraints + other * num_constraints + j] += shared
        sums[chunk] = total
    return sums


@_parallel
def best_sums(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, mixture_J: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Sum the utilities of each prompt's response with the largest ⟨v,g⟩ (the first of equals).

    Returns:
        The sums of each chunk of prompts, shape (chunks, J), and its largest |⟨v,g⟩|, shape (chunks,).
    """
    num_prompts, num_constraints = start_Q.shape[0] - 1, len(columns) - 1
    num_chunks = (num_prompts + CHUNK - 1) // CHUNK
    sums, largest = np.zeros((num_chunks, num_constraints)), np.zeros(num_chunks)
    for chunk in numba.prange(num_chunks):
        score_CK = np.empty((num_constraints + 1, longest))
        mean_C = np.empty(num_constraints + 1)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            best, best_value = 0, -np.inf
            for k in range(start_Q[i + 1] - start_Q[i]):
                value = 0.0
                for j in range(num_constraints):
                    value += mixture_J[j] * score_CK[j + 1, k]
                largest[chunk] = max(largest[chunk], abs(value))
                if value > best_value:
                    best, best_value = k, value
            for j in range(num_constraints):
                sums[chunk, j] += score_CK[j + 1, best]
    return sums, largest


@_parallel
def tilted_means(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float
) -> FloatArray:
    """Return, per prompt, E_w of every centred column, KL(w‖π_ref) and 1/Σw², shape (P, C + 2)."""
    num_prompts, num_columns = start_Q.shape[0] - 1, len(columns)
    means = np.empty((num_prompts, num_columns + 2))
    for chunk in numba.prange((num_prompts + CHUNK - 1) // CHUNK):
        score_CK, mean_C = np.empty((num_columns, longest)), np.empty(num_columns)
        weight_K = np.empty(longest)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            log_norm = _tilt(score_CK, count, lam_J, beta, weight_K)
            tilted = 0.0
            for c in range(num_columns):
                mean = _mean(weight_K, score_CK[c], count)
                means[i, c] = mean
                tilted += mean if c == 0 else lam_J[c - 1] * mean
            means[i, num_columns] = max(tilted / beta - log_norm, 0.0)
            means[i, num_columns + 1] = 1.0 / _mean(weight_K, weight_K, count)
    return means
