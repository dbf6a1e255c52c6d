"""Pairwise win rates from paired scores, and Bradley–Terry strengths with intervals.

M methods on the same P prompts, R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError, DataError, NumericalError

MAX_STEPS = 200
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Ranking:
    """Pairwise results and strengths.

    Attributes:
        names: the methods, in the order given.
        win_MM: share of prompts on which the row's method scores above the column's, ties ½; NaN on the diagonal.
        strength_M: Bradley–Terry log-odds, mean 0: i beats j with probability σ(strength_i − strength_j). In Elo points
            it is 400/ln 10 ≈ 174 times as much.
        low_M: lower end of the 95 % percentile interval over prompts.
        high_M: upper end.
    """

    names: tuple[str, ...]
    win_MM: FloatArray
    strength_M: FloatArray
    low_M: FloatArray
    high_M: FloatArray


def rank_methods(
    score_P_by_method: Mapping[str, npt.ArrayLike], *, num_replicates: int = 1000, seed: int = 0
) -> Ranking:
    """Compare every two methods prompt by prompt and rate all of them, with a bootstrap over prompts.

    Every pair gets one imaginary tied prompt. So a method that never loses has a finite strength, about ln(2P + 1)
    above one it always beats, and other strengths move by O(1/P) towards each other.

    Args:
        score_P_by_method: name → score of each prompt, the same prompts in the same order; higher is better.
        num_replicates: resamples of the prompts, at least 2.
        seed: of the resampling.

    Raises:
        DataError: fewer than 2 methods or 2 prompts, different numbers of prompts, or a score that is not finite.
        ConfigError: num_replicates is below 2.
        NumericalError: the strengths did not converge.
    """
    if num_replicates < 2:
        raise ConfigError(f"num_replicates = {num_replicates}: expected at least 2.")
    score_MP = _checked(score_P_by_method)
    num_methods, num_prompts = score_MP.shape
    win_PMM = 0.5 + 0.5 * np.sign(score_MP.T[:, :, None] - score_MP.T[:, None, :])
    win_MM = win_PMM.mean(axis=0)

    count_RP = np.random.default_rng(seed).multinomial(
        num_prompts, np.full(num_prompts, 1.0 / num_prompts), size=num_replicates
    )
    wins_RMM = (count_RP @ win_PMM.reshape(num_prompts, -1)).reshape(-1, num_methods, num_methods)
    strength_RM = bradley_terry(wins_RMM + 0.5)
    low_M, high_M = np.quantile(strength_RM, [0.025, 0.975], axis=0)
    strength_M = bradley_terry(num_prompts * win_MM[None] + 0.5)[0]
    np.fill_diagonal(win_MM, np.nan)
    return Ranking(tuple(score_P_by_method), win_MM, strength_M, low_M, high_M)


def bradley_terry(wins_RMM: FloatArray) -> FloatArray:
    """Return the maximum-likelihood strengths of each replicate, mean 0, shape (R, M).

    Maximises Σ_{i≠j} w_ij ln σ(s_i − s_j) by Newton's method with steps of at most 1; the likelihood is concave. Every
    pair needs wins on both sides, else a strength may be infinite.

    Args:
        wins_RMM: wins of the row over the column, a tie as ½ on both sides; the diagonal is ignored.

    Raises:
        DataError: a pair with wins on one side only.
        NumericalError: no convergence.
    """
    num_methods = wins_RMM.shape[-1]
    apart_MM = ~np.eye(num_methods, dtype=bool)
    if not (wins_RMM[:, apart_MM] > 0.0).all():
        raise DataError("Bradley–Terry: a pair has wins on one side only. Give every pair a tie, ½ on both sides.")
    wins_RMM = np.where(apart_MM, wins_RMM, 0.0)
    games_RMM = wins_RMM + wins_RMM.swapaxes(1, 2)
    strength_RM = np.zeros(wins_RMM.shape[:2])
    for _ in range(MAX_STEPS):
        chance_RMM = expit(strength_RM[:, :, None] - strength_RM[:, None, :])
        gradient_RM = (wins_RMM - games_RMM * chance_RMM).sum(axis=2)
        weight_RMM = games_RMM * chance_RMM * (1.0 - chance_RMM)
        # the likelihood does not see a common shift: the matrix of ones fixes the mean
        curvature_RMM = weight_RMM.sum(axis=2)[:, :, None] * np.eye(num_methods) - weight_RMM + 1.0
        step_RM = np.linalg.solve(curvature_RMM, gradient_RM[:, :, None])[:, :, 0]
        strength_RM += np.clip(step_RM, -1.0, 1.0)
        strength_RM -= strength_RM.mean(axis=1, keepdims=True)
        if np.abs(step_RM).max() < TOLERANCE:
            return strength_RM
    raise NumericalError(f"Bradley–Terry: no convergence in {MAX_STEPS} Newton steps. Are the numbers of wins huge?")


def _checked(score_P_by_method: Mapping[str, npt.ArrayLike]) -> FloatArray:
    scores = {name: np.asarray(score_P, dtype=np.float64) for name, score_P in score_P_by_method.items()}
    shapes = {score_P.shape for score_P in scores.values()}
    if len(scores) < 2 or len(shapes) != 1 or len(min(shapes)) != 1 or min(shapes)[0] < 2:
        shown = ", ".join(f"{name} {list(score_P.shape)}" for name, score_P in scores.items())
        raise DataError(
            f"scores: {shown or 'none'}; expected at least 2 methods, scored on the same 2 or more prompts."
        )
    for name, score_P in scores.items():
        if not np.isfinite(score_P).all():
            row = int(np.argmin(np.isfinite(score_P)))
            raise DataError(f"scores of {name!r}: {score_P[row]} at prompt {row}; expected finite numbers.")
    return np.stack(list(scores.values()))
