"""The ray of one training, every strength of it, beside the frontier that the dual predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from can_dist.reporting.figures.style import (
    DASHED,
    DOTTED,
    HEIGHT_IN,
    MARGIN,
    POLICY,
    REFERENCE,
    few_ticks,
    name_axis,
    panel,
    svg_text,
)


def ray_svg(
    ray: Mapping[str, Sequence[float]],
    frontier: Mapping[str, Sequence[float | None]] | None,
    *,
    quantity: str,
    marks: Mapping[str, tuple[float, float]],
    margin: float | None,
    label: str,
    prefix: str,
) -> str:
    """Draw a quantity against the gain of one constraint, along the ray and along the frontier.

    Args:
        ray: columns ``improvement``, ``mean``, ``low`` and ``high`` of the quantity, by strength.
        frontier: columns ``margin`` and ``mean`` of what the dual predicts; None where there is none.
        quantity: name of the vertical axis.
        marks: (gain, quantity) of single policies by their name in the legend.
        margin: the gain that is asked for.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(HEIGHT_IN) as (figure, ax):
        gain = np.asarray(ray["improvement"], dtype=float)
        ax.fill_between(gain, ray["low"], ray["high"], color=POLICY, alpha=0.15, linewidth=0)
        ax.plot(gain, ray["mean"], color=POLICY, linewidth=2.0, label="this training, any strength")
        if frontier is not None:
            x, y = (np.array([np.nan if v is None else v for v in frontier[key]], dtype=float) for key in FRONTIER)
            seen = x <= max(float(gain.max()), margin or 0.0) * 1.05
            ax.plot(x[seen], y[seen], color=REFERENCE, linewidth=1.8, linestyle=DASHED, label="the dual's frontier")
        for (name, (x_mark, y_mark)), marker in zip(marks.items(), "oD", strict=False):
            ax.plot([x_mark], [y_mark], marker, color=POLICY, markersize=8, markeredgewidth=1.6, label=name)
        if margin is not None:
            ax.axvline(margin, color=MARGIN, linewidth=1.3, linestyle=DOTTED)
        few_ticks(ax)
        ax.set_xlabel("improvement over the reference")
        name_axis(ax.yaxis, quantity)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=2, borderaxespad=0.0, columnspacing=1.4)
        return svg_text(figure, label, prefix)


FRONTIER: tuple[str, str] = ("margin", "mean")


def columns_of(ray: Mapping[str, Any], name: str, quantity: str) -> dict[str, Any]:
    """Return the columns of one constraint and one quantity of the record of a ray."""
    ends = {"mean": "", "low": "_low", "high": "_high"}
    return {"improvement": ray["improvement"][name], **{key: ray[quantity + end] for key, end in ends.items()}}
