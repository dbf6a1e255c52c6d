"""The training stage alone, under a launcher and without Ray; all earlier stages must be finished.

can-dist label recipes/mocan.yaml --run runs/mocan
deepspeed --module can_dist.train --config recipes/mocan.yaml --run runs/mocan
torchrun --nproc_per_node 2 -m -- can_dist.train --config recipes/mocan.yaml --run runs/mocan
"""

from __future__ import annotations

import os
import sys
import time

import click

from can_dist.config import load_config
from can_dist.errors import CanDistError, ConfigError, Interrupted


@click.command()
@click.option("--config", "config_path", required=True, metavar="FILE", help="Configuration of the run.")
@click.option("--run", "run_dir", required=True, help="Run directory.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key.")
@click.option("--local_rank", type=int, default=0, hidden=True, help="Given by the deepspeed launcher; unused.")
def train(config_path: str, run_dir: str, overrides: tuple[str, ...], local_rank: int) -> None:  # noqa: ARG001
    """Train as one rank of a launched process group."""
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    if wrong := [f"{name}={value}" for name, value in given.items() if not value.isdecimal()]:
        raise ConfigError(f"{', '.join(wrong)} in the environment: expected numbers, as a launcher sets them.")
    if not {"RANK", "WORLD_SIZE"} <= given.keys():
        raise ConfigError(
            "can_dist.train is started by a launcher: deepspeed --module can_dist.train --config ... --run ..."
        )
    from can_dist.pipeline import run_pipeline

    run_pipeline(run_dir, load_config(config_path, overrides), "train", only_stage="train")


def main() -> None:
    """Run one rank; a ``CanDistError`` prints one message per machine and sets the exit code."""
    try:
        train(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(ConfigError.exit_code)
    except (CanDistError, Interrupted) as error:
        local = os.environ.get("LOCAL_RANK", "0")
        if local == "0" or not local.isdecimal():
            click.echo(f"{type(error).__name__}: {error}", err=True)
        else:
            time.sleep(2)  # the launcher kills all ranks when one exits, and local rank 0 must print first
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
