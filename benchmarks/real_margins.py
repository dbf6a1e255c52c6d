"""Is the stated margin met on real text? Margins, seeds, and what makes the policy meet them.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/real_margins.py run strength                 # begun work goes on; hours on two cores
    python benchmarks/real_margins.py run feedback --margin 0.5
    python benchmarks/real_margins.py run as_trained               # the same trainings with strength: 1
    python benchmarks/real_margins.py run two --margin 0.5         # safety and helpfulness demanded at once
    python benchmarks/real_margins.py agree                        # estimates on the prompts of the fresh samples
    python benchmarks/real_margins.py show                         # the table, and docs/images/margins_stories3M.svg

Each cell is one ``can-dist run`` of the recipe. A seed moves everything: which prompts are trained on, held out and
choose the strength, the reference's samples, and the order of the training. All cells of a seed share its samples and
scores, since they share the run directory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from machine import machine
from real_runs import IMAGES, RECIPE, RESULTS, evaluated, read_rows, row, span

from can_dist import load_config
from can_dist.config import Model
from can_dist.dual import ScoreTable, estimate_policy
from can_dist.measuring.verdicts import current
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import LogProb, Response
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.scores import score_arrays
from can_dist.training import POLICY

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
CELL = ("way", "margin", "seed")


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
def run(way: str, run_dir: Path, margins: Sequence[float], seeds: Sequence[int]) -> None:
    """Run the cells of one way that have no row yet, and write each row as it is known."""
    for seed in seeds:
        for margin in margins:
            cell = {"way": way, "margin": margin, "seed": seed}
            if any(all(done[key] == cell[key] for key in CELL) for done in read_rows(RESULT)):
                continue
            settings = {"seed": seed, "constraints.safety.margin": margin, **WAYS.get(way, TWO)}
            known = row(evaluated(run_dir, settings))
            save([*read_rows(RESULT), {**cell, **known}])


def save(rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON, with the machine and the date."""
    record = {"what": "recipes/pku_stories3M/mocan.yaml", "machine": machine(), "rows": rows}
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@main.command()
@click.option(
    "--run", "run_dir", default="runs/pku_stories3M_margins", show_default=True, type=click.Path(path_type=Path)
)
def agree(run_dir: Path) -> None:
    """Estimate every policy from the reference's responses to the very prompts that its fresh samples answered."""
    reference_logp: dict[str, np.ndarray] = {}
    for number, known in enumerate(read_rows(RESULT)):
        if "on_test" not in known:
            known["on_test"] = estimate_on_test(load_artifact(run_dir / known["evaluation"]), reference_logp)
            rows = read_rows(RESULT)
            save([*rows[:number], known, *rows[number + 1 :]])
            click.echo(f"{[known[key] for key in CELL]}: {known['on_test']}")


def estimate_on_test(evaluation: Artifact, reference_logp: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Return the estimated gain of safety and KL of an evaluated policy, from its held-out prompts.

    ``reference_logp`` keeps ln π_ref of the reference's responses to them, by table.
    """
    scores = evaluation.input("scores_before")
    rows = scores.input("responses").table.to_pylist()
    assert [row["response_id"] for row in rows] == scores.table.column("response_id").to_pylist()
    responses = [Response(row["response_id"], row["messages"], row["text"], row["token_ids"]) for row in rows]
    if scores.path.name not in reference_logp:
        reference_logp[scores.path.name] = log_prob(load_config(RECIPE).reference.model, responses)
    policy_logp = log_prob(str(evaluation.input("policy").path / POLICY), responses)
    arrays = score_arrays(scores.table, "reward", ["safety"], str(scores.path))
    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=["safety"])
    lam = {"safety": evaluation.read_json("report.json")["constraints"][0]["lam"]}
    estimate = estimate_policy(table, reference_logp[scores.path.name], policy_logp, lam=lam, beta=1.0)
    return {"safety": span(vars(estimate.improvement["safety"])), "kl": span(vars(estimate.kl))}


def log_prob(model: str, responses: Sequence[Response]) -> np.ndarray:
    """Return ln π of the responses under a model directory, nats."""
    return load_scorer(LogProb(model=Model(model=model)), "fp32").score(responses)


@main.command()
def show() -> None:
    """Print the table and the criteria, and draw the figure."""
    rows = read_rows(RESULT)
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
            same = [agrees(cell["on_test"]["safety"], safety(cell)) for cell in cells if "on_test" in cell]
            click.echo(
                f"\n{way}: {len(cells)} policies, {missed} not met, realised/asked {fmean(shares):.3f} "
                f"({min(shares):.2f} to {max(shares):.2f}); estimates agree with fresh samples of other prompts "
                f"in {sum(apart)} of {len(apart)}, of the same in {sum(same)} of {len(same)}"
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
