"""Per-prompt moments of the tilted policy: what every statistic over prompts is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from can_dist.dual.objective import BLOCK_ROWS, tilt
from can_dist.dual.table import FloatArray, ScoreTable


@dataclass(frozen=True)
class PromptMoments:
    """Moments of r and g under w_i = π_λ(·|x_i) on the table, one row per prompt (docs/dual.md, 3).

    Attributes:
        gain_PJ: E_{w_i} g − E_{π_ref} g.
        reward_gain_P: E_{w_i} r − E_{π_ref} r.
        covariance_PJJ: Cov_{w_i}(g): ∇²D is its mean over prompts divided by β.
        cross_PJ: Cov_{w_i}(r, g), so d E_{w_i} r / dλ = cross / β.
        kl_P: KL(w_i‖π_ref), nats.
        ess_P: 1/Σ_k w_ik².
        log_norm_P: ln Σ_k π_ref(k) exp((r + ⟨λ,g⟩)/β), scores centred per prompt.
    """

    gain_PJ: FloatArray
    reward_gain_P: FloatArray
    covariance_PJJ: FloatArray
    cross_PJ: FloatArray
    kl_P: FloatArray
    ess_P: FloatArray
    log_norm_P: FloatArray

    def hessian(self, beta: float) -> FloatArray:
        """Return ∇²D = (1/(βP)) Σ_i Cov_{w_i}(g), shape (J, J)."""
        hessian_JJ: FloatArray = self.covariance_PJJ.mean(axis=0) / beta
        return hessian_JJ


def prompt_moments(table: ScoreTable, lam_J: FloatArray, beta: float) -> PromptMoments:
    """Compute the moments at λ in one pass over the table."""
    blocks = [_block_moments(block, lam_J, beta) for block in table.blocks(BLOCK_ROWS)]
    return PromptMoments(
        *(np.concatenate([getattr(block, field.name) for block in blocks]) for field in fields(PromptMoments))
    )


def _block_moments(table: ScoreTable, lam_J: FloatArray, beta: float) -> PromptMoments:
    tilted = tilt(table, lam_J, beta)
    num_prompts, num_constraints = table.num_prompts, table.num_constraints
    gain_PJ = np.empty((num_prompts, num_constraints))
    covariance_PJJ = np.empty((num_prompts, num_constraints, num_constraints))
    cross_PJ = np.empty((num_prompts, num_constraints))
    reward_gain_P = table.sum_rows(tilted.weight_N * table.reward_N)
    for j, column_N in enumerate(table.utility_JN):
        weighted_N = tilted.weight_N * column_N
        gain_PJ[:, j] = table.sum_rows(weighted_N)
        deviation_N = column_N.copy()
        table.apply_rows(np.subtract, deviation_N, gain_PJ[:, j])
        weighted_N = np.multiply(tilted.weight_N, deviation_N, out=weighted_N)
        cross_PJ[:, j] = table.sum_rows(weighted_N * table.reward_N)
        for k in range(j, num_constraints):
            covariance_PJJ[:, j, k] = covariance_PJJ[:, k, j] = table.sum_rows(weighted_N * table.utility_JN[k])
    for j in range(num_constraints):
        np.maximum(covariance_PJJ[:, j, j], 0.0, out=covariance_PJJ[:, j, j])
    with np.errstate(invalid="ignore"):
        kl_P = np.maximum(table.sum_rows(tilted.weight_N * tilted.log_ratio_N), 0.0)
    return PromptMoments(
        gain_PJ=gain_PJ,
        reward_gain_P=reward_gain_P,
        covariance_PJJ=covariance_PJJ,
        cross_PJ=cross_PJ,
        kl_P=kl_P,
        ess_P=1.0 / table.sum_rows(tilted.weight_N**2),
        log_norm_P=tilted.log_norm_P,
    )
