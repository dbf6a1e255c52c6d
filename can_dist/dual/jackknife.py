"""The jackknife of the tilted means: no bias of order 1/K, by leaving one response out (docs/estimators.md, 8)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np

from can_dist.dual.moments import PromptMoments, prompt_moments
from can_dist.dual.objective import BLOCK_ROWS, tilt
from can_dist.dual.table import FloatArray, ScoreTable

LEAST_REST = 1e-12
"""Least 1 − w: what is left of the weights without a response that has all of them."""


@functools.singledispatch
def both_moments(table: Any, lam_J: FloatArray, beta: float) -> tuple[PromptMoments, PromptMoments]:
    """Return the moments of every prompt under π_λ as the paper's estimator and as the jackknife sees them.

    This is the form for a ``ScoreTable``; :mod:`can_dist.dual.columns` registers the one for ``ColumnScores``.
    """
    moments = prompt_moments(table, lam_J, beta)
    return moments, jackknife_moments(table, lam_J, beta, moments)


@functools.singledispatch
def gain_and_slope(table: Any, lam_J: FloatArray, beta: float) -> tuple[FloatArray, FloatArray]:
    """Return the jackknifed improvement under π_λ, mean over prompts (J,), and its derivative by λ (J, J).

    With o_k = w_k/(1 − w_k), h centred on its mean m under w, and V = Cov_w(g), the derivative of
    m + ((K−1)/K) Σ o_k h_k is V/β + ((K−1)/(Kβ)) Σ_k [o_k h_k h_kᵀ/(1 − w_k) − o_k V].
    For both kinds of tables, as :func:`both_moments`.
    """
    parts = [_block_slope(block, lam_J, beta) for block in table.blocks(BLOCK_ROWS)]
    gain_J, slope_JJ = (np.sum([part[at] for part in parts], axis=0) for at in (0, 1))
    return gain_J / table.num_prompts, slope_JJ / table.num_prompts


def _block_slope(table: ScoreTable, lam_J: FloatArray, beta: float) -> tuple[FloatArray, FloatArray]:
    weight_N = tilt(table, lam_J, beta).weight_N
    rest_N = np.maximum(1.0 - weight_N, LEAST_REST)
    odds_N = weight_N / rest_N
    odds_P, factor_P = table.sum_rows(odds_N), (table.num_responses_P - 1) / table.num_responses_P
    mean_JP = np.array([table.sum_rows(weight_N * column_N) for column_N in table.utility_JN])
    deviation_JN = [column_N - table.spread(mean_P) for column_N, mean_P in zip(table.utility_JN, mean_JP, strict=True)]
    gain_J, slope_JJ = np.zeros(lam_J.size), np.zeros((lam_J.size, lam_J.size))
    for a, first_N in enumerate(deviation_JN):
        gain_J[a] = (mean_JP[a] + factor_P * table.sum_rows(odds_N * first_N)).sum()
        for b, second_N in enumerate(deviation_JN[: a + 1]):
            product_N = first_N * second_N
            shared_P = table.sum_rows(weight_N * product_N)
            left_P = table.sum_rows(odds_N / rest_N * product_N) - odds_P * shared_P
            slope_JJ[a, b] = slope_JJ[b, a] = (shared_P + factor_P * left_P).sum() / beta
    return gain_J, slope_JJ


def jackknife_moments(table: ScoreTable, lam_J: FloatArray, beta: float, empirical: PromptMoments) -> PromptMoments:
    """Return the moments with their 1/K bias removed: m_J = K m − (K−1) mean_k m_{−k}.

    For m = Σ_k w_k h_k, m_{−k} = (m − w_k h_k)/(1 − w_k), so m_J = m + ((K−1)/K) Σ_k w_k (h_k − m)/(1 − w_k); the log
    normaliser loses ln(1 − w_k) and ln K becomes ln(K−1). The covariances stay the empirical ones.
    """
    tilted = tilt(table, lam_J, beta)
    count_P = table.num_responses_P.astype(np.float64)
    factor_P = (count_P - 1) / count_P
    gain_PJ = np.empty_like(empirical.gain_PJ)
    for j, column_N in enumerate(table.utility_JN):
        gain_PJ[:, j] = jackknife_mean(table, tilted.weight_N, column_N)
    rest_N = np.maximum(1.0 - tilted.weight_N, LEAST_REST)
    several = table.num_responses_P > 1
    lost_P = np.where(several, table.sum_rows(np.log(rest_N)), 0.0)
    shrunk_P = np.where(several, count_P * np.log(np.maximum(count_P - 1, 1) / count_P), 0.0)
    log_norm_P = empirical.log_norm_P - factor_P * (lost_P - shrunk_P)
    score_N = tilted.log_ratio_N + table.spread(tilted.log_norm_P)
    return replace(
        empirical,
        gain_PJ=gain_PJ,
        reward_gain_P=jackknife_mean(table, tilted.weight_N, table.reward_N),
        kl_P=jackknife_mean(table, tilted.weight_N, score_N) - log_norm_P,
        log_norm_P=log_norm_P,
    )


def jackknife_mean(table: ScoreTable, weight_N: FloatArray, value_N: FloatArray) -> FloatArray:
    """Return Σ_k w_k h_k of each prompt without its bias of order 1/K, for weights that sum to 1; shape (P,)."""
    mean_P = table.sum_rows(weight_N * value_N)
    odds_N = weight_N / np.maximum(1.0 - weight_N, LEAST_REST)
    deviation_N: FloatArray = value_N - table.spread(mean_P)
    factor_P: FloatArray = (table.num_responses_P - 1) / table.num_responses_P
    return mean_P + factor_P * table.sum_rows(odds_N * deviation_N)
