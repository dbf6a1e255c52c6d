"""The text of the errors of a solve: what is wrong, the numbers, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from can_dist.dual.columns import Scores
from can_dist.dual.estimators import Estimate
from can_dist.dual.feasibility import BORDER, Feasibility
from can_dist.dual.newton import Minimum
from can_dist.dual.solution import DualSolution, Margin, Status
from can_dist.dual.table import FloatArray


def infeasible_message(
    table: Scores,
    constraints: Sequence[Margin],
    margin_J: FloatArray,
    feasibility: Feasibility,
    scale_J: FloatArray,
    raised_J: FloatArray,
) -> str:
    """Say which margins cannot be met, what can, and how to change that; ``raised_J``: added for a confidence."""
    short = [j for j in range(len(constraints)) if _alone(j, margin_J, feasibility, scale_J) < -BORDER]
    joint = not short
    named = list(range(len(constraints))) if joint else short
    lines = ["no policy supported on this table meets the constraints."]
    lines += [
        _attainable_line(table, constraints[j], float(margin_J[j]), feasibility, j, float(raised_J[j])) for j in named
    ]
    for j in named:
        lines += _other_reading(table, constraints[j], float(feasibility.attainable_J[j]), j)
    if joint:
        mixture = ", ".join(f"{c.name} {v:.2f}" for c, v in zip(constraints, feasibility.certificate_J, strict=True))
        lines.append(
            f"  Each margin is attainable alone, not all together: t* = {feasibility.t_star:.3g}, weighting the "
            f"constraints by v = ({mixture}) every policy misses by at least {-feasibility.t_star:.3g}."
        )
    lines.append(_remedy([constraints[j] for j in named], confident=bool(raised_J.any())))
    return "\n".join(lines)


def boundary_message(
    table: Scores,
    constraints: Sequence[Margin],
    margin_J: FloatArray,
    feasibility: Feasibility,
    scale_J: FloatArray,
    raised_J: FloatArray,
) -> str:
    """Say that the margins equal the most attainable, so that λ* is infinite; ``raised_J``: added for a confidence."""
    exact = [j for j in range(len(constraints)) if _alone(j, margin_J, feasibility, scale_J) <= BORDER]
    named = exact or list(range(len(constraints)))
    lines = ["the constraints are met only by the best responses alone, in the limit of infinite lambda."]
    lines += [
        _attainable_line(table, constraints[j], float(margin_J[j]), feasibility, j, float(raised_J[j])) for j in named
    ]
    for j in named:
        lines += _other_reading(table, constraints[j], float(feasibility.attainable_J[j]), j)
    lines.append(_remedy([constraints[j] for j in named], confident=bool(raised_J.any())))
    return "\n".join(lines)


def max_steps_message(point: Minimum, max_steps: int, tolerance: float) -> str:
    """Say how far the iteration came."""
    if point.num_steps >= max_steps:
        advice = "raise max_steps; raise tolerance; raise beta"
    else:
        advice = "raise beta; raise tolerance; look for outlying scores"
    return (
        f"the dual did not converge: after {point.num_steps} of at most {max_steps} Newton steps the KKT residual is "
        f"{point.residual:.1e} standard deviations, tolerance {tolerance:.1e}.\n  Do one of: {advice}."
    )


def equality_message(
    status: Status, constraints: Sequence[Margin], margin_J: FloatArray, least_J: FloatArray, most_J: FloatArray
) -> str:
    """Say that constraints with an equality among them have no solution, and what each alone can reach."""
    lines = [f"{status.value.rstrip('.')} (equality constraints among them)."]
    for j, constraint in enumerate(constraints):
        kind = "exactly" if constraint.equal else "at least"
        lines.append(
            f"  {constraint.name}: improvement of {kind} {margin_J[j]:.6g} requested, alone attainable from "
            f"{least_J[j]:.6g} to {most_J[j]:.6g}."
        )
    lines.append("  Do one of: move the margins inside these ranges; raise generate.num_responses.")
    return "\n".join(lines)


def misread_hints(solution: DualSolution) -> list[str]:
    """Name the demands below the reference that cost nothing (λ* = 0), with what they allow and other readings of them.

    A margin below zero, or a threshold below ḡ, is no error, and a tolerated loss is a sensible demand. It may also be
    a level given as an improvement, or a cost that was meant to fall. One sentence each, or two.
    """
    hints = []
    for name, lam in solution.lam.items():
        centre, attainable = solution.centre[name], solution.feasibility["attainable"][name]
        margin, threshold = solution.margin[name] - solution.safety_margin.get(name, 0.0), solution.threshold[name]
        other = margin - centre if threshold is None else threshold
        if lam != 0 or margin >= 0:
            continue
        given = f"margin={margin:.6g}" if threshold is None else f"threshold={threshold:.6g}"
        hint = (
            f"{name}: {given} allows the mean to fall by {-margin:.6g} below the reference mean {centre:.6g}; it holds "
            "without any change, so lambda is 0."
        )
        if 0 < other < attainable and threshold is None:
            hint += f" If you meant the absolute level, write threshold={margin:.6g}, a margin of {other:+.6g}."
        elif 0 < other < attainable:
            hint += f" If you meant the improvement, write margin={threshold:.6g}."
        elif threshold is None and not name.startswith("-"):
            hint += f" If {name} is a cost that should fall by {-margin:.6g}, write -{name}:margin={-margin:.6g}."
        hints.append(hint)
    return hints


def lam_error(solution: DualSolution, name: str) -> list[str]:
    """Return what is said beside λ̂: its standard error, what the finite K may add to it, and the paper's λ̂.

    Nothing where there is none: one prompt, λ at its bound, a table that enumerates what the reference can say.
    """
    return [*error_parts(solution.lam_se[name], bias_of(solution, name, "lam_bias")), *_paper(solution, name)]


def gain_error(solution: DualSolution, name: str) -> list[str]:
    """Return what is said beside a predicted improvement: its standard error and the bias of the finite K."""
    return error_parts(solution.predicted["improvement"][name]["se"], bias_of(solution, name, "bias"))


def error_parts(error: float | None, bias: float | None) -> list[str]:
    """Return 'SE 0.1' and the bias beside it, 'bias 0.02 allowed for' or, where it is NaN, 'bias unknown'."""
    if error is None or not math.isfinite(error):
        return []
    if bias is None:
        return [f"SE {error:.2g}"]
    return [f"SE {error:.2g}", f"bias {bias:.2g} allowed for" if math.isfinite(bias) else "bias unknown"]


def bias_of(solution: DualSolution, name: str, kind: Literal["lam_bias", "bias"]) -> float | None:
    """Return how much the finite K may add to λ̂ or to the improvement.

    NaN where it is unknown, None where nothing can be, or where the solution is older than what says it.
    """
    judgement = solution.diagnostics.get("judgement")
    if judgement is None:
        return None
    if judgement["objection"]:
        return math.nan
    biases = judgement.get("lam_bias", {}) if kind == "lam_bias" else {name: judgement["delivered"][name]["bias"]}
    bias: float | None = biases.get(name)
    return bias


def _paper(solution: DualSolution, name: str) -> list[str]:
    if solution.estimator == "empirical" or name not in solution.lam_paper:
        return []
    return [f"paper's {solution.lam_paper[name]:.4g}"]


def estimator_message(corrected: Estimate) -> str:
    """Say that an estimator has no solution near the empirical one."""
    ess = float(np.median(corrected.moments.ess_P))
    return (
        f"the {corrected.estimator} estimator has no solution near the empirical lambda: leaving one response out of a "
        f"prompt changes too much (median effective sample size {ess:.1f}).\n"
        "  Do one of: estimator auto, gaussian or empirical; raise beta; raise generate.num_responses."
    )


def nonfinite_message(largest: float, beta: float) -> str:
    """Say that scores overflow at this β."""
    return (
        f"the dual left the finite numbers: the largest score difference within a prompt is {largest:.3g} at beta = "
        f"{beta:g}.\n  Do one of: check the scorers for overflow; rescale the scores and beta together; raise beta."
    )


def _alone(j: int, margin_J: FloatArray, feasibility: Feasibility, scale_J: FloatArray) -> float:
    """Return how far one margin lies under the most attainable, in standard deviations."""
    return float((feasibility.attainable_J[j] - margin_J[j]) / scale_J[j])


def _attainable_line(
    table: Scores, constraint: Margin, margin: float, feasibility: Feasibility, j: int, raised: float
) -> str:
    requested, attainable = _pair(margin, float(feasibility.attainable_J[j]))
    demand = f"margin {requested} requested"
    if constraint.threshold is not None:
        centre = float(table.centre_J[j])
        demand = (
            f"threshold {constraint.threshold:.6g} requested, margin {requested} over the reference mean {centre:.6g}"
        )
    if raised > 0:
        demand += f" ({margin - raised:.6g} and {raised:.6g} for the confidence)"
    counts = table.num_responses_P
    num = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()}-{counts.max()}"
    return (
        f"  {constraint.name}: {demand}, at most {attainable} attainable "
        f"(mean over prompts of the best of K = {num}, minus the reference mean)."
    )


def _other_reading(table: Scores, constraint: Margin, attainable: float, j: int) -> list[str]:
    """Echo both readings of a number that cannot be met as given and could be as the other kind of demand."""
    centre = float(table.centre_J[j])
    if constraint.threshold is None:
        demand, kind = float(constraint.margin or 0.0), "an improvement over"
        own, other = demand, demand - centre
        advice = f"the absolute level {demand:.6g}, write threshold={demand:.6g}, which is a margin of {other:+.6g}"
    else:
        demand, kind = float(constraint.threshold), "an absolute level, compared with"
        own, other = demand - centre, demand
        advice = f"an improvement of {demand:.6g}, write margin={demand:.6g}"
    if not own >= attainable > other > 0:  # at 0 or below lambda is 0: nothing would be asked
        return []
    return [
        f"  {constraint.name}: read as {kind} the reference mean {centre:.6g} it needs {own:+.6g}, at most "
        f"{attainable:+.6g} attainable; if you meant {advice}."
    ]


def _remedy(constraints: Sequence[Margin], *, confident: bool) -> str:
    fields = [f"constraints.{c.name}.{'margin' if c.threshold is None else 'threshold'}" for c in constraints]
    less = "lower confidence; " if confident else ""
    more = "raise generate.num_responses; add prompts with safer responses"
    return f"  Do one of: {less}lower {' or '.join(fields)}; {more}."


def _pair(first: float, second: float) -> tuple[str, str]:
    """Format two numbers with as few digits as tell them apart, two decimals at least."""
    size = max(abs(first), abs(second))
    if size >= 1e6 or 0 < size < 1e-3:
        for digits in range(3, 17):
            texts = f"{first:.{digits}g}", f"{second:.{digits}g}"
            if texts[0] != texts[1]:
                return texts
        return f"{first:.3g}", f"{second:.3g}"
    for decimals in range(2, 13):
        texts = f"{first:.{decimals}f}", f"{second:.{decimals}f}"
        if texts[0] != texts[1]:
            return texts
    return f"{np.round(first, 2):.2f}", f"{np.round(second, 2):.2f}"
