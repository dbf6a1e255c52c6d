"""The whole trade-off between the margins and helpfulness, without a solve per point (docs/dual.md, 3).

D_b(λ) = D_0(λ) − ⟨λ,b⟩, so ∇D_0(λ) is the margin that λ is optimal for, whatever b was asked. Every λ ≥ 0 is therefore
one exact point of the frontier, and a grid of λ is the frontier: one pass over the table per point, no iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from can_dist.dual.moments import PromptMoments, prompt_moments
from can_dist.dual.predict import check_beta, lambda_standard_error
from can_dist.dual.solution import Margin
from can_dist.dual.solve import solve_table
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError

REACH = 0.95
"""The default curve ends where the improvement has come this far from that of λ = 0 to the most attainable."""

_DOUBLINGS = 60


@dataclass(frozen=True)
class FrontierPoint:
    """One λ and what its policy does on the table; standard errors over prompts, NaN where they do not exist.

    Attributes:
        lam_J: λ, reward units per utility unit: minus the price in E r − β KL of one unit of margin.
        lam_se_J: sandwich standard error of λ̂ at this margin.
        margin_J: the margin b that was asked for; the improvement itself on a grid of λ.
        improvement_J: E_{π_λ} g − E_{π_ref} g.
        improvement_se_J: its standard error at fixed λ.
        reward_improvement: E_{π_λ} r − E_{π_ref} r, reward units.
        reward_improvement_se: its standard error at fixed margin, λ̂ varying with the prompts.
        kl: KL(π_λ‖π_ref), nats.
        kl_se: its standard error at fixed margin.
        ess: median over prompts with several responses of 1/Σ_k w_ik².
        feasible: whether the margin can be met on the table; every number above is NaN where not.
    """

    lam_J: FloatArray
    lam_se_J: FloatArray
    margin_J: FloatArray
    improvement_J: FloatArray
    improvement_se_J: FloatArray
    reward_improvement: float
    reward_improvement_se: float
    kl: float
    kl_se: float
    ess: float
    feasible: bool


@dataclass(frozen=True)
class Frontier:
    """Points by increasing λ (one constraint), or of a product grid in row-major order (several).

    Attributes:
        names: the constraints.
        points: the points.
        shape: points per axis.
        attainable: most attainable improvement of each constraint alone.
        beta: KL weight.
        confidence: of the bands in :meth:`rows`.
    """

    names: tuple[str, ...]
    points: tuple[FrontierPoint, ...]
    shape: tuple[int, ...]
    attainable: dict[str, float]
    beta: float
    confidence: float

    def rows(self) -> list[dict[str, float | bool]]:
        """Return one flat record per point, bands as ``*_low`` and ``*_high``: ready for a table or a plot."""
        half = float(ndtri(0.5 + self.confidence / 2))
        return [_row(point, self.names, half) for point in self.points]

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values; null for what is not a finite number."""
        rows = [{key: _plain(value) for key, value in row.items()} for row in self.rows()]
        return {
            "names": list(self.names),
            "shape": list(self.shape),
            "beta": self.beta,
            "confidence": self.confidence,
            "attainable": self.attainable,
            "points": rows,
        }


def frontier_table(
    table: ScoreTable,
    *,
    beta: float,
    names: Sequence[str],
    margins: Sequence[npt.ArrayLike] | npt.ArrayLike | None = None,
    num_points: int = 50,
    confidence: float = 0.95,
) -> Frontier:
    """Compute the frontier of a table already grouped; arguments and errors as in :func:`can_dist.frontier`."""
    check_beta(beta)
    num_constraints = table.num_constraints
    if len(names) != num_constraints or num_constraints == 0:
        raise ConfigError(
            f"names: {len(names)} given for a table of {num_constraints} utilities; a frontier needs one name for "
            "each, and at least one."
        )
    if num_points < 2 or not 0 < confidence < 1:
        raise ConfigError(
            f"num_points = {num_points}, confidence = {confidence}: expected at least 2, and between 0 and 1."
        )
    if margins is None:
        points, shape = _lam_grid(table, beta, num_points)
    else:
        points, shape = _margin_grid(table, beta, names, _axes(margins, num_constraints))
    attainable = dict(zip(names, table.attainable_J.tolist(), strict=True))
    return Frontier(tuple(names), tuple(points), shape, attainable, float(beta), confidence)


