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

LEAST_REST = 1e-12
"""Least 1 − w of a jackknife: what is left of the weights without a response that has all of them."""

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


@_compiled
def _leave_out(weight_K: FloatArray, value_K: FloatArray, count: int, mean: float) -> float:
    """Return what leaving one response out adds to the tilted mean (docs/estimators.md, 8)."""
    total = 0.0
    for k in range(count):
        total += weight_K[k] / max(1.0 - weight_K[k], LEAST_REST) * (value_K[k] - mean)
    return total * (count - 1) / count


@_parallel
def jackknife_sums(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float
) -> FloatArray:
    """Sum over prompts E_w g without its bias of order 1/K, and its derivative by λ (docs/estimators.md, 8).

    Returns:
        J and J² numbers for each chunk of prompts, shape (chunks, J + J²).
    """
    num_prompts, num_constraints = start_Q.shape[0] - 1, len(columns) - 1
    num_chunks = (num_prompts + CHUNK - 1) // CHUNK
    sums = np.zeros((num_chunks, num_constraints + num_constraints**2))
    for chunk in numba.prange(num_chunks):
        score_CK, mean_C = np.empty((num_constraints + 1, longest)), np.empty(num_constraints + 1)
        weight_K = np.empty(longest)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            _tilt(score_CK, count, lam_J, beta, weight_K)
            factor, odds = (count - 1) / count, 0.0
            for k in range(count):
                odds += weight_K[k] / max(1.0 - weight_K[k], LEAST_REST)
            for j in range(num_constraints):
                mean = _mean(weight_K, score_CK[j + 1], count)
                sums[chunk, j] += mean + _leave_out(weight_K, score_CK[j + 1], count, mean)
                for k in range(count):
                    score_CK[j + 1, k] -= mean
            for j in range(num_constraints):
                for other in range(j + 1):
                    shared = left = 0.0
                    for k in range(count):
                        product = weight_K[k] * score_CK[j + 1, k] * score_CK[other + 1, k]
                        shared += product
                        left += product / max(1.0 - weight_K[k], LEAST_REST) ** 2
                    slope = (shared + factor * (left - odds * shared)) / beta
                    sums[chunk, num_constraints + j * num_constraints + other] += slope
                    if other < j:
                        sums[chunk, num_constraints + other * num_constraints + j] += slope
    return sums


@_parallel
def moments(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float
) -> FloatArray:
    """Return what statistics over prompts are made of, one row per prompt, shape (P, 2 (C + 2) + 1 + J (J + 1)).

    Under w: E_w of every centred column, KL(w‖π_ref), ln of the mean of exp((r+⟨λ,g⟩)/β), 1/Σw²; the first three
    again, jackknifed; Cov_w(g) row by row; Cov_w(r, g).
    """
    num_prompts, num_columns = start_Q.shape[0] - 1, len(columns)
    num_constraints, again, rest = num_columns - 1, num_columns + 3, 2 * num_columns + 5
    rows = np.empty((num_prompts, rest + num_constraints * (num_constraints + 1)))
    for chunk in numba.prange((num_prompts + CHUNK - 1) // CHUNK):
        score_CK, mean_C = np.empty((num_columns, longest)), np.empty(num_columns)
        weight_K, weighted_K = np.empty(longest), np.empty(longest)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            log_norm = _tilt(score_CK, count, lam_J, beta, weight_K)
            tilted = corrected = lost = 0.0
            for c in range(num_columns):
                factor = (1.0 if c == 0 else lam_J[c - 1]) / beta
                mean = _mean(weight_K, score_CK[c], count)
                unbiased = mean + _leave_out(weight_K, score_CK[c], count, mean)
                rows[i, c], rows[i, again + c] = mean, unbiased
                tilted += factor * mean
                corrected += factor * unbiased
            for k in range(count):
                lost += np.log(max(1.0 - weight_K[k], LEAST_REST))
            if count > 1:
                lost -= count * np.log((count - 1) / count)
            rest_norm = log_norm - lost * (count - 1) / count
            rows[i, num_columns], rows[i, again + num_columns] = max(tilted - log_norm, 0.0), corrected - rest_norm
            rows[i, num_columns + 1], rows[i, again + num_columns + 1] = log_norm, rest_norm
            rows[i, num_columns + 2] = 1.0 / _mean(weight_K, weight_K, count)
            for c in range(1, num_columns):
                for k in range(count):
                    weighted_K[k] = weight_K[k] * (score_CK[c, k] - rows[i, c])
                for d in range(num_columns):
                    shared = _mean(weighted_K, score_CK[d], count)
                    if d == 0:
                        rows[i, rest + num_constraints**2 + c - 1] = shared
                    else:
                        rows[i, rest + (c - 1) * num_constraints + d - 1] = max(shared, 0.0) if c == d else shared
    return rows


@_parallel
def scores(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float
) -> FloatArray:
    """Return (r + ⟨λ,g⟩)/β of every response less its prompt's mean, shape (N,)."""
    num_prompts, num_columns = start_Q.shape[0] - 1, len(columns)
    score_N = np.empty(start_Q[num_prompts])
    for chunk in numba.prange((num_prompts + CHUNK - 1) // CHUNK):
        score_CK, mean_C = np.empty((num_columns, longest)), np.empty(num_columns)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            for k in range(start_Q[i + 1] - start_Q[i]):
                total = score_CK[0, k]
                for j in range(num_columns - 1):
                    total += lam_J[j] * score_CK[j + 1, k]
                score_N[start_Q[i] + k] = total / beta
    return score_N


@_parallel
def carrier_sums(
    start_Q: IntArray, columns: Columns, scale_C: FloatArray, longest: int, lam_J: FloatArray, beta: float, peak: float
) -> tuple[FloatArray, FloatArray]:
    """Sum what tells how many responses carry the bias of order 1/K (docs/estimators.md, "What a table can vouch for").

    Returns:
        Σc and Σc² of every utility for each chunk of prompts, c = |g| exp(2(s − ``peak``)) and then c = |g| (w K)²,
        shape (chunks, 4 J); and the unbiased variance of each utility within each prompt, shape (P, J).
    """
    num_prompts, num_constraints = start_Q.shape[0] - 1, len(columns) - 1
    num_chunks = (num_prompts + CHUNK - 1) // CHUNK
    sums, variance_PJ = np.zeros((num_chunks, 4 * num_constraints)), np.empty((num_prompts, num_constraints))
    for chunk in numba.prange(num_chunks):
        score_CK, mean_C = np.empty((num_constraints + 1, longest)), np.empty(num_constraints + 1)
        weight_K = np.empty(longest)
        for i in range(chunk * CHUNK, min(num_prompts, (chunk + 1) * CHUNK)):
            count = start_Q[i + 1] - start_Q[i]
            _load(columns, start_Q[i], start_Q[i + 1], scale_C, score_CK, mean_C)
            log_norm = _tilt(score_CK, count, lam_J, beta, weight_K)
            for j in range(num_constraints):
                variance_PJ[i, j] = _mean(score_CK[j + 1], score_CK[j + 1], count) / max(count - 1, 1)
                for k in range(count):
                    size, own = abs(score_CK[j + 1, k]), weight_K[k] * count
                    shared = own * np.exp(log_norm - peak)
                    sums[chunk, 4 * j] += size * shared**2
                    sums[chunk, 4 * j + 1] += (size * shared**2) ** 2
                    sums[chunk, 4 * j + 2] += size * own**2
                    sums[chunk, 4 * j + 3] += (size * own**2) ** 2
    return sums, variance_PJ
