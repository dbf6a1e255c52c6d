"""What a run reaches without another training, beside the frontier that the dual predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from can_dist.reporting.figures.style import (
    DASHED,
    DOTTED,
    HEIGHT_IN,
    LINES,
    MARGIN,
    MUTED,
    POLICY,
    REFERENCE,
    few_ticks,
    name_axis,
    panel,
    svg_text,
)


def reach_svg(name: str, curve: Mapping[str, Any], quantity: str, axis: str, prefix: str) -> str:
    """Draw a quantity against the gain of one constraint: the basis, the ray, and the dual's frontier.

    Args:
        name: of the constraint.
        curve: its part of the record of :func:`can_dist.outcomes.reach.reach`.
        quantity: ``reward_improvement`` or ``kl``.
        axis: name of the vertical axis.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(HEIGHT_IN) as (figure, ax):
        ways = (("ray", "one policy, any strength", MUTED, LINES[3]), ("basis", "mixture of the basis", POLICY, "-"))
        for way, label, colour, style in ways:
            points = curve[way]
            if points and points["alpha"]:
                gain = points["improvement"][name]
                band = (points[f"{quantity}_low"], points[f"{quantity}_high"])
                ax.fill_between(gain, *band, color=colour, alpha=0.15, linewidth=0)
                ax.plot(gain, points[quantity], color=colour, linewidth=1.9, linestyle=style, label=label)
        dual = curve["dual"][quantity]
        margins = curve["margin"][: len(dual)]
        ax.plot(margins, dual, color=REFERENCE, linewidth=1.8, linestyle=DASHED, label="the dual's frontier")
        ax.axvline(curve["asked"], color=MARGIN, linewidth=1.3, linestyle=DOTTED)
        few_ticks(ax)
        ax.set_xlabel("improvement over the reference")
        name_axis(ax.yaxis, axis)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=2, borderaxespad=0.0, columnspacing=1.4)
        return svg_text(figure, f"{axis} against the improvement of {name}, without another training", prefix)
