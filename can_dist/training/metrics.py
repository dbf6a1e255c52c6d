"""Training metrics: one JSON line per log interval, and the trackers that were asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
RESUMED = "resumed_from"


class MetricsLog:
    """Appends to ``metrics.jsonl``; also TensorBoard and Weights & Biases when configured.

    ``first`` is the step that training goes on from: what was logged of later steps is dropped.
    """

    def __init__(self, directory: Path, first: int, *, tensorboard: bool, wandb_project: str | None) -> None:
        self.path = directory / METRICS
        lines: list[dict[str, float]] = []
        if first:
            lines = [line for line in read_metrics(self.path) if line["step"] <= first]
            lines.append({"step": first, RESUMED: first})
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        self._tensorboard: Any = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1 if first else 0)
        if wandb_project:
            import wandb

            self._wandb = wandb.init(project=wandb_project, name=directory.name, resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record the values of one step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"train/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush the trackers."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def loss_above_start(directory: Path) -> float | None:
    """Return the last training loss when it is above the reference's on the same examples, where training starts.

    It is the sign of a policy that drifted. For pairs with probabilities the reference's loss is ln 2.
    """
    lines = [line for line in read_metrics(directory / METRICS) if "loss" in line]
    return lines[-1]["loss"] if lines and lines[-1]["loss"] > lines[-1]["reference_loss"] else None


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines written so far (an incomplete last line, being written, is left out)."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
