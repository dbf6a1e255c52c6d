"""A run's digests follow from its content: the same under every path, typed as relative or absolute."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from small_run import small_run

from can_dist.config import validate_config
from can_dist.pipeline import run_method
from can_dist.tables.artifacts import MANIFEST, load_artifact


@pytest.mark.slow
def test_digests_are_those_of_the_same_run_under_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()  # the workers of a Ray that another test started are in another directory
    (tmp_path / "world").mkdir()
    config = validate_config(small_run(tmp_path / "world"))
    monkeypatch.chdir(tmp_path)
    digests = []
    for run in (tmp_path / "a" / "deep" / "run", Path("b")):
        run.parent.mkdir(parents=True, exist_ok=True)
        run_method(run, config)
        digests.append({path.parent.name: load_artifact(path.parent).digest for path in run.glob(f"*/{MANIFEST}")})
    assert len(digests[0]) > 15
    assert digests[0] == digests[1]
