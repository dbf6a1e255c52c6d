"""The course of a training by its estimates: how far each gain is from its margin, and λ where it moved."""

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

Points = Sequence[Sequence[float]]


def gain_svg(curves: Mapping[str, Points], *, margin: float | None, label: str, prefix: str) -> str:
    """Draw a gain by optimizer step, with its band and the margin.

    Args:
        curves: [step, value] of ``mean``, ``low`` and ``high``.
        margin: the gain that is asked for.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(HEIGHT_IN) as (figure, ax):
        step, mean = _columns(curves["mean"])
        ax.fill_between(step, *(_columns(curves[end])[1] for end in ("low", "high")), color=POLICY, alpha=0.15, lw=0)
        ax.plot(step, mean, color=POLICY, linewidth=2.0, marker="o", markersize=4, label="estimated gain")
        if margin is not None:
            ax.axhline(margin, color=MARGIN, linewidth=1.3, linestyle=DOTTED, label="asked")
        _finish(ax, "improvement over the reference")
        return svg_text(figure, label, prefix)


def lam_svg(lam: Mapping[str, Points], *, label: str, prefix: str) -> str:
    """Draw λ of every constraint by optimizer step; [step, λ] is what the training went by up to that step."""
    with panel(HEIGHT_IN) as (figure, ax):
        for (name, points), line in zip(lam.items(), LOOKS * len(lam), strict=False):
            step, value = _columns(points)
            ax.step(step, value, where="pre", color=REFERENCE, linewidth=1.8, linestyle=line, label=name)
        _finish(ax, "λ (reward units per score unit)")
        return svg_text(figure, label, prefix)


LOOKS: tuple[Any, ...] = ("solid", DASHED, DOTTED)


def _columns(points: Points) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(points, dtype=float).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _finish(ax: Any, name: str) -> None:
    few_ticks(ax, whole=True)
    ax.set_xlabel("optimiser step")
    name_axis(ax.yaxis, name)
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=3, borderaxespad=0.0, columnspacing=1.4)
