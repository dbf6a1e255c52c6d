"""The figures of the diagnostics: dual curves, weights, stability, frontier.

Each figure shows one question: is the minimum sharp, who carries the weight, does λ̂ still move with the number of
responses, and what does a margin cost. Names that a user chose stand in the HTML around the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.reporting.figures.style import (
    DASHED,
    DOTTED,
    HEIGHT_IN,
    INK,
    MARGIN,
    MUTED,
    POLICY,
    REFERENCE,
    few_ticks,
    label_above,
    name_axis,
    panel,
    svg_text,
)

ROW_HEIGHT_IN = 0.34
LINE = 0.085  # height of a line of text as a share of the axis
CLOSE = 0.34  # share of the axis under which two labels over it would touch


@dataclass(frozen=True)
class Curve:
    """The dual of one margin along λ: values on a common grid, minimiser, name; ``chosen`` is the user's margin."""

    value_G: npt.NDArray[np.float64]
    lam_min: float
    text: str
    chosen: bool


@dataclass(frozen=True)
class Estimated:
    """One λ̂ of the stability figure: its value and its interval's half-width, NaN where it does not exist."""

    text: str
    value: float
    half: float
    used: bool
    open_marker: bool


def dual_svg(
    lam_G: npt.NDArray[np.float64],
    curves: Sequence[Curve],
    lam: tuple[float, float, float],
    text: str,
    *,
    label: str,
    prefix: str,
) -> str:
    """Draw the dual along one multiplier for the chosen margin and its neighbours.

    Args:
        lam_G: values of λ.
        curves: one per margin, in increasing order; exactly one is chosen.
        lam: λ̂ and its 95% interval; NaN bounds where it has none.
        text: label above λ̂.
        label: text that a screen reader reads in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(HEIGHT_IN) as (figure, ax):
        if np.isfinite(lam[1:]).all():
            low, high = np.clip(lam[1:], lam_G[0], lam_G[-1])  # what lies beyond would widen the page, unseen
            ax.axvspan(low, high, color=MARGIN, alpha=0.18, linewidth=0)
        ax.axvline(lam[0], color=MARGIN, linewidth=1.4, linestyle=DASHED)
        places = _label_places([curve.value_G for curve in curves])
        for curve, place in sorted(zip(curves, places, strict=True), key=lambda pair: pair[0].chosen):
            colour, width = (INK, 2.0) if curve.chosen else (MUTED, 0.9)
            ax.plot(lam_G, curve.value_G, color=colour, linewidth=width)
            least = float(np.interp(curve.lam_min, lam_G, curve.value_G))
            edge, face, size = (MARGIN, MARGIN, 8) if curve.chosen else (MUTED, "none", 5)
            ax.plot([curve.lam_min], [least], "o", color=edge, markerfacecolor=face, markersize=size)
            ax.annotate(curve.text, (lam_G[-1], place), xytext=(5, 0), textcoords="offset points",
                        annotation_clip=False, ha="left", va="center", color=colour)  # fmt: skip
        ax.set_xlim(lam_G[0], lam_G[-1])
        ax.margins(y=0.08)
        few_ticks(ax)
        name_axis(ax.xaxis, "λ")
        name_axis(ax.yaxis, "dual value D(λ)")
        label_above(ax, lam[0], text, MARGIN)
        return svg_text(figure, label, prefix)


def ess_svg(
    edges: Sequence[float], count: Sequence[int], median: float, mark: float, *, label: str, prefix: str
) -> str:
    """Draw the distribution of the prompts' effective sample sizes, their median, and from which the bias is small."""
    from matplotlib.ticker import FixedLocator, NullLocator

    with panel(HEIGHT_IN) as (figure, ax):
        share = np.asarray(count, dtype=float) / max(sum(count), 1)
        ax.stairs(share, edges, fill=True, color=REFERENCE, alpha=0.25)
        ax.stairs(share, edges, color=REFERENCE, linewidth=1.5)
        ax.set_xscale("log")
        ax.set_xlim(edges[0], edges[-1])
        ax.set_ylim(0.0, float(share.max(initial=0.0)) * 1.08 or 1.0)
        few_ticks(ax, x=False)
        ticks = [tick * 10**power for power in range(6) for tick in (1, 2, 5) if tick * 10**power <= edges[-1]]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.axvline(mark, color=MARGIN, linewidth=1.6, linestyle=DASHED)
        ax.axvline(median, color=INK, linewidth=1.4)
        _two_labels(ax, (median, f"median {median:.3g}", INK), (mark, f"small bias from {mark:g}", MARGIN))
        ax.set_xlabel("effective responses of a prompt")
        ax.set_ylabel("share of prompts")
        return svg_text(figure, label, prefix)


