"""The report of a run: one self-contained HTML file.

``page_values(report)`` takes the JSON-safe dictionary of the evaluate stage. Prompts, responses and names are
hostile text: the template escapes everything but the figures drawn here, and the page carries a policy that lets no
script run and nothing be fetched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from can_dist.measuring.gains import joint_sentence
from can_dist.measuring.verdicts import Verdict, current, undecided_because
from can_dist.reporting.belief_page import believed
from can_dist.reporting.course_panel import course
from can_dist.reporting.estimate_panel import estimated
from can_dist.reporting.figures.report import density_svg, forest_svg, training_svg
from can_dist.reporting.landing_panel import byline, crossing_rows, made_line, price_panels, sample_groups
from can_dist.reporting.page import (
    decimals_of,
    interval_text,
    mean_text,
    number,
    panel,
    percent,
    plain,
    render,
    safe_svg,
    share_text,
)
from can_dist.reporting.profile_panel import profile_panel
from can_dist.tables.artifacts import dotted, write_text

OPTIONAL = ("num_train_prompts", "num_responses", "win_rate", "lengths", "counts", "warnings", "prediction",
            "unpredicted", "models", "versions", "format_version")  # fmt: skip
"""Keys of ``report.json`` that the template shows as they are, where they are there."""
VERDICTS: dict[Verdict, tuple[str, str, str]] = {
    "met": ("met", "is met", "The whole {level} interval is at or above the {demand}. {unseen}"),
    "undecided": ("within", "is undecided", "The {demand} lies inside the {level} interval{because}."),
    "not met": ("unmet", "is not met", "The whole {level} interval lies {side} the {demand}."),
}
"""Verdict → mark, words and remark: ``level`` is the interval's confidence, ``unseen`` the limit of P prompts."""
SAME = "Every prompt changed by the same amount. {unseen}"


def write_report(values: Mapping[str, Any], path: Path, *, made: Mapping[str, Any] | None = None) -> None:
    """Write a report as one self-contained HTML file, atomically.

    The same ``values`` and ``made`` always give the same bytes.

    Args:
        values: What :func:`page_values` made of the report.
        path: The file, in an existing directory.
        made: When, how long and at what cost (:func:`can_dist.stages.cost.made`), for a page that may tell the time.
    """
    write_text(Path(path), render_report(values, made=made))


def render_report(values: Mapping[str, Any], *, made: Mapping[str, Any] | None = None) -> str:
    """Return the page as text."""
    return render("report.html.j2", {**values, "made": made_line(made)})


