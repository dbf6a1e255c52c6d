"""A certificate as one self-contained HTML page, and as the rows of a model card.

Names may be hostile text: the template escapes everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from can_dist.measuring.certificate import CERTIFIED, NOT_CERTIFIED, NOT_ENOUGH
from can_dist.reporting.page import decimals_of, number, plain, render
from can_dist.tables.artifacts import dotted

KINDS = {CERTIFIED: "met", NOT_ENOUGH: "within", NOT_CERTIFIED: "unmet"}
"""Answer → mark."""


def render_certificate(record: Mapping[str, Any]) -> str:
    """Return the page of ``certificate.json`` as text; the same record always gives the same bytes."""
    rows = [_row(row) for row in record["constraints"]]
    shown = ("sampling", "seed", "precision", "models", "scorers")
    parts = {name: record["measurement"][name] for name in shown}
    parts |= {"policy": record["policy"], "artifacts": record["artifacts"], "look": record["look"]}
    parts |= {"sealed prompts (digest of their ids)": record["sealed_prompts"], "versions": record["versions"]}
    parts |= {"responses cut at generate.max_new_tokens": record["num_cut"]}
    values = {
        **record,
        "title": f"Certificate: {record['answer'].lower()}",
        "kind": KINDS[record["answer"]],
        "rows": rows,
        "bound_error": rows[0]["error"],
        "provenance": [(key, plain(value)) for key, value in dotted(parts).items()],
    }
    return render("certificate.html.j2", values)


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return one constraint with as many decimals as its bounds deserve."""
    decimals = decimals_of(row, row["target"])
    tolerance = "" if row["tolerance"] is None else f" ± {plain(row['tolerance'])}"
    return {
        **row,
        "kind": KINDS[row["answer"]],
        "kind_text": "improvement over the reference" if row["demand"] == "margin" else "mean of the policy",
        "target_text": number(row["target"], decimals) + tolerance,
        "mean_text": number(row["mean"], decimals),
        "low_text": number(row["low"], decimals),
        "high_text": number(row["high"], decimals),
    }
