"""A run with sealed prompts in this process: real stages from reading to labelling, without Ray and without ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_run import WORDS, small_run
from tiny import make_tiny_lm

from can_dist.config import Config, load_config
from can_dist.modeling.policy_probe import PROBE
from can_dist.tables.artifacts import write_json
from can_dist.training import POLICY, SUMMARY
from can_dist.workspace import Workspace

NUM_SEALED = 64


def sealed_config(folder: Path, **prompts: Any) -> dict[str, Any]:
    """Write model and 90 prompts with ids into ``folder``; return a configuration that seals 64 of them."""
    config = small_run(folder)
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b][:90]
    rows = [json.dumps({"prompt_id": f"p{n}", "prompt": text}) + "\n" for n, text in enumerate(texts)]
    (folder / "prompts.jsonl").write_text("".join(rows))
    config["prompts"] |= {"num_sealed": NUM_SEALED, **prompts}
    config["generate"] |= {"max_new_tokens": 4, "batch_prompts": 32, "shard_prompts": 32}
    config["evaluate"] = {"num_responses": 2, "num_samples": 1}
    return config


def without_ray(patch: pytest.MonkeyPatch) -> None:
    """Run what Ray would in this process; a training leaves weights that follow from its identity."""
    patch.setattr(Workspace, "run_shards", _run_shards)
    patch.setattr("can_dist.stages.train.connect", lambda cluster: None)
    patch.setattr("can_dist.stages.train.check_room_for_workers", lambda cluster, say: None)
    patch.setattr("can_dist.stages.train.run_ranks", _trained)


def change(run: Path, key: str, value: Any) -> Config:
    """Rewrite one key of ``RUN/config.yaml``."""
    from can_dist.config import dump_yaml, validate_config

    config = load_config(run / "config.yaml").model_dump(mode="json", exclude_unset=True)
    *path, last = key.split(".")
    inner = config
    for name in path:
        inner = inner[name]
    inner[last] = value
    changed = validate_config(config)
    (run / "config.yaml").write_text(dump_yaml(changed))
    return changed


def _run_shards(work: Workspace, job: Any, shards: Mapping[int, int], name: str) -> None:
    loaded = job.load() if shards else None
    for shard in shards:
        job.process(loaded, shard)


def _trained(work: Workspace, directory: Path, spec: str, lent: Any) -> None:
    make_tiny_lm(directory / POLICY, WORDS, seed=int(directory.name[-4:], 16))
    write_json(directory / SUMMARY, {"num_steps": 1, "num_examples": 1, "num_tokens": 1})
    write_json(directory / PROBE, {"precision": "fp32", "rows": []})
    (directory / "metrics.jsonl").write_text(json.dumps({"step": 0, "loss": 0.7, "reference_loss": 0.6}) + "\n")
