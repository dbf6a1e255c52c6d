"""What a run reaches without another training: reward and KL of every margin, along its ray and in its basis.

Gains are taken to grow as the coefficients do and KL as their square, from estimates of each policy as it was
trained: no estimate is made at a large strength, where a few weights decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from can_dist.dual import Demand, PolicyEstimate, ScoreTable, at_strength
from can_dist.dual.basis import basis_of, mixture_of
from can_dist.dual.estimate import policy_gains
from can_dist.dual.interval import interval_of
from can_dist.dual.strength import RayPoint

CONFIDENCE = 0.95


def ray_reach(estimate: PolicyEstimate, name: str, margins: Sequence[float]) -> list[RayPoint]:
    """Return the strengths of one policy that meet margins of one constraint; none where it goes the wrong way."""
    gain = estimate.improvement[name].mean
    return [at_strength(estimate, margin / gain) for margin in margins] if gain > 0 else []


def basis_reach(
    table: ScoreTable,
    log_prob_ref_N: npt.ArrayLike,
    log_prob_policy_N: Mapping[str, npt.ArrayLike],
    demands: Sequence[Demand],
    name: str,
    margins: Sequence[float],
    *,
    beta: float,
) -> list[RayPoint]:
    """Return the mixtures that meet margins of one constraint, the other demands as they are.

    ``alpha`` of a point is the scalar on the coefficients of :func:`can_dist.dual.mix` with which the demands are met
    by the estimates of the single policies. Points end where no scalar meets them. Intervals are at fixed coefficients.

    Args:
        table: scores of the reference's responses to prompts that no policy was trained on.
        log_prob_ref_N: ln π_ref(y|x), nats, in the row order of the arrays that ``table`` was built from.
        log_prob_policy_N: ln π_i(y|x) of each policy by its name, likewise.
        demands: one demand per utility of the table, in its order.
        name: of the constraint whose margin varies.
        margins: improvements, utility units.
        beta: KL weight β > 0.

    Raises:
        DataError: too few prompts.
        NumericalError: two policies say the same.
    """
    basis = basis_of(table, log_prob_ref_N, log_prob_policy_N, beta=beta)
    estimates = [policy_gains(table, log_prob_ref_N, column_N, key) for key, column_N in log_prob_policy_N.items()]
    gain_ICP = np.array([gain_CP for gain_CP, _ in estimates])
    kl_I = np.array([kl_P.mean() for _, kl_P in estimates])
    # the quadratic form of the log-ratios, in which each policy alone has the KL of its estimate
    scale_I = np.sqrt(2 * kl_I / np.diag(basis.covariance_PII.mean(axis=0)))
    quadratic_PII = basis.covariance_PII * np.outer(scale_I, scale_I) / 2
    points = []
    for margin in margins:
        demanded = [replace(d, margin=margin) if d.name == name else d for d in demands]
        mixture = mixture_of(basis, demanded)
        a_I = np.array(list(mixture.coefficient.values()))
        gain_CP = np.einsum("i,icp->cp", a_I, gain_ICP)
        alpha = _scalar(gain_CP.mean(axis=1)[1:], demanded, binding=any(mu != 0 for mu in mixture.mu.values()))
        if alpha is None:
            break
        kl_P = alpha**2 * np.einsum("pij,i,j->p", quadratic_PII, a_I, a_I)
        gains = [interval_of(alpha * float(gain_P.mean()), alpha * gain_P, CONFIDENCE) for gain_P in gain_CP]
        improvement = {d.name: gain for d, gain in zip(demanded, gains[1:], strict=True)}
        points.append(RayPoint(alpha, improvement, gains[0], interval_of(float(kl_P.mean()), kl_P, CONFIDENCE)))
    return points


def _scalar(gain_J: npt.NDArray[np.float64], demands: Sequence[Demand], *, binding: bool) -> float | None:
    """Return the least scalar with which all gains meet their demands; None where there is none."""
    needed = [0.0]
    for gain, demand in zip(gain_J.tolist(), demands, strict=True):
        if demand.margin > 0:
            if gain <= 0:
                return None
            needed.append(demand.margin / gain)
    return max(needed) if binding and max(needed) > 0 else max(1.0, *needed)
