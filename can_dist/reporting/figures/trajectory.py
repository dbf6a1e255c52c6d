"""λ and the measured slack round by round, as a figure for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.reporting.figures.style import DOTTED, GREY, LINES, MARKERS, SERIES, paper_figure, save_figure

SIZE_IN = (6.4, 2.6)
REACH = 1.96  # standard errors of a 95 % interval


def look_of(index: int) -> dict[str, Any]:
    """Return the colour, marker and line of a constraint; the first 24 differ in marker or line, also in grey."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(SERIES)],
        "linestyle": LINES[index // len(SERIES) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def draw_trajectory(rounds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw into ``path`` (SVG) λ (left) and the slack with its 95 % interval (right) of every round and constraint.

    ``rounds`` are those of ``trajectory.json``: ``lam`` by constraint, and ``constraints`` with ``slack`` and ``se``.
    """
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(rounds) + 1)
    with paper_figure(SIZE_IN) as figure:
        left, right = figure.subplots(1, 2)
        for index, name in enumerate(rounds[0]["lam"]):
            look = look_of(index)
            left.plot(numbers, [entry["lam"][name] for entry in rounds], label=name, **look)
            measured = [entry["constraints"][name] for entry in rounds]
            reach = [REACH * slack["se"] for slack in measured]
            right.errorbar(numbers, [slack["slack"] for slack in measured], yerr=reach, capsize=2.5, **look)
        right.axhline(0, color=GREY, linewidth=0.9, linestyle=DOTTED)
        left.set_ylabel("λ (reward units per score unit)")
        right.set_ylabel("measured slack (score units)")
        right.set_title("95 % interval over prompts; 0: exactly met", loc="left")
        left.legend()
        for ax in (left, right):
            ax.set_xlabel("policy, in the order trained")
            ax.set_xlim(0.6, len(rounds) + 0.4)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, path, "svg")
