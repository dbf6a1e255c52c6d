"""λ and what was measured round by round, as a figure for a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.reporting.figures.style import DOTTED, GREY, LINES, MARKERS, SERIES, paper_figure, save_figure

WIDTH_IN, ROW_IN = 6.4, 2.6
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

    Below them the reward (left) and the KL (right), where the rounds have measured their KL.

    ``rounds`` are those of ``trajectory.json``: ``lam`` by constraint, ``constraints`` with ``slack`` and ``se``, and
    where there is a ``kl`` with ``mean`` and ``se``, the ``reward`` with ``improvement`` and ``se``.
    """
    from matplotlib.ticker import MaxNLocator

    num_rows = 2 if "kl" in rounds[0] else 1
    with paper_figure((WIDTH_IN, num_rows * ROW_IN)) as figure:
        (left, right), *below = figure.subplots(num_rows, 2, squeeze=False)
        for index, name in enumerate(rounds[0]["lam"]):
            look = look_of(index)
            left.plot(range(1, len(rounds) + 1), [entry["lam"][name] for entry in rounds], label=name, **look)
            _draw_measured(right, [entry["constraints"][name] for entry in rounds], "slack", look)
        right.axhline(0, color=GREY, linewidth=0.9, linestyle=DOTTED)
        left.set_ylabel("λ (reward units per score unit)")
        right.set_ylabel("measured slack (score units)")
        right.set_title("95 % interval over prompts; 0: exactly met", loc="left")
        left.legend()
        for reward, kl in below:
            _draw_measured(reward, [entry["reward"] for entry in rounds], "improvement", look_of(0))
            reward.set_ylabel("measured reward gain")
            _draw_measured(kl, [entry["kl"] for entry in rounds], "mean", look_of(0))
            kl.set_ylabel("measured KL (nats per response)")
        for ax in figure.axes:
            ax.set_xlabel("policy, in the order trained")
            ax.set_xlim(0.6, len(rounds) + 0.4)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        save_figure(figure, path, "svg")


def _draw_measured(ax: Any, measured: Sequence[Mapping[str, float]], key: str, look: Mapping[str, Any]) -> None:
    """Draw a value of every round with its 95 % interval."""
    reach = [REACH * value["se"] for value in measured]
    ax.errorbar(range(1, len(measured) + 1), [value[key] for value in measured], yerr=reach, capsize=2.5, **look)
