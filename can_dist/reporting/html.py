"""The report of a run: one HTML file that needs nothing but itself.

``write_report(report, path)`` takes the JSON-safe dictionary of the evaluate stage. Prompts, responses and names are
hostile text: the template escapes everything but the figures drawn here, and the page carries a policy that lets no
script run and nothing be fetched.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

MISSING = "–"
MINUS = "−"
SUMMARY_CHARS = 110
# Control characters become their visible pictures and lone surrogates the replacement character: neither is legal HTML.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)

VERDICTS = {
    "met": ("met", "is met", ""),
    "met within the interval": (
        "within",
        "is met within the interval",
        " The margin lies inside the 95% interval and the estimate is {side} it: more prompts would settle it.",
    ),
    "not met": ("unmet", "is not met", " The whole 95% interval lies below the margin."),
}
ESS_COLUMNS = (("min", "least"), ("p10", "10%"), ("median", "median"), ("p90", "90%"), ("max", "most"))
DIAGNOSTICS_SHOWN = {"ess", "kl_over_log_k", "sd_over_beta", "verdict"}


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as one self-contained HTML file; the file appears whole or not at all.

    The same ``report`` always gives the same bytes. A key that is missing or null leaves its section out; only
    ``title, method, beta, num_train_prompts, num_test_prompts, constraints`` and ``reward`` must be there.
    """
    _write_whole(Path(path), render_report(report).encode("utf-8"))


def render_report(report: Mapping[str, Any]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"num": _number, "plain": _plain, "pct": _percent}
    template = environment.from_string(files("can_dist.reporting").joinpath("report.html.j2").read_text("utf-8"))
    return template.render(_page(report)).translate(VISIBLE)


