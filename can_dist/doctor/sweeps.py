"""Where ``can-dist sweep`` is: each set of margins is a session of the run's log, and one page tells of all."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from can_dist.config import margins_text
from can_dist.errors import REFUSALS, DataError
from can_dist.measuring.verdicts import verdict_line
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.workspace import SWEEP_PAGE, SWEEP_RECORD

Events = Sequence[Mapping[str, Any]]
REFUSED = {kind.__name__ for kind in REFUSALS}
SETTLED = ("finished", "no policy")


def last_command(events: Events) -> list[Events]:
    """Return the sessions of the last command: one, or of a sweep one for each set of margins that it came to."""
    starts = [number for number, event in enumerate(events) if event.get("event") == "began"] or [0]
    sessions = [events[start:end] for start, end in zip(starts, [*starts[1:], len(events)], strict=True)]
    place = _place(sessions[-1])
    return sessions[-(place[0] if place else 1) :]


def read_sweep(run: Path, sessions: Sequence[Events], *, works: bool) -> dict[str, Any] | None:
    """Return the margins of a sweep with the state of each, and its page; None where the last command was no sweep.

    Args:
        run: The run directory.
        sessions: Of the last command.
        works: Whether a process holds the run.
    """
    place = _place(sessions[-1])
    if place is None:
        return None
    points = [_point(run, margins, events, works) for margins, events in zip_longest(place[1], sessions)]
    names, page = [margins_text(margins) for margins in place[1]], run / SWEEP_PAGE
    is_written = _names(run / SWEEP_RECORD) == names and page.is_file()
    sweep = {"points": points, "page": None}
    return sweep | {"page": str(page)} if is_written and is_settled(sweep) else sweep


def is_settled(sweep: Mapping[str, Any]) -> bool:
    """Return whether every set of margins has a policy, or is known to have none."""
    return all(point["state"] in SETTLED for point in sweep["points"])


def next_of_sweep(run: Path, sweep: Mapping[str, Any]) -> str:
    """Return the command that comes after a sweep that nobody works on, or why there is none."""
    if is_settled(sweep) and all(point["state"] == "no policy" for point in sweep["points"]):
        return "none: these margins cannot be had, for the reasons above"
    if is_settled(sweep) and sweep["page"] is not None:
        return f"can-dist verify {run}"
    axes: dict[str, list[float]] = {}
    for point in sweep["points"]:
        for name, margin in point["margins"].items():
            axes.setdefault(name, []).append(margin)
    options = [f"{name}={','.join(f'{value:g}' for value in dict.fromkeys(values))}" for name, values in axes.items()]
    margins = " ".join(f"--margin {shlex.quote(option)}" for option in options)
    return f"can-dist sweep {run / 'config.yaml'} --run {run} {margins}"


def format_sweep(sweep: Mapping[str, Any]) -> list[str]:
    """Return a sweep as lines for people: a margin a line, then the page."""
    width = max(len(margins_text(point["margins"])) for point in sweep["points"])
    lines = ["margins:"]
    for point in sweep["points"]:
        told = point["error"] or "; ".join(point["verdicts"])
        lines.append(f"  {point['state']:<12} {margins_text(point['margins']):<{width}}  {told}".rstrip())
    return [*lines, *([f"page of all margins: {sweep['page']}"] if sweep["page"] else [])]


def _point(run: Path, margins: Mapping[str, float], events: Events | None, works: bool) -> dict[str, Any]:
    """Return the state of one set of margins, the verdicts on its policy, and why it has none."""
    told: dict[str, Any] = {"margins": dict(margins), "state": "not started", "verdicts": [], "error": None}
    if events is None:
        return told
    failed = next((event for event in events if event.get("event") == "failed"), None)
    if failed is not None:
        refused = failed["error"] in REFUSED
        reason = f"{failed['error']}: {failed['message'].partition(chr(10))[0]}"
        return told | {"state": "no policy" if refused else "interrupted", "error": reason if refused else None}
    if any(event.get("event") == "ended" for event in events):
        return told | {"state": "finished", "verdicts": _verdicts(run, events)}
    return told | {"state": "in progress" if works else "interrupted"}


def _verdicts(run: Path, events: Events) -> list[str]:
    opened = [str(event["artifact"]) for event in events if event.get("stage") == "evaluate" and "artifact" in event]
    if not opened or not (run / opened[-1] / MANIFEST).is_file():
        return []
    try:
        return [verdict_line(row) for row in load_artifact(run / opened[-1]).info["constraints"]]
    except (DataError, KeyError, TypeError):  # `verify` reports what is damaged
        return []


def _place(session: Events) -> tuple[int, list[dict[str, float]]] | None:
    """Return the number of the set of margins that a session is for, and all sets; None where it is of no sweep."""
    event = next((event for event in session if event.get("event") == "sweep"), None)
    if event is None or not 1 <= event["point"] <= len(event["points"]):
        return None
    is_whole = all(isinstance(p, dict) and all(isinstance(b, int | float) for b in p.values()) for p in event["points"])
    return (event["point"], event["points"]) if is_whole else None


def _names(record: Path) -> list[str]:
    """Return the names of the margins that a page's record tells of."""
    try:
        return [str(point["name"]) for point in json.loads(record.read_text(encoding="utf-8"))["points"]]
    except (OSError, ValueError, KeyError, TypeError):  # absent, or damaged: it is not this sweep's
        return []
