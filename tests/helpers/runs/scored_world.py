"""Responses that no model wrote, and their scoring on real actors: for faults of actors and nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from can_dist.config import Config, PythonCallable, validate_config
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import RESPONSES
from can_dist.workspace import Workspace


def make_responses(run: Path, *, parts: int = 4, prompts: int = 2, poison: str = "") -> Artifact:
    """``parts`` shards of ``prompts`` prompts with four responses; the response named ``poison`` says that word."""
    stage = open_stage(run, "generate", "reference on train", {"poison": poison}, {})
    for part in range(parts):
        rows = []
        for prompt in (f"p{part * prompts + n}" for n in range(prompts)):
            for k in range(4):
                name = f"{prompt}/{k}"
                rows.append(
                    {
                        "prompt_id": prompt,
                        "response_id": name,
                        "messages": [{"role": "user", "content": prompt}],
                        "text": "poison" if name == poison else " ".join(["w1"] * (k + part)),
                        "token_ids": [1] * (k + 1),
                        "num_tokens": k + 1,
                        "finish_reason": "stop",
                    }
                )
        write_part(stage.path, part, pa.Table.from_pylist(rows, schema=RESPONSES))
    return stage.commit(info={"num_prompts": parts * prompts})


def configured(**cluster: Any) -> Config:
    return validate_config(
        {
            "prompts": {"source": "prompts.jsonl", "num_test": 2, "num_validation": 0},
            "strength": 1,
            "reference": {"model": "lm"},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "cluster": cluster,
        }
    )


def scored(run: Path, responses: Artifact, function: str, *, batch_size: int = 256, **cluster: Any) -> Artifact:
    """Score with one function of ``scorers.py`` in a run of its own."""
    work = Workspace(run, configured(**cluster))
    try:
        scorer = PythonCallable(function=f"scorers:{function}", batch_size=batch_size)
        return score(work, responses, {"r": scorer}, role="reference on train")
    finally:
        work.close()


def events(run: Path, event: str) -> list[dict[str, Any]]:
    """The events of one kind in the log of a run."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.get("event") == event]
