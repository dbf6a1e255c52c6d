"""``can-dist sweep``: one run at several margins, and one page of what each gave."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import click

from can_dist.cli.options import read_config, run_options
from can_dist.errors import ConfigError, PartlyRefused


@click.command()
@run_options()
@click.option(
    "--margin",
    "texts",
    multiple=True,
    required=True,
    metavar="NAME=B,B,...",
    help="The margins of a constraint; of several constraints, all combinations.",
)
def sweep(
    config: str | None, config_option: str | None, run_dir: Path, overrides: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    """Run the method at several margins in one run directory, and write one page of what each gave.

    Prompts, responses and scores are made once. A margin that cannot be had is told of and the others go on; the exit
    code is then 9. Run again to continue.
    """
    settings, points = read_config(config, config_option, overrides), margin_points(texts)
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.sweep import point_line, write_sweep
        from can_dist.pipeline import run_margins

        outcomes = list(zip(points, run_margins(run_dir, settings, points), strict=True))
        page = write_sweep(outcomes, run_dir)
    click.echo("\n".join([*(point_line(margins, outcome) for margins, outcome in outcomes), str(page)]))
    refused = [margins for margins, outcome in outcomes if isinstance(outcome, Exception)]
    if refused:
        raise PartlyRefused(f"{len(refused)} of {len(outcomes)} margins have no policy; {page} says which and why.")


def margin_points(texts: Sequence[str]) -> list[dict[str, float]]:
    """Return every combination of the margins given as NAME=B,B,...

    Raises:
        ConfigError: a text is none of these, or a constraint or a margin is named twice.
    """
    axes: dict[str, list[float]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        try:
            margins = [float(value) for value in values.split(",")]
        except ValueError:
            margins = []
        if not name or not equals or not margins:
            raise ConfigError(f"--margin {text}: expected NAME=number,number,..., such as safety=0.25,0.5.")
        if name in axes or len(set(margins)) < len(margins):
            raise ConfigError(
                f"--margin {text}: {name if name in axes else 'a margin'} is named twice.", "Name it once."
            )
        axes[name] = margins
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]
