"""The report's figures of a training's course: its estimated gains, and λ where feedback moved it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from can_dist.reporting.figures.course import gain_svg, lam_svg
from can_dist.reporting.page import panel, plain


def course(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``course``, the panels, and ``moved``, how λ moved in words; both empty where nothing was estimated."""
    training = report.get("training") or {}
    estimates, last = training.get("estimates") or {}, training.get("lam") or {}
    first = {name: estimates[f"lam.{name}"][0][1] for name in last if f"lam.{name}" in estimates}
    moved = ", ".join(f"{name} from {plain(first[name])} to {plain(last[name])}" for name in first)
    return {"moved": moved, "course": list(_panels(report, estimates, first))}


def _panels(
    report: Mapping[str, Any], estimates: Mapping[str, Any], steered: Iterable[str]
) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(report["constraints"]):
        name = row["name"]
        curves = {"mean": f"gain.{name}", "low": f"gain.{name}.low", "high": f"gain.{name}.high"}
        if any(curve not in estimates for curve in curves.values()):
            continue
        drawn = {key: estimates[curve] for key, curve in curves.items()}
        label = f"Estimated gain of {name} by step, {plain(drawn['mean'][-1][1])} at last"
        yield panel(name, gain_svg(drawn, margin=row["margin"], label=label, prefix=f"course{index}"))
    if lam := {name: estimates[f"lam.{name}"] for name in steered}:
        yield panel("λ", lam_svg(lam, label="λ of every constraint by step", prefix="lam"))
