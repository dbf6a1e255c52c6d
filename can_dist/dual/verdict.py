"""One sentence on a trained policy: how far it went, in which direction, and what strength would meet its margins.

Every number in it was measured on the table of the estimate, or follows from one by the linear law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from can_dist.dual.estimate import PolicyEstimate
from can_dist.dual.strength import Demand, Strength, choose_strength, plus_minus
from can_dist.errors import DataError, InfeasibleConstraint

GOOD_DIRECTION = 0.9
"""Correlation from which length alone is missing."""


def verdict(
    estimate: PolicyEstimate,
    demands: Sequence[Demand],
    *,
    predicted_kl: float,
    max_strength: float = math.inf,
    max_kl: float = math.inf,
) -> str:
    """Say whether a policy meets its demands, as far as the estimate knows, and if not, why and what would.

    A demand is missed where the whole 95 % interval of its gain lies outside, as in the report of an evaluation.

    Args:
        estimate: of the policy at strength 1.
        demands: one demand per constraint of the estimate, in its order.
        predicted_kl: KL of π_λ*, what the margins cost at best, nats.
        max_strength: largest α, as :func:`~can_dist.dual.strength.choose_strength` takes it.
        max_kl: largest predicted KL, likewise.

    Raises:
        ConfigError: demands or bounds that ``choose_strength`` refuses.
    """
    missed = [demand for demand in demands if _distance(estimate, demand) < 0]
    chosen: Strength | None = None
    try:
        chosen = choose_strength(estimate, demands, max_strength=max_strength, max_kl=max_kl)
        remedy = (
            f"strength {chosen.alpha:.2g} would meet the margins at KL {chosen.predicted.kl.mean:.2g} "
            f"({predicted_kl:.2g} predicted)"
        )
    except (InfeasibleConstraint, DataError) as refusal:
        remedy = f"no strength can be named, since {str(refusal).splitlines()[0].rstrip('.')}"
    if missed:
        worst = min(missed, key=lambda demand: _distance(estimate, demand))
        return f"Stopped short: {_way(estimate, worst)}, {_cause(estimate)}: {remedy}."
    excess = next((demand for demand in demands if chosen is not None and demand.name == chosen.limiting), None)
    if chosen is not None and chosen.alpha < 1 and excess and estimate.improvement[excess.name].low > excess.margin:
        return f"Went too far: {_way(estimate, excess)} at KL {estimate.kl.mean:.2g}: {remedy}."
    gains = "; ".join(_way(estimate, demand) for demand in demands) or "no margin is asked for"
    return f"Arrived: {gains}, at KL {estimate.kl.mean:.2g} ({predicted_kl:.2g} predicted)."


def estimate_line(estimate: PolicyEstimate, demands: Sequence[Demand]) -> str:
    """Return an estimate as a line: 'safety +0.24 ± 0.03 of +0.50, reward +0.08, KL 0.11, length 0.36, direction 0.64'.

    Args:
        estimate: of the policy.
        demands: what is asked of its constraints; those not named here are shown alone.
    """
    margin_of = {demand.name: demand.margin for demand in demands}
    parts = []
    for name, gain in estimate.improvement.items():
        of = f" of {margin_of[name]:+.2f}" if name in margin_of else ""
        parts.append(f"{name} {_signed(gain.mean)} ± {gain.high - gain.mean:.2f}{of}")
    parts += [f"reward {_signed(estimate.reward_improvement.mean)}", f"KL {estimate.kl.mean:.2f}"]
    for name, value in (("length", estimate.length.mean), ("direction", estimate.direction.mean)):
        parts += [] if math.isnan(value) else [f"{name} {value:.2f}"]
    return ", ".join(parts)


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # no −0.00


def _distance(estimate: PolicyEstimate, demand: Demand) -> float:
    """Return by how many half-widths of its interval a gain lies inside what is asked, less than 0 where outside."""
    gain = estimate.improvement[demand.name]
    reach = math.hypot(gain.high - gain.mean, 2 * demand.error)
    slack = gain.mean - demand.margin
    inside = reach - abs(slack) if demand.equal else reach + slack
    return inside / reach if reach > 0 else math.copysign(math.inf, inside)


def _way(estimate: PolicyEstimate, demand: Demand) -> str:
    """Return how far a gain went."""
    gain = estimate.improvement[demand.name]
    if demand.margin > 0:
        share = gain.mean / demand.margin
        return f"{demand.name} went {share:.0%} of the way ({plus_minus(gain)} of {demand.margin:+.3g})"
    kind = "exactly" if demand.equal else "at least"
    return f"{demand.name} {plus_minus(gain)} where {kind} {demand.margin:+.3g} is asked"


def _cause(estimate: PolicyEstimate) -> str:
    """Return length and direction, and which of them is missing."""
    length, direction = estimate.length, estimate.direction
    if math.isnan(direction.mean):
        return "it is the reference"
    numbers = f"length {length.mean:.2f}, direction {direction.mean:.2f}"
    if direction.high < GOOD_DIRECTION:
        return numbers
    return f"{numbers} (length alone is missing)" if length.high < 1 else numbers
