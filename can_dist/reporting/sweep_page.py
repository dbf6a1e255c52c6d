"""The margins of a sweep as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from can_dist.reporting.page import decimals_of, interval_text, number, panel, render
from can_dist.reporting.run_page import VERDICTS


def render_sweep(record: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """Return the page as text.

    Args:
        record: ``sweep.json``.
        drawn: by constraint, the picture of the reward's gain against the constraint's.
    """
    points = record["points"]
    measured = [point for point in points if point["refusal"] is None]
    values = {
        "title": "One run at several margins",
        "num_points": len(points),
        "reward": measured[0]["reward"]["name"],
        "points": [_row(point) for point in measured],
        "refused": [(point["name"], point["refusal"]["message"]) for point in points if point["refusal"]],
        "pictures": [panel(f"{measured[0]['reward']['name']} against {name}", svg) for name, svg in drawn.items()],
        "format_version": record["format_version"],
    }
    return render("sweep.html.j2", values)


def _row(point: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": point["name"],
        "report": point["report"],
        "constraints": [
            {
                "name": row["name"],
                "lam": "" if row["lam"] is None else f"{row['lam']:.3g}",
                "predicted": number(row["predicted"], decimals_of(row["realised"], row["margin"]), sign=True),
                "realised": _gain(row["realised"], row["margin"]),
                "verdict": row["verdict"],
                "kind": VERDICTS[row["verdict"]][0],
            }
            for row in point["constraints"]
        ],
        "reward": _gain(point["reward"]["realised"], None),
        "kl": number(point["kl"]["mean"]),
    }


def _gain(gain: Mapping[str, Any], margin: float | None) -> tuple[str, str]:
    decimals = decimals_of(gain, margin)
    return number(gain["mean"], decimals, sign=True), interval_text(gain, decimals)
