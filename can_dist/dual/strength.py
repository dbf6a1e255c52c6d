"""How far to go along the direction a training learned: θ(α) = θ_ref + α (θ − θ_ref), α from the constraints.

Near the reference the gain of a score is linear in α and KL quadratic, so one estimate at α = 1 gives the whole ray.
No root of the estimate is searched at a large α, where the weights' tail decides.

The strength is the least α that meets every demand. Where a constraint binds in the dual (λ_j > 0), a policy that
overshoots is shrunk, α < 1: the optimum meets a binding margin exactly. Where none binds, the margins cost nothing
and the policy stays as it was trained, α = 1, unless a margin needs more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import stdtrit

from can_dist.dual.columns import Scores
from can_dist.dual.estimate import PolicyEstimate
from can_dist.dual.interval import Interval
from can_dist.dual.solution import Margin, json_safe
from can_dist.dual.solve import margins
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint

MIN_PROMPTS = 32
"""Fewer validation prompts leave the realised gain anywhere between little and twice what was asked."""

ADVISED_PROMPTS = 128

RESOLVED = 2.0
"""Standard errors that a gain must lie above zero to be divided by."""

SHARE = 0.9
"""Of policies whose realised gain lies in the range that a small table's sentence names."""


@dataclass(frozen=True)
class Demand:
    """An improvement that is asked for: b of one constraint.

    Attributes:
        name: of the constraint.
        margin: b, improvement over the reference, utility units; τ − ḡ for a threshold τ.
        error: standard error of b: that of ḡ for a threshold, 0 for a margin.
        equal: exactly b, not at least.
    """

    name: str
    margin: float
    error: float = 0.0
    equal: bool = False


