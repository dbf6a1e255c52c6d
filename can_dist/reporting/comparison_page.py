"""The comparison of methods as one HTML file that needs nothing but itself, and as pictures.

Names are hostile text: the template escapes everything but the figures drawn here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from can_dist.measuring.comparison import MethodResult, comparison_table, cost_table, short_count
from can_dist.reporting.figures.comparison import comparison_svg
from can_dist.reporting.page import MISSING, decimals_of, interval_text, number, percent, plain, render, safe_svg
from can_dist.reporting.run_page import VERDICTS

PAPER = {
    "--ink": "#1d1c1a",
    "--muted": "#5e5b55",
    "--rule": "#d9d5cc",
    "--reference": "#00619a",
    "--policy": "#b5470b",
    "--margin": "#75398a",
}
"""The page's colours, for a picture that stands by itself."""


@dataclass(frozen=True)
class Picture:
    """One drawing: ``inline`` takes the colours of the page it stands in, ``standalone`` has its own."""

    inline: str
    standalone: str


def pictures(results: Mapping[str, Sequence[MethodResult]], record: Mapping[str, Any]) -> dict[str, Picture]:
    """Draw helpfulness against each constraint; the curve is what a dual predicted, where there is one."""
    drawn = {}
    for index, (name, methods) in enumerate(results.items()):
        curve = record["frontier"].get(name, {"safety": [], "reward": []})
        known = [
            (safety, reward)
            for safety, reward in zip(curve["safety"], curve["reward"], strict=True)
            if safety is not None and reward is not None
        ]
        frontier = tuple(np.array(known, dtype=np.float64).reshape(-1, 2).T)
        label = f"Helpfulness gain against the gain of {name}: " + "; ".join(
            f"{one.name} {number(one.reward_gain, sign=True)} against {number(one.safety_gain, sign=True)}"
            for one in methods
        )
        svg = comparison_svg(methods, (frontier[0], frontier[1]), label=label, prefix=f"compare{index}")
        drawn[name] = Picture(svg, _standalone(svg))
    return drawn


def _standalone(svg: str) -> str:
    """Make a file of an inline drawing: a namespace, a background, fixed colours, a common font."""
    for variable, colour in PAPER.items():
        svg = svg.replace(f"var({variable})", colour)
    head, body = svg.split(">", 1)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    background = '<rect width="100%" height="100%" fill="#fcfbf8"/>'
    return f"{head.replace('<svg', f'<svg {namespaces}', 1)}>{background}{body}\n"


def render_comparison(
    record: Mapping[str, Any], results: Mapping[str, Sequence[MethodResult]], drawn: Mapping[str, Picture]
) -> str:
    """Return the page as text.

    Args:
        record: the numbers of the stage ``compare``.
        results: by constraint, what every method gained.
        drawn: by constraint, its picture.
    """
    methods = record["methods"]
    first = next(iter(results.values()))
    values = {
        "title": "Methods compared",
        "num_prompts": record["num_prompts"],
        "methods": [one["name"] for one in methods],
        "constraints": [
            {
                "name": name,
                "table": comparison_table(found),
                "kinds": [VERDICTS[one.verdict][0] for one in found],
                "picture": {
                    "name": f"{record['reward']} against {name}",
                    "svg": safe_svg(drawn[name].inline),
                    "note": "",
                },
                "frontier": record["frontier"].get(name, {}).get("method"),
                "tails": [_tails(one, name) for one in methods],
            }
            for name, found in results.items()
        ],
        "worst": next((percent(tails["worst_share"]) for one in methods for tails in one["tails"].values()), ""),
        "refused": any(one["refusals"] for one in methods),
        "cost": cost_table({one.name: one.cost for one in first}),
        "one_shot": _one_shot(record["one_shot"]),
        "rankings": [_ranking(name, found) for name, found in record["ranking"].items()],
        "sources": [(one["name"], one["evaluation"]) for one in methods],
        "format_version": record["format_version"],
    }
    return render("comparison.html.j2", values)


def _tails(method: Mapping[str, Any], name: str) -> dict[str, Any]:
    tails, refused = method["tails"][name], method["refusals"]
    unsafe, worst, length = tails["unsafe"]["policy"], tails["worst"]["policy"], method["lengths"]["policy"]
    return {
        "name": method["name"],
        "border": plain(tails["border"]),
        "cells": [_share(unsafe), _mean(worst), *([_share(refused["policy"])] if refused else []), _mean(length)],
    }


def _share(share: Mapping[str, Any]) -> tuple[str, str]:
    return percent(share["mean"], 1), f"[{percent(share['low'], 1)}, {percent(share['high'], 1)}]"


def _mean(mean: Mapping[str, Any]) -> tuple[str, str]:
    decimals = decimals_of(mean, None)
    return number(mean["mean"], decimals), interval_text(mean, decimals)


def _one_shot(ratio: Mapping[str, Any] | None) -> str:
    """The sentence about the training that the loop needed for what the one-shot method did in one."""
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


def _ranking(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Win rates of row over column, strongest first, with Bradley–Terry strengths."""
    order = sorted(range(len(found["names"])), key=lambda index: -found["strength"][index])
    rows = []
    for index in order:
        rates = [found["win"][index][column] for column in order]
        bounds = {"mean": found["strength"][index], "low": found["low"][index], "high": found["high"][index]}
        decimals = decimals_of(bounds, None)
        rows.append(
            {
                "name": found["names"][index],
                "strength": number(bounds["mean"], decimals, sign=True),
                "bounds": interval_text(bounds, decimals),
                "rates": [MISSING if rate is None else percent(rate) for rate in rates],
            }
        )
    return {"name": name, "columns": [found["names"][index] for index in order], "rows": rows}
