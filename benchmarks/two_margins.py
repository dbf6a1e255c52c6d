"""Pairs of margins from one run: mixtures of a basis of three policies, beside trainings whose λ follows the gain.

    python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world
    python benchmarks/two_margins.py run     # begun work goes on; an hour on two idle cores
    python benchmarks/two_margins.py show    # the table

The recipe with a second constraint, plain words (characters per word, :mod:`plain_words`), and ``basis: true``, trained
once for one pair of margins. Then, of four other pairs, the mixture that ``export policy --margin`` writes, and a
training of its own with ``train.feedback: validation``; all measured on fresh responses to the same held-out prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
from every_margin import at_margins
from real_margins import FEEDBACK
from real_runs import AS_MEASURED_32, RESULTS, evaluated, read_rows, row, save_rows

RESULT = RESULTS / "two_margins.json"
SECOND = AS_MEASURED_32 | {
    "constraints.plain.scorer.kind": "callable",
    "constraints.plain.scorer.function": "benchmarks.plain_words:plain_words",
}
TRAINED_FOR = (0.45, 0.3)
PAIRS = tuple(product((0.3, 0.6), (0.15, 0.45)))
BASIS, FOLLOWING = "basis of three", "feedback"
WAYS = (BASIS, FOLLOWING)


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.option(
    "--run", "run_dir", default="runs/pku_stories3M_basis", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), default=WAYS, show_default=True)
def run(run_dir: Path, ways: Sequence[str]) -> None:
    """Measure the policies that have no row yet, and write each row as it is known."""
    for way, (safety, plain) in product(ways, PAIRS):
        cell = {"way": way, "safety": safety, "plain": plain}
        if any(cell.items() <= done.items() for done in read_rows(RESULT)):
            continue
        if way == BASIS:
            own = settings(*TRAINED_FOR) | {"basis": "true"}
            margins = {"safety": safety, "plain": plain}
            known = at_margins(run_dir, evaluated(run_dir, own), own, margins, mixed=True)
        else:
            known = row(evaluated(run_dir, settings(safety, plain) | FEEDBACK))
        save_rows(RESULT, [*read_rows(RESULT), {**cell, **known}])


def settings(safety: float, plain: float) -> dict[str, Any]:
    """Return what is overridden in the recipe for a pair of margins."""
    return SECOND | {"constraints.safety.margin": safety, "constraints.plain.margin": plain}


@main.command()
def show() -> None:
    """Print the table."""
    click.echo(
        "| margins: safety, plain | way | safety, 95 % interval | plain, 95 % interval | reward | KL (predicted) |"
    )
    click.echo("|---|---|---|---|---|---|")
    for known in sorted(
        read_rows(RESULT), key=lambda known: (known["safety"], known["plain"], WAYS.index(known["way"]))
    ):
        safety, plain = (
            f"{gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}]"
            for gain in (known["constraints"][name] for name in ("safety", "plain"))
        )
        click.echo(
            f"| {known['safety']}, {known['plain']} | {known['way']} | {safety} | {plain} "
            f"| {known['reward']['mean']:+.2f} | {known['kl']['mean']:.2f} ({known['kl']['predicted']:.2f} predicted) |"
        )


if __name__ == "__main__":
    main()
