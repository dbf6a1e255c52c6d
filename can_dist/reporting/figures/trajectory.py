"""λ and the measured slack round by round, as a figure for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.reporting.figures.comparison import LINES
from can_dist.reporting.figures.frontier import STYLE

SIZE_IN = (6.4, 2.6)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito
MARKERS = "osD^vP"
REACH = 1.96
"""Standard errors of a 95 % interval."""


def look_of(index: int) -> dict[str, Any]:
    """Return the colour, marker and line of a constraint; the first 24 differ in marker or line, also in grey."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(MARKERS) % len(LINES)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def draw_trajectory(rounds: Sequence[Mapping[str, Any]], path: Path, kind: str = "svg") -> None:
    """Draw λ (left) and the slack with its 95 % interval (right) of every round and constraint into ``path``.

    ``rounds`` are those of ``trajectory.json``: ``lam`` by constraint, and ``constraints`` with ``slack`` and ``se``.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = range(1, len(rounds) + 1)
    with matplotlib.rc_context(STYLE):
        figure = Figure(SIZE_IN, layout="constrained")
        left, right = figure.subplots(1, 2)
        for index, name in enumerate(rounds[0]["lam"]):
            look = look_of(index)
            left.plot(numbers, [one["lam"][name] for one in rounds], label=name, **look)
            measured = [one["constraints"][name] for one in rounds]
            reach = [REACH * one["se"] for one in measured]
            right.errorbar(numbers, [one["slack"] for one in measured], yerr=reach, capsize=2.5, **look)
        right.axhline(0, color="#555555", linewidth=0.9, linestyle=(0, (1, 1.2)))
        left.set_ylabel("λ (reward units per score unit)")
        right.set_ylabel("measured slack (score units)")
        right.set_title("95 % interval over prompts; 0: exactly met", loc="left")
        left.legend()
        for ax in (left, right):
            ax.set_xlabel("policy, in the order trained")
            ax.set_xlim(0.6, len(rounds) + 0.4)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        # no date: the same rounds give the same bytes
        figure.savefig(path, format=kind, dpi=200, metadata={"Date": None} if kind == "svg" else {})
