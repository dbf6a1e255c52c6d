"""What all figures share: palette, sizes, ticks, and SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

WIDTH_IN, HEIGHT_IN = 5.3, 3.1

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
