"""The dual objective and its derivatives: one function, a sum over prompts (docs/dual.md, 2 to 4)."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.table import FloatArray, ScoreTable

BLOCK_ROWS = 32_768
"""Rows handled at a time, so that the temporaries stay in a core's cache (measured on 1,000 × 128 scores)."""


@dataclass(frozen=True)
class PartialSums:
    """Sums over prompts from which D, ∇D and ∇²D follow; tables of disjoint prompts add.

    Attributes:
        num_prompts: number of prompts summed.
        log_norm: Σ_i ln Σ_k π_ref(k) exp((r_ik + ⟨λ,g_ik⟩)/β), scores centred per prompt.
        reward: Σ_i of the reference mean of r.
        improvement_J: Σ_i ( E_{w_i} g − E_{π_ref} g ).
        covariance_JJ: Σ_i Cov_{w_i}(g).
    """

    num_prompts: int
    log_norm: float
    reward: float
    improvement_J: FloatArray
    covariance_JJ: FloatArray

    def __add__(self, other: PartialSums) -> PartialSums:
        return PartialSums(
            self.num_prompts + other.num_prompts,
            self.log_norm + other.log_norm,
            self.reward + other.reward,
            self.improvement_J + other.improvement_J,
            self.covariance_JJ + other.covariance_JJ,
        )

    def evaluation(self, lam_J: FloatArray, beta: float, margin_J: FloatArray) -> Evaluation:
        """Return D(λ), ∇D(λ) and ∇²D(λ) of the prompts summed."""
        value = (beta * self.log_norm + self.reward) / self.num_prompts - float(lam_J @ margin_J)
        gradient = self.improvement_J / self.num_prompts - margin_J
        return Evaluation(value, gradient, self.covariance_JJ / (beta * self.num_prompts))


@dataclass(frozen=True)
class Evaluation:
    """D (reward units), ∇D = predicted slack (utility units) and ∇²D at one λ."""

    value: float
    gradient_J: FloatArray
    hessian_JJ: FloatArray

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return bool(
            np.isfinite(self.value) and np.isfinite(self.gradient_J).all() and np.isfinite(self.hessian_JJ).all()
        )


@dataclass(frozen=True)
class Tilt:
    """π_λ on the table: ``log_ratio_N`` = ln π_λ/π_ref, ``weight_N`` = π_λ, ``log_norm_P`` the log normaliser."""

    log_ratio_N: FloatArray
    weight_N: FloatArray
    log_norm_P: FloatArray


def tilt(table: ScoreTable, lam_J: FloatArray, beta: float) -> Tilt:
    """Return w_ik = softmax_k((r_ik + ⟨λ,g_ik⟩)/β + ln π_ref(k)), stable for |score|/β up to 1e6 and beyond."""
    with np.errstate(over="ignore", invalid="ignore"):
        score_N = table.score(lam_J)
        score_N /= beta
        weight_N = score_N + table.log_weight_N
        peak_P = table.max_rows(weight_N)
        table.apply_rows(np.subtract, weight_N, peak_P)
        np.exp(weight_N, out=weight_N)
        total_P = table.sum_rows(weight_N)
        log_norm_P = peak_P + np.log(total_P)
        table.apply_rows(np.divide, weight_N, total_P)
        table.apply_rows(np.subtract, score_N, log_norm_P)
    return Tilt(score_N, weight_N, log_norm_P)


@functools.singledispatch
def partial_sums(table: Any, lam_J: FloatArray, beta: float) -> PartialSums:
    """Return the sums over the prompts of ``table`` that one Newton step needs: J² + J + 2 numbers and a count.

    This is the form for a ``ScoreTable``; :mod:`can_dist.dual.columns` registers the one for ``ColumnScores``.
    """
    blocks = [_block_sums(block, lam_J, beta) for block in table.blocks(BLOCK_ROWS)]
    return functools.reduce(operator.add, blocks)


def _block_sums(table: ScoreTable, lam_J: FloatArray, beta: float) -> PartialSums:
    tilted = tilt(table, lam_J, beta)
    num_constraints = table.num_constraints
    improvement_J = np.zeros(num_constraints)
    deviation_JN = table.utility_JN.copy()
    weighted_N = np.empty_like(tilted.weight_N)
    for j in range(num_constraints):
        mean_P = table.sum_rows(np.multiply(tilted.weight_N, table.utility_JN[j], out=weighted_N))
        improvement_J[j] = mean_P.sum()
        table.apply_rows(np.subtract, deviation_JN[j], mean_P)
    covariance_JJ = np.empty((num_constraints, num_constraints))
    for j in range(num_constraints):
        np.multiply(tilted.weight_N, deviation_JN[j], out=weighted_N)
        covariance_JJ[j] = deviation_JN @ weighted_N
    return PartialSums(
        table.num_prompts,
        float(tilted.log_norm_P.sum()),
        float(table.mean_reward_P.sum()),
        improvement_J,
        (covariance_JJ + covariance_JJ.T) / 2,
    )


def evaluate(table: Any, lam_J: FloatArray, beta: float, margin_J: FloatArray) -> Evaluation:
    """Return D(λ) = (β/I) Σ_i ln Σ_k π_ref(k) exp((r_ik + ⟨λ,h_ik⟩)/β) with its gradient and Hessian.

    Args:
        table: scores of P prompts, a ``ScoreTable`` or ``ColumnScores``.
        lam_J: λ, reward units per utility unit.
        beta: KL weight β > 0, reward units per nat.
        margin_J: b, utility units.
    """
    return partial_sums(table, lam_J, beta).evaluation(lam_J, beta, margin_J)


def dual_curve(
    table: ScoreTable,
    *,
    beta: float,
    margin_J: npt.ArrayLike,
    lam_J: npt.ArrayLike,
    axis: int,
    lam_grid: npt.ArrayLike,
) -> FloatArray:
    """Return D along the axis of one constraint, the others held at ``lam_J`` (usually λ*).

    Args:
        table: scores of P prompts.
        beta: KL weight β > 0.
        margin_J: b, one per constraint.
        lam_J: point through which the curve passes.
        axis: index of the constraint whose λ varies.
        lam_grid: values of λ on that axis, shape (G,).

    Returns:
        D at each grid value, shape (G,), reward units.
    """
    margin = np.asarray(margin_J, dtype=np.float64)
    grid = np.asarray(lam_grid, dtype=np.float64)
    values = np.empty(grid.shape[0])
    point = np.array(lam_J, dtype=np.float64)
    for index, lam in enumerate(grid):
        point[axis] = lam
        log_norm = float(tilt(table, point, beta).log_norm_P.mean())
        values[index] = beta * log_norm + table.mean_reward - float(point @ margin)
    return values
