"""Three estimators of the dual from a finite number of responses per prompt (docs/estimators.md, 8 and 9).

``empirical``: the softmax weights over the K sampled responses, the paper's. Biased by the finite K.
``jackknife``: each per-prompt mean under the weights with its bias of order 1/K removed by leaving one response out.
``gaussian``: second-order cumulants, exact where (r, g) are jointly Gaussian within each prompt.

Each is a way to get the per-prompt moments at a given λ; λ̂ is where their mean meets the margins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from can_dist.dual.columns import ColumnScores, Scores
from can_dist.dual.jackknife import both_moments, gain_and_slope
from can_dist.dual.moments import PromptMoments
from can_dist.dual.newton import kkt_residual
from can_dist.dual.nonnegative import nonnegative_least_squares
from can_dist.dual.objective import tilt
from can_dist.dual.predict import Prediction, lambda_standard_error, prediction_of
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError

ESTIMATORS = ("empirical", "jackknife", "gaussian", "auto")

_MAX_STEPS = 40
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Estimate:
    """λ̂ of one estimator and the moments there.

    Attributes:
        estimator: which one.
        lam_J: λ̂, NaN where it did not converge.
        lam_se_J: its sandwich standard error over prompts.
        moments: per-prompt moments at λ̂ by this estimator.
        hessian_JJ: derivative of the mean improvement with respect to λ.
        residual: KKT residual in within-prompt standard deviations.
        num_steps: Newton steps.
    """

    estimator: str
    lam_J: FloatArray
    lam_se_J: FloatArray
    moments: PromptMoments
    hessian_JJ: FloatArray
    residual: float
    num_steps: int

    @property
    def converged(self) -> bool:
        """Whether λ̂ exists."""
        return bool(np.isfinite(self.lam_J).all())


def check_estimator(estimator: str, table: Scores | None = None) -> None:
    """Raise ConfigError for an unknown estimator, or one that cannot read the table."""
    if estimator not in ESTIMATORS:
        raise ConfigError(f"estimator: found {estimator!r}, expected one of {', '.join(ESTIMATORS)}.")
    if isinstance(table, ColumnScores) and estimator == "gaussian":
        raise ConfigError(
            "estimator: 'gaussian' needs the table in memory, and this one is streamed.",
            "Take 'auto', 'jackknife' or 'empirical'; give --engine memory; or solve a sample of the prompts.",
        )
    if table is not None and table.weighted and estimator == "jackknife":
        raise ConfigError(
            "estimator: 'jackknife' takes the responses as samples of the reference, and this table has reference "
            "weights; use 'empirical', which is exact for a table that enumerates its support."
        )


def estimator_moments(table: Scores, lam_J: FloatArray, beta: float, estimator: str) -> PromptMoments:
    """Return the per-prompt moments of π_λ as ``estimator`` sees them."""
    if estimator == "gaussian":
        assert isinstance(table, ScoreTable)  # check_estimator refuses others
        return gaussian_moments(table, lam_J, beta)
    empirical, jackknifed = both_moments(table, lam_J, beta)
    return jackknifed if estimator == "jackknife" else empirical


def within_covariance(table: ScoreTable, first_N: FloatArray, second_N: FloatArray) -> FloatArray:
    """Return the within-prompt covariance of two centred columns, unbiased for sampled responses; shape (P,)."""
    if table.weighted:
        return table.sum_rows(np.exp(table.log_weight_N) * first_N * second_N)
    return table.sum_rows(first_N * second_N) / np.maximum(table.num_responses_P - 1, 1)


def gaussian_moments(table: ScoreTable, lam_J: FloatArray, beta: float) -> PromptMoments:
    """Return the moments where (r, g) are Gaussian within a prompt, with the sample covariances Σ_i.

    Gain of g: (Σ_rg + Σ_gg λ)/β; of r: (Σ_rr + ⟨λ,Σ_rg⟩)/β; KL = Var(r + ⟨λ,g⟩)/(2β²) = ln normaliser.
    """
    num_prompts, num_constraints = table.num_prompts, table.num_constraints
    covariance_PJJ = np.empty((num_prompts, num_constraints, num_constraints))
    cross_PJ = np.empty((num_prompts, num_constraints))
    for j, column_N in enumerate(table.utility_JN):
        cross_PJ[:, j] = within_covariance(table, table.reward_N, column_N)
        for k in range(j, num_constraints):
            shared_P = within_covariance(table, column_N, table.utility_JN[k])
            covariance_PJJ[:, j, k] = covariance_PJJ[:, k, j] = shared_P
    reward_P = within_covariance(table, table.reward_N, table.reward_N)
    gain_PJ = (cross_PJ + covariance_PJJ @ lam_J) / beta
    reward_gain_P = (reward_P + cross_PJ @ lam_J) / beta
    kl_P = (reward_gain_P + gain_PJ @ lam_J) / (2 * beta)
    ess_P = 1.0 / table.sum_rows(tilt(table, lam_J, beta).weight_N ** 2)
    return PromptMoments(gain_PJ, reward_gain_P, covariance_PJJ, cross_PJ, kl_P, ess_P, kl_P)


def estimate(
    table: Scores,
    beta: float,
    margin_J: FloatArray,
    estimator: str,
    start_J: FloatArray,
    level_J: FloatArray | None = None,
) -> Estimate:
    """Compute λ̂ of one estimator (``auto`` excluded).

    Args:
        table: scores of P prompts.
        beta: KL weight β > 0.
        margin_J: b.
        estimator: which.
        start_J: the empirical λ̂, from which the jackknife starts.
        level_J: 1 where the constraint is an absolute level, so that ḡ is an estimate too; 0 where a margin.
    """
    spread_J = np.array([spread or 1.0 for spread in table.spread_J.tolist()])
    steps = 0
    if estimator == "gaussian":
        assert isinstance(table, ScoreTable)
        lam, hessian = _gaussian_lam(table, beta, margin_J)
        steps = 1
    elif estimator == "jackknife":
        lam, hessian, steps = _jackknife_lam(table, beta, margin_J, start_J, spread_J)
    else:
        lam, hessian = start_J, np.full((start_J.size, start_J.size), math.nan)
    converged = bool(np.isfinite(lam).all())
    moments = estimator_moments(table, lam if converged else start_J, beta, estimator)
    if estimator == "empirical":
        hessian = moments.hessian(beta)
    if estimator == "jackknife" and converged and moments.kl_P.mean() < -_TOLERANCE:
        lam, converged = np.full(lam.size, math.nan), False  # its correction is larger than what it corrects
    slack_PJ = moments.gain_PJ - margin_J
    error, residual = np.full(lam.size, math.nan), math.inf
    if converged:
        error = lambda_standard_error(with_level(table, slack_PJ, level_J), hessian, lam)
        residual = kkt_residual(lam, slack_PJ.mean(axis=0) / spread_J)
    return Estimate(estimator, lam, error, moments, hessian, residual, steps)


def with_level(table: Scores, slack_PJ: FloatArray, level_J: FloatArray | None) -> FloatArray:
    """Return u_i unpaired where the constraint is an absolute level: Σ_k w_ik g_ik − τ varies with ḡ_i too."""
    if level_J is None:
        return slack_PJ
    return slack_PJ + level_J * (table.mean_utility_JP.T - table.centre_J)


def prediction_from(table: Scores, moments: PromptMoments, beta: float, margin_J: FloatArray) -> Prediction:
    """Summarise per-prompt moments as a prediction."""
    return prediction_of(
        table.mean_reward,
        gain_PJ=moments.gain_PJ,
        reward_gain_P=moments.reward_gain_P,
        kl_P=moments.kl_P,
        ess_P=moments.ess_P,
        prompt_P=table.prompt_P,
        beta=beta,
        margin_J=margin_J,
    )


def orthant_minimum(
    hessian_JJ: FloatArray, linear_J: FloatArray, equal_J: npt.NDArray[np.bool_] | None = None
) -> FloatArray:
    """Return argmin over λ ≥ 0 of ½ λᵀHλ + ⟨c,λ⟩ for H ⪰ 0; what has no curvature stays 0.

    The multipliers of ``equal_J`` belong to equalities and may have either sign.
    """
    lam = np.zeros(linear_J.size)
    equal_J = np.zeros(linear_J.size, dtype=np.bool_) if equal_J is None else equal_J
    curved = np.diag(hessian_JJ) > 0
    if not curved.any():
        return lam
    scale = np.sqrt(np.diag(hessian_JJ)[curved])
    correlation = hessian_JJ[np.ix_(curved, curved)] / np.outer(scale, scale)
    factor = np.linalg.cholesky(correlation + 1e-14 * np.eye(scale.size))
    signed = equal_J[curved]
    target = _active_set(factor, linear_J[curved] / scale, signed)
    free = signed | (target > 0)
    curvature = correlation[np.ix_(free, free)]
    if free.any() and np.linalg.matrix_rank(curvature) == free.sum():  # two that say the same have no single answer
        refined = -np.linalg.solve(curvature, (linear_J[curved] / scale)[free])
        if np.all(signed[free] | (refined > 0)):
            target[free] = refined
    lam[curved] = target / scale
    return lam


def _active_set(factor_JJ: FloatArray, linear_J: FloatArray, signed_J: npt.NDArray[np.bool_]) -> FloatArray:
    """Return argmin of ½ λᵀLLᵀλ + ⟨c,λ⟩ with λ ≥ 0 where it is not signed."""
    if linear_J.size == 1:  # needs no search, and so no scipy.optimize
        free: FloatArray = -linear_J / factor_JJ[0] ** 2
        return free if signed_J[0] else np.maximum(free, 0.0)
    both_signs = np.hstack([factor_JJ.T, -factor_JJ.T[:, signed_J]])
    parts = nonnegative_least_squares(both_signs, -np.linalg.solve(factor_JJ, linear_J))
    target: FloatArray = parts[: linear_J.size]
    target[signed_J] -= parts[linear_J.size :]
    return target


def _gaussian_lam(table: ScoreTable, beta: float, margin_J: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return λ_G = argmin_{λ≥0} ½ λᵀΣ_gg λ + ⟨λ, Σ_rg − βb⟩ and the Hessian Σ_gg/β."""
    at_zero = gaussian_moments(table, np.zeros(table.num_constraints), beta)
    hessian = at_zero.hessian(beta)
    return orthant_minimum(hessian, at_zero.gain_PJ.mean(axis=0) - margin_J), hessian


def _jackknife_lam(
    table: Scores, beta: float, margin_J: FloatArray, start_J: FloatArray, spread_J: FloatArray
) -> tuple[FloatArray, FloatArray, int]:
    """Solve the jackknifed optimality conditions by Newton from the empirical λ̂; NaN where they have no root near."""

    lam, none = start_J, np.full(start_J.size, math.nan)
    unit_J = np.maximum(np.abs(start_J), max(table.reward_spread, beta) / spread_J)
    hessian = np.full((start_J.size, start_J.size), math.nan)
    if start_J.size == 0:
        return start_J, hessian, 0
    for step in range(1, _MAX_STEPS + 1):
        gain_J, hessian = gain_and_slope(table, lam, beta)
        gradient = gain_J - margin_J
        if not np.isfinite(hessian).all() or np.linalg.eigvalsh(hessian).min() <= 0:
            return none, hessian, step
        if kkt_residual(lam, gradient / spread_J) <= _TOLERANCE:
            return lam, hessian, step
        following = orthant_minimum(hessian, gradient - hessian @ lam)
        if np.any(np.abs(following - start_J) > unit_J):
            return none, hessian, step
        lam = following
    return none, hessian, _MAX_STEPS
