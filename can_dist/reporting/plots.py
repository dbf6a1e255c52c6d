"""The report's figures, each one small SVG to be set inline in HTML.

A panel is drawn about as wide as a phone, so that its text stays readable there; a page sets several side by side.
Colours leave this file as CSS variables (``var(--ink)``), so one drawing serves the light and the dark page. The
reference and the policy, and the predicted and the realised value, also differ in line style, hatching and marker, so
a figure still reads in grey. No name that a user chose is drawn: names stand in the HTML around the figure.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

LN_2 = math.log(2.0)
WIDTH_IN, HEIGHT_IN = 5.3, 3.1
FOREST_HEIGHT_IN = 1.75
MANY_STEPS = 40

# A stand-in that no plot would use by chance -> the CSS variable the page defines for each colour scheme.
INK, MUTED, RULE, REFERENCE, POLICY, MARGIN = "#010901", "#020902", "#030903", "#040904", "#050905", "#060906"
CSS_COLOUR = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    REFERENCE: "var(--reference)",
    POLICY: "var(--policy)",
    MARGIN: "var(--margin)",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "can-dist",
    "font.family": ["DejaVu Sans"],
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "hatch.linewidth": 0.8,
    "legend.fontsize": 11.0,
    "legend.frameon": False,
    "legend.handlelength": 2.4,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def forest_svg(
    predicted: tuple[float, float, float] | None,
    realised: tuple[float, float, float],
    texts: tuple[str, str],
    *,
    margin: tuple[float, str] | None,
    label: str,
    prefix: str,
) -> str:
    """One quantity: (mean, low, high) as predicted, if it was, and as realised, beside zero and the margin.

    ``texts`` are the two means and ``margin`` its value as they should read; ``label`` is read out in place of the
    figure; ``prefix`` makes the ids of this figure unlike those of the others on the page.
    """
    with panel(FOREST_HEIGHT_IN if predicted else FOREST_HEIGHT_IN - 0.4) as (figure, ax):
        ax.axvline(0.0, color=MUTED, linewidth=0.8)
        if margin is not None:
            ax.axvline(margin[0], color=MARGIN, linewidth=1.6, linestyle=(0, (5, 2)))
        rows = [(1, predicted, REFERENCE, "D", "none"), (0, realised, POLICY, "o", POLICY)]
        for y, values, colour, marker, face in rows:
            if values is None:
                continue
            mean, low, high = values
            ax.plot([low, high], [y, y], color=colour, linewidth=2.2, marker="|", markersize=9, markeredgewidth=1.6)
            # An open marker hides the bar behind it only where it is filled, so the bar is drawn around it in any case.
            ax.plot([mean], [y], marker, color=colour, markersize=8.5, markerfacecolor=face, markeredgewidth=1.8)
        names = [f"predicted {texts[0]}", f"realised {texts[1]}"]
        ax.set_yticks([1, 0][not predicted :], names[not predicted :])
        ax.set_ylim(-0.6, 1.6 if predicted else 0.6)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.12)
        few_ticks(ax, y=False)
        ax.set_xlabel("change against the reference")
        if margin is not None:
            label_above(ax, margin[0], f"margin {margin[1]}", MARGIN)
        return svg_text(figure, label, prefix)


def density_svg(reference: Sequence[float], policy: Sequence[float], *, label: str, prefix: str) -> tuple[str, int]:
    """The distribution of one score under the reference and the policy, and how many values lie beyond the axis."""
    before, after = _finite(reference), _finite(policy)
    edges = _bin_edges(np.concatenate([before, after]))
    outside = sum(int(np.sum((values < edges[0]) | (values > edges[-1]))) for values in (before, after))
    with panel(HEIGHT_IN) as (figure, ax):
        for values, name, colour, line, hatch in (
            (before, "reference", REFERENCE, (0, (4, 2)), "////"),
            (after, "policy", POLICY, "solid", None),
        ):
            count, _ = np.histogram(values, edges)
            share = count / max(values.size, 1)
            if hatch:
                ax.stairs(share, edges, fill=True, facecolor="none", edgecolor=colour, hatch=hatch, lw=0, alpha=0.6)
            else:
                ax.stairs(share, edges, fill=True, color=colour, alpha=0.22)
            ax.stairs(share, edges, color=colour, linewidth=1.7, linestyle=line, label=name)
        top = ax.get_ylim()[1] * 1.08
        ax.set_ylim(0.0, top)
        for values, colour, line, marker in (
            (before, REFERENCE, (0, (4, 2)), "D"),
            (after, POLICY, "solid", "o"),
        ):
            mean = float(values.mean()) if values.size else math.nan
            if edges[0] <= mean <= edges[-1]:
                ax.plot([mean, mean], [0.0, top], color=colour, linewidth=1.2, linestyle=line)
                face = colour if marker == "o" else "none"
                ax.plot([mean], [top], marker, color=colour, markerfacecolor=face, markersize=7, clip_on=False)
        few_ticks(ax)
        ax.set_xlabel("score")
        ax.set_ylabel("share of responses")
        _legend_above(ax)
        return svg_text(figure, label, prefix), outside


def training_svg(
    loss: Sequence[Sequence[float]], eval_loss: Sequence[Sequence[float]], *, label: str, prefix: str
) -> str:
    """The training loss, the evaluation loss where there is one, and ln 2."""
    x, y = _finite_pairs(loss)
    with panel(HEIGHT_IN) as (figure, ax):
        if x.size > MANY_STEPS:
            ax.plot(x, y, color=REFERENCE, linewidth=0.8, alpha=0.45)
            ax.plot(x, _running_mean(y, x.size // 20), color=REFERENCE, linewidth=2.0, label="training")
        else:
            ax.plot(x, y, color=REFERENCE, linewidth=1.8, label="training")
        eval_x, eval_y = _finite_pairs(eval_loss)
        if eval_x.size:
            ax.plot(eval_x, eval_y, color=POLICY, linewidth=1.6, linestyle=(0, (4, 2)), marker="o", label="evaluation")
        ax.axhline(LN_2, color=MARGIN, linewidth=1.3, linestyle=(0, (1, 1.5)), label="ln 2")
        few_ticks(ax, whole=True)
        ax.set_xlabel("optimiser step")
        name_axis(ax.yaxis, "loss")
        _legend_above(ax)
        return svg_text(figure, label, prefix)


@contextmanager
def panel(height_in: float) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes in the house style, whatever the user's matplotlibrc says."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.add_subplot()


def svg_text(figure: Any, label: str, prefix: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page: theme colours, own ids, no metadata, no outside address."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for colour, variable in CSS_COLOUR.items():
        text = text.replace(colour, variable)
    text = text.replace('xlink:href="#', 'href="#')
    text = re.sub(r'(?<=id=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib wrote an svg without a viewBox"
    body = re.sub(r"\n\s*\n", "\n", text[text.index(">") + 1 :].strip())
    return f'<svg role="img" aria-label="{escape(label)}" {box.group()}>\n{body}'


def name_axis(axis: Any, name: str) -> None:
    """Label an axis; a common factor of its ticks (1e−5) joins the label, for its corner may belong to the legend."""
    axis.set_label_text(name)
    axis.figure.draw_without_rendering()
    corner = axis.get_offset_text()
    if factor := corner.get_text():
        axis.set_label_text(f"{name} ({factor if factor[0] in '+−' else '×' + factor})")
        corner.set_visible(False)


def few_ticks(ax: Any, *, x: bool = True, y: bool = True, whole: bool = False) -> None:
    """At most five steps on the axes named; ``whole`` keeps those of x to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    round_steps = (1, 2, 2.5, 5, 10)
    if x:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=whole, steps=round_steps))
    if y:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=round_steps))


