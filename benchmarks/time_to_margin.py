"""From scored responses to a policy that meets the margin: training tokens and CPU seconds, and the KL it pays.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/time_to_margin.py run            # begun work goes on; an hour on two idle cores
    python benchmarks/time_to_margin.py show

All on one table of scored responses of the reference, with one margin, in one run directory, by the product's own
commands. Counted: trainings, their own measurements (C-DPO, CAID and the online loop sample their policies and score
them), estimates, the choice of the strength, and the start of Ray; not the evaluation on held-out prompts that judges
them. CPU seconds also leave out what all need (sampling and scoring the reference on training and validation prompts,
and the first labels); generated and scored tokens and the wall seconds of the log hold it, the same for every way.
C-DPO goes on until its own measurement is within a standard error of the margin; row n of CAID and of the online loop
(primal–dual) is what it has spent after n rounds, and the held-out evaluation ends it, which costs it nothing. λ is
shown with its range over the second half of the rounds. ``--learning-rate`` and ``--step-size`` sweep that loop, each
with rows of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from real_runs import AS_MEASURED, RESULTS, command, evaluated, read_rows, row, save_rows
from tree_cpu import metered

from can_dist.measuring.verdicts import current
from can_dist.stages.cost import cost_of, trajectories
from can_dist.stages.trajectory import TRAJECTORY

RESULT = RESULTS / "time_to_margin.json"
SUBJECT = "recipes/pku_stories3M/mocan.yaml, margin 0.5, seed 0"
CDPO_ROUNDS = 5
PAIRS = {"label.pairs_per_prompt": 8, "train.batch_size": 32, "train.num_epochs": 1, "train.learning_rate": 5e-5}
AS_TRAINED = {"strength": 1}
WHAT = "recipes/pku_stories3M/mocan.yaml, margin 0.5, seed 0"
FIRST, BASE = "MoCAN as trained", "MoCAN + strength"
WAYS: dict[str, dict[str, Any]] = {
    FIRST: AS_TRAINED,
    BASE: {},
    "MoCAN + feedback": {"train.feedback": "validation", "train.eval_every": 10},
    "MoCAN, one epoch, + strength": {"train.num_epochs": 1},
    "MoCAN, until flat, + strength": {"train.num_epochs": 4, "train.stop": "flat", "train.schedule": "constant"},
    "MoCAN, one epoch, + feedback": {"train.num_epochs": 1, "train.feedback": "validation", "train.eval_every": 5},
    "sampled labels, as published": {"label.labels": "sampled", **PAIRS, **AS_TRAINED},
    "soft labels, the recipe before": {"label.labels": "soft", **PAIRS, **AS_TRAINED},
    "C-DPO": {"method": "cdpo", "cdpo.rounds": CDPO_ROUNDS, **AS_TRAINED},
    "CAID": {"method": "caid", "caid.epochs": 2, **AS_TRAINED},
    "primal–dual": {"method": "primal_dual", "label": "{}", **AS_TRAINED},
}
ROUNDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "CAID": ("caid.rounds", (1, 2, 3)),
    "primal–dual": ("primal_dual.rounds", (1, 2, 4, 8, 12, 16, 20)),
}
"""Loops that go on until their gain is at the margin: the key of their rounds, and after how many they are judged."""
GO_ON = (BASE, "CAID")
"""What goes on from MoCAN's training, which is counted in."""


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.option("--run", "run_dir", default="runs/pku_stories3M_time", show_default=True, type=click.Path(path_type=Path))
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), default=list(WAYS), help="Default: all.")
@click.option("--margin", default=0.5, show_default=True)
@click.option("--learning-rate", default=None, type=float, help="Of primal–dual's epochs; default: the recipe's.")
@click.option("--step-size", default=None, help="η of primal–dual; default: 1/H.")
def run(
    run_dir: Path, ways: tuple[str, ...], margin: float, learning_rate: float | None, step_size: str | None
) -> None:
    """Run the ways that have no row yet; CAID and primal–dual go on until their gain is at the margin."""
    swept = {"train.learning_rate": learning_rate, "primal_dual.step_size": step_size}
    tried = {key: value for key, value in swept.items() if value is not None}
    for name in ways:
        own = tried if WAYS[name].get("method") == "primal_dual" else {}
        way = ", ".join([name, *(f"{key.rpartition('.')[2]} {value}" for key, value in own.items())])
        settings = {**AS_MEASURED, "constraints.safety.margin": margin, **WAYS[name], **own}
        key, numbers = ROUNDS.get(name, ("", (1,)))
        for number in numbers:
            rows = read_rows(RESULT)
            before = [known for known in rows if known["way"] == way]
            if any(known["round"] == number for known in before):
                continue
            if before and before[-1]["constraints"]["safety"]["mean"] >= margin:
                break
            if not before and name in GO_ON:
                before = [known for known in rows if known["way"] == FIRST]
            rounds = {key: number} if key else {}
            save_rows(
                RESULT,
                [*rows, {"way": way, "round": number, **spent(run_dir, {**settings, **rounds}, before)}],
                SUBJECT,
            )