@dataclass(frozen=True)
class RayPoint:
    """What θ(α) does by the linear law.

    Attributes:
        alpha: strength, 1 for the policy as trained.
        improvement: gain of each constraint, α times that at 1, utility units.
        reward_improvement: likewise, reward units.
        kl: α² times that at 1, nats.
    """

    alpha: float
    improvement: dict[str, Interval]
    reward_improvement: Interval
    kl: Interval

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values, null for what is not a finite number."""
        record = {
            "alpha": self.alpha,
            "improvement": {name: vars(gain) for name, gain in self.improvement.items()},
            "reward_improvement": vars(self.reward_improvement),
            "kl": vars(self.kl),
        }
        return {name: json_safe(value) for name, value in record.items()}


@dataclass(frozen=True)
class Strength:
    """The strength chosen and why.

    Attributes:
        alpha: α*.
        alpha_se: its standard error over prompts, from that of the limiting gain; NaN where no demand set it.
        limiting: the constraint that set it; None where the policy stays as trained.
        needed: the least α that meets each constraint alone, 0 where the reference does.
        predicted: what θ(α*) does by the linear law.
        confidence: with which every demand is met, all of them jointly; None where they are met in the mean.
        notes: sentences to tell the user.
    """

    alpha: float
    alpha_se: float
    limiting: str | None
    needed: dict[str, float]
    predicted: RayPoint
    confidence: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values, null for what is not a finite number."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record |= {"predicted": self.predicted.to_dict(), "notes": list(self.notes)}
        return {name: json_safe(value) for name, value in record.items()}


def demands_of(table: Scores, constraints: Sequence[Margin]) -> tuple[Demand, ...]:
    """Return what the constraints ask of a policy, as improvements.

    A threshold is turned into an improvement by the reference means of ``table``. Give the table that λ was solved
    on: it has most prompts, its b is the one the run speaks of, and its error is independent of the estimate's.
    """
    deviation_JP = table.mean_utility_JP - table.centre_J[:, None]
    spread_J = np.sqrt((deviation_JP**2).sum(axis=1) / max(table.num_prompts - 1, 1) / table.num_prompts)
    rows = zip(constraints, margins(table, constraints).tolist(), spread_J.tolist(), strict=True)
    return tuple(Demand(c.name, b, 0.0 if c.threshold is None else error, c.equal) for c, b, error in rows)


def at_strength(estimate: PolicyEstimate, alpha: float) -> RayPoint:
    """Predict θ(α) from the estimate at α = 1: gains times α, KL times α²."""
    gains = {name: _times(gain, alpha) for name, gain in estimate.improvement.items()}
    return RayPoint(alpha, gains, _times(estimate.reward_improvement, alpha), _times(estimate.kl, alpha**2))


def choose_strength(
    estimate: PolicyEstimate,
    demands: Sequence[Demand],
    *,
    confidence: float | None = None,
    max_strength: float = math.inf,
    max_kl: float = math.inf,
) -> Strength:
    """Choose α* = max_j b_j/(Ĝ_j − z·SE_j), the least strength that meets every demand.

    A threshold's b has an error of its own: its α solves α Ĝ − z·√(α² SE² + SE_b²) = b. An equality takes no z and
    must hold at α* within the 95 % interval of its gain.

    Args:
        estimate: of the policy at α = 1, on prompts it was not trained on.
        demands: one demand per constraint of the estimate, in its order.
        confidence: joint confidence (Bonferroni over the inequalities) with which every demand is met; None: z = 0.
        max_strength: largest α.
        max_kl: largest predicted KL, nats.

    Raises:
        ConfigError: demands of other constraints, or bounds and a confidence that cannot mean anything.
        DataError: under ``MIN_PROMPTS`` prompts, or a gain that the table cannot tell from zero.
        InfeasibleConstraint: the direction is wrong, a bound is exceeded, or no one strength meets all demands.
    """
    _check(estimate, demands, confidence, max_strength, max_kl)
    quantile = _quantile(estimate, demands, confidence)
    ranges = {demand.name: _range(estimate, demand, quantile, confidence) for demand in demands}
    needed = {name: low for name, (low, _) in ranges.items()}
    binding = any(demand.equal or estimate.lam[demand.name] > 0 for demand in demands)
    limiting = max(needed, key=lambda name: needed[name], default=None)
    if limiting is None or needed[limiting] == 0.0 or (needed[limiting] < 1.0 and not binding):
        alpha, limiting = _as_trained(estimate, demands, ranges, strict=confidence is not None)
    else:
        alpha = needed[limiting]
    _check_together(estimate, demands, alpha, limiting, ranges, strict=confidence is not None)
    _check_bounds(estimate, alpha, limiting, max_strength, max_kl)
    notes = _width_notes(estimate, demands) if estimate.num_prompts < ADVISED_PROMPTS else ()
    return Strength(
        alpha=alpha,
        alpha_se=_alpha_se(estimate, demands, alpha, limiting),
        limiting=limiting,
        needed=needed,
        predicted=at_strength(estimate, alpha),
        confidence=confidence,
        notes=notes,
    )


def check_num_prompts(num_prompts: int) -> None:
    """Raise DataError where a validation table is too small to choose by."""
    if num_prompts < MIN_PROMPTS:
        raise DataError(
            f"validation table: {num_prompts} prompts with more than one response, at least {MIN_PROMPTS} are needed "
            f"to choose by it and {ADVISED_PROMPTS} are advised. Raise prompts.num_validation."
        )


def _times(value: Interval, factor: float) -> Interval:
    return Interval(value.mean * factor, value.se * factor, value.low * factor, value.high * factor)


def _check(
    estimate: PolicyEstimate, demands: Sequence[Demand], confidence: float | None, max_strength: float, max_kl: float
) -> None:
    names = [demand.name for demand in demands]
    if names != list(estimate.improvement):
        known = ", ".join(estimate.improvement)
        raise ConfigError(f"demands: found {', '.join(names) or 'none'}, expected those of the estimate: {known}.")
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ConfigError(f"strength.confidence = {confidence}: expected at least 0.5 and below 1.")
    for name, bound in (("max", max_strength), ("max_kl", max_kl)):
        if not bound > 0:
            raise ConfigError(f"strength.{name} = {bound}: expected a number above 0.")
    check_num_prompts(estimate.num_prompts)


def _quantile(estimate: PolicyEstimate, demands: Sequence[Demand], confidence: float | None) -> float:
    """Return z: Student's t over prompts, the chance of missing shared among the inequalities."""
    if confidence is None:
        return 0.0
    num_inequalities = max(sum(not demand.equal for demand in demands), 1)
    return float(stdtrit(estimate.num_prompts - 1, 1 - (1 - confidence) / num_inequalities))


