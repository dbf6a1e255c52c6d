"""The one-sided bounds that a certificate is decided by: they hold at small errors, where an interval's ends do not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from can_dist.dual.interval import mean_interval
from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError

LARGEST_ERROR, SMALLEST_ERROR = 0.25, 1e-12
"""A bound at a larger error is the one at the largest, which holds all the more; at a smaller one there is none."""

BEYOND_THE_WORST = 0.5
"""The floor lies this share of the worst value's distance from the mean below the worst value."""


@dataclass(frozen=True)
class Bound:
    """A lower bound of a mean over prompts, and the value that no prompt is taken to lie below."""

    low: float
    floor: float


def lower_bound(value_P: FloatArray, error: float) -> Bound:
    """Return a bound above which the mean of P values lies, wrong with a probability of at most ``error``.

    It is the lower of two. The first is the end of :func:`~can_dist.dual.interval.mean_interval`. The second is
    Gaffke's bound (2005, "Three test statistics for a nonparametric one-sided hypothesis on the mean of a nonnegative
    variable", Math. Methods of Statistics 14): the ``error``-quantile of Σ D_i v_i, D uniform on the simplex over the
    P values and a floor, below which no value lies. The floor is not known; it is put below the worst value by
    ``BEYOND_THE_WORST`` of that value's distance from the mean. The first is too high where few prompts lose much, the
    second where a minority of the prompts carries the spread on both sides (docs/estimators.md, "The bounds of a
    certificate").

    Args:
        value_P: one finite number per prompt, shape (P,), any unit.
        error: largest probability that the mean lies below, in (0, 1).

    Returns:
        The bound; −∞ where fewer than two prompts, or prompts that are all alike, show no spread, and at an error that
        no quantile is computed for.

    Raises:
        ConfigError: ``error`` outside (0, 1).

    >>> round(lower_bound(np.array([0.2, 0.5, 0.4, 0.3, 0.6, 0.1]), 0.05).low, 3)
    0.173
    """
    if not 0 < error < 1:
        raise ConfigError(f"error = {error}: expected between 0 and 1.")
    mean, worst = float(value_P.mean()), float(value_P.min())
    floor = worst - BEYOND_THE_WORST * (mean - worst)
    if value_P.size < 2 or not floor < worst or error < SMALLEST_ERROR:
        return Bound(-math.inf, floor)
    error = min(error, LARGEST_ERROR)
    interval = mean_interval(value_P, 1 - 2 * error)
    return Bound(min(interval.low, _gaffke(np.append(value_P, floor), error)), floor)


def _gaffke(value_M: FloatArray, error: float) -> float:
    """Return the ``error``-quantile of Σ D_i v_i, D uniform on the simplex, by Lugannani and Rice's approximation.

    P(Σ D_i v_i ≤ b) = P(Σ E_i (v_i − b) ≤ 0) with E_i exponential, whose cumulant function −Σ ln(1 − s(v_i − b)) has
    its saddlepoint where b is the mean of the v_i weighted by 1/(1 + t(v_i − mean)): t is the one unknown.
    """
    centre_M = value_M - value_M.mean()
    scale = float(-centre_M.min())
    unit_M = centre_M / scale

    from scipy.optimize import brentq  # slow to import, needed by a certificate only

    def excess(logit: float) -> float:
        return _tail(unit_M, 1 / (1 + math.exp(-logit)))[1] - error

    if excess(30.0) > 0:  # an error so small that nothing above the floor is known
        return float(value_M.min())
    logit = brentq(excess, -12.0, 30.0, xtol=1e-10)
    return float(value_M.mean()) + scale * _tail(unit_M, 1 / (1 + math.exp(-logit)))[0]


def _tail(unit_M: FloatArray, tilt: float) -> tuple[float, float]:
    """Return b and P(Σ D_i u_i ≤ b) at one tilt in (0, 1); u has the mean 0 and the least value −1."""
    denominator_M = 1 + tilt * unit_M
    weight_M = 1 / denominator_M
    bound = float(weight_M @ unit_M / weight_M.sum())
    norming = 1 + tilt * bound
    cumulant = float(-np.log(denominator_M / norming).sum())
    curvature = float((((unit_M - bound) * weight_M * norming) ** 2).sum())
    reach = -math.sqrt(max(-2 * cumulant, 0.0))
    steepness = -tilt / norming * math.sqrt(curvature)
    if reach > -1e-4:  # the two terms of the correction cancel
        return bound, 0.5
    density = math.exp(-(reach**2) / 2) / math.sqrt(2 * math.pi)
    return bound, float(ndtr(reach)) + density * (1 / reach - 1 / steepness)
