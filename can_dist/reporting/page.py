"""The parts that all pages share: the templates, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

MISSING = "–"
MINUS = "−"
# Control characters become their visible pictures and lone surrogates the replacement character: neither is legal HTML.
VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def render(template: str, values: Mapping[str, Any]) -> str:
    """Fill in a template of this package; everything but its own figures is escaped.

    Args:
        template: its file name in ``can_dist/reporting/templates``.
        values: by the names that the template uses; a missing name is an error.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: files("can_dist.reporting").joinpath("templates", name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"num": number, "plain": plain, "pct": percent}
    return environment.get_template(template).render(values).translate(VISIBLE)


def safe_svg(svg: str) -> Any:
    """Mark a figure of :mod:`can_dist.reporting.figures`, whose labels are escaped, as needing no escaping."""
    from markupsafe import Markup

    return Markup(svg)


def panel(name: str, svg: str, note: str = "") -> dict[str, Any]:
    """Return the values of a figure with its name and its note."""
    return {"name": name, "svg": safe_svg(svg), "note": note}


def decimals_of(interval: Mapping[str, Any], margin: float | None) -> int:
    """Return decimals for two digits of the interval's width, three of the margin, and bounds unlike the margin."""
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


def number(value: float | None, decimals: int = 2, *, sign: bool = False) -> str:
    """Return a number with fixed decimals and a true minus sign, never before a zero; a dash for an unknown one."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{round(value, decimals) + 0.0:{'+' if sign else ''}.{decimals}f}"
    return text.replace("-", MINUS)


def plain(value: Any) -> str:
    """Return a JSON value for reading: three significant digits, lists and mappings on one line."""
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
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value) or "(none)"
    return str(value)


def percent(value: float | None, decimals: int = 0) -> str:
    """Return a share as a percentage; a dash for an unknown one."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.{decimals}f}%"


def share_text(share: Mapping[str, Any]) -> tuple[str, str]:
    """Return a share with its interval, both as percentages."""
    return percent(share["mean"], 1), f"[{percent(share['low'], 1)}, {percent(share['high'], 1)}]"


def mean_text(mean: Mapping[str, Any]) -> tuple[str, str]:
    """Return a mean with its interval, with as many decimals as the interval deserves."""
    decimals = decimals_of(mean, None)
    return number(mean["mean"], decimals), interval_text(mean, decimals)


def interval_text(interval: Mapping[str, Any], decimals: int) -> str:
    """Return '[low, high]', or '' where a bound is unknown."""
    if interval.get("low") is None or interval.get("high") is None:
        return ""
    return f"[{number(interval['low'], decimals)}, {number(interval['high'], decimals)}]"