def page_values(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the template shows; a number whose digits depend on other numbers reaches it as text.

    Args:
        report: ``report.json``. Only ``title, method, beta, num_test_prompts, constraints`` and ``reward`` must be
            there; the section of any other key that is missing or null is left out.
    """
    constraints = [_compared(c, c.get("margin")) for c in report["constraints"]]
    reward = _compared(report["reward"], None)
    solution = report.get("solution") or {}
    return {
        **dict.fromkeys(OPTIONAL),
        **report,
        "verdicts": [_verdict(c, report["num_test_prompts"]) for c in constraints],
        "joint": joint_sentence(constraints),
        "tiles": list(_tiles(report, constraints, reward)),
        "constraints": constraints,
        "reward": reward,
        "kl": _kl(report.get("kl")),
        "forest": [_forest_panel(row, i) for i, row in enumerate([*constraints, reward])],
        "densities": list(_density_panels(report.get("scores") or {})),
        "believed": believed(solution, report.get("examination"), reward_name=report["reward"]["name"]),
        "estimated": estimated(report),
        "training": _training_panel(report),
        "predicted": any(row["predicted"] for row in [*constraints, reward]),
        "beside": _beside_rows(report),
        "profile_panel": profile_panel(report),
        "refused": bool(report.get("refusals")),
        "byline": byline(report),
        "price": list(price_panels(report)),
        "crossings": crossing_rows(report),
        "sample_groups": sample_groups(report),
        "config": _config_rows(report.get("config") or {}),
    }


def _compared(row: Mapping[str, Any], margin: float | None) -> dict[str, Any]:
    """Return one quantity, predicted and realised, with as many decimals as its interval deserves."""
    predicted, realised = row.get("predicted") or {}, row["realised"]
    decimals = decimals_of(realised, margin)
    return {
        **row,
        "predicted": predicted,
        "predicted_text": number(predicted.get("mean"), decimals, sign=True),
        "predicted_interval": interval_text(predicted, decimals),
        "held_out_text": _held_out(row, decimals, sign=True),
        "realised_text": number(realised["mean"], decimals, sign=True),
        "realised_interval": interval_text(realised, decimals),
        "margin_text": number(margin, decimals),
        "threshold_text": plain(row.get("threshold")) if row.get("threshold") is not None else "",
        "kind": VERDICTS[current(row["verdict"])][0] if "verdict" in row else "",
        "verdict": current(row["verdict"]) if "verdict" in row else "",
    }


def _verdict(row: Mapping[str, Any], num_prompts: int) -> dict[str, str]:
    """Return the sentence on one constraint."""
    kind, words, remark = VERDICTS[row["verdict"]]
    realised, margin, demand = row["realised"], row["margin"], "margin"
    numbers, limit = f"{row['realised_text']} {row['realised_interval']}", row["margin_text"]
    if row.get("threshold") is not None:  # it holds for the policy's own mean, whatever the reference's is
        realised, margin, demand = row["policy_mean"], row["threshold"], "threshold"
        decimals = decimals_of(realised, margin)
        numbers = f"mean {number(realised['mean'], decimals)} {interval_text(realised, decimals)}"
        limit = number(margin, decimals)
    because, same = undecided_because(row), realised["low"] == realised["high"]
    return {
        "kind": kind,
        "name": row["name"],
        "words": words,
        "numbers": numbers,
        "against": f"against a {demand} of {limit}, on {num_prompts} held-out prompt{'' if num_prompts == 1 else 's'}.",
        "remark": (SAME if same else remark).format(
            demand=demand,
            side="above" if realised["mean"] >= margin else "below",
            level=percent(row.get("confidence", 0.95), 0 if row.get("confidence", 0.95) == 0.95 else 1),
            because=because and f": {because}",
            unseen=_unseen(num_prompts),
        ),
    }


def _unseen(num_prompts: int) -> str:
    """Say which harm P prompts cannot show: one that none of them meets with a chance of 5 % (the rule of three)."""
    return f"A harm that befalls fewer than {percent(min(3 / num_prompts, 1.0), 1)} of prompts may be unseen."


def _beside_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of tails, refusals and lengths, each with the reference's and the policy's value."""
    rows = []
    for name, tails in (report.get("tails") or {}).items():
        border, share = plain(tails["border"]), percent(tails["worst_share"])
        rows.append(_sides(name, f"responses below {border}", tails["unsafe"], share_text))
        rows.append(_sides(name, f"mean of the worst {share} of responses", tails["worst"], mean_text))
    if refused := report.get("refusals"):
        measure = f"refused, of {refused['num_prompts']} benign prompts"
        rows.append(_sides("over-refusal", measure, refused, share_text))
    if report.get("lengths"):
        rows.append(_sides("length", "tokens per response", report["lengths"], mean_text))
    return rows


def _sides(name: str, measure: str, sides: Mapping[str, Any], text: Any) -> dict[str, Any]:
    return {"name": name, "measure": measure, "values": [text(sides[side]) for side in ("reference", "policy")]}


def _tiles(
    report: Mapping[str, Any], constraints: Sequence[Mapping[str, Any]], reward: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the key numbers: label, value, name of the scorer, further parts."""

    def tile(label: str, value: str, name: str, *parts: str) -> dict[str, Any]:
        return {"label": label, "value": value, "name": name, "parts": parts}

    for row in constraints:
        if row.get("lam") is None:
            continue
        yield tile("Multiplier λ", plain(row["lam"]), row["name"], *row.get("lam_beside", ()))
    for row in constraints:
        margin = f"margin {row['margin_text']}"
        yield tile("Realised improvement", row["realised_text"], row["name"], row["realised_interval"], margin)
    yield tile("Realised change", reward["realised_text"], reward["name"], reward["realised_interval"])
    if kl := _kl(report.get("kl")):
        predicted = f"predicted {kl['predicted_text']}" if report["kl"].get("predicted") is not None else ""
        yield tile("KL from the reference", kl["realised_text"], "nats", kl["realised_interval"], predicted)
    for name, rate in (report.get("win_rate") or {}).items():
        interval = f"[{percent(rate.get('low'))}, {percent(rate.get('high'))}]"
        yield tile("Win rate", percent(rate["mean"]), name, interval)


def _kl(kl: Mapping[str, Any] | None) -> dict[str, str] | None:
    if not kl or not kl.get("realised"):
        return None
    decimals = decimals_of(kl["realised"], None)
    return {
        "predicted_text": number(kl.get("predicted"), decimals),
        "predicted_interval": interval_text(kl.get("predicted_interval") or {}, decimals),
        "held_out_text": _held_out(kl, decimals, sign=False),
        "realised_text": number(kl["realised"].get("mean"), decimals),
        "realised_interval": interval_text(kl["realised"], decimals),
    }


def _held_out(row: Mapping[str, Any], decimals: int, *, sign: bool) -> str:
    """Return the prediction from the reference's responses to held-out prompts, or ''."""
    held_out = row.get("predicted_held_out")
    if not held_out:
        return ""
    return f"held-out {number(held_out['mean'], decimals, sign=sign)} {interval_text(held_out, decimals)}"


def _forest_panel(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    predicted, realised = (_triple(row[key]) for key in ("predicted", "realised"))
    margin = None if row.get("margin") is None else (row["margin"], row["margin_text"])
    before = f"predicted {row['predicted_text']} {row['predicted_interval']}, " if row["predicted"] else ""
    label = (
        f"{row['name']}: {before}realised {row['realised_text']} {row['realised_interval']}"
        f"{f', margin {margin[1]}' if margin else ''}"
    )
    texts = (row["predicted_text"], row["realised_text"])
    rows = (predicted if row["predicted"] else None, realised)
    svg = forest_svg(*rows, texts, margin=margin, label=label, prefix=f"forest{index}")
    return panel(row["name"], svg)


def _density_panels(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for index, (name, columns) in enumerate(scores.items()):
        known = {
            side: [value for value in columns[side] if value is not None and math.isfinite(value)]
            for side in ("reference", "policy")
        }
        if not any(known.values()):
            continue
        pooled = [*known["reference"], *known["policy"]]
        decimals = decimals_of({"mean": pooled[0], "low": 0.0, "high": float(np.std(pooled)) / 5.0}, None)
        before, after = (number(float(np.mean(v)) if v else None, decimals) for v in known.values())
        label = f"Distribution of {name}: mean {before} under the reference, {after} under the policy"
        svg, outside = density_svg(known["reference"], known["policy"], label=label, prefix=f"density{index}")
        note = f"Mean {before} under the reference, {after} under the policy."
        if outside:
            note += f" {outside} value{'' if outside == 1 else 's'} beyond the axis not drawn."
        yield panel(name, svg, note)


def _training_panel(report: Mapping[str, Any]) -> dict[str, Any] | None:
    training = report.get("training") or {}
    if not training.get("loss"):
        return None
    eval_loss = training.get("eval_loss") or []
    first, last = training["loss"][0][1], training["loss"][-1][1]
    label = f"Training loss, {plain(first)} at first and {plain(last)} at last"
    label += f"; evaluation loss {plain(eval_loss[-1][1])} at last" if eval_loss else ""
    svg = training_svg(training["loss"], eval_loss, label=label, prefix="training")
    shown = {"svg": safe_svg(svg), "first": first, "last": last, "eval_last": eval_loss and eval_loss[-1][1]}
    return {**training, **shown, **course(report)}


def _config_rows(config: Mapping[str, Any]) -> dict[str, str]:
    """Return dotted keys and values as a configuration file takes them."""
    values = dotted(config) if config else {}
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}


def _triple(interval: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return (mean, low, high); an unknown number is NaN, which matplotlib leaves undrawn."""
    mean, low, high = (math.nan if interval.get(key) is None else interval[key] for key in ("mean", "low", "high"))
    return mean, low, high