def _page(report: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, each number already in words where its digits depend on other numbers."""
    constraints = [_compared(c, c.get("margin")) for c in report["constraints"]]
    reward = _compared(report["reward"], None)
    solution = report.get("solution") or {}
    diagnostics = solution.get("diagnostics") or {}
    return {
        "title": report["title"],
        "method": report["method"],
        "beta": report["beta"],
        "num_train_prompts": report["num_train_prompts"],
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
        "duals": list(_dual_panels(report.get("dual_curves") or {}, solution.get("lam") or {})),
        "training": _training_panel(report.get("training") or {}),
        "lengths": report.get("lengths") or {},
        "counts": report.get("counts") or {},
        "warnings": report.get("warnings") or [],
        "solution": solution,
        "trust": diagnostics.get("verdict"),
        "ess": diagnostics.get("ess") or {},
        "ess_columns": ESS_COLUMNS,
        "solver": _solver_rows(solution, diagnostics),
        "samples": [_sample(sample) for sample in report.get("samples") or []],
        "models": report.get("models") or {},
        "config": _flat(report.get("config") or {}),
        "versions": report.get("versions") or {},
        "format_version": report.get("format_version"),
    }


def _compared(row: Mapping[str, Any], margin: float | None) -> dict[str, Any]:
    """One quantity predicted and realised, with as many decimals as its interval deserves."""
    predicted, realised = row.get("predicted") or {}, row["realised"]
    decimals = _decimals(realised, margin)
    return {
        **row,
        "predicted": predicted,
        "predicted_text": _number(predicted.get("mean"), decimals, sign=True),
        "predicted_interval": _interval(predicted, decimals),
        "realised_text": _number(realised["mean"], decimals, sign=True),
        "realised_interval": _interval(realised, decimals),
        "margin_text": _number(margin, decimals),
        "threshold_text": _plain(row.get("threshold")) if row.get("threshold") is not None else "",
        "kind": VERDICTS[row["verdict"]][0] if "verdict" in row else "",
    }


def _verdict(row: Mapping[str, Any], num_prompts: int) -> dict[str, str]:
    """The sentence a reader takes home about one constraint."""
    kind, words, remark = VERDICTS[row["verdict"]]
    side = "above" if row["realised"]["mean"] >= row["margin"] else "below"
    return {
        "kind": kind,
        "name": row["name"],
        "words": words,
        "numbers": f"{row['realised_text']} {row['realised_interval']}",
        "against": f"against a margin of {row['margin_text']}, "
        f"on {num_prompts} held-out prompt{'' if num_prompts == 1 else 's'}.",
        "remark": remark.format(side=side),
    }


def _tiles(
    report: Mapping[str, Any], constraints: Sequence[Mapping[str, Any]], reward: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The key numbers: what, its value, of which scorer, and what stands beside it."""

    def tile(label: str, value: str, name: str, *parts: str) -> dict[str, Any]:
        return {"label": label, "value": value, "name": name, "parts": parts}

    for row in constraints:
        error = "" if row.get("lam_se") is None else f"SE {row['lam_se']:.2g}"
        yield tile("Multiplier λ", _plain(row["lam"]), row["name"], error)
    for row in constraints:
        margin = f"margin {row['margin_text']}"
        yield tile("Realised improvement", row["realised_text"], row["name"], row["realised_interval"], margin)
    yield tile("Helpfulness change", reward["realised_text"], reward["name"], reward["realised_interval"])
    if kl := _kl(report.get("kl")):
        predicted = f"predicted {kl['predicted_text']}"
        yield tile("KL from the reference", kl["realised_text"], "nats", kl["realised_interval"], predicted)
    for name, rate in (report.get("win_rate") or {}).items():
        interval = f"[{_percent(rate.get('low'))}, {_percent(rate.get('high'))}]"
        yield tile("Win rate", _percent(rate["mean"]), name, interval)


def _kl(kl: Mapping[str, Any] | None) -> dict[str, str] | None:
    if not kl or not kl.get("realised"):
        return None
    decimals = _decimals(kl["realised"], None)
    return {
        "predicted_text": _number(kl.get("predicted"), decimals),
        "realised_text": _number(kl["realised"].get("mean"), decimals),
        "realised_interval": _interval(kl["realised"], decimals),
    }


def _forest_panel(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    from can_dist.reporting.plots import forest_svg

    predicted, realised = (_triple(row[key]) for key in ("predicted", "realised"))
    margin = None if row.get("margin") is None else (row["margin"], row["margin_text"])
    label = (
        f"{row['name']}: predicted {row['predicted_text']} {row['predicted_interval']}, "
        f"realised {row['realised_text']} {row['realised_interval']}" + (f", margin {margin[1]}" if margin else "")
    )
    texts = (row["predicted_text"], row["realised_text"])
    svg = forest_svg(predicted, realised, texts, margin=margin, label=label, prefix=f"forest{index}")
    return {"name": row["name"], "svg": _safe(svg), "note": ""}


def _density_panels(scores: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    from can_dist.reporting.plots import density_svg

    for index, (name, columns) in enumerate(scores.items()):
        known = {side: _known(columns[side]) for side in ("reference", "policy")}
        if not any(known.values()):
            continue
        pooled = [*known["reference"], *known["policy"]]
        decimals = _decimals({"mean": pooled[0], "low": 0.0, "high": float(np.std(pooled)) / 5.0}, None)
        before, after = (_number(float(np.mean(v)) if v else None, decimals) for v in known.values())
        label = f"Distribution of {name}: mean {before} under the reference, {after} under the policy"
        svg, outside = density_svg(known["reference"], known["policy"], label=label, prefix=f"density{index}")
        note = f"Mean {before} under the reference, {after} under the policy."
        if outside:
            note += f" {outside} value{'' if outside == 1 else 's'} beyond the axis not drawn."
        yield {"name": name, "svg": _safe(svg), "note": note}


def _dual_panels(curves: Mapping[str, Any], lam: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    from can_dist.reporting.plots import dual_svg

    for index, (name, curve) in enumerate(curves.items()):
        if not curve or not curve["lam"] or name not in lam:
            continue
        label = f"Dual value against the multiplier of {name}, least at λ* = {_plain(lam[name])}"
        svg = dual_svg(curve["lam"], curve["value"], lam[name], label=label, prefix=f"dual{index}")
        yield {"name": name, "svg": _safe(svg), "note": ""}


def _training_panel(training: Mapping[str, Any]) -> dict[str, Any] | None:
    from can_dist.reporting.plots import training_svg

    if not training.get("loss"):
        return None
    eval_loss = training.get("eval_loss") or []
    first, last = training["loss"][0][1], training["loss"][-1][1]
    label = f"Training loss, {_plain(first)} at first and {_plain(last)} at last"
    label += f"; evaluation loss {_plain(eval_loss[-1][1])} at last" if eval_loss else ""
    svg = training_svg(training["loss"], eval_loss, label=label, prefix="training")
    return {**training, "svg": _safe(svg), "first": first, "last": last, "eval_last": eval_loss and eval_loss[-1][1]}


def _solver_rows(solution: Mapping[str, Any], diagnostics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the solver said, as (what, value) in reading order; what is absent is left out."""
    predicted, feasibility = solution.get("predicted") or {}, solution.get("feasibility") or {}
    rows = [
        ("status", solution.get("status")),
        ("dual value", solution.get("value")),
        ("KKT residual", solution.get("kkt_residual")),
        ("slack", solution.get("slack")),
        ("centre (reference mean)", solution.get("centre")),
        ("predicted reward", predicted.get("reward")),
        ("joint attainable slack t*", feasibility.get("t_star")),
        ("most attainable, each alone", feasibility.get("attainable")),
        ("certificate weights", feasibility.get("certificate")),
        ("KL / ln K", diagnostics.get("kl_over_log_k")),
        ("sd of the score / β", diagnostics.get("sd_over_beta")),
    ]
    rows += [(key.replace("_", " "), value) for key, value in diagnostics.items() if key not in DIAGNOSTICS_SHOWN]
    return [(name, _plain(value)) for name, value in rows if value is not None and value != {} and value != []]


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


def _safe(svg: str) -> Any:
    """Mark a figure drawn here, in which every label is escaped, as needing no escaping."""
    from markupsafe import Markup

    return Markup(svg)


def _triple(interval: Mapping[str, Any]) -> tuple[float, float, float]:
    """(mean, low, high); what is unknown is NaN, which matplotlib leaves undrawn."""
    mean, low, high = (math.nan if interval.get(key) is None else interval[key] for key in ("mean", "low", "high"))
    return mean, low, high


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _decimals(interval: Mapping[str, Any], margin: float | None) -> int:
    """Two digits of the interval's width, the margin's own first three, and enough to tell a bound from the margin."""
    low, high = interval.get("low"), interval.get("high")
    width = abs(high - low) if low is not None and high is not None else 0.0
    scale = width or abs(interval.get("mean") or 0.0) or 1.0
    if not math.isfinite(scale):
        return 2
    decimals = min(max(1 - math.floor(math.log10(scale)), 0), 8)
    if margin is None:
        return decimals
    decimals = max(
        decimals, next(d for d in range(9) if d == 8 or math.isclose(round(margin, d), margin, rel_tol=5e-3))
    )
    bounds = [bound for bound in (low, high, interval.get("mean")) if bound is not None and bound != margin]
    most = min(decimals + 3, 8)
    while decimals < most and any(round(bound, decimals) == round(margin, decimals) for bound in bounds):
        decimals += 1
    return decimals


def _number(value: float | None, decimals: int = 2, *, sign: bool = False) -> str:
    """Fixed decimals with a true minus sign; a dash for what is unknown; no minus before a zero."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{round(value, decimals) + 0.0:{'+' if sign else ''}.{decimals}f}"
    return text.replace("-", MINUS)


def _plain(value: Any) -> str:
    """Any JSON value for reading: three or four significant digits, lists and mappings on one line."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.6g}"
        return text.replace("-", MINUS)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", MINUS)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_plain(item) for item in value) or "(none)"
    return str(value)


def _percent(value: float | None, decimals: int = 0) -> str:
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f}%"


def _interval(interval: Mapping[str, Any], decimals: int) -> str:
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"[{_number(interval['low'], decimals)}, {_number(interval['high'], decimals)}]"


def _write_whole(path: Path, data: bytes) -> None:
    """Write a temporary file beside ``path``, force it to disk, and only then give it the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
