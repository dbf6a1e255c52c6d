"""Can any policy on the table meet the margins? Answered before solving, with a certificate (docs/dual.md, 6)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from can_dist.dual.columns import Scores
from can_dist.dual.table import FloatArray

BORDER = 1e-9
"""|t*| below this many within-prompt standard deviations counts as t* = 0."""

_MAX_CUTS = 400
_GAP_UNDECIDED = BORDER / 10
_GAP_DECIDED = 1e-8


@dataclass(frozen=True)
class Feasibility:
    """Whether the margins can be met on the table, and the proof.

    Attributes:
        t_star: min over v in the simplex of mean_i max_k ⟨v,h_ik⟩, raw units: all constraints can have at least this
            slack at once. NaN without constraints.
        certificate_J: the minimising v. Where t* < 0, no policy has ⟨v, slack⟩ above t*.
        attainable_J: largest improvement of each constraint alone, mean_i max_k g_ik − ḡ, raw units.
        relative: t* with every utility in units of its within-prompt standard deviation; its sign decides.
        flat: the certificate's mixture of utilities does not vary within any prompt, so t* = 0 is harmless.
    """

    t_star: float
    certificate_J: FloatArray
    attainable_J: FloatArray
    relative: float
    flat: bool

    @property
    def infeasible(self) -> bool:
        """Whether no policy on the table meets the margins."""
        return self.relative < -BORDER

    @property
    def border(self) -> bool:
        """Whether the margins are met only in the limit of infinite λ."""
        return abs(self.relative) <= BORDER and not self.flat


def check_feasibility(scaled: Scores, margin_J: FloatArray, scale_J: FloatArray) -> Feasibility:
    """Compute t*, the certificate and the attainable margins.

    Args:
        scaled: table whose utilities were divided by ``scale_J`` so that each varies by about 1 within a prompt.
        margin_J: margins in those units.
        scale_J: the scales, to report in raw units.
    """
    attainable = scaled.attainable_J
    num_constraints = scaled.num_constraints
    if num_constraints == 0:
        return Feasibility(np.nan, np.zeros(0), attainable, np.inf, False)
    if num_constraints == 1:
        relative = float(attainable[0] - margin_J[0])
        return Feasibility(relative * float(scale_J[0]), np.ones(1), attainable * scale_J, relative, False)
    cuts: list[FloatArray] = []
    relative, mixture = _minimise(scaled, margin_J, np.ones(num_constraints), cuts)
    flat = scaled.best(mixture)[1] <= 1e-12 * scaled.peak
    if np.all(scale_J == scale_J[0]):
        return Feasibility(relative * float(scale_J[0]), mixture, attainable * scale_J, relative, flat)
    smallest = float(scale_J.min())
    t_raw, mixture = _minimise(scaled, margin_J, smallest / scale_J, cuts)
    certificate = mixture / scale_J
    return Feasibility(t_raw * smallest, certificate / certificate.sum(), attainable * scale_J, relative, flat)


def _minimise(
    table: Scores, margin_J: FloatArray, price_J: FloatArray, cuts: list[FloatArray]
) -> tuple[float, FloatArray]:
    """Minimise mean_i max_k ⟨v,h_ik⟩ over v ≥ 0, ⟨price, v⟩ = 1, by cutting planes.

    The function is a maximum of linear ones, so every evaluation yields a cut that touches it; a linear programme
    over the cuts gives the lower bound and the next v. Returns the best value and its v.
    """
    num_constraints = margin_J.shape[0]
    best_value, best_point = np.inf, np.zeros(num_constraints)
    corners = [np.eye(num_constraints)[j] / price_J[j] for j in range(num_constraints)]
    queue = [*corners, np.sum(corners, axis=0) / num_constraints]
    while len(cuts) < _MAX_CUTS:
        point = queue.pop(0)
        cut = table.best(point)[0] - margin_J
        cuts.append(cut)
        value = float(cut @ point)
        if value < best_value:
            best_value, best_point = value, point
        if queue:
            continue
        lower, point = _master(np.array(cuts), price_J)
        gap = best_value - lower
        unit = float(best_point.sum())
        decided = best_value < -BORDER * unit or lower > BORDER * unit
        if gap <= (_GAP_DECIDED if decided else _GAP_UNDECIDED) * unit:
            break
        queue.append(point)
    return best_value, best_point


def _master(cuts_CJ: FloatArray, price_J: FloatArray) -> tuple[float, FloatArray]:
    """Minimise max_c ⟨cut_c, v⟩ over v ≥ 0, ⟨price, v⟩ = 1; returns the optimum and v."""
    from scipy.optimize import linprog  # 0.3 s of every start, needed by several constraints only

    num_cuts, num_constraints = cuts_CJ.shape
    result = linprog(
        c=np.append(np.zeros(num_constraints), 1.0),
        A_ub=np.hstack([cuts_CJ, -np.ones((num_cuts, 1))]),
        b_ub=np.zeros(num_cuts),
        A_eq=np.append(price_J, 0.0)[None, :],
        b_eq=np.ones(1),
        bounds=[(0, None)] * num_constraints + [(None, None)],
        method="highs-ds",
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    if result.x is None:
        return -np.inf, np.full(num_constraints, 1.0 / price_J.sum())
    point = np.maximum(result.x[:num_constraints], 0.0)
    return float(result.x[-1]), point / float(price_J @ point)
