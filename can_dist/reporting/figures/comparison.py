"""Methods as one picture: helpfulness against safety, the margin, and what the dual predicts along its frontier.

Policies of several methods often lie on each other, so names stand in a legend below, not beside their ellipses. Each
method has its own marker and line, so that it is found in grey and without colours too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
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


def comparison_svg(results: Sequence[MethodResult], frontier_2G: FloatArray, *, label: str, prefix: str) -> str:
    """Draw every method's gains with their joint 95 % confidence ellipse; the first method is the one that stands out.

    Args:
        results: the methods, on the same prompts; every margin among them is a line.
        frontier_2G: finite safety gains and reward gains that the dual predicts, along the curve; G may be 0.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of others on the page.

    Raises:
        DataError: methods that cannot be compared.
    """
    check_comparable(results)
    margins = sorted({result.margin for result in results})
    names = [textwrap.fill(result.name, NAME_WIDTH) for result in results]
    num_columns = 2 if max(map(len, names)) <= SHORT_NAME else 1
    num_rows = math.ceil((2 + sum(1 + name.count("\n") for name in names)) / num_columns)
    with panel(HEIGHT_IN + LEGEND_ROW_IN * num_rows) as (figure, ax):
        ax.axhline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        ax.axvline(0.0, color=MUTED, linewidth=0.6, zorder=0)
        for margin in margins:
            ax.axvline(margin, color=MARGIN, linewidth=1.6, linestyle=DASHED, zorder=1)
        entries = []
        for place, (result, name) in enumerate(zip(results, names, strict=True)):
            entries.append(_draw_method(ax, name, confidence_ellipse(result), place))
        (cross,) = ax.plot([0.0], [0.0], "+", color=MUTED, markersize=11, markeredgewidth=1.8, label="reference")
        entries.append(cross)
        if frontier_2G.size:
            dots = {"color": MUTED, "linewidth": 1.6, "linestyle": DOTTED, "label": "predicted frontier"}
            entries += ax.plot(*frontier_2G, zorder=1, **dots)
        ax.margins(0.1)
        few_ticks(ax)
        ax.set_xlabel("safety gain against the reference")
        ax.set_ylabel("helpfulness gain against the reference")
        for level, margin in enumerate(margins):
            label_above(ax, margin, f"margin {margin:.3g}", MARGIN, level=level)
        figure.legend(handles=entries, loc="outside lower center", ncols=num_columns, columnspacing=2.0)
        return svg_text(figure, label, prefix)


def _draw_method(ax: Any, name: str, ellipse: Ellipse, place: int) -> Any:
    """Draw a method's mean and region; return its entry of the legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Ellipse as Region

    colour, first = COLOURS[min(place, len(COLOURS) - 1)], place == 0
    region = ((ellipse.safety, ellipse.reward), ellipse.width, ellipse.height)
    if first:
        ax.add_patch(Region(*region, angle=ellipse.angle, color=colour, alpha=0.22, linewidth=0, zorder=2))
    line: dict[str, Any] = {"color": colour, "linewidth": 1.8 if first else 1.0, "linestyle": LINES[place % len(LINES)]}
    dot: dict[str, Any] = {
        "marker": MARKERS[place % len(MARKERS)], "markersize": 7, "markeredgewidth": 1.4, "markeredgecolor": colour,
        "markerfacecolor": colour if first else "none",
    }  # fmt: skip
    ax.add_patch(Region(*region, angle=ellipse.angle, fill=False, zorder=3, **line))
    ax.plot([ellipse.safety], [ellipse.reward], linestyle="none", zorder=4, **dot)
    return Line2D([], [], label=name, **line, **dot)
