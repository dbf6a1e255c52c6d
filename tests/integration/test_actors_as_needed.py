"""Actors on CPUs start as their work needs them: a short stage has one, a long one all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from can_dist.cluster.actors import ActorPool
from can_dist.cluster.connection import connect
from can_dist.cluster.ledger import run_shards
from can_dist.config import Cluster

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Job:
    """Shards that take some time, and a file each."""

    out: Path
    opening_s: float
    shard_s: float
    models: str = "none"

    def load(self) -> None:
        time.sleep(self.opening_s)

    def process(self, loaded: None, shard: int) -> None:
        time.sleep(self.shard_s)
        (self.out / f"{shard}").touch()


@pytest.fixture(scope="module", autouse=True)
def ray_of_two_cpus() -> Iterator[None]:
    import ray

    connect(Cluster())
    yield
    ray.shutdown()


@pytest.mark.parametrize(
    ("opening_s", "shard_s", "num_shards", "started"),
    [(3.0, 0.05, 8, [0]), (0.5, 5.0, 4, [0, 1]), (0.5, 5.0, 1, [0])],
    ids=["short work", "long work", "one shard"],
)
def test_another_actor_starts_where_work_is_long_beside_its_start(
    tmp_path: Path, opening_s: float, shard_s: float, num_shards: int, started: list[int]
) -> None:
    pool = ActorPool(Cluster(num_actors=2), print)
    try:
        job = Job(tmp_path, opening_s, shard_s)
        run_shards(pool, job, dict.fromkeys(range(num_shards), 1), "work", dict)
        assert sorted(path.name for path in tmp_path.iterdir()) == [str(n) for n in range(num_shards)]
        assert [slot for slot in range(2) if pool.has(slot)] == started
    finally:
        pool.close()


def test_an_actor_trains_once_and_scores_between(tmp_path: Path) -> None:
    """The second training gets a new process in the same place."""
    import ray

    pool = ActorPool(Cluster(num_actors=2, num_workers=1), print)
    try:
        run_shards(pool, Job(tmp_path, 0.0, 0.0), {0: 1}, "work", dict)
        first = pool.lend()
        assert first is pool.actor(0)
        ray.get(first.train.remote(_write_environment, str(tmp_path / "rank"), {"LOCAL_SIZE": "1"}))
        assert (tmp_path / "rank").read_text() == "0 1"
        assert ray.get(first.__ray_call__.remote(_local_size)) is None
        run_shards(pool, Job(tmp_path, 0.0, 0.0), {1: 1}, "work", dict)
        assert pool.actor(0) is first
        assert pool.lend() is pool.actor(0) is not first
    finally:
        pool.close()


def _write_environment(path: str) -> None:
    Path(path).write_text(f"{os.environ['RANK']} {os.environ['LOCAL_SIZE']}")


def _local_size(_: object) -> str | None:
    return os.environ.get("LOCAL_SIZE")
