"""Every margin from one run: the ray of one training, the mixtures of a basis, and a training of its own for each.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/every_margin.py run --seed 0     # begun work goes on; an hour on two cores
    python benchmarks/every_margin.py show             # the table, and docs/images/every_margin.svg
    python benchmarks/every_margin.py show --rows benchmarks/results/every_margin_32.json  # of the recipe before

One ``can-dist run`` of the recipe at margin 0.5; its policy of r + ⟨λ, g⟩ alone is the ray. Then, of every margin, the
policy that ``export policy --margin`` writes of either, and one by a run of its own with strength; all measured on
fresh responses to the same held-out prompts. The objective is E r − β KL, the policy scaled to meet its margin exactly
(gains grow as the scale, KL as its square), so that policies that overshoot can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from real_runs import IMAGES, RECIPE, RESULTS, evaluated, read_rows, row, save_rows

from can_dist import Run, load_config
from can_dist.config import with_margins
from can_dist.stages.estimate import without_strength
from can_dist.stages.mixture import inputs_of
from can_dist.stages.solve import load_solution
from can_dist.tables.artifacts import Artifact

RESULT = RESULTS / "every_margin.json"
TRAINED_FOR, MARGINS = 0.5, (0.25, 0.5, 0.75, 1.0, 1.25)
BASIS, RAY, OWN = "basis", "ray", "a training of its own"
WAYS = (BASIS, RAY, OWN)


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.option(
    "--run", "run_dir", default="runs/pku_stories3M_basis", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, show_default=True)
@click.option("--margin", "margins", multiple=True, type=float, default=MARGINS, show_default=True)
def run(run_dir: Path, seeds: Sequence[int], ways: Sequence[str], margins: Sequence[float]) -> None:
    """Measure the policies that have no row yet, and write each row as it is known."""
    for seed in seeds:
        trained = {"seed": seed, "constraints.safety.margin": TRAINED_FOR}
        for way in ways:
            for margin in margins:
                cell = {"way": way, "margin": margin, "seed": seed}
                if any(cell.items() <= done.items() for done in read_rows(RESULT)):
                    continue
                if way == OWN:
                    own = {"seed": seed, "constraints.safety.margin": margin, "basis": "false"}
                    known = row(evaluated(run_dir, own))
                else:
                    of_basis = evaluated(run_dir, trained)
                    known = at_margins(run_dir, of_basis, trained, {"safety": margin}, mixed=way == BASIS)
                save_rows(RESULT, [*read_rows(RESULT), {**cell, **known}])


def at_margins(
    run_dir: Path, evaluation: Artifact, settings: Mapping[str, Any], margins: Mapping[str, float], *, mixed: bool
) -> dict[str, Any]:
    """Return the row of the policy that a finished run with a basis gives for other margins, without a training.

    Args:
        run_dir: Of the finished run.
        evaluation: Of its own policy.
        settings: What the run overrode in the recipe.
        margins: By constraint.
        mixed: Mix the basis; otherwise its policy of r + ⟨λ, g⟩ alone.

    Raises:
        InfeasibleConstraint: No mixture of the basis, and no strength, meets the margins.
    """
    own = without_strength(evaluation.input("policy"))
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = with_margins(load_config(RECIPE, overrides), margins)
    with Run(run_dir, config) as work:
        solved = work.solve(own.input("solution").input("scores"), config.constraints, config.beta)
        policies, validation = inputs_of(own, "policy"), own.input("validation")
        policy = work.mixture(policies, config.reference, solved, validation) if mixed else policies[""]
        policy = work.strength(policy, config.reference, solved, validation)
        judged = work.evaluate(policy, work.prompts(), config.reference, config.reward, config.constraints)
    known = row(judged)
    known["kl"]["predicted"] = load_solution(solved).predicted["kl"]
    return known


def at_the_margin(known: Mapping[str, Any]) -> tuple[float, float]:
    """Return reward and KL of a policy scaled until it has its margin exactly, by the law of small steps."""
    scale = known["margin"] / known["constraints"]["safety"]["mean"]
    return scale * known["reward"]["mean"], scale**2 * known["kl"]["mean"]


@main.command()
@click.option(
    "--rows", "result", default=RESULT, type=click.Path(path_type=Path, exists=True), help="Measured earlier."
)
def show(result: Path) -> None:
    """Print the table, and draw KL and reward against gain."""
    rows = sorted(read_rows(result), key=lambda known: (known["seed"], known["margin"], WAYS.index(known["way"])))
    click.echo("| seed | margin | way | safety, 95 % interval | realised/asked | reward | KL (predicted) | objective |")
    click.echo("|---|---|---|---|---|---|---|---|")
    for known in rows:
        gain, (reward, kl) = known["constraints"]["safety"], at_the_margin(known)
        click.echo(
            f"| {known['seed']} | {known['margin']} | {known['way']} "
            f"| {gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}] | {gain['mean'] / known['margin']:.2f} "
            f"| {known['reward']['mean']:+.2f} | {known['kl']['mean']:.2f} ({known['kl']['predicted']:.2f}) "
            f"| {reward - kl:+.2f} |"
        )
    draw(rows, IMAGES / f"{result.stem}.svg")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw KL and reward of every measured policy against its gain, beside what the dual predicts at the margins."""
    from can_dist.reporting.figures.style import DOTTED, GREY, MARKERS, SERIES, paper_figure, save_figure

    with paper_figure((6.2, 2.7)) as figure:
        left, right = figure.subplots(1, 2)
        for number, way in enumerate(WAYS):
            cells = [known for known in rows if known["way"] == way]
            if not cells:
                continue
            gain = [known["constraints"]["safety"]["mean"] for known in cells]
            style = {"color": SERIES[number], "marker": MARKERS[number], "markersize": 4, "linestyle": "none"}
            left.plot(gain, [known["kl"]["mean"] for known in cells], label=way, **style)
            right.plot(gain, [known["reward"]["mean"] for known in cells], label=way, **style)
        predicted = sorted({(known["margin"], known["kl"]["predicted"]) for known in rows})
        left.plot(*zip(*predicted, strict=True), color=GREY, linestyle=DOTTED, label="predicted at the margin")
        left.set_ylabel("KL(policy‖reference), nats")
        right.set_ylabel("reward gained")
        for axes in (left, right):
            axes.set_xlabel("safety gained on held-out prompts")
        left.legend(loc="upper left")
        save_figure(figure, path, "svg")


if __name__ == "__main__":
    main()
