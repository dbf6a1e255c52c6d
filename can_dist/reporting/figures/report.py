"""The report's figures, each a small SVG inline in HTML.

A panel is drawn about as wide as a phone, so that its text stays readable there; a page sets several side by side.
Colours leave this file as CSS variables (``var(--ink)``), so one drawing serves the light and the dark page. The
reference and the policy, and the predicted and the realised value, also differ in line style, hatching and marker, so
a figure still reads in grey. No name that a user chose is drawn: names stand in the HTML around the figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from can_dist.reporting.figures.style import (
    DASHED,
    DOTTED,
    HEIGHT_IN,
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

LN_2 = math.log(2.0)
FOREST_HEIGHT_IN = 1.75
MANY_STEPS = 40


def forest_svg(
    predicted: tuple[float, float, float] | None,
    realised: tuple[float, float, float],
    texts: tuple[str, str],
    *,
    margin: tuple[float, str] | None,
    label: str,
    prefix: str,
) -> str:
    """Draw one quantity, predicted and realised, beside zero and the margin.

    Args:
        predicted: mean and interval (mean, low, high); None without a prediction.
        realised: the same of the trained policy.
        texts: the two means as text.
        margin: its value, and its text; None for a quantity without one.
        label: text that a screen reader reads in place of the figure.
        prefix: makes the ids of this figure unlike those of the others on the page.
    """
    with panel(FOREST_HEIGHT_IN if predicted else FOREST_HEIGHT_IN - 0.4) as (figure, ax):
        ax.axvline(0.0, color=MUTED, linewidth=0.8)
        if margin is not None:
            ax.axvline(margin[0], color=MARGIN, linewidth=1.6, linestyle=DASHED)
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
    """Draw a score's distribution under reference and policy; also return how many values lie beyond the axis."""
    before, after = _finite(reference), _finite(policy)
    edges = _bin_edges(np.concatenate([before, after]))
    outside = sum(int(np.sum((values < edges[0]) | (values > edges[-1]))) for values in (before, after))
    with panel(HEIGHT_IN) as (figure, ax):
        for values, name, colour, line, hatch in (
            (before, "reference", REFERENCE, DASHED, "////"),
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
        for values, colour, line, marker in ((before, REFERENCE, DASHED, "D"), (after, POLICY, "solid", "o")):
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
    """Draw the training loss, the evaluation loss where there is one, and ln 2, the start of a pairwise loss."""
    x, y = _finite_pairs(loss)
    with panel(HEIGHT_IN) as (figure, ax):
        if x.size > MANY_STEPS:
            ax.plot(x, y, color=REFERENCE, linewidth=0.8, alpha=0.45)
            ax.plot(x, _running_mean(y, x.size // 20), color=REFERENCE, linewidth=2.0, label="training")
        else:
            ax.plot(x, y, color=REFERENCE, linewidth=1.8, label="training")
        eval_x, eval_y = _finite_pairs(eval_loss)
        if eval_x.size:
            ax.plot(eval_x, eval_y, color=POLICY, linewidth=1.6, linestyle=DASHED, marker="o", label="evaluation")
        ax.axhline(LN_2, color=MARGIN, linewidth=1.3, linestyle=DOTTED, label="ln 2")
        few_ticks(ax, whole=True)
        ax.set_xlabel("optimiser step")
        name_axis(ax.yaxis, "loss")
        _legend_above(ax)
        return svg_text(figure, label, prefix)


def _legend_above(ax: Any) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), ncols=3, borderaxespad=0.0, columnspacing=1.4)


def _finite(values: Sequence[float]) -> np.ndarray:
    """Return the finite values; a JSON null counts as missing."""
    array = np.asarray(values, dtype=float)
    finite: np.ndarray = array[np.isfinite(array)]
    return finite


def _finite_pairs(pairs: Any) -> tuple[np.ndarray, np.ndarray]:
    table = np.asarray(pairs, dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).all(axis=1)]
    return table[:, 0], table[:, 1]


def _bin_edges(values: np.ndarray) -> np.ndarray:
    """Return equal bins over the values, at most five quartile ranges beyond the middle half."""
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
    """Return the mean over a window centred on each value, cut at the ends."""
    kernel = np.ones(2 * (max(width, 2) // 2) + 1)
    total = np.convolve(values, kernel, mode="same")
    return np.asarray(total / np.convolve(np.ones_like(values), kernel, mode="same"))
