"""PeCAN from a preference file alone: a tiny model, and pairs with two labels each, for `can-dist run` in a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from ruamel.yaml import YAML
from tiny import make_tiny_lm

CAN_DIST = str(Path(sys.executable).parent / "can-dist")
WORDS = [f"w{i}" for i in range(12)]


def user_folder(folder: Path) -> Path:
    """A tiny language model, and 132 pairs as in PKU-SafeRLHF: people mostly find w1 helpful and w2 safe."""
    random = np.random.default_rng(0)
    make_tiny_lm(folder / "lm", WORDS)
    rows = []
    for a, b in ((a, b) for a in WORDS for b in WORDS if a != b):
        helpful, safe = (random.choice(WORDS, size=3).tolist() for _ in range(2))
        helpful[random.integers(3)], safe[random.integers(3)] = "w1", "w2"
        better, safer = int(random.random() < 0.2), int(random.random() < 0.8)
        rows.append(
            {"prompt": f"{a} {b}", "response_0": " ".join(helpful), "response_1": " ".join(safe),
             "better_response_id": better, "safer_response_id": safer,
             "is_response_0_safe": safer == 0, "is_response_1_safe": safer == 1}
        )  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "method": "pecan",
        "beta": 0.1,
        "prompts": {"source": "pairs.jsonl", "num_train": 24, "num_test": 8, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": {"kind": "log_ratio", "criterion": "helpful", "beta": 0.2},
        "constraints": {
            "safety": {
                "scorer": {"kind": "log_ratio", "criterion": "safe", "beta": 0.1, "calibrate": True},
                "margin": 0.1,
            }
        },
        "generate": {"num_responses": 8, "max_new_tokens": 6},
        "label": {"preferences": {"source": "pairs.jsonl"}, "validation_fraction": 0.4},
        "train": {"learning_rate": 3e-3, "batch_size": 16, "num_epochs": 4, "max_steps": 20, "log_every": 1},
        "evaluate": {"num_responses": 2},
    }
    with (folder / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    return folder


def can_dist(folder: Path, *arguments: str, timeout: float = 500) -> subprocess.CompletedProcess:
    return subprocess.run([CAN_DIST, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout)
