"""Sampling tells its rows batch by batch, so that a bar can move within a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from can_dist.config import Model
from can_dist.config.sections import Generate
from can_dist.console import heard_by
from can_dist.stages.generate import GenerateJob


def test_rows_are_told_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    options = Generate(num_responses=3, batch_prompts=2, shard_prompts=4)
    job = GenerateJob(Model(model="lm"), options, 0, "fp32", "train", Path("prompts"), Path("out"))

    def sampled(_: GenerateJob, __: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows for _ in range(options.num_responses)]

    monkeypatch.setattr(GenerateJob, "_sample_batch", sampled)
    told: list[int] = []
    with heard_by(told.append):
        rows = job._sample(None, [{"prompt_id": f"p{n}"} for n in range(5)])
    assert told == [6, 6, 3]
    assert len(rows) == sum(told)
