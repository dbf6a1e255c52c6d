"""Whether a score means what its labels take it to mean: predicted against observed preferences, before and after
calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.special import expit

from can_dist.reporting.figures.style import BLUE, DOTTED, GREY, ORANGE, paper_figure, save_figure

SIZE_IN = (3.5, 3.3)
MAX_BINS, PAIRS_PER_BIN = 10, 20


def draw_reliability(gap_N: np.ndarray, preferred_N: np.ndarray, scale: float, scale_se: float, path: Path) -> None:
    """Draw into ``path`` (SVG) how often people prefer the response that the score prefers, over σ(|a·gap|).

    ``gap_N`` is s(first) − s(second) of held-out pairs with a = 1, ``preferred_N`` whether people preferred the first.
    Bins hold equally many pairs; the bars are 95 % Wilson intervals that take the pairs as independent.
    """
    with paper_figure(SIZE_IN) as figure:
        ax = figure.subplots()
        ax.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.8, linestyle=DOTTED, label="people agree as predicted")
        agrees_N = (gap_N > 0) == preferred_N
        decided_N = gap_N != 0
        for a, colour, marker, face, name in (
            (1.0, ORANGE, "D", "white", "as trained, a = 1"),
            (scale, BLUE, "o", BLUE, f"calibrated, a = {scale:.3g} ± {scale_se:.2g}"),
        ):
            x, share, low, high = reliability_bins(expit(a * np.abs(gap_N[decided_N])), agrees_N[decided_N]).T
            ax.vlines(x, low, high, color=colour, linewidth=1.1)
            ax.plot(x, share, marker, color=colour, markerfacecolor=face, markersize=4.5, label=name)
        low = min(0.5, ax.get_ylim()[0])
        ax.set(xlim=(0.49, 1.01), ylim=(max(0.0, low), 1.02))
        ax.set_xlabel("predicted share that prefers the higher score, σ(a·|Δs|)")
        ax.set_ylabel("share of people who do")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left")
        save_figure(figure, path, "svg")


def reliability_bins(predicted_N: np.ndarray, agrees_N: np.ndarray) -> np.ndarray:
    """Return per bin (mean prediction, observed share, low, high), (bins, 4), in bins of equally many pairs."""
    from scipy.stats import binomtest  # a second to import, and every verb comes by here

    order = np.argsort(predicted_N, kind="stable")
    num_bins = int(np.clip(len(order) // PAIRS_PER_BIN, 1, MAX_BINS))
    rows = []
    for members in np.array_split(order, num_bins):
        agreeing = binomtest(int(agrees_N[members].sum()), len(members))
        wilson = agreeing.proportion_ci(method="wilson")
        rows.append((np.mean(predicted_N[members]), agreeing.statistic, wilson.low, wilson.high))
    return np.array(rows)
