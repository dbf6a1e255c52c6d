"""λ steered inside one training: by how far the policy is from its margins on validation prompts.

At each evaluation λ takes a damped Newton step on the dual, with the policy's estimated slack Ĝ − b in place of the
slack that the dual predicts: λ ← [λ + ½ H⁻¹ (b − Ĝ)]₊. A policy that stops short of its margin is drawn further.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from can_dist.dual.estimators import orthant_minimum
from can_dist.dual.strength import Demand
from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError, NumericalError

STEP = 0.5
"""Share of the Newton step: a training answers late, and a whole step would be taken twice."""

MAX_CONDITION = 1e8
"""Condition of the utilities' correlations from which a step is rounding and noise."""


def steer(
    lam_J: npt.ArrayLike,
    gain_J: npt.ArrayLike,
    demands: Sequence[Demand],
    hessian_JJ: npt.ArrayLike,
    *,
    step: float = STEP,
) -> FloatArray:
    """Return λ after one step towards the margins.

    [·]₊ projects in the metric of H: the result minimises ½ (λ′ − λ)ᵀ H (λ′ − λ) − step · ⟨b − Ĝ, λ′ − λ⟩ over λ′ ≥ 0.
    For one constraint it is the maximum with 0. For several, the maximum of each λ_j with 0 would go on moving
    the others for a constraint that is at 0 and met; this step rests where each margin is met, or exceeded at λ_j = 0.

    Args:
        lam_J: λ of the training so far; λ_j ≥ 0 but for equalities, whose multipliers may have either sign.
        gain_J: Ĝ, estimated gain of each constraint, utility units.
        demands: b of each constraint, in the same order.
        hessian_JJ: ∇²D at λ*, utility units squared per reward unit.
        step: share of the Newton step, above 0 and at most 1.

    Raises:
        ConfigError: shapes or a step that cannot mean anything, or λ_j < 0 of an inequality.
        NumericalError: a number that is not finite, or utilities that H cannot tell apart.
    """
    lam, gain, hessian = (np.asarray(values, dtype=np.float64) for values in (lam_J, gain_J, hessian_JJ))
    num_constraints = len(demands)
    shapes = (lam.shape, gain.shape, hessian.shape)
    if shapes != ((num_constraints,), (num_constraints,), (num_constraints, num_constraints)):
        raise ConfigError(f"feedback: lambda, gain and Hessian of shapes {shapes} for {num_constraints} demands.")
    if not 0 < step <= 1:
        raise ConfigError(f"feedback: step = {step}, expected above 0 and at most 1.")
    for name, values in (("lambda", lam), ("the estimated gain", gain), ("the Hessian", hessian)):
        if not np.isfinite(values).all():
            raise NumericalError(f"feedback: {name} is not finite: {values.tolist()}. Lower train.learning_rate.")
    equal_J = np.array([demand.equal for demand in demands], dtype=np.bool_)
    if (lam[~equal_J] < 0).any():
        raise ConfigError(f"feedback: lambda = {lam.tolist()}, expected at least 0 for an inequality.")
    check_regular(hessian, [demand.name for demand in demands], MAX_CONDITION, "lambda cannot be steered")
    margin_J = np.array([demand.margin for demand in demands])
    return orthant_minimum(hessian, -step * (margin_J - gain) - hessian @ lam, equal_J)


def check_regular(matrix_II: FloatArray, names: Sequence[str], limit: float, consequence: str) -> None:
    """Refuse a covariance that is singular, naming what makes it so.

    Args:
        matrix_II: symmetric, positive semidefinite.
        names: of its rows.
        limit: largest condition number of its correlations.
        consequence: what cannot be done.

    Raises:
        NumericalError: a row without variance, or rows that are combinations of each other.
    """
    if not names:
        return
    variance_I = np.diag(matrix_II)
    flat = [name for name, variance in zip(names, variance_I, strict=True) if not variance > 0]
    if flat:
        raise NumericalError(f"{', '.join(flat)}: no variance within prompts, so {consequence}.")
    scale_I = np.sqrt(variance_I)
    correlation_II = matrix_II / np.outer(scale_I, scale_I)
    value_I, vector_II = np.linalg.eigh(correlation_II)
    if value_I[-1] <= limit * value_I[0]:
        return
    share_I = np.abs(vector_II[:, 0])
    alike = [name for name, share in zip(names, share_I, strict=True) if share > 0.1 * share_I.max()]
    pair = f" (correlation {correlation_II[tuple(np.argsort(share_I)[-2:])]:.6f})" if len(alike) == 2 else ""
    raise NumericalError(f"{' and '.join(alike)} say the same{pair}, so {consequence}. Leave one of them out.")