def label_above(ax: Any, x: float, text: str, colour: str, *, level: int = 0) -> None:
    """Write ``text`` over the axes at ``x``, turned inwards near either end so that it is never cut.

    ``level`` counts lines upwards, for a label that would touch another.
    """
    ax.autoscale_view()  # limits are set lazily, and the transforms below read them
    place = float(ax.transAxes.inverted().transform(ax.transData.transform((x, 0.0)))[0])
    side = "left" if place < 0.2 else "right" if place > 0.8 else "center"
    ax.annotate(text, (x, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3 + 15 * level),
                textcoords="offset points", ha=side, va="bottom", color=colour)  # fmt: skip


def _legend_above(ax: Any) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=3, borderaxespad=0.0, columnspacing=1.4)


def _finite(values: Sequence[float]) -> np.ndarray:
    """The finite values; a JSON null counts as missing."""
    array = np.asarray([math.nan if value is None else value for value in values], dtype=float)
    return array[np.isfinite(array)]


def _finite_pairs(pairs: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = [[math.nan if value is None else value for value in pair] for pair in pairs]
    table = np.asarray(rows, dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).all(axis=1)]
    return table[:, 0], table[:, 1]


def _bin_edges(values: np.ndarray) -> np.ndarray:
    """Equal bins over the values, or over five quartile ranges around the middle half where outliers reach further."""
    if not values.size:
        return np.linspace(0.0, 1.0, 11)
    low, high = float(values.min()), float(values.max())
    first, third = np.quantile(values, [0.25, 0.75])
    reach = 5.0 * float(third - first)
    if reach > 0.0:
        low, high = max(low, float(first) - reach), min(high, float(third) + reach)
    if not high > low:
        pad = max(0.5, abs(low) * 1e-3)
        low, high = low - pad, high + pad
    return np.linspace(low, high, int(np.clip(math.sqrt(values.size), 10, 40)) + 1)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a window centred on each value; at the ends, over the part of the window that exists."""
    kernel = np.ones(2 * (max(width, 2) // 2) + 1)
    total = np.convolve(values, kernel, mode="same")
    return np.asarray(total / np.convolve(np.ones_like(values), kernel, mode="same"))
