"""Minimise the convex dual over λ ≥ 0: a bracketed Newton for one constraint, a projected Newton for several.

Both take scores in units of about 1, count one step per Newton direction, stop on the KKT residual and then polish
to the floor of double precision, so that answers agree across invariances and not only within the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from can_dist.dual.columns import Scores
from can_dist.dual.objective import Evaluation, evaluate
from can_dist.dual.table import FloatArray

_FLOOR = 1e-15
_EPS = float(np.finfo(np.float64).eps)
_COOLING = 4.0
_WARMEST = 0.5


@dataclass(frozen=True)
class Minimum:
    """Where the iteration stopped: λ, the derivatives there, the KKT residual and the Newton steps taken."""

    lam_J: FloatArray
    at: Evaluation
    residual: float
    num_steps: int


def kkt_residual(lam_J: FloatArray, gradient_J: FloatArray) -> float:
    """Return max_j of |∇_jD| where λ_j > 0 and of max(0, −∇_jD) where λ_j = 0."""
    violation_J = np.where(lam_J > 0, np.abs(gradient_J), np.maximum(0.0, -gradient_J))
    return float(violation_J.max(initial=0.0))


def minimise(table: Scores, beta: float, margin_J: FloatArray, *, max_steps: int, tolerance: float) -> Minimum:
    """Minimise D over λ ≥ 0 (docs/dual.md, 2) for a table and margins in units of about 1.

    Args:
        table: scores scaled so that each utility, and the larger of r and β, is about 1.
        beta: β in the same reward units, at most about 1.
        margin_J: b in the same utility units.
        max_steps: most Newton steps.
        tolerance: KKT residual to reach.
    """

    def at(lam_J: FloatArray, temperature: float = beta) -> Evaluation:
        return evaluate(table, lam_J, temperature, margin_J)

    start = at(np.zeros(table.num_constraints))
    if not start.finite or kkt_residual(np.zeros(table.num_constraints), start.gradient_J) == 0.0:
        return Minimum(
            np.zeros(table.num_constraints), start, kkt_residual(np.zeros_like(margin_J), start.gradient_J), 0
        )
    if table.num_constraints == 1:
        return _bracketed_newton(at, start, max_steps, tolerance)
    lam, steps = np.zeros(table.num_constraints), 0
    for temperature in _temperatures(beta):
        loose = temperature > beta
        point = _projected_newton(
            lambda lam_J, temperature=temperature: at(lam_J, temperature),  # type: ignore[misc]
            lam,
            max_steps - steps,
            1e-2 if loose else tolerance,
            polish=not loose,
        )
        lam, steps = point.lam_J, steps + point.num_steps
        if not loose:
            return Minimum(lam, point.at, point.residual, steps)
    raise AssertionError("the last temperature is beta")


def _temperatures(beta: float) -> list[float]:
    """Return the softmax temperatures to solve at, each warm-started from the one before, ending at β.

    For score/β ≫ 1 the dual is nearly piecewise linear and Newton from afar sees no curvature; a warmer softmax does.
    """
    levels = [beta]
    while levels[-1] * _COOLING <= _WARMEST:
        levels.append(levels[-1] * _COOLING)
    return levels[::-1]


def _bracketed_newton(
    at: Callable[[FloatArray], Evaluation], start: Evaluation, max_steps: int, tolerance: float
) -> Minimum:
    """Find the root of D′ on λ > 0 given D′(0) < 0: Newton inside a bracket, bisection where it does not pay."""
    low, high = 0.0, np.inf
    best = Minimum(np.zeros(1), start, abs(float(start.gradient_J[0])), 0)
    lam, history = _newton_point(0.0, start, 1.0), [np.inf, np.inf]
    for step in range(1, max_steps + 1):
        here = at(np.array([lam]))
        slope = float(here.gradient_J[0])
        if not here.finite:
            return Minimum(np.array([lam]), here, np.inf, step)
        stalled = best.residual <= tolerance and abs(slope) > best.residual / 2
        if abs(slope) < best.residual:
            best = Minimum(np.array([lam]), here, abs(slope), step)
        if stalled or best.residual <= _FLOOR:
            break
        low, high = (lam, high) if slope < 0 else (low, lam)
        following = _newton_point(lam, here, 4 * lam + 1)
        slow = abs(slope) > history[-2] / 2
        if np.isfinite(high) and (slow or not low < following < high):
            following = (low + high) / 2
        history.append(abs(slope))
        if abs(following - lam) <= _EPS * lam:
            break
        lam = following
    return Minimum(best.lam_J, best.at, best.residual, step)


def _newton_point(lam: float, here: Evaluation, limit: float) -> float:
    """Return the Newton point, at most ``limit`` when moving up; ``limit`` itself where there is no curvature."""
    curvature, slope = float(here.hessian_JJ[0, 0]), float(here.gradient_J[0])
    if curvature * limit <= abs(slope) * 1e-9:
        return limit if slope < 0 else -1.0
    return min(lam - slope / curvature, limit)


def _projected_newton(
    at: Callable[[FloatArray], Evaluation], lam_J: FloatArray, max_steps: int, tolerance: float, *, polish: bool
) -> Minimum:
    """Minimise over the orthant: each direction minimises the quadratic model over λ ≥ 0, then a line search."""
    here = at(lam_J)
    residual = kkt_residual(lam_J, here.gradient_J)
    step = 0
    while step < max_steps and here.finite and residual > (_FLOOR if polish else tolerance):
        step += 1
        direction = _direction(lam_J, here)
        if residual <= tolerance:
            trial = np.maximum(lam_J + direction, 0.0)
            there = at(trial)
            polished = kkt_residual(trial, there.gradient_J)
            if not there.finite or polished > residual / 2:
                break
            lam_J, here, residual = trial, there, polished
            continue
        length, there = _line_search(at, lam_J, direction, here)
        if length == 0.0:
            break
        lam_J = np.maximum(lam_J + length * direction, 0.0)
        here, residual = there, kkt_residual(lam_J, there.gradient_J)
    return Minimum(lam_J, here, residual, step)


def _direction(lam_J: FloatArray, here: Evaluation) -> FloatArray:
    """Return d minimising ⟨∇D,d⟩ + ½ dᵀ∇²D d subject to λ + d ≥ 0, its length capped where there is no curvature."""
    from scipy.optimize import nnls  # 0.3 s of every start, needed by several constraints only

    cap = 10.0 * (1.0 + float(np.abs(lam_J).max()))
    slope = float(np.abs(here.gradient_J).max())
    ridge = max(1e-13 * float(np.trace(here.hessian_JJ)), 1e-6 * slope / cap, 1e-300)
    hessian, factor = _factorise(here.hessian_JJ, ridge)
    target, _ = nnls(factor.T, -np.linalg.solve(factor, here.gradient_J - hessian @ lam_J))
    free = target > 0
    direction = target - lam_J
    if free.any():
        right = here.gradient_J[free] + hessian[np.ix_(free, ~free)] @ direction[~free]
        refined = -np.linalg.solve(hessian[np.ix_(free, free)], right)
        if np.all(lam_J[free] + refined >= 0):
            direction[free] = refined
    longest = float(np.abs(direction).max())
    capped: FloatArray = direction * (cap / longest) if longest > cap else direction
    return capped


def _factorise(hessian_JJ: FloatArray, ridge: float) -> tuple[FloatArray, FloatArray]:
    """Return ∇²D plus the smallest tried ridge that makes it positive definite, and its Cholesky factor."""
    while True:
        raised = hessian_JJ + ridge * np.eye(hessian_JJ.shape[0])
        try:
            return raised, np.asarray(np.linalg.cholesky(raised), dtype=np.float64)
        except np.linalg.LinAlgError:
            ridge *= 100.0


def _line_search(
    at: Callable[[FloatArray], Evaluation], lam_J: FloatArray, direction_J: FloatArray, here: Evaluation
) -> tuple[float, Evaluation]:
    """Find a length in (0, 1] along a descent direction whose slope has at least halved, by bracketed Newton.

    Uses slopes, which keep their digits near the minimum where values do not. Length 1 is accepted when D still falls
    there; a convex function whose slope is still negative has decreased.
    """
    initial = float(here.gradient_J @ direction_J)
    if initial >= 0.0:
        return 0.0, here
    low, high, length = 0.0, 1.0, 1.0
    lowest = (0.0, here)
    for _ in range(60):
        there = at(np.maximum(lam_J + length * direction_J, 0.0))
        slope = float(there.gradient_J @ direction_J)
        rising = slope > 0 and there.value > here.value
        if there.finite and not rising and (abs(slope) <= -initial / 2 or (length == 1.0 and slope <= 0)):
            return length, there
        if slope <= 0:
            low, lowest = length, (length, there)
        else:
            high = length
        curvature = float(direction_J @ there.hessian_JJ @ direction_J)
        guess = length - slope / curvature if curvature > 0 else -1.0
        inside = low + 0.1 * (high - low) <= guess <= high - 0.1 * (high - low)
        length = guess if inside else (low + high) / 2
    return lowest
