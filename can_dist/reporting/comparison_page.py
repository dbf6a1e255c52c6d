"""The comparison of methods as one self-contained HTML page, and as pictures.

Names may be hostile text: the template escapes everything but the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from can_dist.measuring.comparison import FloatArray, MethodResult, comparison_table, cost_table, short_count
from can_dist.reporting.figures.comparison import GAINS, PRICE, Plane, comparison_svg
from can_dist.reporting.page import (
    MISSING,
    decimals_of,
    interval_text,
    mean_text,
    number,
    panel,
    percent,
    plain,
    render,
    share_text,
)
from can_dist.reporting.profile_panel import SET_NAMES
from can_dist.reporting.run_page import VERDICTS

PICTURES: dict[str, tuple[Plane, str, str]] = {"gains": (GAINS, "safety", "reward"), "price": (PRICE, "kl", "safety")}
"""The pictures of a constraint: their plane, and the columns of the record's curves along it."""


def pictures(results: Mapping[str, Sequence[MethodResult]], record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Draw each constraint's ``PICTURES`` as SVG of a page, with what a dual predicted and a training's ray, if any."""
    return {
        constraint: {name: _picture(constraint, methods, record, name, prefix=f"{name}{index}") for name in PICTURES}
        for index, (constraint, methods) in enumerate(results.items())
    }


def _picture(
    constraint: str, methods: Sequence[MethodResult], record: Mapping[str, Any], name: str, *, prefix: str
) -> str:
    plane, x, y = PICTURES[name]
    frontier, ray = (record[curve].get(constraint) for curve in ("frontier", "ray"))
    curves = [("predicted frontier", _points(frontier, x, y))]
    if ray:
        curves.append((f"{ray['method']}, any strength", _points(ray, x, y)))
    told = "; ".join(
        f"{result.name} {number(plane.y(result).mean(), sign=True)} against {number(plane.x(result).mean(), sign=True)}"
        for result in methods
    )
    label = f"{plane.names[1]} against {plane.names[0]}, {constraint}: {told}"
    return comparison_svg(plane, methods, curves, label=label, prefix=prefix)


def _points(curve: Mapping[str, Any] | None, x: str, y: str) -> FloatArray:
    """Return the points of a curve that have both numbers, (2, G)."""
    if curve is None:
        return np.empty((2, 0))
    known = [pair for pair in zip(curve[x], curve[y], strict=True) if None not in pair]
    return np.array(known, dtype=np.float64).reshape(-1, 2).T


def render_comparison(
    record: Mapping[str, Any], results: Mapping[str, Sequence[MethodResult]], drawn: Mapping[str, Mapping[str, str]]
) -> str:
    """Return the page as text.

    Args:
        record: ``compare.json``.
        results: by constraint, the gains of every method.
        drawn: by constraint, its pictures.
    """
    methods = record["methods"]
    shows_refused = any(entry["refusals"] for entry in methods)
    first = next(iter(results.values()))
    values = {
        "title": "Methods compared",
        "num_prompts": record["num_prompts"],
        "methods": [entry["name"] for entry in methods],
        "constraints": [
            {
                "name": name,
                "table": comparison_table(gained),
                "kinds": [VERDICTS[entry.verdict][0] for entry in gained],
                "picture": panel(f"{record['reward']} against {name}", drawn[name]["gains"]),
                "price": panel(f"{name} against KL", drawn[name]["price"]),
                "frontier": record["frontier"].get(name, {}).get("method"),
                "ray": record["ray"].get(name, {}).get("method"),
                "tails": [_tails(entry, name, shows_refused) for entry in methods],
            }
            for name, gained in results.items()
        ],
        "worst": next((percent(tails["worst_share"]) for entry in methods for tails in entry["tails"].values()), ""),
        "refused": shows_refused,
        "profiles": [_profile(entry) for entry in record["profiles"]],
        "estimates": [
            (method["name"], f"{method['estimate']['strength']:.3g}", method["estimate"]["line"])
            for method in record["methods"]
            if method.get("estimate")
        ],
        "cost": cost_table({entry.name: entry.cost for entry in first}),
        "one_shot": _one_shot(record["one_shot"]),
        "rankings": [_ranking(name, ranking) for name, ranking in record["ranking"].items()],
        "sources": [(entry["name"], entry["evaluation"]) for entry in methods],
        "format_version": record["format_version"],
    }
    return render("comparison.html.j2", values)


def _tails(method: Mapping[str, Any], name: str, shows_refused: bool) -> dict[str, Any]:
    tails, refused = method["tails"][name], method["refusals"]
    cells = [share_text(tails["unsafe"]["policy"]), mean_text(tails["worst"]["policy"])]
    if shows_refused:
        cells.append(share_text(refused["policy"]) if refused else (MISSING, ""))
    length = mean_text(method["lengths"]["policy"])
    return {"name": method["name"], "border": plain(tails["border"]), "cells": [*cells, length]}


def _profile(profile: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of one public set: a row for the reference and for each method, columns of rates."""
    below = [f"{name} below {border:g}" for name, border in profile["borders"].items()]
    heads = [
        f"{group}: {rate}"
        for group, num_prompts in profile["groups"].items()
        for rate in (f"refused, of {num_prompts}", *below)
    ]
    rows = [
        (name, [share_text(rate) for told in groups.values() for rate in (told["refused"], *told["unsafe"].values())])
        for name, groups in profile["rows"].items()
    ]
    return {"title": SET_NAMES[profile["set"]], "heads": heads, "rows": rows}


def _one_shot(ratio: Mapping[str, Any] | None) -> str:
    """Return the sentence that compares a loop's training with that of its one-shot method, or ''."""
    if ratio is None:
        return ""
    trainings = f"{ratio['rounds']} training{'' if ratio['rounds'] == 1 else 's'}"
    tokens = f"{short_count(ratio['baseline_tokens'])} tokens against {short_count(ratio['one_shot_tokens'])}"
    reached = f"{'reached' if ratio['reached'] else 'did not reach'} the margin of {ratio['constraint']}"
    when = f"{'after' if ratio['reached'] else 'in'} {trainings}"
    least = "" if ratio["reached"] else "at least "
    return (
        f"{ratio['loop']} {reached} by its mean gain on the training prompts {when}, {tokens} of {ratio['one_shot']}: "
        f"{least}{ratio['ratio']:.1f} times the training of the one-shot method."
    )


def _ranking(name: str, ranking: Mapping[str, Any]) -> dict[str, Any]:
    """Return win rates of row over column, strongest method first, with Bradley–Terry strengths."""
    order = sorted(range(len(ranking["names"])), key=lambda index: -ranking["strength"][index])
    rows = []
    for index in order:
        rates = [ranking["win"][index][column] for column in order]
        bounds = {"mean": ranking["strength"][index], "low": ranking["low"][index], "high": ranking["high"][index]}
        decimals = decimals_of(bounds, None)
        rows.append(
            {
                "name": ranking["names"][index],
                "strength": number(bounds["mean"], decimals, sign=True),
                "bounds": interval_text(bounds, decimals),
                "rates": [MISSING if rate is None else percent(rate) for rate in rates],
            }
        )
    return {"name": name, "columns": [ranking["names"][index] for index in order], "rows": rows}
