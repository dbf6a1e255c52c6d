"""What the tilted policy π_λ does on a table of scores, with paired standard errors over prompts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.objective import tilt
from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError


@dataclass(frozen=True)
class Prediction:
    """Means over prompts of π_λ against π_ref on one table (docs/dual.md, 3 and 5).

    Attributes:
        improvement_J: E_{π_λ} g − E_{π_ref} g, utility units.
        improvement_se_J: sd(u)/√P of it; NaN for a single prompt.
        slack_J: improvement − margin.
        slack_PJ: u_i = Σ_k w_ik g_ik − mean_k g_ik − b, one row per prompt in the order of ``prompt_P``.
        reward: E_{π_λ} r, reward units.
        reward_improvement: E_{π_λ} r − E_{π_ref} r.
        reward_improvement_se: its paired standard error.
        reward_gain_P: the paired improvement of each prompt.
        kl: KL(π_λ‖π_ref), nats, mean over prompts; ``kl_P`` by prompt.
        objective: E r − β KL, reward units: the primal value.
        ess_P: effective sample size 1/Σ_k w_ik² of each prompt, between 1 and K_i.
        prompt_P: ids of the prompts.
    """

    improvement_J: FloatArray
    improvement_se_J: FloatArray
    slack_J: FloatArray
    slack_PJ: FloatArray
    reward: float
    reward_improvement: float
    reward_improvement_se: float
    reward_gain_P: FloatArray
    kl: float
    kl_P: FloatArray
    objective: float
    ess_P: FloatArray
    prompt_P: npt.NDArray[Any]


@functools.singledispatch
def predict(table: Any, lam_J: npt.ArrayLike, beta: float, margin_J: npt.ArrayLike) -> Prediction:
    """Predict what the policy of λ does on any table: on the prompts that gave λ, or on held-out ones.

    Args:
        table: scores of P prompts, with the same utilities as λ; a ``ScoreTable`` or ``ColumnScores``.
        lam_J: λ ≥ 0, reward units per utility unit, shape (J,).
        beta: KL weight β > 0.
        margin_J: b, improvement over the reference of ``table``, shape (J,).

    Raises:
        ConfigError: shapes do not match the table, or β is not positive.
    """
    lam = _vector(lam_J, "lam_J", table.num_constraints)
    margin = _vector(margin_J, "margin_J", table.num_constraints)
    check_beta(beta)
    tilted = tilt(table, lam, beta)
    gain_JP = np.array([table.sum_rows(tilted.weight_N * column) for column in table.utility_JN])
    gain_PJ = gain_JP.reshape(table.num_constraints, table.num_prompts).T
    reward_gain_P = table.sum_rows(tilted.weight_N * table.reward_N)
    with np.errstate(invalid="ignore"):
        kl_P = np.maximum(table.sum_rows(tilted.weight_N * tilted.log_ratio_N), 0.0)
    return prediction_of(
        table.mean_reward,
        gain_PJ=gain_PJ,
        reward_gain_P=reward_gain_P,
        kl_P=kl_P,
        ess_P=1.0 / table.sum_rows(tilted.weight_N**2),
        prompt_P=table.prompt_P,
        beta=beta,
        margin_J=margin,
    )


def prediction_of(
    mean_reward: float,
    *,
    gain_PJ: FloatArray,
    reward_gain_P: FloatArray,
    kl_P: FloatArray,
    ess_P: FloatArray,
    prompt_P: npt.NDArray[Any],
    beta: float,
    margin_J: FloatArray,
) -> Prediction:
    """Summarise what π_λ does on each prompt (fields as in :class:`Prediction`); ``mean_reward`` is E_{π_ref} r."""
    reward = mean_reward + float(reward_gain_P.mean())
    kl = float(kl_P.mean())
    return Prediction(
        improvement_J=gain_PJ.mean(axis=0),
        improvement_se_J=_standard_error(gain_PJ),
        slack_J=gain_PJ.mean(axis=0) - margin_J,
        slack_PJ=gain_PJ - margin_J,
        reward=reward,
        reward_improvement=float(reward_gain_P.mean()),
        reward_improvement_se=float(_standard_error(reward_gain_P[:, None])[0]),
        reward_gain_P=reward_gain_P,
        kl=kl,
        kl_P=kl_P,
        objective=reward - beta * kl,
        ess_P=ess_P,
        prompt_P=prompt_P,
    )


def lambda_standard_error(slack_PJ: FloatArray, hessian_JJ: FloatArray, lam_J: FloatArray) -> FloatArray:
    """Return the sandwich √diag(H⁻¹ Cov(u) H⁻¹ / P) over the constraints with λ > 0 (docs/estimators.md, 7).

    NaN for a constraint at the bound λ = 0, for a single prompt, and where H is singular.
    """
    error = np.full(lam_J.shape[0], math.nan)
    free = np.flatnonzero(lam_J > 0)
    num_prompts = slack_PJ.shape[0]
    if free.size == 0 or num_prompts < 2:
        return error
    hessian = hessian_JJ[np.ix_(free, free)]
    curvature = np.sqrt(np.diag(hessian))
    if not np.isfinite(hessian).all() or np.any(curvature == 0):
        return error
    correlation = hessian / np.outer(curvature, curvature)
    if np.linalg.cond(correlation) > 1e12:
        return error
    deviation = slack_PJ[:, free] - slack_PJ[:, free].mean(axis=0)
    influence = np.linalg.solve(correlation, (deviation / curvature).T) / curvature[:, None]
    error[free] = np.sqrt((influence**2).sum(axis=1) / (num_prompts - 1) / num_prompts)
    return error


def check_beta(beta: float) -> None:
    """Raise ConfigError unless β is a positive finite number."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float, np.floating, np.integer)) or not 0 < beta < math.inf:
        raise ConfigError(
            f"beta: found {beta!r}, expected a positive finite number; it is the KL weight, 0.1 in the paper."
        )


def _standard_error(value_PJ: FloatArray) -> FloatArray:
    num_prompts = value_PJ.shape[0]
    if num_prompts < 2:
        return np.full(value_PJ.shape[1], math.nan)
    error_J: FloatArray = value_PJ.std(axis=0, ddof=1) / math.sqrt(num_prompts)
    return error_J


def _vector(values: npt.ArrayLike, name: str, length: int) -> FloatArray:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (length,):
        raise ConfigError(
            f"{name}: shape {vector.shape}, expected ({length},): one number per constraint of the table."
        )
    return vector
