"""The two sides of the training benchmark still run, and still do the same work."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = [pytest.mark.slow, pytest.mark.real_data]


def run_side(tmp_path: Path, model: Path, side: str) -> dict[str, Any]:
    job = {
        "side": side,
        "work": "pku-like",
        "model": str(model),
        "output": str(tmp_path / f"{side}.json"),
        "num_pairs": 8,
        "batch_size": 4,
        "context": 512,
        "strategy": "sequential",
    }
    subprocess.run([sys.executable, BENCHMARKS / "train_side.py", json.dumps([job])], check=True, timeout=500)
    (line,) = Path(job["output"]).read_text().splitlines()
    record: dict[str, Any] = json.loads(line)
    return record


def test_both_sides_train_on_the_same_tokens_with_the_same_losses(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL comes with the extra 'bench'")
    model = shared_data / "models" / "stories3M-qa-sft"
    ours, peer = (run_side(tmp_path, model, side) for side in ("ours", "trl"))
    assert ours["targets_seen"] == peer["targets_seen"] == ours["target_tokens"] > 0
    assert ours["first_loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert ours["losses"] == pytest.approx(peer["losses"], abs=1e-3)
    assert len(ours["losses"]) == 2
    assert ours["seconds"]["train"][0] > 0
