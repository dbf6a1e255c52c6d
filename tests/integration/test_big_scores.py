"""A score table in memory, streamed from shards, and spread over Ray tasks: one result, and nothing read twice."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from can_dist.cluster import big_scores as passes
from can_dist.cluster.big_scores import big_scores
from can_dist.config import Cluster
from can_dist.dual import DualSolution, Margin, solve_dual, solve_table
from can_dist.errors import DataError, InfeasibleConstraint
from can_dist.tables import score_shards

COLUMNS = ("reward", "safety", "calm")
MARGINS = [Margin("safety", margin=0.4), Margin("calm", threshold=2.2)]


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five Parquet shards of 200 prompts, ragged K; the memory of passes in a place of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    directory = tmp_path / "scores"
    directory.mkdir()
    for number in range(5):
        counts = rng.integers(1, 20, 200)
        prompt = np.repeat([f"prompt {number}-{i}" for i in range(200)], counts)
        reward = rng.standard_normal(counts.sum()).astype(np.float32)
        safety = (rng.standard_normal(counts.sum()) - 0.4 * reward).astype(np.float32)
        calm = (2 + rng.standard_normal(counts.sum())).astype(np.float32)
        columns = {"prompt_id": prompt, "reward": reward, "safety": safety, "calm": calm}
        pq.write_table(pa.table(columns), directory / f"part-{number}.parquet", row_group_size=300)
    return directory


def in_memory(directory: Path) -> DualSolution:
    table = pq.read_table(directory)
    utility = np.stack([table[name].to_numpy().astype(np.float64) for name in COLUMNS[1:]], axis=1)
    reward, prompt = table["reward"].to_numpy().astype(np.float64), table["prompt_id"].to_pylist()
    return solve_dual(reward, utility, prompt, beta=0.5, constraints=MARGINS)


def solve_shards(directory: Path, cluster: Cluster | None = None) -> DualSolution:
    with big_scores(directory, COLUMNS, cluster=cluster) as scores:
        return solve_table(scores, beta=0.5, constraints=MARGINS)


def test_three_ways_give_one_result(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, streamed in batches smaller than a shard, and as Ray tasks: equal to 1e-8."""
    expected = in_memory(shards)
    assert min(expected.lam.values()) > 0, "both constraints bind, else the comparison is weak"
    monkeypatch.setattr(score_shards, "BATCH_ROWS", 500)
    streamed = solve_shards(shards)
    spread = solve_shards(shards, Cluster())
    assert spread.lam == pytest.approx(streamed.lam, rel=1e-12)
    for found in (streamed, spread):
        assert found.lam == pytest.approx(expected.lam, rel=1e-8)
        assert found.lam_se == pytest.approx(expected.lam_se, rel=1e-8)
        assert found.value == pytest.approx(expected.value, rel=1e-8)
        assert found.slack == pytest.approx(expected.slack, abs=1e-8)
        assert found.predicted["kl"] == pytest.approx(expected.predicted["kl"], rel=1e-8)
        assert found.predicted["improvement"]["calm"] == pytest.approx(expected.predicted["improvement"]["calm"])
        assert found.diagnostics["ess"] == pytest.approx(expected.diagnostics["ess"], rel=1e-8)
        assert found.feasibility["attainable"] == pytest.approx(expected.feasibility["attainable"], rel=1e-8)


def test_stopped_solve_goes_on_where_it_was(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies in the middle of a pass: no answered shard is read again, and the result is the same."""
    calm = solve_shards(shards)
    reads: list[str] = []

    def counting(path: Path, *arguments: object) -> object:
        if len(reads) == 17:
            raise KeyboardInterrupt
        reads.append(path.name)
        return read_blocks(path, *arguments)  # type: ignore[arg-type]

    read_blocks = score_shards.read_blocks
    monkeypatch.setattr(passes, "read_blocks", counting)
    with pytest.raises(KeyboardInterrupt):
        solve_shards(shards)
    (memory,) = (tmp_path / "cache" / "can_dist" / "passes").iterdir()
    with sqlite3.connect(memory) as connection:
        assert connection.execute("SELECT count(*) FROM answers").fetchone() == (5 + 17,), "the index, then 17 shards"
    reads.append("the 17th is tried again")
    assert solve_shards(shards).to_dict() == calm.to_dict()
    total = len(reads) - 1
    assert not memory.exists(), "a finished solve leaves nothing"
    reads.clear()
    reads.extend([""] * 18)  # past the interruption
    solve_shards(shards)
    assert len(reads) - 18 == total, "the two halves together read what one calm solve reads"


def test_shards_that_changed_are_not_answered_from_memory(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleConstraint), big_scores(shards, COLUMNS) as scores:
        solve_table(scores, beta=0.5, constraints=[Margin("safety", margin=50.0), Margin("calm", margin=0.1)])
    part = shards / "part-4.parquet"
    changed = pq.read_table(part)
    pq.write_table(changed.set_column(1, "reward", pa.array(changed["reward"].to_numpy() * 2)), part)
    assert solve_shards(shards).lam == pytest.approx(in_memory(shards).lam, rel=1e-8)


def test_bad_shard_is_named_by_a_ray_task_too(shards: Path) -> None:
    (shards / "part-5.parquet").write_bytes((shards / "part-0.parquet").read_bytes())
    with pytest.raises(DataError, match=r"part-5.parquet: 200 of its 200 prompts .* a shard counted twice; remove one"):
        solve_shards(shards, Cluster())


def test_prompts_without_scores_are_found(shards: Path) -> None:
    ids = pa.chunked_array([[*pq.read_table(shards)["prompt_id"].unique().to_pylist(), "prompt 9-9"]])
    with (
        pytest.raises(DataError, match="1 of 1001 expected prompts have no scores"),
        big_scores(shards, COLUMNS, prompt_ids=ids),
    ):
        pass
