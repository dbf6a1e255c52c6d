"""The plan of a training beside what torch allocates on a GPU, by the training benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
AGREEMENT = 0.15

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.real_data,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("train", [{}, {"activation_checkpointing": True}, {"lora": True}], ids=str)
def test_the_plan_is_what_training_takes_on_a_gpu(shared_data: Path, tmp_path: Path, train: dict[str, Any]) -> None:
    job = {
        "side": "ours",
        "work": "hh-like",
        "model": models.language_model("random-1b", tmp_path, "cuda"),
        "output": str(tmp_path / "record.jsonl"),
        "num_pairs": 64,
        "batch_size": 32,
        "context": 1024,
        "device": "cuda",
        "tokens_per_pack": 8192,
        **train,
    }
    environment = {**os.environ, "CAN_DIST_DATA": str(shared_data)}
    subprocess.run([sys.executable, BENCHMARKS / "train_side.py", json.dumps([job])], check=True, env=environment)
    record = json.loads(Path(job["output"]).read_text())
    assert record["peak_device_mb"] > 0
    assert abs(record["planned_mb"] / record["peak_device_mb"] - 1) <= AGREEMENT, record
