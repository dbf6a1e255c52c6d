"""``can-dist estimate``: what a policy does, from a run's validation responses, without generating."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import click

from can_dist.cli.options import LOCAL_PATH


@click.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
@click.option(
    "--policy",
    metavar="DIR",
    type=LOCAL_PATH,
    help="Any model directory of the reference's architecture and tokenizer; default: the run's own policy.",
)
def estimate(run_dir: Path, policy: Path | None) -> None:
    """Estimate what the policy of RUN, a run directory or an artifact in it, gains: one scoring pass, no sampling."""
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.estimate import estimate_text, run_estimate

        line = run_estimate(run_dir, policy)
        text = estimate_text(line)
    click.echo(text)
