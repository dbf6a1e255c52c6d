"""A whole run in a minute, as a configuration: tiny model, twenty-four prompts, two scores that count words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from tiny import make_tiny_lm

ROOT = Path(__file__).parents[3]
WORDS = [f"w{i}" for i in range(12)]


def small_run(folder: Path, prompt_end: str = "", **sections: Any) -> dict[str, Any]:
    """Write model and prompts into ``folder``; return the configuration, with ``sections`` added or replaced."""
    make_tiny_lm(folder / "lm", WORDS)
    prompts = [f"{a} {b}{prompt_end}" for a in WORDS[:6] for b in WORDS[6:10]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return {
        "seed": 1,
        "beta": 0.5,
        "prompts": {"source": str(folder / "prompts.jsonl"), "num_test": 4, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(folder / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.05}},
        "generate": {"num_responses": 4, "max_new_tokens": 6, "batch_prompts": 4, "shard_prompts": 4},
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 12,
            "max_steps": 4,
            "ds_config": str(ROOT / "ds_configs" / "zero3_cpu.json"),
        },
        "evaluate": {"num_responses": 4},
        **sections,
    }


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """Write a configuration as YAML; return its path."""
    with path.open("w") as file:
        YAML().dump(config, file)
    return path
