"""Measure the estimators on worlds whose λ* is known, and write the tables of docs/estimators.md between its markers.

python benchmarks/estimator_table.py                  # about three minutes
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
from dual_worlds import LAWS, World

from can_dist.dual import Margin, ScoreTable, choose, solve_table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "estimators.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
NAMES = ("empirical", "jackknife", "gaussian")


@dataclass(frozen=True)
class Row:
    """One world: population λ*, each estimator's median λ̂, ``auto``'s choices, trust and errors over the tables."""

    world: World
    population: float
    ess: float
    lam: dict[str, float]
    chosen: list[str]
    trusted: list[bool]
    errors: list[float]

    @property
    def worst_trusted(self) -> float:
        """Largest relative error where ``auto`` said that λ̂ may be trusted; NaN where it never did."""
        known = [abs(error) for error, trusted in zip(self.errors, self.trusted, strict=True) if trusted]
        return max(known, default=float("nan"))


def measure(world: World, num_tables: int) -> Row:
    """Solve ``num_tables`` tables of one world with every estimator."""
    population = world.population_lam()
    lams: dict[str, list[float]] = {name: [] for name in NAMES}
    chosen, trusted, errors, ess = [], [], [], []
    for seed in range(num_tables):
        table = ScoreTable.build(*world.sample(seed))
        solution = solve_table(table, beta=world.beta, constraints=[Margin("g", world.margin)], throw=False)
        ess.append(solution.diagnostics["ess"]["median"])
        if not np.isfinite(solution.lam_vector).all():
            continue
        choice = choose(table, world.beta, np.array([world.margin]), solution.lam_vector)
        for name in NAMES:
            lams[name].append(float(choice.candidates[name].estimate.lam_J[0]))
        chosen.append(choice.chosen.estimator)
        trusted.append(choice.trustworthy)
        errors.append(float(choice.chosen.lam_J[0]) / population - 1)
    medians = {name: float(np.median(values)) if values else float("nan") for name, values in lams.items()}
    return Row(world, population, float(np.median(ess)), medians, chosen, trusted, errors)


def gaussian_table(num_tables: int) -> tuple[list[str], list[Row]]:
    """Return the lines for the Gaussian world of ALGORITHMS section 2, at every K and sd/β asked for."""
    lines = [
        "| K | sd/β | population λ* | paper's (empirical) | jackknife | gaussian | median ESS | `auto` | trusted | "
        "largest error where trusted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for count, scale in product((8, 32, 128), (0.5, 1.0, 2.0, 4.0, 10.0, 50.0)):
        row = measure(World("gaussian", scale, num_responses=count), num_tables)
        rows.append(row)
        shown = " | ".join(_number(row.lam[name]) for name in NAMES)
        lines.append(
            f"| {count} | {scale:g} | {row.population:.3f} | {shown} | {row.ess:.1f} | {_most(row.chosen)} | "
            f"{sum(row.trusted)}/{num_tables} | {_percent(row.worst_trusted)} |"
        )
    return lines, rows


def other_table(num_tables: int) -> tuple[list[str], list[Row]]:
    """Return the lines for the other laws: K = 128 shown, the smaller K counted in the last columns."""
    lines = [
        "| scores | sd/β | population λ* | paper's (empirical) | jackknife | gaussian | `auto` | trusted, K = 8, 32, "
        "128 | largest error where trusted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for law, scale in product([name for name in LAWS if name != "gaussian"], (0.5, 1.0, 2.0, 10.0)):
        measured = [measure(World(law, scale, num_responses=count), num_tables) for count in (8, 32, 128)]
        rows += measured
        last = measured[-1]
        shown = " | ".join(_number(last.lam[name]) for name in NAMES)
        trusted = ", ".join(f"{sum(row.trusted)}/{num_tables}" for row in measured)
        known = [row.worst_trusted for row in measured if row.worst_trusted == row.worst_trusted]
        worst = max(known, default=float("nan"))
        lines.append(
            f"| {law} | {scale:g} | {last.population:.3f} | {shown} | {_most(last.chosen)} | {trusted} | "
            f"{_percent(worst)} |"
        )
    return lines, rows


def _most(names: list[str]) -> str:
    return max(set(names), key=names.count) if names else "infeasible"


def _number(value: float) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "none"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if np.isfinite(value) else "–"


def main() -> None:
    """Measure, print, and replace the block between the markers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=3)
    arguments = parser.parse_args()
    gaussian_lines, gaussian_rows = gaussian_table(arguments.tables)
    other_lines, other_rows = other_table(arguments.tables)
    everything = gaussian_rows + other_rows
    num_tables = sum(len(row.trusted) for row in everything)
    num_trusted = sum(sum(row.trusted) for row in everything)
    worst = max((row.worst_trusted for row in everything if row.worst_trusted == row.worst_trusted), default=0.0)
    summary = (
        f"{num_tables} tables of 1,000 prompts; `auto` trusted {num_trusted} of them, and its largest error there was "
        f"{100 * worst:.1f} %. λ̂ is the median over {arguments.tables} tables."
    )
    block = "\n".join([summary, "", *gaussian_lines, "", *other_lines])
    print(block)
    text = DOCUMENT.read_text(encoding="utf-8")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{head}{BEGIN}\n{block}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
