"""One dual in units of about 1: scaling, feasibility and minimisation, in that order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from can_dist.dual.columns import Scores
from can_dist.dual.estimators import Estimate
from can_dist.dual.feasibility import Feasibility, check_feasibility
from can_dist.dual.newton import Minimum, kkt_residual, minimise
from can_dist.dual.objective import Evaluation, evaluate
from can_dist.dual.solution import Status
from can_dist.dual.table import FloatArray


@dataclass(frozen=True)
class Outcome:
    """Status, the empirical point in raw units where one was reached, the feasibility, and the estimator's λ̂.

    ``reason`` says why ``auto`` did not take the jackknife.
    """

    status: Status
    point: Minimum | None
    feasibility: Feasibility
    corrected: Estimate | None = None
    reason: str = ""


@dataclass(frozen=True)
class Problem:
    """The dual in units of about 1; utilities that never vary within a prompt are left out (λ = 0, or infeasible)."""

    table: Scores
    beta: float
    margin_J: FloatArray
    reward_scale: float
    scale_J: FloatArray
    varies_J: npt.NDArray[np.bool_]
    raw: Scores
    raw_beta: float
    raw_margin_J: FloatArray

    @classmethod
    def standardise(cls, table: Scores, beta: float, margin_J: FloatArray) -> Problem | None:
        """Scale by powers of two, which cost no digit; None where the scores overflow."""
        spread_J, reward_spread = table.spread_J, table.reward_spread
        if not (np.isfinite(spread_J).all() and math.isfinite(reward_spread) and np.isfinite(margin_J).all()):
            return None
        varies = spread_J > 0
        scale_J = np.array([_power_of_two(spread) for spread in spread_J])
        reward_scale = _power_of_two(max(reward_spread, beta))
        scaled = table.scaled(reward_scale, scale_J, varies)
        if beta / reward_scale == 0.0:
            return None
        small_margin = margin_J[varies] / scale_J[varies]
        return cls(scaled, beta / reward_scale, small_margin, reward_scale, scale_J, varies, table, beta, margin_J)

    def solve(self, max_steps: int, tolerance: float) -> Outcome:
        """Decide feasibility, then minimise."""
        feasibility = self._feasibility()
        if feasibility.infeasible:
            return Outcome(Status.INFEASIBLE, None, feasibility)
        if feasibility.border:
            return Outcome(Status.BOUNDARY, None, feasibility)
        minimum = minimise(self.table, self.beta, self.margin_J, max_steps=max_steps, tolerance=tolerance)
        point = self._raw_point(minimum)
        if not (minimum.at.finite and point.at.finite):
            return Outcome(Status.NONFINITE, None, feasibility)
        return Outcome(Status.OPTIMAL if minimum.residual <= tolerance else Status.MAX_STEPS, point, feasibility)

    def _feasibility(self) -> Feasibility:
        """Feasibility over all constraints, those that never vary included: each of these attains 0 and no more."""
        inner = check_feasibility(self.table, self.margin_J, self.scale_J[self.varies_J])
        fixed = ~self.varies_J
        if not fixed.any():
            return inner
        rounding_J = 1e-14 * np.abs(self.raw.centre_J)
        slack_J = np.where(fixed, -self.raw_margin_J, math.inf)
        slack_J[fixed & (np.abs(slack_J) <= rounding_J)] = 0.0
        worst = int(np.argmin(slack_J))
        attainable = np.zeros(self.varies_J.shape[0])
        attainable[self.varies_J] = inner.attainable_J
        relative = min(inner.relative, math.inf if slack_J[worst] >= 0 else -math.inf)
        if not slack_J[worst] < inner.t_star and not math.isnan(inner.t_star):
            certificate = np.zeros(attainable.shape[0])
            certificate[self.varies_J] = inner.certificate_J
            return Feasibility(inner.t_star, certificate, attainable, relative, inner.flat)
        return Feasibility(float(slack_J[worst]), np.eye(attainable.shape[0])[worst], attainable, relative, inner.flat)

    def _raw_point(self, minimum: Minimum) -> Minimum:
        """Undo the scaling and evaluate D in raw units."""
        lam = np.zeros(self.varies_J.shape[0])
        lam[self.varies_J] = minimum.lam_J * self.reward_scale / self.scale_J[self.varies_J]
        at: Evaluation = evaluate(self.raw, lam, self.raw_beta, self.raw_margin_J)
        return Minimum(lam, at, kkt_residual(minimum.lam_J, minimum.at.gradient_J), minimum.num_steps)


def _power_of_two(spread: float) -> float:
    return math.ldexp(1.0, math.frexp(spread)[1]) if spread > 0 else 1.0
