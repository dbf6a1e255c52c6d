"""What a run reaches without another training, as one self-contained page with a slider over the margin.

Names may be hostile text: the template escapes everything, and data that the script reads holds no markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from can_dist.reporting.figures.reach import reach_svg
from can_dist.reporting.page import panel, plain, render, safe_svg

QUANTITIES = (("reward_improvement", "reward gain"), ("kl", "KL (nats)"))
WAYS = {"basis": "mixture of the basis", "ray": "one policy, any strength", "dual": "the dual's frontier"}


def render_reach(record: Mapping[str, Any]) -> str:
    """Return the page of a record of :func:`can_dist.outcomes.reach.reach` as text."""
    script = files("can_dist.reporting").joinpath("templates", "reach.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ways = [way for way in WAYS if any(curve[way] for curve in record["constraints"].values())]
    constraints = []
    for index, (name, curve) in enumerate(record["constraints"].items()):
        panels = [
            panel(f"{axis} against {name}", reach_svg(name, curve, quantity, axis, f"reach{index}-{quantity}"))
            for quantity, axis in QUANTITIES
        ]
        constraints.append(
            {
                "name": name,
                "panels": panels,
                "rows": rows(name, curve, ways, record["run"]),
                "start": _nearest(curve["margin"], curve["asked"]),
                "last": max(len(curve["margin"]) - 1, 0),
            }
        )
    data = json.dumps([constraint["rows"] for constraint in constraints], ensure_ascii=True).replace("<", "\\u003c")
    return render(
        "reach.html.j2",
        {
            "title": "Every margin without another training",
            "num_prompts": record["num_prompts"],
            "has_basis": "basis" in ways,
            "constraints": constraints,
            "ways": [WAYS[way] for way in ways],
            "script": safe_svg(script),
            "data": safe_svg(data),
            "digest": safe_svg(digest),
        },
    )


def rows(name: str, curve: Mapping[str, Any], ways: Sequence[str], run: str) -> list[dict[str, Any]]:
    """Return what the page says of each margin: reward and KL of the ways there are, and the command."""
    made = []
    for index, margin in enumerate(curve["margin"]):
        cells = []
        for way in ways:
            points = curve[way] or {}
            for quantity, _ in QUANTITIES:
                values = points.get(quantity, [])
                cells.append(plain(float(values[index])) if index < len(values) else "–")
        words = [
            "can-dist",
            "export",
            "policy",
            run,
            "--margin",
            f"{name}={margin:.3g}",
            "--out",
            f"{name}-{margin:.3g}",
        ]
        made.append({"margin": f"{margin:+.3g}", "cells": cells, "command": shlex.join(words)})
    return made


def _nearest(margins: list[float], margin: float) -> int:
    return min(range(len(margins)), key=lambda index: abs(margins[index] - margin), default=0)
