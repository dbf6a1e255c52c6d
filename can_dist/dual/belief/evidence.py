"""How many responses a prediction rests on: spread within prompts, carriers of the bias, tail of the weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from can_dist.dual.belief.psis import pooled_tail_size, shape_above, tail_shape
from can_dist.dual.columns import ColumnScores, largest_of
from can_dist.dual.estimators import within_covariance
from can_dist.dual.objective import tilt
from can_dist.dual.table import FloatArray


@dataclass(frozen=True)
class Evidence:
    """What the weights at one λ rest on, arrays in the order of the constraints.

    Attributes:
        variance_JP: variance of each utility within each prompt, unbiased.
        carriers_J: responses that carry the bias of order 1/K: (Σ c)²/Σ c² with c = |g| exp(2 s/β), s and g less their
            prompt's means.
        own_carriers_J: the same with c = |g| (w K)², the density ratios by each prompt's own normaliser.
        shape: pooled Pareto k̂ of exp(s/β).
    """

    variance_JP: FloatArray
    carriers_J: FloatArray
    own_carriers_J: FloatArray
    shape: float


@functools.singledispatch
def weigh_evidence(table: Any, lam_J: FloatArray, beta: float) -> Evidence:
    """Measure what π_λ rests on; for a ``ScoreTable`` of sampled responses, or ``ColumnScores``."""
    score_N = table.score(lam_J) / beta
    log_ratio_N = tilt(table, lam_J, beta).log_ratio_N
    carriers_J, own_carriers_J = (
        np.array([_carriers(value_N, column_N) for column_N in table.utility_JN]) for value_N in (score_N, log_ratio_N)
    )
    variance_JP = np.array([within_covariance(table, column_N, column_N) for column_N in table.utility_JN])
    return Evidence(variance_JP, carriers_J, own_carriers_J, tail_shape(np.exp(score_N - score_N.max())))


@weigh_evidence.register
def _column_evidence(table: ColumnScores, lam_J: FloatArray, beta: float) -> Evidence:
    size = pooled_tail_size(table.num_rows) + 1
    tail_M = largest_of(table.ask("tail", lam_J, beta, size).rows[:, 0], size)
    peak = float(tail_M[-1])
    answer = table.ask("carriers", lam_J, beta, peak)
    sums_J4 = answer.sums.reshape(-1, 4)
    with np.errstate(invalid="ignore"):
        carriers_J, own_carriers_J = (np.nan_to_num(sums_J4[:, at] ** 2 / sums_J4[:, at + 1]) for at in (0, 2))
    return Evidence(answer.rows.T, carriers_J, own_carriers_J, shape_above(np.exp(tail_M - peak), table.num_rows))


def _carriers(score_N: FloatArray, column_N: FloatArray) -> float:
    """Return (Σ c)²/Σ c² of c = |g| exp(2s), in logarithms."""
    with np.errstate(divide="ignore"):
        log_N = 2 * score_N + np.log(np.abs(column_N))
    if not np.isfinite(log_N).any():
        return 0.0
    return float(np.exp(2 * logsumexp(log_N) - logsumexp(2 * log_N)))
