"""Every strength of one training: what the linear law says of each, from the estimate at strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from can_dist.dual import Demand, PolicyEstimate, at_strength
from can_dist.dual.strength import RayPoint

NUM_POINTS = 41
REACH = 1.5
"""The ray is drawn to so many times the largest margin, or to strength 1 where that lies further."""


def ray(estimate: PolicyEstimate, demands: Sequence[Demand]) -> dict[str, Any]:
    """Return gain of each constraint, gain of the reward and KL at strengths from 0, columns of ``NUM_POINTS`` numbers.

    Gains grow as α and KL as α², which was seen to hold within a tenth as far as KL is of the order of a nat; each
    ``_low`` and ``_high`` is a 95 % interval over prompts.
    """
    gains = [(demand.margin, estimate.improvement[demand.name].mean) for demand in demands]
    furthest = max([1.0, *(REACH * margin / gain for margin, gain in gains if gain > 0)])
    points = [at_strength(estimate, alpha) for alpha in np.linspace(0.0, furthest, NUM_POINTS).tolist()]
    return columns_of(points)


def columns_of(points: Sequence[RayPoint]) -> dict[str, Any]:
    """Return points as columns: strength, gain of each constraint, and reward and KL with their intervals."""
    columns: dict[str, Any] = {"alpha": [point.alpha for point in points]}
    names = points[0].improvement if points else ()
    columns["improvement"] = {name: [p.improvement[name].mean for p in points] for name in names}
    for quantity in ("reward_improvement", "kl"):
        values = [getattr(point, quantity) for point in points]
        columns |= {quantity + end: [getattr(v, key) for v in values] for end, key in ENDS.items()}
    return columns


ENDS = {"": "mean", "_low": "low", "_high": "high"}
