"""A run with a basis as its trainings leave it, without them: policies that moved a little towards each score.

Log-probabilities are scored by the real job, in this process.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_world as tw
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from watched_world import MARGINS, Watching, make_watching

from can_dist.config import dump_yaml, validate_config
from can_dist.modeling.loading import model_digest
from can_dist.stages.label import label, label_alone
from can_dist.stages.mixture import mixture
from can_dist.stages.solve import load_solution, solve
from can_dist.tables.artifacts import Artifact, open_stage
from can_dist.training import POLICY
from can_dist.workspace import Workspace

STEP = 0.02
"""Length of a policy's step in the space of weights."""


@dataclass
class BasisRun:
    """The world, an open run, and the policies by name, '' that of r + ⟨λ, g⟩."""

    world: Watching
    work: Workspace
    policies: dict[str, Artifact]

    def solution(self, **margins: float) -> Artifact:
        """Solve the dual for other margins."""
        constraints = {
            name: constraint.model_copy(update={"margin": margins.get(name, constraint.margin)})
            for name, constraint in self.world.config.constraints.items()
        }
        return solve(self.work, self.world.scores, reward="reward", constraints=constraints, beta=tw.BETA)

    def mixture(self, **margins: float) -> Artifact:
        """Mix the policies for margins."""
        return mixture(
            self.work,
            self.policies,
            self.world.config.reference,
            self.solution(**margins),
            self.world.validation,
        )

    def log_ratio(self, policy: Path) -> np.ndarray:
        """ln π/π_ref of the validation responses, computed one by one in double precision; shape (P, K)."""
        models = [AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64) for p in (policy, self.world.reference)]
        rows = self.world.validation_rows
        with torch.no_grad():
            logp = [[log_prob(model, row).item() for row in rows] for model in models]
        ratio_N = np.array(logp[0]) - np.array(logp[1])
        return ratio_N.reshape(len({row["prompt_id"] for row in rows}), -1)

    def column(self, name: str) -> np.ndarray:
        """A score of the validation responses, shape (P, K)."""
        rows = self.world.validation_rows
        return np.array([row[name] for row in rows]).reshape(len({row["prompt_id"] for row in rows}), -1)


def log_prob(model: torch.nn.Module, row: Mapping[str, Any]) -> torch.Tensor:
    return tw.logp_one(model, tw.prompt_tokens(dict(row)), row["token_ids"])


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the jobs of actors run here, one part after the other."""

    def run_shards(_: Workspace, job: Any, shards: Mapping[int, int], __: str) -> None:
        loaded = job.load() if shards else None
        for shard in shards:
            job.process(loaded, shard)

    monkeypatch.setattr(Workspace, "run_shards", run_shards)


def make_basis_run(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    constraints: Sequence[str] = ("calm",),
    num_prompts: int = 40,
    margin: float = 0.04,
    **sections: Any,
) -> BasisRun:
    """Write a run of ``num_prompts`` validation prompts with its policies into ``root``; one margin for all."""
    in_this_process(monkeypatch)
    for name in MARGINS:
        monkeypatch.setitem(MARGINS, name, margin)
    world = make_watching(root, constraints=tuple(constraints), num_prompts=num_prompts)
    given = world.config.model_dump(mode="json", exclude_unset=True)
    world.config = validate_config({**given, "basis": True, "cluster": {"score_cache": False}, **sections})
    work = Workspace(root / "run", world.config)
    work.close()
    (root / "run" / "config.yaml").write_text(dump_yaml(world.config))
    responses = world.scores.input("responses")
    lam = load_solution(world.solution).lam
    labels = {"": label(work, responses, world.scores, world.solution, reward="reward", beta=tw.BETA)}
    scores = {"": {"reward": 1.0, **lam}}
    for name in constraints:
        labels[name] = label_alone(work, responses, world.scores, world.solution, name, reward="reward", beta=tw.BETA)
        scores[name] = {name: 1.0}
    policies = {name: trained(world, work, labels[name], weights, name) for name, weights in scores.items()}
    return BasisRun(world, work, policies)


def trained(
    world: Watching, work: Workspace, preferences: Artifact, weights: Mapping[str, float], name: str
) -> Artifact:
    """Return a policy a step away from the reference along the gradient of a score's mean."""
    model = AutoModelForCausalLM.from_pretrained(world.reference)
    rows = world.validation_rows  # whatever a training finds, these responses are to know of
    score_N = np.array([sum(weight * row[key] for key, weight in weights.items()) for row in rows])
    means = {p: score_N[[row["prompt_id"] == p for row in rows]].mean() for p in {row["prompt_id"] for row in rows}}
    advantage_N = [score - means[row["prompt_id"]] for score, row in zip(score_N, rows, strict=True)]
    sum(a * log_prob(model, row) for a, row in zip(advantage_N, rows, strict=True)).backward()
    gradient = {key: parameter.grad for key, parameter in model.named_parameters()}
    length = torch.sqrt(sum((g**2).sum() for g in gradient.values()))
    identity = {
        "reference": model_digest(world.config.reference),
        "template": None,
        "beta": tw.BETA,
        "train": {"learning_rate": 1e-3, "lora": None},
    }
    stage = open_stage(
        work.directory, "train", f"policy of {name}" if name else "policy", identity, {"preferences": preferences}
    )
    shutil.copytree(world.reference, stage.path / POLICY, dirs_exist_ok=True)
    start = load_file(world.reference / "model.safetensors")
    moved = {key: tensor + STEP * gradient[key] / length for key, tensor in start.items()}
    save_file(moved, stage.path / POLICY / "model.safetensors", metadata={"format": "pt"})
    files = [str(p.relative_to(stage.path)) for p in (stage.path / POLICY).glob("*")]
    return stage.commit(files, info={"summary": {"num_steps": 1, "num_examples": 1, "num_tokens": 1}})
