"""The price of a gain: what the dual predicts for every KL, and where one run landed."""

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

Triple = tuple[float, float, float]


def price_svg(
    curve: Mapping[str, Sequence[float | None]] | None,
    predicted: tuple[Triple, Triple] | None,
    realised: tuple[Triple, Triple],
    *,
    margin: float | None,
    quantity: str,
    label: str,
    prefix: str,
) -> str:
    """Draw a gain against the KL that it costs.

    Args:
        curve: columns ``kl`` and ``gain`` of the dual's frontier; None where there is none.
        predicted: (KL, gain) of this margin, each (mean, low, high); None where there is none.
        realised: the same of the policy on held-out prompts.
        margin: the gain that is asked for, drawn across; None for a quantity without one.
        quantity: name of the vertical axis.
        label: read out in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(HEIGHT_IN) as (figure, ax):
        if curve is not None:
            kl, gain = (np.array([np.nan if v is None else v for v in curve[key]], dtype=float) for key in CURVE)
            far = 1.25 * np.nanmax([realised[0][2], realised[0][0], *(predicted[0] if predicted else ())])
            seen = kl <= max(far, float(np.nanmin(kl, initial=np.inf)))
            ax.plot(kl[seen], gain[seen], color=REFERENCE, linewidth=1.8, linestyle=DASHED, label="any margin")
        if predicted is not None:
            _draw_point(ax, predicted, "D", REFERENCE, "none", "predicted")
        _draw_point(ax, realised, "o", POLICY, POLICY, "realised")
        if margin is not None:
            ax.axhline(margin, color=MARGIN, linewidth=1.3, linestyle=DOTTED)
        few_ticks(ax)
        ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
        ax.set_xlabel("KL from the reference, nats")
        name_axis(ax.yaxis, quantity)
        ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=3, borderaxespad=0.0, columnspacing=1.2)
        return svg_text(figure, label, prefix)


def _draw_point(ax: Any, point: tuple[Triple, Triple], marker: str, color: str, face: str, name: str) -> None:
    """Draw (KL, gain) with its intervals."""
    kl, gain = point
    xerr, yerr = ([[mean - low], [high - mean]] for mean, low, high in point)
    style = {"markersize": 8, "markeredgewidth": 1.6, "elinewidth": 1.3, "capsize": 3}
    ax.errorbar([kl[0]], [gain[0]], yerr, xerr, fmt=marker, color=color, markerfacecolor=face, label=name, **style)


CURVE: tuple[str, str] = ("kl", "gain")