def _range(estimate: PolicyEstimate, demand: Demand, quantile: float, confidence: float | None) -> tuple[float, float]:
    """Return the least and the largest α that meet one demand alone."""
    gain = estimate.improvement[demand.name]
    if demand.equal and demand.margin == 0.0:
        return 0.0, math.inf
    turned = demand.equal and demand.margin < 0
    mean, margin = (-gain.mean, -demand.margin) if turned else (gain.mean, demand.margin)
    quantile = 0.0 if demand.equal else quantile
    cautious = mean - quantile * gain.se
    if margin + quantile * demand.error <= 0.0:
        # what is asked is a loss at most: the reference keeps to it, and a policy that loses does up to some strength
        return 0.0, math.inf if cautious >= 0 else (margin + quantile * demand.error) / cautious
    _check_direction(estimate, demand, mean, quantile, confidence)
    if quantile * demand.error == 0.0:
        return margin / cautious, math.inf
    square = cautious * (mean + quantile * gain.se)
    spread = (gain.se * margin) ** 2 + (mean * demand.error) ** 2 - (quantile * gain.se * demand.error) ** 2
    return (mean * margin + quantile * math.sqrt(max(spread, 0.0))) / square, math.inf


def _as_trained(
    estimate: PolicyEstimate, demands: Sequence[Demand], ranges: dict[str, tuple[float, float]], *, strict: bool
) -> tuple[float, str | None]:
    """Return α = 1, or the largest α at which no loss is larger than what a demand allows, and which one."""
    broken = [demand.name for demand in demands if _broken(estimate, demand, 1.0, ranges[demand.name][1], strict)]
    broken = [name for name in broken if math.isfinite(ranges[name][1])]
    if not broken:
        return 1.0, None
    limiting = min(broken, key=lambda name: ranges[name][1])
    gain, alpha = estimate.improvement[limiting], ranges[limiting][1]
    if alpha == 0.0:
        raise InfeasibleConstraint(
            f"{limiting}: the policy gains {plus_minus(gain)} where no loss is allowed, so no strength above 0 keeps "
            "to it: its direction is wrong.\n  Do one of: train on more prompts or longer; look for a scorer whose "
            f"sign is turned; allow a loss (constraints.{limiting})."
        )
    return alpha, limiting


def _broken(estimate: PolicyEstimate, demand: Demand, alpha: float, high: float, strict: bool) -> bool:
    """Whether a demand fails at α: outside its 95 % interval; where a confidence is asked for, by any amount."""
    gain = estimate.improvement[demand.name]
    reach = math.hypot(alpha * (gain.high - gain.mean), 2 * demand.error)
    distance = alpha * gain.mean - demand.margin
    if demand.equal:
        return abs(distance) > reach
    return alpha > high * (1 + 1e-12) and (strict or distance < -reach)


def _alpha_se(estimate: PolicyEstimate, demands: Sequence[Demand], alpha: float, limiting: str | None) -> float:
    """Return the standard error of α* = b/Ĝ from those of Ĝ and of b (delta method)."""
    for demand in demands:
        if demand.name == limiting:
            gain = estimate.improvement[limiting]
            return math.hypot(alpha * gain.se, demand.error) / abs(gain.mean)
    return math.nan


