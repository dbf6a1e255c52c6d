"""Experiment trackers, each through its own package: TensorBoard, Weights & Biases, MLflow, trackio.

A tracker is on only when ``train.trackers`` names it. Trackers run on rank 0 and log in by their packages' own means
(``WANDB_API_KEY``, ``MLFLOW_TRACKING_URI``, ...). They get numbers and the training's configuration only: no prompts,
no responses, no environment. A resumed training continues its tracker's run; steps after the checkpoint that were
logged before are not logged again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from can_dist.errors import ConfigError
from can_dist.tables.artifacts import dotted

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""The package of each tracker; the first one comes with CAN-Dist."""
MLFLOW_RUN = "mlflow_run_id"
LONGEST_PARAM = 500  # characters; MLflow refuses longer ones with some stores


@dataclass(frozen=True)
class Tracker:
    """An open tracker: takes the values of a step, and is closed at the end."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a tracker whose package is not installed."""
    for name in names:
        if find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"train.trackers: {name} needs the package {PACKAGES[name]!r}, which is not installed.",
                f"pip install 'can-dist[{name}]', or leave {name} out.",
            )


def open_trackers(
    names: Sequence[str], directory: Path, first: int, project: str, settings: Mapping[str, Any]
) -> list[Tracker]:
    """Open the named trackers for a training in ``directory``.

    Args:
        names: of ``PACKAGES``.
        directory: of the training; its name is the run's name.
        first: step that the training goes on from; 0 starts a new run.
        project: W&B and trackio project, MLflow experiment.
        settings: recorded with the run, to find it by; plain values, nested.
    """
    check_trackers(names)
    opened = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
    return [opened[name](directory, first, project, settings) for name in names]


def _tensorboard(directory: Path, first: int, project: str, settings: Mapping[str, Any]) -> Tracker:  # noqa: ARG001
    from tensorboardX import SummaryWriter

    # the suffix tells apart files that were begun in the same second
    events = str(directory / "tensorboard")
    writer = SummaryWriter(events, purge_step=first + 1 if first else 0, filename_suffix=f".from-{first}")
    writer.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```", first)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"train/{name}", value, step)

    return Tracker(log, writer.close)


def _wandb(directory: Path, first: int, project: str, settings: Mapping[str, Any]) -> Tracker:  # noqa: ARG001
    import wandb

    run = wandb.init(
        project=project,
        name=directory.name,
        id=f"{directory.parent.name}-{directory.name}",  # known again when the training goes on
        config=dict(settings),
        dir=str(directory),
        resume="allow",
        settings=wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False),
    )
    return Tracker(lambda step, values: run.log(dict(values), step=step), run.finish)


def _mlflow(directory: Path, first: int, project: str, settings: Mapping[str, Any]) -> Tracker:
    import mlflow

    kept = directory / MLFLOW_RUN
    mlflow.set_experiment(project)
    known = kept.read_text(encoding="utf-8") if first and kept.is_file() else None
    run = mlflow.start_run(run_id=known, run_name=None if known else directory.name)
    kept.write_text(run.info.run_id, encoding="utf-8")
    if known is None:
        mlflow.log_params({name: str(value)[:LONGEST_PARAM] for name, value in dotted(settings).items()})
    there = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    last = max((metric.step for metric in there), default=-1)

    def log(step: int, values: Mapping[str, float]) -> None:
        if step <= last:
            return
        try:
            mlflow.log_metrics(dict(values), step=step)
        except mlflow.MlflowException as error:  # a server that went away must not end a training
            print(f"can-dist: train: mlflow did not take step {step} ({error}).", file=sys.stderr, flush=True)

    return Tracker(log, mlflow.end_run)


def _trackio(directory: Path, first: int, project: str, settings: Mapping[str, Any]) -> Tracker:  # noqa: ARG001
    import trackio

    run = trackio.init(project=project, name=directory.name, config=dict(settings), resume="allow")
    begin = getattr(run, "_next_step", 0)  # behind the last step of the run in its store; there is no public name

    def log(step: int, values: Mapping[str, float]) -> None:
        if step >= begin:
            trackio.log(dict(values), step=step)

    return Tracker(log, trackio.finish)
