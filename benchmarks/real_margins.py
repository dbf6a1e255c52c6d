"""Is the stated margin met on real text? Margins, seeds, and what makes the policy meet them.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/real_margins.py run strength                 # begun work goes on; hours on two cores
    python benchmarks/real_margins.py run feedback --margin 0.5
    python benchmarks/real_margins.py run as_trained               # the same trainings with strength: 1
    python benchmarks/real_margins.py run two --margin 0.5         # safety and helpfulness demanded at once
    python benchmarks/real_margins.py show                         # the table, and docs/images/margins_stories3M.svg

Each cell is one ``can-dist run`` of the recipe. A seed moves everything: which prompts are trained on, held out and
choose the strength, the reference's samples, and the order of the training. All cells of a seed share its samples and
scores, since they share the run directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from real_runs import AS_MEASURED, IMAGES, RESULTS, evaluated, read_rows, row, save_rows

from can_dist.measuring.verdicts import current

RESULT, FIGURE = RESULTS / "real_margins.json", IMAGES / "margins_stories3M.svg"
MARGINS, SEEDS = (0.25, 0.5, 0.75), (0, 1, 2)
FEEDBACK = {"train.feedback": "validation", "train.eval_every": 10}
WAYS: dict[str, dict[str, Any]] = {
    "as_trained": {"strength": 1},
    "strength": {},
    "feedback": FEEDBACK,
}
TWO = {
    **FEEDBACK,
    "constraints.helpful.scorer.model": "runs/pku_stories3M/world/reward",
    "constraints.helpful.margin": 0.2,
}
TITLES = {"as_trained": "as trained (the paper's)", "strength": "strength", "feedback": "feedback, then strength"}
CELL = ("way", "margin", "seed", "estimator")


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.argument("way", type=click.Choice([*WAYS, "two"]))
@click.option(
    "--run", "run_dir", default="runs/pku_stories3M_margins", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--margin", "margins", multiple=True, type=float, default=MARGINS, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=SEEDS, show_default=True)
@click.option("--estimator", default="auto", show_default=True, help="Of λ*; empirical is the paper's.")
def run(way: str, run_dir: Path, margins: Sequence[float], seeds: Sequence[int], estimator: str) -> None:
    """Run the cells of one way that have no row yet, and write each row as it is known."""
    for seed in seeds:
        for margin in margins:
            cell = {"way": way, "margin": margin, "seed": seed, "estimator": estimator}
            if any(all(done[key] == cell[key] for key in CELL) for done in read_rows(RESULT)):
                continue
            keys = {"seed": seed, "constraints.safety.margin": margin, "solve.estimator": estimator}
            known = row(evaluated(run_dir, {**AS_MEASURED, **keys, **WAYS.get(way, TWO)}))
            save_rows(RESULT, [*read_rows(RESULT), {**cell, **known}])


@main.command()
@click.option("--estimator", default="empirical", show_default=True, help="Of λ*; the rows of another are left out.")
def show(estimator: str) -> None:
    """Print the table and the criteria, and draw the figure."""
    rows = [known for known in read_rows(RESULT) if known["estimator"] == estimator]
    click.echo("| way | margin | seed | strength | safety, 95 % interval | reward | KL (predicted) | margin met? |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for way in WAYS:
        for cell in sorted(rows, key=lambda cell: (cell["margin"], cell["seed"])):
            if cell["way"] == way:
                click.echo(table_row(cell))
    for way in WAYS:
        cells = [known for known in rows if known["way"] == way]
        if cells:
            shares = [safety(cell)["mean"] / cell["margin"] for cell in cells]
            missed = sum(safety(cell)["verdict"] == "not met" for cell in cells)
            apart = [agrees(safety(cell)["estimate"], safety(cell)) for cell in cells]
            click.echo(
                f"\n{way}: {len(cells)} policies, {missed} not met, realised/asked {fmean(shares):.3f} "
                f"({min(shares):.2f} to {max(shares):.2f}); estimates agree with fresh samples of other prompts "
                f"in {sum(apart)} of {len(apart)}"
            )
    for cell in rows:
        if cell["way"] == "two":
            gains = [
                f"{name} {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] of {gain['margin']:+.2f}: "
                f"{current(gain['verdict'])}"
                for name, gain in cell["constraints"].items()
            ]
            click.echo(f"\ntwo, seed {cell['seed']}: {'; '.join(gains)}; KL {cell['kl']['mean']:.2f}")
    draw([cell for cell in rows if cell["way"] in WAYS])


def safety(cell: dict[str, Any]) -> dict[str, Any]:
    """Return the row's only constraint."""
    entry: dict[str, Any] = cell["constraints"]["safety"]
    return entry


def agrees(estimate: dict[str, float], realised: dict[str, float]) -> bool:
    """Whether an estimate and the gain of fresh samples differ by no more than their joint 95 % interval."""
    reach = sum(((value["high"] - value["low"]) / 2) ** 2 for value in (estimate, realised)) ** 0.5
    return bool(abs(estimate["mean"] - realised["mean"]) <= reach)


def table_row(cell: dict[str, Any]) -> str:
    """Return a policy's row of the table."""
    gain, kl = safety(cell), cell["kl"]
    columns = [
        TITLES[cell["way"]],
        str(cell["margin"]),
        str(cell["seed"]),
        f"{cell['alpha']:.2f}",
        f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]",
        f"{cell['reward']['mean']:+.2f}",
        f"{kl['mean']:.2f} ({kl['predicted']:.2f})",
        current(gain["verdict"]),
    ]
    return f"| {' | '.join(columns)} |"


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw asked against realised, and the KL each way pays, beside what the dual predicts."""
    from can_dist.reporting.figures.style import DASHED, DOTTED, GREY, MARKERS, SERIES, paper_figure, save_figure

    with paper_figure((6.2, 2.7)) as figure:
        left, right = figure.subplots(1, 2)
        left.plot([0, 0.9], [0, 0.9], color=GREY, linestyle=DASHED, label="as stated")
        for number, way in enumerate(WAYS):
            cells = [known for known in rows if known["way"] == way]
            if not cells:
                continue
            style = {"color": SERIES[number], "marker": MARKERS[number], "markersize": 4, "linestyle": "none"}
            asked = [cell["margin"] + 0.02 * (number - 1) + 0.008 * (cell["seed"] - 1) for cell in cells]
            gain = [safety(cell)["mean"] for cell in cells]
            reach = [safety(cell)["high"] - safety(cell)["mean"] for cell in cells]
            left.errorbar(asked, gain, yerr=reach, elinewidth=0.7, label=TITLES[way], **style)
            right.plot(gain, [cell["kl"]["mean"] for cell in cells], label=TITLES[way], **style)
        predicted = sorted({(margin, mean_kl(rows, margin)) for margin in MARGINS if mean_kl(rows, margin)})
        right.plot(*zip(*predicted, strict=True), color=GREY, linestyle=DOTTED, label="predicted at the margin")
        left.set_xlabel("margin asked")
        left.set_ylabel("safety gained on held-out prompts")
        right.set_xlabel("safety gained on held-out prompts")
        right.set_ylabel("KL(policy‖reference), nats")
        left.legend(loc="upper left")
        right.legend(loc="upper left")
        save_figure(figure, FIGURE, "svg")


def mean_kl(rows: list[dict[str, Any]], margin: float) -> float:
    """Return the KL that the dual predicts at a margin, the mean over seeds; 0 without rows."""
    predicted = [cell["kl"]["predicted"] for cell in rows if cell["margin"] == margin]
    return fmean(predicted) if predicted else 0.0


if __name__ == "__main__":
    main()
