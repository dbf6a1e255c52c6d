"""The comparison of methods as one self-contained HTML page, and as pictures.

Names may be hostile text: the template escapes everything but the figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from can_dist.measuring.comparison import MethodResult, comparison_table, cost_table, short_count
from can_dist.reporting.figures.comparison import comparison_svg
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
from can_dist.reporting.run_page import VERDICTS


def pictures(results: Mapping[str, Sequence[MethodResult]], record: Mapping[str, Any]) -> dict[str, str]:
    """Draw helpfulness against each constraint as SVG of a page, with the frontier that a dual predicted, if any."""
    drawn = {}
    for index, (name, methods) in enumerate(results.items()):
        curve = record["frontier"].get(name, {"safety": [], "reward": []})
        known = [
            (safety, reward)
            for safety, reward in zip(curve["safety"], curve["reward"], strict=True)
            if safety is not None and reward is not None
        ]
        frontier_2G = np.array(known, dtype=np.float64).reshape(-1, 2).T
        label = f"Helpfulness gain against the gain of {name}: " + "; ".join(
            f"{result.name} {number(result.reward_gain, sign=True)} against {number(result.safety_gain, sign=True)}"
            for result in methods
        )
        drawn[name] = comparison_svg(methods, frontier_2G, label=label, prefix=f"compare{index}")
    return drawn


def render_comparison(
    record: Mapping[str, Any], results: Mapping[str, Sequence[MethodResult]], drawn: Mapping[str, str]
) -> str:
    """Return the page as text.

    Args:
        record: ``compare.json``.
        results: by constraint, the gains of every method.
        drawn: by constraint, its picture.
    """
    methods = record["methods"]
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
                "picture": panel(f"{record['reward']} against {name}", drawn[name]),
                "frontier": record["frontier"].get(name, {}).get("method"),
                "tails": [_tails(entry, name) for entry in methods],
            }
            for name, gained in results.items()
        ],
        "worst": next((percent(tails["worst_share"]) for entry in methods for tails in entry["tails"].values()), ""),
        "refused": any(entry["refusals"] for entry in methods),
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


def _tails(method: Mapping[str, Any], name: str) -> dict[str, Any]:
    tails, refused = method["tails"][name], method["refusals"]
    refusals = [share_text(refused["policy"])] if refused else []
    unsafe, worst, length = tails["unsafe"]["policy"], tails["worst"]["policy"], method["lengths"]["policy"]
    return {
        "name": method["name"],
        "border": plain(tails["border"]),
        "cells": [share_text(unsafe), mean_text(worst), *refusals, mean_text(length)],
    }


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