def _lam_grid(table: ScoreTable, beta: float, num_points: int) -> tuple[list[FrontierPoint], tuple[int, ...]]:
    """Return exact points on a product grid of λ, each axis spread so that its margin moves in even steps."""
    num_constraints = table.num_constraints
    if num_constraints == 1:
        curve = _curve(table, beta, 0, num_points)
        return [point for _, point in sorted(curve.items())], (len(curve),)
    side = max(2, round(num_points ** (1 / num_constraints)))
    axes = [sorted(_curve(table, beta, axis, side)) for axis in range(num_constraints)]
    points = [_point(table, np.array(lam), beta) for lam in product(*axes)]
    return points, tuple(len(axis) for axis in axes)


def _curve(table: ScoreTable, beta: float, axis: int, num_points: int) -> dict[float, FrontierPoint]:
    """Return ``num_points`` points along one axis of λ, the others at zero.

    A few doublings of λ span the curve; the rest are put where the monotone interpolant of the margin asks for them.
    """
    direction = np.eye(table.num_constraints)[axis]
    spread = table.within_sd(table.utility_JN[axis])
    if spread == 0.0:
        return {0.0: _point(table, np.zeros(table.num_constraints), beta)}
    points = {0.0: _point(table, np.zeros(table.num_constraints), beta)}
    start = float(points[0.0].improvement_J[axis])
    goal = start + REACH * (float(table.attainable_J[axis]) - start)
    lam, step = max(table.within_sd(table.reward_N), beta) / spread / 4, 2.0 if num_points >= 12 else 8.0
    for _ in range(min(_DOUBLINGS, max(1, num_points // 2))):
        points[lam] = _point(table, lam * direction, beta)
        if points[lam].improvement_J[axis] >= goal:
            break
        lam *= step
    while len(points) < num_points:
        known = np.array(sorted(points))
        margin = np.maximum.accumulate([points[value].improvement_J[axis] for value in known])
        missing = num_points - len(points)
        fresh = _between(known, margin, missing if len(points) >= 6 else min(missing, 4))
        if not fresh:
            break
        points |= {value: _point(table, value * direction, beta) for value in fresh}
    return points


def _between(known: FloatArray, margin: FloatArray, count: int) -> list[float]:
    """Return ``count`` new λ that split the widest gaps of the margin, read off its monotone interpolant."""
    gap = np.diff(margin)
    if not gap.max(initial=0.0) > 0:
        return []
    pieces = np.ones(gap.size, dtype=int)
    for _ in range(count):
        pieces[np.argmax(gap / pieces)] += 1
    from scipy.interpolate import PchipInterpolator  # slow to import, needed by the frontier only

    curve = PchipInterpolator(known, margin)
    fresh: list[float] = []
    for low, high, num in zip(known[:-1], known[1:], pieces, strict=True):
        if num == 1:
            continue
        inner = np.linspace(low, high, 33)
        level = np.maximum.accumulate(curve(inner))
        wanted = level[0] + (level[-1] - level[0]) * np.arange(1, num) / num
        fresh += [float(value) for value in np.interp(wanted, level, inner) if low < value < high]
    return sorted(set(fresh) - set(known.tolist()))


def _margin_grid(
    table: ScoreTable, beta: float, names: Sequence[str], axes: list[FloatArray]
) -> tuple[list[FrontierPoint], tuple[int, ...]]:
    """Solve exactly for each combination of margins; what cannot be met is marked."""
    points = []
    for margin in product(*axes):
        constraints = [Margin(name, float(value)) for name, value in zip(names, margin, strict=True)]
        solution = solve_table(table, beta=beta, constraints=constraints, throw=False, estimator="empirical")
        if np.isfinite(solution.lam_vector).all():
            points.append(_point(table, solution.lam_vector, beta, np.array(margin)))
        else:
            points.append(_nothing(np.array(margin)))
    return points, tuple(axis.size for axis in axes)


def _axes(margins: Sequence[npt.ArrayLike] | npt.ArrayLike, num_constraints: int) -> list[FloatArray]:
    given = [np.ravel(np.asarray(margins, dtype=np.float64))] if num_constraints == 1 else list(margins)  # type: ignore[arg-type]
    axes = [np.atleast_1d(np.asarray(axis, dtype=np.float64)) for axis in given]
    if len(axes) != num_constraints or any(axis.ndim != 1 or not np.isfinite(axis).all() for axis in axes):
        raise ConfigError(
            f"margins: found {len(axes)} vectors for {num_constraints} constraints; give one vector of finite "
            "margins per constraint."
        )
    return axes


def _point(table: ScoreTable, lam_J: FloatArray, beta: float, margin_J: FloatArray | None = None) -> FrontierPoint:
    moments = prompt_moments(table, lam_J, beta)
    improvement_J = moments.gain_PJ.mean(axis=0)
    margin = improvement_J if margin_J is None else margin_J
    hessian = moments.hessian(beta)
    several = table.num_responses_P > 1
    reward_se, kl_se = _errors_at_margin(moments, lam_J, beta, hessian)
    root = math.sqrt(table.num_prompts)
    alone = table.num_prompts < 2
    return FrontierPoint(
        lam_J=lam_J,
        lam_se_J=lambda_standard_error(moments.gain_PJ - margin, hessian, lam_J),
        margin_J=margin,
        improvement_J=improvement_J,
        improvement_se_J=np.full(lam_J.size, math.nan) if alone else moments.gain_PJ.std(axis=0, ddof=1) / root,
        reward_improvement=float(moments.reward_gain_P.mean()),
        reward_improvement_se=reward_se,
        kl=float(moments.kl_P.mean()),
        kl_se=kl_se,
        ess=float(np.median(moments.ess_P[several])) if several.any() else math.nan,
        feasible=True,
    )


def _errors_at_margin(
    moments: PromptMoments, lam_J: FloatArray, beta: float, hessian_JJ: FloatArray
) -> tuple[float, float]:
    """Return the standard errors of E r and KL where λ̂ moves so as to keep the margin.

    Influence of prompt i on a mean f(λ̂): f_i − f − (∂f/∂λ)ᵀ H⁻¹ u_i over the active constraints, with
    ∂E r/∂λ = Cov(r,g)/β and ∂KL/∂λ = Cov(r + ⟨λ,g⟩, g)/β².
    """
    num_prompts = moments.kl_P.shape[0]
    if num_prompts < 2:
        return math.nan, math.nan
    free = np.flatnonzero(lam_J > 0)
    cross_J = moments.cross_PJ.mean(axis=0)
    slope_reward = cross_J / beta
    slope_kl = cross_J / beta**2 + hessian_JJ @ lam_J / beta
    deviation = (moments.gain_PJ - moments.gain_PJ.mean(axis=0))[:, free]
    inverse = np.linalg.pinv(hessian_JJ[np.ix_(free, free)], hermitian=True) if free.size else np.zeros((0, 0))
    shift_PJ = deviation @ inverse
    errors = []
    for value_P, slope in ((moments.reward_gain_P, slope_reward), (moments.kl_P, slope_kl)):
        influence = value_P - value_P.mean() - shift_PJ @ slope[free]
        errors.append(float(np.sqrt((influence**2).sum() / (num_prompts - 1) / num_prompts)))
    return errors[0], errors[1]


def _nothing(margin_J: FloatArray) -> FrontierPoint:
    none = np.full(margin_J.size, math.nan)
    return FrontierPoint(
        none, none, margin_J, none, none, math.nan, math.nan, math.nan, math.nan, math.nan, feasible=False
    )


def _row(point: FrontierPoint, names: Sequence[str], half: float) -> dict[str, float | bool]:
    row: dict[str, float | bool] = {"feasible": point.feasible}
    for j, name in enumerate(names):
        row[f"margin.{name}"] = float(point.margin_J[j])
        values = (("lam", point.lam_J, point.lam_se_J), ("improvement", point.improvement_J, point.improvement_se_J))
        for label, value_J, error_J in values:
            row |= _banded(f"{label}.{name}", float(value_J[j]), float(error_J[j]), half)
        row[f"lam.{name}_low"] = float(np.maximum(row[f"lam.{name}_low"], 0.0))  # NaN stays
    row |= _banded("reward_improvement", point.reward_improvement, point.reward_improvement_se, half)
    row |= _banded("kl", point.kl, point.kl_se, half)
    row["kl_low"] = float(np.maximum(row["kl_low"], 0.0))  # a divergence is never below zero
    return row | {"ess": point.ess}


def _banded(label: str, value: float, error: float, half: float) -> dict[str, float]:
    ends = {"": value, "_se": error, "_low": value - half * error, "_high": value + half * error}
    return {label + suffix: number for suffix, number in ends.items()}


def _plain(value: float | bool) -> float | bool | None:
    return value if isinstance(value, bool) or math.isfinite(value) else None
