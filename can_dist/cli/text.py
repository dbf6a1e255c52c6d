"""Solutions and frontiers as text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from can_dist.dual.belief.level import stated
from can_dist.dual.messages import gain_error, lam_error, misread_hints

if TYPE_CHECKING:
    from can_dist.dual import DualSolution, Frontier, Settled

MAP_ROWS = 6
MARGIN_STEP = 3


def solution_text(solution: DualSolution, equal: Sequence[str] = ()) -> str:
    """Return a solution as labelled lines: status, estimator, one line per constraint, reward, weights, verdict.

    Args:
        solution: of any status.
        equal: the constraints that are met exactly, not at least.
    """
    lines = [f"status    {solution.status.name}: {solution.status.value}"]
    lines.append(f"estimator {solution.estimator}" + (f": {why}" if (why := solution.estimator_reason) else ""))
    for name, lam in solution.lam.items():
        gain = solution.predicted["improvement"][name]
        raised = f" ({solution.safety_margin[name]:+.4g} of it safety margin)" if solution.safety_margin else ""
        lines.append(
            f"{name:9} lambda* {lam:.6g}{_bracketed(lam_error(solution, name))}, margin {solution.margin[name]:.4g}"
            f"{raised} over the reference mean {solution.centre[name]:.4g}, predicted {gain['mean']:+.4g}"
            f"{_bracketed(gain_error(solution, name))}"
        )
    if solution.confidence is not None:
        each = "the margin is" if len(solution.lam) == 1 else "all margins are jointly"
        lines.append(f"margins   {each} met with confidence {solution.confidence:g} over the draw of the prompts")
    elif _vouched(solution) and (met := [name for name, lam in solution.lam.items() if lam > 0 and name not in equal]):
        joint = f", all {len(met)} of them together less often" if len(met) > 1 else ""
        lines.append(
            f"margins   met in the mean: over the draw of the prompts {', '.join(met)} holds about every second time"
            f"{joint}; --confidence 0.95 raises what is solved for"
        )
    predicted, diagnostics = solution.predicted, solution.diagnostics
    lines.append(f"reward    predicted {predicted['reward_improvement']:+.4g}; KL {predicted['kl']:.4g} nats")
    lines.append(
        f"weights   effective responses per prompt: median {diagnostics['ess']['median']:.1f} of "
        f"{diagnostics['responses_per_prompt']['median']:.0f}; KKT residual {solution.kkt_residual:.1e}"
    )
    lines += [f"note      {hint}" for hint in misread_hints(solution)]
    return "\n".join([*lines, f"verdict   {stated(diagnostics)}"])


def tail_lines(settled: Settled) -> list[str]:
    """Return a line for every constraint on more than a mean: what it is on, and of a CVaR what the reference has."""
    return [f"tail      {line}" for line in settled.lines()]


def _vouched(solution: DualSolution) -> bool:
    """Return whether the table can vouch for what the policy delivers."""
    judgement = solution.diagnostics.get("judgement")
    return judgement is not None and not judgement["objection"]


def _bracketed(parts: Sequence[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def frontier_text(curve: Frontier) -> str:
    """Return a frontier as a table: margins, λ*, gain of the reward and KL with bands, effective sample size."""
    names = curve.names
    share = f"{100 * curve.confidence:g} %"
    attainable = ", ".join(f"{name} {value:.4g}" for name, value in curve.attainable.items())
    grid = " x ".join(map(str, curve.shape))
    lines = [
        f"frontier of {' and '.join(names)}: {grid} points, beta {curve.beta:g}; margins are improvements over the "
        f"reference mean, at most {attainable} attainable; [..] are {share} bands over the prompts, KL in nats, "
        "ESS the median effective responses per prompt. lambda* is that of the paper's estimator, which solve prints "
        "beside its own."
    ]
    shown = _shown(curve)
    if len(shown) < len(curve.points):
        lines.append(f"{len(shown)} of the {len(curve.points)} points; --csv or --json writes all.")
    header = [text for name in names for text in (f"margin {name}", f"lambda* {name}", "SE")]
    rows = [[*header, "reward gain", f"[{share}]", "KL", f"[{share}]", "ESS"]]
    for row in shown:
        cells = [
            _number(row[key], digits)
            for name in names
            for key, digits in ((f"margin.{name}", 4), (f"lam.{name}", 4), (f"lam.{name}_se", 2))
        ]
        for label in ("reward_improvement", "kl"):
            low, high = (_number(row[f"{label}_{end}"]) for end in ("low", "high"))
            cells += [_number(row[label]), f"[{low}, {high}]"]
        rows.append([*cells, _number(row["ess"], 3)])
    return "\n".join([*lines, *_columns(rows)])


def reach_text(record: Mapping[str, Any]) -> str:
    """Return the record of what a run reaches as a table by constraint: every third margin, and what each way pays."""
    lines = [
        f"expected by {record['num_prompts']} validation prompts, not measured; gains over the reference, KL in nats, "
        "–: not reached. --report PATH writes every margin, with the command for each, as a page."
    ]
    for name, curve in record["constraints"].items():
        ways = {"basis": curve["basis"], "ray": curve["ray"], "dual": curve["dual"]}
        ways = {way: points for way, points in ways.items() if points is not None}
        rows = [[f"margin {name}", *(f"{way} {text}" for way in ways for text in ("reward", "KL"))]]
        for index in range(0, len(curve["margin"]), MARGIN_STEP):
            columns = [points[key] for points in ways.values() for key in ("reward_improvement", "kl")]
            cells = [_number(values[index]) if index < len(values) else "–" for values in columns]
            rows.append([_number(curve["margin"][index]), *cells])
        lines += _columns(rows)
    return "\n".join(lines)


def _shown(curve: Frontier) -> list[dict[str, float | bool]]:
    """Return every point of a curve, and of a map at most MAP_ROWS along each axis, ends included."""
    rows = curve.rows()
    if len(curve.shape) == 1:
        return rows
    kept = [np.unique(np.linspace(0, size - 1, min(size, MAP_ROWS)).round().astype(int)) for size in curve.shape]
    return [rows[index] for index in np.arange(len(rows)).reshape(curve.shape)[np.ix_(*kept)].ravel()]


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}g}" if math.isfinite(value) else "-"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
