"""The style of all figures: the palette, sizes, lines and markers, ticks, and SVG that takes the page's colours.

A figure of a page (:func:`panel`, :func:`svg_text`) is drawn in stand-in colours that become CSS variables, so one
drawing serves the light and the dark page. A figure for a paper (:func:`paper_figure`, :func:`save_figure`) is a file
with colours of its own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

WIDTH_IN, HEIGHT_IN = 5.3, 3.1

LIGHT = {
    "ink": "#1d1c1a",
    "muted": "#5e5b55",
    "rule": "#d9d5cc",
    "reference": "#00619a",
    "policy": "#b5470b",
    "margin": "#75398a",
}
"""The light page's colours, by the names of their CSS variables."""
INK, MUTED, RULE, REFERENCE, POLICY, MARGIN = STAND_INS = tuple(f"#0{number}090{number}" for number in range(1, 7))
"""Colours that no plot would use by chance, in the order of ``LIGHT``; :func:`svg_text` replaces them."""
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours for figures on white: colour-blind readers can tell them apart."""
BLUE, ORANGE, GREY = *SERIES[:2], "#555555"

MARKERS = "osD^vPX*<>hp"
LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
DASHED, DOTTED = (0, (5, 2)), (0, (1, 1.5))

COMMON_STYLE: dict[str, Any] = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": ["DejaVu Sans"],
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "can-dist",
    "text.parse_math": False,
}
PAGE_STYLE: dict[str, Any] = COMMON_STYLE | {
    "font.size": 11.0,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "figure.facecolor": "none",
    "hatch.linewidth": 0.8,
    "legend.fontsize": 11.0,
    "legend.handlelength": 2.4,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
PAPER_STYLE: dict[str, Any] = COMMON_STYLE | {
    "axes.linewidth": 0.7,
    "axes.titlesize": 8.5,
    "font.size": 8.0,
    "legend.fontsize": 7.5,
    "pdf.fonttype": 42,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}


@contextmanager
def panel(height_in: float) -> Iterator[tuple[Any, Any]]:
    """Give a figure of a page and its one pair of axes, whatever the user's matplotlibrc says."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", PAGE_STYLE]):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.add_subplot()


@contextmanager
def paper_figure(size_in: tuple[float, float]) -> Iterator[Any]:
    """Give an empty figure for a paper, whatever the user's matplotlibrc says."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", PAPER_STYLE]):
        yield Figure(size_in, layout="constrained")


def save_figure(figure: Any, path: Path, kind: str) -> None:
    """Write a figure for a paper as svg, pdf or png, without a date: the same figure gives the same bytes."""
    import matplotlib.style

    date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    with matplotlib.style.context(["default", PAPER_STYLE]):
        figure.savefig(path, format=kind, dpi=300, metadata=date)


def svg_text(figure: Any, label: str, prefix: str) -> str:
    """Return a figure as an ``<svg>`` element of an HTML page, without metadata or outside addresses.

    Args:
        figure: drawn in the stand-in colours.
        label: text that a screen reader reads in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    # ``savefig`` draws twice, and writes the same
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for stand_in, name in zip(STAND_INS, LIGHT, strict=True):
        text = text.replace(stand_in, f"var(--{name})")
    text = text.replace('xlink:href="#', 'href="#')
    text = re.sub(r'(?<=id=")|(?<=url\(#)|(?<=href="#)', f"{prefix}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib wrote an svg without a viewBox"
    body = re.sub(r"\n\s*\n", "\n", text[text.index(">") + 1 :].strip())
    return f'<svg role="img" aria-label="{escape(label)}" {box.group()}>\n{body}'


def standalone_svg(svg: str) -> str:
    """Return a page's figure as a file: with a namespace, a background, the light page's colours, a common font."""
    for name, colour in LIGHT.items():
        svg = svg.replace(f"var(--{name})", colour)
    head, body = svg.split(">", 1)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    background = '<rect width="100%" height="100%" fill="#fcfbf8"/>'
    return f"{head.replace('<svg', f'<svg {namespaces}', 1)}>{background}{body}\n"


def name_axis(axis: Any, name: str) -> None:
    """Label an axis. A common factor of its ticks (1e−5) joins the label: the legend may cover the axis's corner."""
    axis.set_label_text(name)
    formatter = axis.get_major_formatter()
    formatter.set_locs(axis.get_majorticklocs())
    if factor := formatter.get_offset():
        axis.set_label_text(f"{name} ({factor if factor[0] in '+−' else '×' + factor})")
        axis.get_offset_text().set_visible(False)


def few_ticks(ax: Any, *, x: bool = True, y: bool = True, whole: bool = False) -> None:
    """Set at most five ticks on each chosen axis; ``whole`` keeps those of x to whole numbers."""
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