def spent(run_dir: Path, settings: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a policy says, what it was made from, and the CPU seconds from the labels to it, rounds before added.

    Raises:
        CalledProcessError: A command failed.
    """
    metered(command("label", run_dir, settings))
    _, seconds = metered(command("strength", run_dir, settings))
    evaluation = evaluated(run_dir, settings)
    cost = cost_of(evaluation)
    rounds = [record.read_json(TRAJECTORY)["rounds"] for record in trajectories(evaluation)]
    earlier = before[-1]["cpu"] if before else {}
    return {
        **row(evaluation),
        "generated": cost.generated_tokens,
        "scored": cost.scored_tokens,
        "wall_s": cost.wall_s,
        "lam": [turn["lam"] for turn in rounds[-1]] if rounds else None,
        "trainings": cost.num_trainings,
        "tokens": cost.trained_tokens,
        "cpu": {kind: earlier.get(kind, 0.0) + seconds.get(kind, 0.0) for kind in {*earlier, *seconds}},
    }


@main.command()
def show() -> None:
    """Print the table; the ratios are to MoCAN with its strength."""
    rows = read_rows(RESULT)
    base = next(known for known in rows if known["way"] == BASE)
    click.echo(
        "| way | trainings | training tokens | generated, scored tokens | CPU seconds | wall seconds "
        "| λ (its range) | safety, 95 % interval | reward | KL (predicted) | margin |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|---|")
    for known in rows:
        total, kl = sum(known["cpu"].values()), known["kl"]
        predicted = "–" if kl["predicted"] is None else f"{kl['predicted']:.2f}"
        gain = known["constraints"]["safety"]
        is_loop = any(known["way"].startswith(loop) for loop in ROUNDS)
        name = f"{known['way']}, round {known['round']}" if is_loop else known["way"]
        made = f"{known['generated'] / 1e6:.2f} M, {known['scored'] / 1e6:.2f} M" if "generated" in known else "–"
        wall = f"{known['wall_s']:.0f}" if known.get("wall_s") else "–"
        tokens = f"{known['tokens'] / 1e6:.2f} M ({known['tokens'] / base['tokens']:.1f}×)"
        click.echo(
            f"| {name} | {known['trainings']} | {tokens} | {made} "
            f"| {total:.0f} ({total / sum(base['cpu'].values()):.1f}×) | {wall} | {lam_range(known)} "
            f"| {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | {known['reward']['mean']:+.2f} "
            f"| {kl['mean']:.2f} ({predicted}) "
            f"| {current(gain['verdict'])} |"
        )


def lam_range(known: dict[str, Any]) -> str:
    """Return λ of a row, and of a loop the least and the greatest of the second half of its rounds."""
    rounds = [turn["safety"] for turn in known.get("lam") or ()]
    if not rounds:
        lam = known["constraints"]["safety"]["lam"]
        return "–" if lam is None else f"{lam:.2f}"
    later = rounds[len(rounds) // 2 :]
    return f"{rounds[-1]:.2f} ({min(later):.2f} to {max(later):.2f})"


if __name__ == "__main__":
    main()
