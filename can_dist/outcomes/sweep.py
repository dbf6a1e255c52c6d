"""evaluations at several margins → one page: asked, predicted and measured at each, and which cannot be had."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.config import margins_text
from can_dist.measuring.verdicts import current, verdict_line
from can_dist.outcomes.compare import Evaluated, comparison, results
from can_dist.stages.cost import cost_of
from can_dist.tables.artifacts import Artifact, write_json, write_text
from can_dist.workspace import PAGE, REPORT, SWEEP_PAGE, SWEEP_RECORD

Point = tuple[Mapping[str, float], Artifact | Exception]
"""Margins by constraint, and the evaluation at them or the error that says why there is none."""


def write_sweep(points: Sequence[Point], out: Path) -> Path:
    """Write ``sweep.html`` and ``sweep.json`` into the run directory ``out``; return the page's path."""
    from can_dist.reporting.comparison_page import pictures
    from can_dist.reporting.sweep_page import render_sweep

    measured = [
        Evaluated(margins_text(margins), artifact, artifact.read_json(REPORT), artifact.table, cost_of(artifact))
        for margins, artifact in points
        if isinstance(artifact, Artifact)
    ]
    drawn = pictures(results(measured), comparison(measured) | {"ray": {}})  # each margin has a ray of its own
    record = {"format_version": 1, "points": [_record(margins, outcome, out) for margins, outcome in points]}
    write_json(out / SWEEP_RECORD, record)
    write_text(out / SWEEP_PAGE, render_sweep(record, {name: svgs["gains"] for name, svgs in drawn.items()}))
    return out / SWEEP_PAGE


def point_line(margins: Mapping[str, float], outcome: Artifact | Exception) -> str:
    """Return a point as a line for a terminal: its verdicts, or the first line of why there is no policy."""
    if isinstance(outcome, Exception):
        return f"{margins_text(margins)}: no policy: {str(outcome).splitlines()[0]}"
    return f"{margins_text(margins)}: {'; '.join(verdict_line(row) for row in outcome.info['constraints'])}"


def _record(margins: Mapping[str, float], outcome: Artifact | Exception, out: Path) -> dict[str, Any]:
    record: dict[str, Any] = {"margins": dict(margins), "name": margins_text(margins), "refusal": None}
    if isinstance(outcome, Exception):
        return record | {"refusal": {"kind": type(outcome).__name__, "message": str(outcome)}}
    report = outcome.read_json(REPORT)
    rows = [
        {
            "name": row["name"],
            "lam": row.get("lam"),
            "predicted": (row.get("predicted_held_out") or row.get("predicted") or {}).get("mean"),
            "realised": row["realised"],
            "margin": row["margin"],
            "verdict": current(row["verdict"]),
        }
        for row in report["constraints"]
    ]
    return record | {
        "constraints": rows,
        "reward": {"name": report["reward"]["name"], "realised": report["reward"]["realised"]},
        "kl": report["kl"]["realised"],
        "report": os.path.relpath(outcome.path / PAGE, out),
    }
