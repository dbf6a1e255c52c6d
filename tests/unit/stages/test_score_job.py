"""How an actor reads the responses that it scores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from scored_world import make_responses

from can_dist.config import PythonCallable
from can_dist.stages import score
from can_dist.stages.score import ScoreJob
from can_dist.tables.artifacts import MANIFEST, load_artifact


def test_manifest_is_read_once_for_all_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of many parts takes longer to read than a part: read for each of them, scoring was quadratic."""
    responses = make_responses(tmp_path, parts=3, prompts=2)
    job = ScoreJob("r", PythonCallable(function="a:b"), "{}", "fp32", responses.path, tmp_path, 0)
    opened = []

    def counted(directory: Path) -> object:
        opened.append(directory)
        return load_artifact(directory)

    monkeypatch.setattr(score, "load_artifact", counted)
    assert [job.read(shard).num_rows for shard in range(3)] == [part.num_rows for part in map(responses.part, range(3))]
    assert opened == [responses.path]
    os.utime(responses.path / MANIFEST, ns=(0, 1))  # made again
    job.read(0)
    assert opened == [responses.path] * 2
