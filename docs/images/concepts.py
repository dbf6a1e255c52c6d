"""Draw the pictures of docs/concepts.md: ``python docs/images/concepts.py``. The same bytes every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from can_dist.dual import Margin, ScoreTable, predict, solve_table
from can_dist.reporting.figures.style import BLUE, DASHED, DOTTED, GREY, ORANGE, paper_figure, save_figure

HERE = Path(__file__).parent
BETA, MARGIN = 1.0, 0.5


def scores() -> ScoreTable:
    """200 prompts of 16 responses whose helpfulness falls where their safety rises."""
    random = np.random.default_rng(0)
    safety = random.normal(size=(200, 16))
    reward = -0.6 * safety + random.normal(size=safety.shape)
    return ScoreTable.build(reward.ravel(), safety.ravel(), np.repeat(np.arange(200), 16), names=["safety"])


def draw_dual(table: ScoreTable, path: Path) -> None:
    """The dual function and its slope, λ* where both say so."""
    best = solve_table(table, beta=BETA, constraints=[Margin("safety", margin=MARGIN)])
    lam = best.lam["safety"]
    grid = np.linspace(0, 2.2, 60)
    found = [predict(table, [x], BETA, [MARGIN]) for x in grid]
    value = [p.objective + x * float(p.slack_J[0]) for p, x in zip(found, grid, strict=True)]
    with paper_figure((5.4, 2.5)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot(grid, value, color=BLUE)
        left.set_ylabel("D(λ), reward units")
        right.plot(grid, [float(p.improvement_J[0]) for p in found], color=BLUE, label="predicted improvement")
        right.axhline(MARGIN, color=ORANGE, linestyle=DASHED, label=f"margin {MARGIN}")
        right.set_ylabel("improvement of safety")
        right.legend(loc="lower right")
        for ax in (left, right):
            ax.axvline(lam, color=GREY, linestyle=DOTTED)
            ax.set_xlabel("λ, price of safety")
            ax.annotate(f"λ* = {lam:.2f}", (lam, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -2),
                        textcoords="offset points", va="top")  # fmt: skip
        save_figure(figure, path, "svg")


def draw_tilt(path: Path) -> None:
    """One prompt's eight responses: how λ moves weight from the helpful and unsafe to the safe."""
    reward = np.array([1.6, 1.2, 0.9, 0.5, 0.2, 0.0, -0.4, -0.8])
    safety = np.array([-1.4, 0.3, -0.9, 0.8, -0.2, 1.1, 0.4, 1.3])
    place = np.arange(8)
    with paper_figure((5.4, 2.5)) as figure:
        ax = figure.subplots()
        looks = ((0.0, BLUE, ""), (1.0, ORANGE, "///"))
        for index, (lam, colour, hatch) in enumerate(looks):
            weight = np.exp((reward + lam * safety) / BETA)
            weight /= weight.sum()
            label = f"λ = {lam:g}: mean safety {weight @ safety:+.2f}, mean reward {weight @ reward:+.2f}"
            ax.bar(place + 0.4 * index - 0.2, weight, 0.38, color=colour, hatch=hatch, edgecolor="white", label=label)
        ax.axhline(1 / 8, color=GREY, linestyle=DOTTED, label="the reference, 1/K each")
        labels = [f"r {r:+.1f}\ng {g:+.1f}" for r, g in zip(reward, safety, strict=True)]
        ax.set_xticks(place, labels)
        ax.set_ylabel("weight of the response")
        ax.legend(loc="upper right")
        save_figure(figure, path, "svg")


if __name__ == "__main__":
    draw_dual(scores(), HERE / "dual.svg")
    draw_tilt(HERE / "tilt.svg")
