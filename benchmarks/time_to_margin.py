"""From scored responses to a policy that meets the margin: training tokens and CPU seconds, and the KL it pays.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/time_to_margin.py run            # begun work goes on; an hour on two idle cores
    python benchmarks/time_to_margin.py show

All on one table of scored responses of the reference, with one margin, in one run directory, by the product's own
commands. Not counted: what all of them need (sampling and scoring the reference on training and validation prompts, and
the labels), and the evaluation on held-out prompts that judges them. Counted: trainings, their own measurements (C-DPO
and CAID sample their policies and score them), estimates, the choice of the strength, and the start of Ray. C-DPO goes
on until its own measurement is within a standard error of the margin; CAID's row n is what it has spent after n rounds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from machine import machine
from real_runs import RESULTS, command, evaluated, read_rows, row
from tree_cpu import metered

from can_dist.measuring.verdicts import current
from can_dist.tables.artifacts import load_artifact

RESULT = RESULTS / "time_to_margin.json"
CAID_ROUNDS, CDPO_ROUNDS = 3, 12
PAIRS = {"label.pairs_per_prompt": 8, "train.batch_size": 32, "train.num_epochs": 1, "train.learning_rate": 5e-5}
AS_TRAINED = {"strength": 1}
FIRST, BASE = "MoCAN as trained", "MoCAN + strength"
WAYS: dict[str, dict[str, Any]] = {
    FIRST: AS_TRAINED,
    BASE: {},
    "MoCAN + feedback": {"train.feedback": "validation", "train.eval_every": 10},
    "sampled labels, as published": {"label.labels": "sampled", **PAIRS, **AS_TRAINED},
    "soft labels, the recipe before": {"label.labels": "soft", **PAIRS, **AS_TRAINED},
    "C-DPO": {"method": "cdpo", "cdpo.rounds": CDPO_ROUNDS, **AS_TRAINED},
    "CAID": {"method": "caid", "caid.epochs": 2, **AS_TRAINED},
}
GO_ON = (BASE, "CAID")
"""What goes on from MoCAN's training, which is counted in."""


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.option("--run", "run_dir", default="runs/pku_stories3M_time", show_default=True, type=click.Path(path_type=Path))
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), default=list(WAYS), help="Default: all.")
@click.option("--margin", default=0.5, show_default=True)
def run(run_dir: Path, ways: tuple[str, ...], margin: float) -> None:
    """Run the ways that have no row yet; CAID goes on until its gain is at the margin."""
    for way in ways:
        settings = {"constraints.safety.margin": margin, **WAYS[way]}
        for number in range(1, CAID_ROUNDS + 1 if way == "CAID" else 2):
            rows = read_rows(RESULT)
            before = [known for known in rows if known["way"] == way]
            if any(known["round"] == number for known in before):
                continue
            if before and before[-1]["constraints"]["safety"]["mean"] >= margin:
                break
            if not before and way in GO_ON:
                before = [known for known in rows if known["way"] == FIRST]
            rounds = {"caid.rounds": number} if way == "CAID" else {}
            save([*rows, {"way": way, "round": number, **spent(run_dir, {**settings, **rounds}, before)}])


def spent(run_dir: Path, settings: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a policy says, and the tokens and CPU seconds from the scored responses to it, rounds before added.

    Raises:
        CalledProcessError: A command failed.
    """
    metered(command("label", run_dir, settings))
    old = set(run_dir.glob("train-*"))
    _, seconds = metered(command("strength", run_dir, settings))
    new = [load_artifact(path) for path in set(run_dir.glob("train-*")) - old]
    known = row(evaluated(run_dir, settings))
    last = before[-1] if before else {"trainings": 0, "tokens": 0, "cpu": {}}
    tokens = sum(training.info["summary"]["num_tokens"] for training in new)
    return {
        **known,
        "trainings": last["trainings"] + len(new),
        "tokens": last["tokens"] + tokens,
        "cpu": {kind: last["cpu"].get(kind, 0.0) + seconds.get(kind, 0.0) for kind in {*last["cpu"], *seconds}},
    }


def save(rows: list[dict[str, Any]]) -> None:
    """Write the rows as JSON, with the machine and the date."""
    record = {"what": "recipes/pku_stories3M/mocan.yaml, margin 0.5, seed 0", "machine": machine(), "rows": rows}
    RESULT.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@main.command()
def show() -> None:
    """Print the table; the ratios are to the first row."""
    rows = read_rows(RESULT)
    base = next(known for known in rows if known["way"] == BASE)
    click.echo(
        "| way | trainings | training tokens | CPU seconds of ranks and actors | all CPU seconds "
        "| safety | reward | KL | margin |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|")
    for known in rows:
        work, total = working(known), sum(known["cpu"].values())
        gain = known["constraints"]["safety"]
        name = f"CAID, round {known['round']}" if known["way"] == "CAID" else known["way"]
        tokens = f"{known['tokens'] / 1e6:.2f} M ({known['tokens'] / base['tokens']:.1f}×)"
        click.echo(
            f"| {name} | {known['trainings']} | {tokens} "
            f"| {work:.0f} ({work / working(base):.1f}×) | {total:.0f} ({total / sum(base['cpu'].values()):.1f}×) "
            f"| {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | {known['reward']['mean']:+.2f} "
            f"| {known['kl']['mean']:.2f} | {current(gain['verdict'])} |"
        )


def working(known: dict[str, Any]) -> float:
    """Return the CPU seconds of ranks and actors; the rest is the driver and Ray's daemons."""
    return float(known["cpu"].get("ranks", 0.0) + known["cpu"].get("actors", 0.0))


if __name__ == "__main__":
    main()
