"""Training metrics: one JSON line per log interval, and the configured trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.errors import DataError
from can_dist.training.trackers import Tracker

METRICS = "metrics.jsonl"
RESUMED = "resumed_from"
ESTIMATE = "estimate"


class MetricsLog:
    """Appends to ``metrics.jsonl``, and hands the same values to the trackers.

    ``first`` is the step that training goes on from: lines of later steps are dropped.
    """

    def __init__(self, directory: Path, first: int, trackers: Sequence[Tracker] = ()) -> None:
        self.path, self._trackers = directory / METRICS, trackers
        lines: list[dict[str, Any]] = []
        if first:
            lines = [line for line in read_metrics(self.path) if line["step"] <= first]
            lines.append({"step": first, RESUMED: first})
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def write(self, step: int, values: dict[str, float], estimate: str = "") -> None:
        """Record the values of one step, and in the file the estimate as a line for people, where there is one."""
        line = {ESTIMATE: estimate} if estimate else {}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, **line}) + "\n")
        for tracker in self._trackers:
            tracker.log(step, values)

    def close(self) -> None:
        """Flush the trackers."""
        for tracker in self._trackers:
            tracker.close()


def training_curve(directory: Path) -> dict[str, list[list[float]]]:
    """Return [step, value] of the losses and of estimates; it holds no times, so it can be committed."""
    curves: dict[str, dict[float, float]] = {"loss": {}, "reference_loss": {}, "eval_loss": {}}
    for line in read_metrics(directory / METRICS):
        for name, value in line.items():
            if name in curves or name.startswith(f"{ESTIMATE}."):
                curves.setdefault(name, {})[line["step"]] = value  # a resumed training may have written a step twice
    return {name: [[step, values[step]] for step in sorted(values)] for name, values in curves.items()}


def loss_above_start(curve: Mapping[str, Sequence[Sequence[float]]]) -> float | None:
    """Return the last training loss when it is above the reference's on the same examples, where training starts.

    It is the sign of a policy that drifted. For pairs with probabilities the reference's loss is ln 2.
    """
    if not curve["loss"]:
        return None
    (_, last), (_, reference) = curve["loss"][-1], curve["reference_loss"][-1]
    return last if last > reference else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines written so far (an incomplete last line, being written, is left out).

    Raises:
        DataError: A line is damaged.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    return [_line(path, number, line) for number, line in enumerate(lines, start=1)]


def _line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    known = isinstance(line, dict) and all(type(line[key]) in (int, float) for key in line.keys() - {ESTIMATE})
    if not known or not isinstance(line.get("step"), int) or not isinstance(line.get(RESUMED, 0), int):
        raise DataError(
            f"{path}, line {number}: found {text[:80]!r}, expected numbers with a step, and an estimate in words.",
            f"Delete {path.parent} and run again.",
        )
    return dict(line)
