"""Trainings as a user starts them: processes in a folder with a configuration, and what they logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
STEPS_IN_PLENTY: dict[str, Any] = {
    "learning_rate": 1e-3,
    "batch_size": 12,
    "tokens_per_pack": 40,
    "num_epochs": 2,
    "log_every": 1,
    "checkpoint_every": 4,
    "ds_config": str(Path(__file__).parents[3] / "ds_configs" / "zero3_cpu.json"),
}
"""Many steps of few short examples: time enough for a kill."""


def start(folder: Path, *command: str, env: dict[str, str] = ENVIRONMENT) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run: Path) -> dict[int, float]:
    """The logged loss of every step; a last line that is still being written is left out."""
    paths = list(run.glob("train-*/metrics.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().split("\n")[:-1]]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}
