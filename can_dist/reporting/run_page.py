"""The report of a run: one HTML file that needs nothing but itself.

``write_report(report, path)`` takes the JSON-safe dictionary of the evaluate stage. Prompts, responses and names are
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

from can_dist.reporting.belief_page import believed
from can_dist.reporting.page import decimals_of, interval_text, number, percent, plain, render, safe_svg, write_whole

SUMMARY_CHARS = 110
VERDICTS = {
    "met": ("met", "is met", ""),
    "met within the interval": (
        "within",
        "is met within the interval",
        " The margin lies inside the 95% interval and the estimate is {side} it: more prompts would settle it.",
    ),
    "not met": ("unmet", "is not met", " The whole 95% interval lies {side} the margin."),
}


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as one self-contained HTML file; the file appears whole or not at all.

    The same ``report`` always gives the same bytes. A key that is missing or null leaves its section out; only
    ``title, method, beta, num_test_prompts, constraints`` and ``reward`` must be there.
    """
    write_whole(Path(path), render_report(report).encode("utf-8"))


def render_report(report: Mapping[str, Any]) -> str:
    """The page as text."""
    return render("report.html.j2", _page(report))


def _page(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, each number already in words where its digits depend on other numbers."""
    constraints = [_compared(c, c.get("margin")) for c in report["constraints"]]
    reward = _compared(report["reward"], None)
    solution = report.get("solution") or {}
    return {
        "title": report["title"],
        "method": report["method"],
        "beta": report["beta"],
        "num_train_prompts": report.get("num_train_prompts"),
        "num_test_prompts": report["num_test_prompts"],
        "num_responses": report.get("num_responses"),
        "verdicts": [_verdict(c, report["num_test_prompts"]) for c in constraints],
        "tiles": list(_tiles(report, constraints, reward)),
        "constraints": constraints,
        "reward": reward,
        "kl": _kl(report.get("kl")),
        "win_rate": report.get("win_rate") or {},
        "forest": [_forest_panel(row, i) for i, row in enumerate([*constraints, reward])],
        "densities": list(_density_panels(report.get("scores") or {})),
        "believed": believed(solution, report.get("examination"), reward_name=report["reward"]["name"]),
        "training": _training_panel(report.get("training") or {}),
        "lengths": report.get("lengths") or {},
        "counts": report.get("counts") or {},
        "warnings": report.get("warnings") or [],
        "predicted": any(row["predicted"] for row in [*constraints, reward]),
        "prediction": report.get("prediction") or {},
        "unpredicted": report.get("unpredicted"),
        "beside": _beside_rows(report),
        "refused": bool(report.get("refusals")),
        "samples": [_sample(sample) for sample in report.get("samples") or []],
        "models": report.get("models") or {},
        "config": _flat(report.get("config") or {}),
        "versions": report.get("versions") or {},
        "format_version": report.get("format_version"),
    }


def _compared(row: Mapping[str, Any], margin: float | None) -> dict[str, Any]:
    """One quantity predicted and realised, with as many decimals as its interval deserves."""
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
        "kind": VERDICTS[row["verdict"]][0] if "verdict" in row else "",
    }


def _verdict(row: Mapping[str, Any], num_prompts: int) -> dict[str, str]:
    """The sentence a reader takes home about one constraint."""
    kind, words, remark = VERDICTS[row["verdict"]]
    realised, margin, what = row["realised"], row["margin"], "margin"
    numbers, asked = f"{row['realised_text']} {row['realised_interval']}", row["margin_text"]
    if row.get("threshold") is not None:  # asked of the policy's own mean, whatever the reference's is
        realised, margin, what = row["policy_mean"], row["threshold"], "threshold"
        decimals = decimals_of(realised, margin)
        numbers = f"mean {number(realised['mean'], decimals)} {interval_text(realised, decimals)}"
        asked = number(margin, decimals)
    return {
        "kind": kind,
        "name": row["name"],
        "words": words,
        "numbers": numbers,
        "against": f"against a {what} of {asked}, on {num_prompts} held-out prompt{'' if num_prompts == 1 else 's'}.",
        "remark": remark.format(side="above" if realised["mean"] >= margin else "below").replace("margin", what),
    }


def _beside_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of what means do not tell: one row per quantity, the reference's value and the policy's."""
    rows = []
    for name, tails in (report.get("tails") or {}).items():
        border, share = plain(tails["border"]), percent(tails["worst_share"])
        rows.append(_sides(name, f"responses below {border}", tails["unsafe"], _share_text))
        rows.append(_sides(name, f"mean of the worst {share} of responses", tails["worst"], _mean_text))
    if refused := report.get("refusals"):
        what = f"refused, of {refused['num_prompts']} benign prompts"
        rows.append(_sides("over-refusal", what, refused, _share_text))
    if report.get("lengths"):
        rows.append(_sides("length", "tokens per response", report["lengths"], _mean_text))
    return rows


def _sides(name: str, what: str, sides: Mapping[str, Any], text: Any) -> dict[str, Any]:
    return {"name": name, "what": what, "values": [text(sides[side]) for side in ("reference", "policy")]}


def _share_text(share: Mapping[str, Any]) -> tuple[str, str]:
    return percent(share["mean"], 1), f"[{percent(share['low'], 1)}, {percent(share['high'], 1)}]"


def _mean_text(mean: Mapping[str, Any]) -> tuple[str, str]:
    decimals = decimals_of(mean, None)
    return number(mean["mean"], decimals), interval_text(mean, decimals)


def _tiles(
    report: Mapping[str, Any], constraints: Sequence[Mapping[str, Any]], reward: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The key numbers: what, its value, of which scorer, and what stands beside it."""

    def tile(label: str, value: str, name: str, *parts: str) -> dict[str, Any]:
        return {"label": label, "value": value, "name": name, "parts": parts}

    for row in constraints:
        if row.get("lam") is None:
            continue
        error = "" if row.get("lam_se") is None else f"SE {row['lam_se']:.2g}"
        yield tile("Multiplier λ", plain(row["lam"]), row["name"], error)
    for row in constraints:
        margin = f"margin {row['margin_text']}"
        yield tile("Realised improvement", row["realised_text"], row["name"], row["realised_interval"], margin)
    yield tile("Helpfulness change", reward["realised_text"], reward["name"], reward["realised_interval"])
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
    """The prediction from the reference's responses to held-out prompts, where the row carries one."""
    held_out = row.get("predicted_held_out")
    if not held_out:
        return ""
    return f"held-out {number(held_out['mean'], decimals, sign=sign)} {interval_text(held_out, decimals)}"


def _forest_panel(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    from can_dist.reporting.figures.report import forest_svg

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
    return {"name": row["name"], "svg": safe_svg(svg), "note": ""}


def _density_panels(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from can_dist.reporting.figures.report import density_svg

    for index, (name, columns) in enumerate(scores.items()):
        known = {side: _known(columns[side]) for side in ("reference", "policy")}
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
        yield {"name": name, "svg": safe_svg(svg), "note": note}


def _training_panel(training: Mapping[str, Any]) -> dict[str, Any] | None:
    from can_dist.reporting.figures.report import training_svg

    if not training.get("loss"):
        return None
    eval_loss = training.get("eval_loss") or []
    first, last = training["loss"][0][1], training["loss"][-1][1]
    label = f"Training loss, {plain(first)} at first and {plain(last)} at last"
    label += f"; evaluation loss {plain(eval_loss[-1][1])} at last" if eval_loss else ""
    svg = training_svg(training["loss"], eval_loss, label=label, prefix="training")
    return {**training, "svg": safe_svg(svg), "first": first, "last": last, "eval_last": eval_loss and eval_loss[-1][1]}


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    line = " ".join(sample["prompt"].split())
    short = line if len(line) <= SUMMARY_CHARS else line[: SUMMARY_CHARS - 1].rstrip() + "…"
    return {**sample, "summary": short or "(empty prompt)", "scores": sample.get("scores") or {}}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and verbatim values: what stands here may be copied back into a configuration."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _triple(interval: Mapping[str, Any]) -> tuple[float, float, float]:
    """(mean, low, high); what is unknown is NaN, which matplotlib leaves undrawn."""
    mean, low, high = (math.nan if interval.get(key) is None else interval[key] for key in ("mean", "low", "high"))
    return mean, low, high


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
