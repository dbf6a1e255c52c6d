"""The commands of ``ray_jobs/``: the driver of a submitted Ray job.

A job runs in an uploaded copy of the working directory, which is deleted some time after it ends, and on a node that
Ray chooses: so the run directory must be absolute, on storage that every node sees.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from can_dist.cli.options import read_config, run_options, run_until
from can_dist.config.methods import FROM_SCORES
from can_dist.errors import ConfigError


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of every job: those of a run, and ``--require-auth``."""
    text = "Refuse a cluster that anyone on its network can run commands on."
    return run_options()(click.option("--require-auth", is_flag=True, help=text)(command))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@job_options
def run(**options: Any) -> None:
    """Run the whole method: ray job submit --working-dir . -- python ray_jobs/run.py CONFIG --run DIR."""
    _run("evaluate", **options)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("stage", type=click.Choice(FROM_SCORES))
@job_options
def stage(stage: str, **options: Any) -> None:
    """Run up to and including STAGE; what is finished is reused."""
    _run(stage, **options)


def _run(
    until: str,
    config: str | None,
    config_option: str | None,
    run_dir: Path,
    overrides: tuple[str, ...],
    require_auth: bool,
) -> None:
    settings = read_config(config, config_option, overrides)
    if not run_dir.is_absolute():
        raise ConfigError(
            f"--run {run_dir}: a relative path. A job runs in an uploaded copy of the working directory, which is "
            "deleted later. Give an absolute path on storage that every node sees."
        )
    from can_dist.cluster.connection import connect, open_to_the_network

    connect(settings.cluster)
    problem = open_to_the_network()
    if problem and require_auth:
        raise problem
    if problem:
        click.echo(f"can-dist: warning: {problem}", err=True)
    click.echo(str(run_until(run_dir, settings, until).path))
