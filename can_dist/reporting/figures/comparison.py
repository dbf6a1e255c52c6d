"""Methods as pictures: helpfulness against safety, and safety against the KL that it costs.

Beside each method's joint region stand the margin, what the dual predicts along its frontier, and the ray of a
training, its every strength. Policies of several methods often lie on each other, so names stand in a legend below,
not beside their ellipses. Each method has its own marker and line, so that it is found in grey and without colours too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from can_dist.measuring.comparison import Ellipse, FloatArray, MethodResult, check_comparable, confidence_ellipse
from can_dist.reporting.figures.style import (
    DASHED,
    DOTTED,
    INK,
    LINES,
    MARGIN,
    MARKERS,
    MUTED,
    POLICY,
    REFERENCE,
    few_ticks,
    label_above,
    panel,
    svg_text,
)

HEIGHT_IN, LEGEND_ROW_IN = 4.0, 0.24
SHORT_NAME, NAME_WIDTH = 20, 46
"""Characters of a name that leaves room for a second column of the legend, and of a line of one that does not."""
COLOURS = (POLICY, REFERENCE, INK)
REACH = 1.1
"""Lines are drawn to so many times the furthest method where they would go on far beyond all of them."""


@dataclass(frozen=True)
class Plane:
    """The two axes of a picture: a number of each prompt, and its name.

    Attributes:
        x: the numbers of the horizontal axis.
        y: those of the vertical one.
        names: of both.
        margin_on_x: whether the margins are gains of the horizontal axis.
        cut: whether curves end at the furthest method.
    """

    x: Callable[[MethodResult], FloatArray]
    y: Callable[[MethodResult], FloatArray]
    names: tuple[str, str]
    margin_on_x: bool
    cut: bool


SAFETY = "safety gain against the reference"
GAINS = Plane(
    lambda m: m.safety_P, lambda m: m.reward_P, (SAFETY, "helpfulness gain against the reference"), True, False
)
PRICE = Plane(lambda m: m.kl_P, lambda m: m.safety_P, ("KL from the reference (nats)", SAFETY), False, True)


def comparison_svg(
    plane: Plane,
    results: Sequence[MethodResult],
    curves: Sequence[tuple[str, FloatArray]],
    *,
    label: str,
    prefix: str,
) -> str:
    """Draw every method's two means with their joint 95 % confidence ellipse; the first method is what stands out.

    Args:
        plane: what is drawn against what.
        results: the methods, on the same prompts; every margin among them is a line.
        curves: by their names in the legend, finite x and y, (2, G); G may be 0. The first is dotted, others dashed.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of others on the page.

    Raises:
        DataError: methods that cannot be compared.
    """
    check_comparable(results)
    margins = sorted({result.margin for result in results})
    styled = zip(curves, (DOTTED, DASHED), strict=False)
    lines = [(textwrap.fill(name, NAME_WIDTH), curve_2G, style) for (name, curve_2G), style in styled if curve_2G.size]
    names = [textwrap.fill(result.name, NAME_WIDTH) for result in results]
    ellipses = [confidence_ellipse(plane.x(result), plane.y(result)) for result in results]
    entries = ["reference", *names, *(name for name, _, _ in lines)]
    num_columns = 2 if max(map(len, entries)) <= SHORT_NAME else 1
    num_rows = math.ceil(sum(1 + entry.count("\n") for entry in entries) / num_columns)
    with panel(HEIGHT_IN + LEGEND_ROW_IN * num_rows) as (figure, ax):
        ax.axhline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        ax.axvline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        for margin in margins:
            draw = ax.axvline if plane.margin_on_x else ax.axhline
            draw(margin, color=MARGIN, linewidth=1.6, linestyle=DASHED, zorder=1)
        drawn = [
            _draw_method(ax, name, ellipse, place)
            for place, (name, ellipse) in enumerate(zip(names, ellipses, strict=True))
        ]
        drawn += ax.plot([0.0], [0.0], "+", color=MUTED, markersize=11, markeredgewidth=1.8, label="reference")
        furthest = REACH * max(ellipse.x + ellipse.width / 2 for ellipse in ellipses) if plane.cut else math.inf
        for name, curve_2G, style in lines:
            shown_2G = curve_2G[:, curve_2G[0] <= furthest]
            drawn += ax.plot(*shown_2G, zorder=1, color=MUTED, linewidth=1.6, linestyle=style, label=name)
        ax.margins(0.1)
        few_ticks(ax)
        ax.set_xlabel(plane.names[0])
        ax.set_ylabel(plane.names[1])
        for level, margin in enumerate(margins):
            _name_margin(ax, margin, level, on_x=plane.margin_on_x)
        figure.legend(handles=drawn, loc="outside lower center", ncols=num_columns, columnspacing=2.0)
        return svg_text(figure, label, prefix)


def _name_margin(ax: Any, margin: float, level: int, *, on_x: bool) -> None:
    """Write a margin at the end of its line, outside of the axes."""
    text = f"margin {margin:.3g}"
    if on_x:
        label_above(ax, margin, text, MARGIN, level=level)
        return
    ax.annotate(text, (1.0, margin), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
                ha="left", va="center", color=MARGIN)  # fmt: skip


def _draw_method(ax: Any, name: str, ellipse: Ellipse, place: int) -> Any:
    """Draw a method's mean and region; return its entry of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Ellipse as Region

    colour, first = COLOURS[min(place, len(COLOURS) - 1)], place == 0
    region = ((ellipse.x, ellipse.y), ellipse.width, ellipse.height)
    if first:
        ax.add_patch(Region(*region, angle=ellipse.angle, color=colour, alpha=0.22, linewidth=0, zorder=2))
    line: dict[str, Any] = {"color": colour, "linewidth": 1.8 if first else 1.0, "linestyle": LINES[place % len(LINES)]}
    dot: dict[str, Any] = {
        "marker": MARKERS[place % len(MARKERS)], "markersize": 7, "markeredgewidth": 1.4, "markeredgecolor": colour,
        "markerfacecolor": colour if first else "none",
    }  # fmt: skip
    ax.add_patch(Region(*region, angle=ellipse.angle, fill=False, zorder=3, **line))
    ax.plot([ellipse.x], [ellipse.y], linestyle="none", zorder=4, **dot)
    return Line2D([], [], label=name, **line, **dot)
