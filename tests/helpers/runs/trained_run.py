"""A run as a training leaves it, without one: real weights, a real dual, an estimate that says what we like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from policy_world import estimate
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm

from can_dist.config import Config, Model, dump_yaml, validate_config
from can_dist.dual import PolicyEstimate
from can_dist.modeling.loading import model_digest
from can_dist.stages.estimate import ESTIMATE
from can_dist.stages.solve import solve
from can_dist.tables.artifacts import Artifact, open_stage, write_json, write_part
from can_dist.training import ADAPTER, POLICY
from can_dist.workspace import Workspace

WORDS = ("tea", "lock", "bomb", "no", "yes")
SCORER = {"kind": "callable", "function": "builtins:len"}
BETA = 0.8
FIRST, SECOND = np.random.default_rng(0).normal(size=(2, 480))
TABLE = pa.table({"prompt_id": np.repeat(np.arange(60), 8), "reward": FIRST, "a": SECOND - 0.4 * FIRST})


class TrainedRun:
    """The reference, a policy a hundredth away from it, the dual of one constraint ``a``, and an estimate."""

    def __init__(self, folder: Path, constraint: Mapping[str, Any] = {"margin": 0.5}, **sections: Any) -> None:
        self.folder, self.run = folder, folder / "run"
        make_tiny_lm(folder / "lm", WORDS, seed=1)
        self.config: Config = validate_config(
            {
                "prompts": {"source": "prompts.jsonl"},
                "reference": {"model": str(folder / "lm")},
                "reward": SCORER,
                "constraints": {"a": {"scorer": SCORER, **constraint}},
                "beta": BETA,
                **sections,
            }
        )
        self.work = Workspace(self.run, self.config)
        self.reference: Model = self.config.reference
        stage = open_stage(self.run, "scores", "reference on train", {}, {})
        write_part(stage.path, 0, TABLE)
        scores = stage.finished or stage.commit()
        self.solution = solve(self.work, scores, reward="reward", constraints=self.config.constraints, beta=BETA)
        self.work.close()
        (self.run / "config.yaml").write_text(dump_yaml(self.config))

    def train(self, *, lora: Mapping[str, Any] | None = None) -> Artifact:
        """Return a policy whose weights moved a hundredth, as an artifact of the stage ``train``."""
        preferences = open_stage(self.run, "label", "preferences", {}, {"solution": self.solution})
        labelled = preferences.finished or preferences.commit(info={"counts": {}})
        identity = {
            "reference": model_digest(self.reference),
            "template": None,
            "beta": BETA,
            "train": {"learning_rate": 1e-3, "lora": lora},
        }
        stage = open_stage(self.run, "train", "policy", identity, {"preferences": labelled})
        shutil.copytree(self.folder / "lm", stage.path / POLICY, dirs_exist_ok=True)
        random = torch.Generator().manual_seed(0)
        weights = load_file(self.folder / "lm" / "model.safetensors")
        moved = {name: t + 0.01 * torch.randn(t.shape, generator=random) for name, t in weights.items()}
        save_file(moved, stage.path / POLICY / "model.safetensors", metadata={"format": "pt"})
        if lora:
            (stage.path / ADAPTER).mkdir(exist_ok=True)
            (stage.path / ADAPTER / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "lora_alpha": 16, "r": 8})
            )
            save_file({"lora": torch.ones(8)}, stage.path / ADAPTER / "adapter_model.safetensors")
        files = [
            str(p.relative_to(stage.path)) for folder in (POLICY, ADAPTER) for p in (stage.path / folder).glob("*")
        ]
        return stage.commit(files, info={"summary": {"num_steps": 1, "num_examples": 1, "num_tokens": 1}})

    def estimate(self, policy: Artifact, *gains: float, **numbers: Any) -> Artifact:
        """Return an estimate of the policy that says these gains."""
        found: PolicyEstimate = estimate(*(gains or (0.25,)), **numbers)
        stage = open_stage(
            self.run, "estimate", "policy", {"gains": gains}, {"policy": policy, "solution": self.solution}
        )
        write_json(stage.path / ESTIMATE, found.to_dict())
        return stage.commit([ESTIMATE])

    def weights_at(self, policy: Artifact, alpha: float) -> dict[str, torch.Tensor]:
        """Return θ_ref + α(θ − θ_ref), in double precision."""
        start = load_file(self.folder / "lm" / "model.safetensors")
        end = load_file(policy.path / POLICY / "model.safetensors")
        return {name: t.double() + alpha * (end[name].double() - t.double()) for name, t in start.items()}

    def said(self) -> str:
        """Return every message of the run's log."""
        lines = (self.run / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return "\n".join(str(json.loads(line).get("message", "")) for line in lines)


def assert_weights(directory: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """Check a policy's weights against those computed in double precision."""
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
