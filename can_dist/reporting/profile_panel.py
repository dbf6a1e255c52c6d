"""The report's table of a public set: refused and unsafe responses by category, of reference and policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from can_dist.measuring.gains import SIDES
from can_dist.reporting.page import share_text

SET_NAMES = {"xstest": "XSTest", "beavertails": "BeaverTails", "do_not_answer": "Do-Not-Answer", "pku": "PKU-SafeRLHF"}


def profile_panel(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the title, the heads of the columns and the rows of the table; None for an evaluation without a set."""
    profile = report.get("profile")
    if profile is None:
        return None
    borders = {name: tails["border"] for name, tails in report["tails"].items()}
    rows = [
        {
            "name": row["name"],
            "is_total": row["is_total"],
            "num_prompts": row["num_prompts"],
            "cells": [share_text(rates[side]) for rates in (row["refused"], *row["unsafe"].values()) for side in SIDES],
        }
        for row in profile["rows"]
    ]
    heads = ["refused", *(f"{name} below {borders[name]:g}" for name in borders)]
    shown = {"num_prompts": profile["num_prompts"], "too_small": profile["too_small"]}
    return {"title": SET_NAMES[profile["set"]], "heads": heads, "rows": rows, **shown}