def largest_weight_svg(weight_Q: Sequence[float], even: float, *, label: str, prefix: str) -> str:
    """Draw equally spaced quantiles of the prompts' largest weights, beside an even weight."""
    from matplotlib.ticker import PercentFormatter

    with panel(HEIGHT_IN) as (figure, ax):
        share = np.linspace(0.0, 1.0, len(weight_Q))
        ax.fill_between(share, weight_Q, color=REFERENCE, alpha=0.25, linewidth=0)
        ax.plot(share, weight_Q, color=REFERENCE, linewidth=1.8)
        ax.axhline(even, color=MARGIN, linewidth=1.4, linestyle=DASHED)
        above = "bottom" if even < 0.85 else "top"
        ax.annotate(f"even weights {even:.2g}", (1.0, even), xytext=(-4, 3 if above == "bottom" else -3),
                    textcoords="offset points", ha="right", va=above, color=MARGIN)  # fmt: skip
        ax.set_xlim(0.0, 1.0)
        ax.set_ylim(0.0, 1.03)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel("prompts, sorted")
        ax.set_ylabel("largest weight")
        return svg_text(figure, label, prefix)


def stability_svg(rows: Sequence[Estimated], *, label: str, prefix: str) -> str:
    """Draw λ̂ from parts of the responses, from all of them, and by the other estimators, from top to bottom."""
    with panel(0.95 + ROW_HEIGHT_IN * len(rows)) as (figure, ax):
        places = list(range(len(rows) - 1, -1, -1))
        for y, row in zip(places, rows, strict=True):
            colour = POLICY if row.used else REFERENCE
            if row.used:
                ax.axvline(row.value, color=POLICY, linewidth=1.0, linestyle=DASHED)
            ax.plot([row.value - row.half, row.value + row.half], [y, y], color=colour, linewidth=2.0, marker="|",
                    markersize=8, markeredgewidth=1.5)  # fmt: skip
            face = "none" if row.open_marker else colour
            ax.plot([row.value], [y], "o", color=colour, markersize=7.5, markerfacecolor=face, markeredgewidth=1.6)
        ax.set_yticks(places, [row.text for row in rows])
        ax.set_ylim(-0.6, len(rows) - 0.4)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.08)
        few_ticks(ax, y=False)
        name_axis(ax.xaxis, "λ̂")
        return svg_text(figure, label, prefix)


def frontier_svg(
    margin_G: npt.NDArray[np.float64],
    band_3G: npt.NDArray[np.float64],
    supported_G: npt.NDArray[np.bool_],
    target: tuple[float, str],
    attainable: tuple[float, str],
    quantity: str,
    *,
    label: str,
    prefix: str,
) -> str:
    """Draw one quantity against the margin.

    Args:
        margin_G: margins, increasing.
        band_3G: the quantity, its lower and its upper bound; NaN where the margin cannot be met.
        supported_G: whether enough responses carry the weight; the line is solid there and dashed elsewhere.
        target: the chosen margin, and its text.
        attainable: the most attainable margin, and its text.
        quantity: name of the y axis.
        label: text that a screen reader reads in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    value_G, low_G, high_G = band_3G
    with panel(HEIGHT_IN) as (figure, ax):
        ax.fill_between(margin_G, low_G, high_G, color=REFERENCE, alpha=0.2, linewidth=0)
        ax.plot(margin_G, value_G, color=REFERENCE, linewidth=1.4, linestyle=DASHED)
        ax.plot(margin_G, np.where(supported_G, value_G, np.nan), color=REFERENCE, linewidth=2.2)
        low, high = min(margin_G[0], target[0]), max(attainable[0], target[0])
        reach = 0.03 * (high - low or 1.0)
        ax.set_xlim(low - reach, high + reach)
        ax.axvline(attainable[0], color=MUTED, linewidth=1.4, linestyle=DOTTED)
        ax.axvline(target[0], color=MARGIN, linewidth=1.4, linestyle=DASHED)
        at = np.flatnonzero(margin_G == target[0])
        if at.size and np.isfinite(value_G[at[0]]):
            ax.plot([target[0]], [value_G[at[0]]], "o", color=MARGIN, markersize=8)
        ax.margins(y=0.08)
        few_ticks(ax)
        name_axis(ax.xaxis, "margin")
        name_axis(ax.yaxis, quantity)
        _two_labels(ax, (target[0], f"asked {target[1]}", MARGIN), (attainable[0], f"at most {attainable[1]}", MUTED))
        return svg_text(figure, label, prefix)


def _label_places(values: Sequence[npt.NDArray[np.float64]]) -> list[float]:
    """Return the height of each curve's name: that of its end, or moved apart where two names would touch.

    The curves come in increasing order of their margin, so their ends fall.
    """
    ends = np.array([value_G[-1] for value_G in values])
    reach = max(float(value_G.max()) for value_G in values) - min(float(value_G.min()) for value_G in values)
    places = ends.copy()
    for index in range(1, places.size):
        places[index] = min(places[index], places[index - 1] - LINE * reach)
    moved: list[float] = (places + (ends - places).mean()).tolist()
    return moved


def _two_labels(ax: Any, first: tuple[float, str, str], second: tuple[float, str, str]) -> None:
    """Write two labels over the axes, one above the other where they would touch."""
    ax.autoscale_view()  # limits are set lazily, and the transforms below read them
    low, high = ax.transAxes.inverted().transform(ax.transData.transform([(first[0], 0.0), (second[0], 0.0)]))[:, 0]
    label_above(ax, *second)
    label_above(ax, *first, level=int(abs(high - low) < CLOSE))