def _check_direction(
    estimate: PolicyEstimate, demand: Demand, mean: float, quantile: float, confidence: float | None
) -> None:
    """Refuse to divide by a gain that goes the wrong way, or that may as well be zero."""
    gain = estimate.improvement[demand.name]
    facts = f"{demand.name}: the policy gains {plus_minus(gain)} where {demand.margin:+.3g} is asked"
    direction = "" if math.isnan(estimate.direction.mean) else f" (direction {estimate.direction.mean:.2f})"
    if mean <= 0:
        raise InfeasibleConstraint(
            f"{facts}, so no strength brings it there: its direction is wrong{direction}.\n  Do one of: train on more "
            "prompts or longer; look for a scorer whose sign is turned."
        )
    multiple = max(RESOLVED, quantile)
    if mean > multiple * gain.se:
        return
    num_prompts = math.ceil(estimate.num_prompts * (multiple * gain.se / mean) ** 2) + 1
    claim = (
        "cannot tell it from zero" if multiple == RESOLVED else f"cannot vouch for it with confidence {confidence:g}"
    )
    raise DataError(
        f"{facts}, and a validation table of {estimate.num_prompts} prompts {claim}.\n  Do one of: raise "
        f"prompts.num_validation (about {num_prompts} would do if the gain is what it seems); train longer or at a "
        "higher learning rate."
    )


def _check_together(
    estimate: PolicyEstimate,
    demands: Sequence[Demand],
    alpha: float,
    limiting: str | None,
    ranges: dict[str, tuple[float, float]],
    *,
    strict: bool,
) -> None:
    """Refuse where the strength that meets one demand breaks another."""
    cause = "the policy as trained" if limiting is None else f"strength {alpha:.3g}, which {limiting} needs,"
    for demand in demands:
        if demand.name == limiting or not _broken(estimate, demand, alpha, ranges[demand.name][1], strict):
            continue
        gain, kind = _times(estimate.improvement[demand.name], alpha), "exactly" if demand.equal else "at least"
        raise InfeasibleConstraint(
            f"{cause} brings {demand.name} to {plus_minus(gain)} where {kind} {demand.margin:+.3g} is asked: one "
            "strength cannot meet both.\n  Do one of: steer lambda in the training (train.feedback: validation); "
            f"change constraints.{demand.name}."
        )


def _check_bounds(
    estimate: PolicyEstimate, alpha: float, limiting: str | None, max_strength: float, max_kl: float
) -> None:
    if limiting is None:
        return  # the policy as it was trained; nothing is stretched
    gain, kl = estimate.improvement[limiting], estimate.kl
    cause = f"{limiting} needs strength {alpha:.3g} (gain {plus_minus(gain)} at strength 1)"
    lower = f"lower constraints.{limiting}.margin (or threshold)"
    remedy = f"{lower}; train at a higher learning rate, longer or on more prompts"
    if alpha > max_strength:
        raise InfeasibleConstraint(
            f"{cause}, above strength.max = {max_strength:g}.\n  Do one of: raise strength.max; {remedy}."
        )
    if alpha**2 * kl.mean > max_kl:
        raise InfeasibleConstraint(
            f"{cause}, where KL is predicted to be {alpha**2 * kl.mean:.3g} nats ({kl.mean:.3g} at strength 1), above "
            f"strength.max_kl = {max_kl:g}.\n  Do one of: raise strength.max_kl; {remedy}."
        )


def _width_notes(estimate: PolicyEstimate, demands: Sequence[Demand]) -> tuple[str, ...]:
    """Say what a small table costs: the range of the realised gain, which errs as Ĝ does."""
    notes = []
    for demand in demands:
        gain = estimate.improvement[demand.name]
        if demand.margin <= 0 or gain.mean <= 0:
            continue
        relative = gain.se / gain.mean
        more = relative * math.sqrt(estimate.num_prompts / ADVISED_PROMPTS)
        ranges = []
        for num_prompts, error in ((estimate.num_prompts, relative), (ADVISED_PROMPTS, more)):
            reach = float(stdtrit(num_prompts - 1, 0.5 + SHARE / 2)) * error
            ranges.append(f"{demand.margin * (1 - reach):.3g} and {demand.margin * (1 + reach):.3g}")
        notes.append(
            f"{estimate.num_prompts} validation prompts leave the gain of {demand.name} between {ranges[0]} "
            f"({SHARE:.0%}) where {demand.margin:.3g} is asked; {ADVISED_PROMPTS} would leave it between {ranges[1]}."
        )
    return tuple(notes)


def plus_minus(value: Interval) -> str:
    """Return a mean and the half-width of its interval as text."""
    return f"{value.mean:+.3g} ± {value.high - value.mean:.2g}"
