"""``can-dist fit-scorer``: a reward or cost model from preferences, and what it is worth."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import click

from can_dist.cli.options import LOCAL_PATH


@click.command("fit-scorer")
@click.argument("base", metavar="MODEL")
@click.option("--data", required=True, help="Preferences: a local file or directory, or a hub id.")
@click.option("--split", default="train", show_default=True, help="Split of a hub data set or directory.")
@click.option("--revision", help="Revision of a hub data set.")
@click.option("--template", help="Plain template of the prompt, for a model without a chat template.")
@click.option("--criterion", required=True, type=click.Choice(["helpful", "safe"]), help="The labels to learn.")
@click.option("--out", required=True, type=LOCAL_PATH, help="Folder of the model; must not exist.")
@click.option("--epochs", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--learning-rate", "lr", default=3e-4, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--held-out", default=0.15, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the prompts that measure it.",
)  # fmt: skip
@click.option("--least-accuracy", default=0.6, show_default=True, help="Below it on held-out prompts, runs refuse it.")
@click.option("--seed", default=0, show_default=True)
def fit_scorer(
    base: str,
    data: str,
    split: str,
    revision: str | None,
    template: str | None,
    out: Path,
    **options: Any,
) -> None:
    """Fit a score model on the body of MODEL, measure it on held-out prompts, and write it.

    One process in float32: for models of up to some hundred million parameters. The scorer is used as {model: OUT}.
    """
    with contextlib.redirect_stdout(sys.stderr):
        from can_dist.config import DataSource, Model
        from can_dist.fitting.fit_scorer import fit_scorer as fit
        from can_dist.fitting.fit_scorer import told

        source = DataSource(source=data, split=split, revision=revision)
        record = fit(Model(model=base, template=template), source, out, **options)
    click.echo("\n".join([*told(record), str(out)]))
