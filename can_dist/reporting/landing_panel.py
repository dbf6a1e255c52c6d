"""The parts of the report that say what this run is, where it landed, and which responses show it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from can_dist.reporting.figures.price import Triple, price_svg
from can_dist.reporting.page import number, panel, plain

SUMMARY_CHARS = 110


def byline(report: Mapping[str, Any]) -> str:
    """Say which model was aligned, on which prompts."""
    models, config = report.get("models") or {}, report.get("config") or {}
    reference, source = models.get("reference", {}).get("model"), (config.get("prompts") or {}).get("source")
    parts = [f"Reference {reference}" if reference else "", f"prompts of {source}" if source else ""]
    return ", ".join(filter(None, parts))


def made_line(made: Mapping[str, Any] | None) -> str:
    """Say when a policy was measured, how long it took and what it cost; '' where the page is not to tell."""
    if not made:
        return ""
    parts = [f"Measured {made['finished']}."] if made["finished"] else []
    if made["seconds"] is not None:
        measured = made["measured_seconds"]
        after = f", the measurement {duration(measured)}" if measured is not None else ""
        parts.append(f"The policy took {duration(made['seconds'])}{after}.")
    times = "" if made["num_trainings"] == 1 else f" in {made['num_trainings']} trainings"
    parts.append(
        f"It cost {plain(made['generated_tokens'])} generated tokens, {plain(made['scored_tokens'])} scored and "
        f"{plain(made['trained_tokens'])} trained on{times}."
    )
    return " ".join(parts)


def duration(seconds: float) -> str:
    """'42 s', '7.5 min', '3.4 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def price_panels(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Draw the gain of each constraint, and of the reward, against the KL: predicted for any margin, and realised."""
    kl = report.get("kl") or {}
    if not kl.get("realised"):
        return
    curves = (report.get("examination") or {}).get("frontier") or {}
    for index, row in enumerate(report["constraints"]):
        curve = curves.get(row["name"])
        points = {**row, "margin": row["margin"]}
        drawn = curve and {"kl": curve["kl"], "gain": curve["margin"]}
        yield _price(f"price{index}", points, drawn, kl, f"gain of {row['name']}")
    only = next(iter(curves.values()), None) if len(curves) == 1 else None
    drawn = only and {"kl": only["kl"], "gain": only["reward_improvement"]}
    yield _price("price-reward", {**report["reward"], "margin": None}, drawn, kl, f"gain of {report['reward']['name']}")


def _price(
    prefix: str, row: Mapping[str, Any], curve: Mapping[str, Any] | None, kl: Mapping[str, Any], quantity: str
) -> dict[str, Any]:
    realised = (_triple(kl["realised"]), _triple(row["realised"]))
    predicted = None
    if kl.get("predicted_interval") and row.get("predicted"):
        predicted = (_triple(kl["predicted_interval"]), _triple(row["predicted"]))
    label = f"{quantity}: realised {number(realised[1][0], sign=True)} at KL {number(realised[0][0])}"
    if predicted:
        label += f", predicted {number(predicted[1][0], sign=True)} at KL {number(predicted[0][0])}"
    margin = row["margin"]
    svg = price_svg(curve, predicted, realised, margin=margin, quantity=quantity, label=label, prefix=prefix)
    return panel(f"{quantity} against KL", svg)


def _triple(interval: Mapping[str, Any]) -> Triple:
    """Return (mean, low, high); an unknown number is NaN, which matplotlib leaves undrawn."""
    mean, low, high = (math.nan if interval.get(key) is None else interval[key] for key in ("mean", "low", "high"))
    return mean, low, high


def crossing_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per constraint: how many prompts stayed safe, became safe, became unsafe, stayed unsafe."""
    return [
        {"name": name, "border": plain(row["border"]), "counts": list(row["counts"].values())}
        for name, row in (report.get("crossings") or {}).items()
    ]


def sample_groups(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the samples by group, in the order of the record; those of older reports have none."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in report.get("samples") or []:
        group = sample.get("group", "")
        title = f"{group[0].upper()}{group[1:]}, by {sample['constraint']}" if group else ""
        groups.setdefault(title, []).append(_sample(sample))
    return [{"title": title, "samples": samples} for title, samples in groups.items()]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    line = " ".join(sample["prompt"].split())
    short = line if len(line) <= SUMMARY_CHARS else line[: SUMMARY_CHARS - 1].rstrip() + "…"
    change = ""
    if "means" in sample:
        before, after = sample["means"][sample["constraint"]]
        change = f"{number(before, sign=True)} → {number(after, sign=True)}"
    scores = sample.get("scores") or {}
    return {**sample, "summary": short or "(empty prompt)", "scores": scores, "change": change}
