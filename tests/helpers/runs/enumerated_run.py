"""A run of the enumerable world, all its responses in place of samples: for methods with real trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import enumerable_world as world
import numpy as np
import pyarrow as pa

from can_dist.config import Config, validate_config
from can_dist.run import Run
from can_dist.stages.solve import load_solution
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import PROMPTS, RESPONSES

BETA = 0.5


def enumerate_responses(run_dir: Path, reference: Path) -> tuple:
    """Write prompts and all 64 responses of each as artifacts, in place of sampled ones."""
    stage = open_stage(run_dir, "prompts", "enumerated", {}, {})
    rows = [{"prompt_id": p, "messages": messages_of(p), "split": "train"} for p in world.PROMPTS]
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PROMPTS))
    prompts = stage.commit()
    stage = open_stage(run_dir, "generate", "enumerated", {"reference": str(reference)}, {"prompts": prompts})
    rows = [row for prompt in world.PROMPTS for row in responses_to(prompt, prompt)]
    for part in range(4):
        write_part(stage.path, part, pa.Table.from_pylist(rows[part * 48 : (part + 1) * 48], schema=RESPONSES))
    return prompts, stage.commit()


def messages_of(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def responses_to(prompt: str, prompt_id: str) -> list[dict[str, Any]]:
    """All 64 responses to a prompt, as rows."""
    return [
        {
            "prompt_id": prompt_id,
            "response_id": f"{prompt_id}/{k}",
            "messages": messages_of(prompt),
            "text": text,
            "token_ids": [world.WORDS.index(word) for word in text.split()],
            "num_tokens": 2,
            "finish_reason": "length",
        }
        for k, text in enumerate(world.RESPONSES)
    ]


def repeat_responses(run_dir: Path, copies: int) -> Artifact:
    """Write each prompt ``copies`` times with all its responses: a validation of as many prompts, without an error."""
    stage = open_stage(run_dir, "generate", "reference on validation", {"copies": copies}, {})
    names = [(prompt, f"{prompt} {copy}") for copy in range(copies) for prompt in world.PROMPTS]
    rows = [row for prompt, prompt_id in names for row in responses_to(prompt, prompt_id)]
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
    return stage.finished or stage.commit()


def configure(reference: Path, margins: dict[str, float], train: dict, labels: str = "soft") -> Config:
    return validate_config(
        {
            "beta": BETA,
            "prompts": {"source": "unused.jsonl", "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(reference), "template": "{prompt}"},
            "reward": {"kind": "callable", "function": "enumerable_world:reward"},
            "constraints": {
                name: {"scorer": {"kind": "callable", "function": f"enumerable_world:{name}"}, "margin": margin}
                for name, margin in margins.items()
            },
            "label": {"labels": labels, "validation_fraction": 0.0},
            "train": {"schedule": "cosine", "warmup_steps": 20, "log_every": 50, **train},
        }
    )


class EnumeratedRun(Run):
    """A run as it is, except that the responses are all there are, weighted by their probability."""

    enumerated: Artifact

    def generate(self, model, prompts):
        return self.enumerated

    def solve(self, scores, constraints, beta):
        return super().solve(scores, constraints, beta, log_weight="logp.reference")


class ValidatedRun(EnumeratedRun):
    """Its validation has every response too, weighted by its probability, of 33 prompts that are three."""

    def validation(self, reference, prompts, reward, constraints, aligned=None):
        responses = repeat_responses(self._work.directory, 11)
        return self.score(responses, reward, constraints, reference, aligned)


def align(
    run_dir: Path, config: Config, method: Callable[..., Artifact], run_class: type = EnumeratedRun, **options: Any
) -> tuple[np.ndarray, Mapping[str, float]]:
    """Run a method of the product to its policy; return π_θ(y|x) of all responses, and λ where it solved for one."""
    run_dir.mkdir()
    prompts, responses = enumerate_responses(run_dir, Path(config.reference.model))
    with run_class(run_dir, config) as run:
        run.enumerated = responses
        policy = method(
            run,
            prompts=prompts,
            reference=config.reference,
            reward=config.reward,
            constraints=config.constraints,
            beta=BETA,
            **options,
        )
        solved = config.method in ("mocan", "pecan")
        lam = load_solution(run.ancestor(policy, "solve")).lam if solved else {}
    return world.probabilities(policy.path / POLICY), lam


LISTS = {"batch_size": 3, "tokens_per_pack": 600, "num_epochs": 400}  # three prompts with 64 responses each
