"""Actors that run the shards of a stage: placed, started, and replaced as they die."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from can_dist.cluster.connection import address_of
from can_dist.cluster.metrics import shard_seconds
from can_dist.cluster.places import reserve
from can_dist.cluster.rank import THREADS, Rank
from can_dist.cluster.rows_done import RowsDone
from can_dist.config import Cluster
from can_dist.console import MACHINE, heard_by, of_machine
from can_dist.errors import CanDistError, EnvironmentProblem

LITTLE = 0.1
"""Share of the free memory: actors that hold less keep their models, and stay open beside a training."""
REST_S = 10.0  # within which an actor lets go of its models


class ShardJob(Protocol):
    """The work of a stage on actors: load once, then process shards. Instances are pickled to the actors."""

    @property
    def out(self) -> Path:
        """The directory of the stage."""

    @property
    def models(self) -> str:
        """What ``load`` opens, with its weights' digest: jobs with the same text share it."""

    def load(self) -> Any:
        """Open models; runs in the actor."""

    def process(self, loaded: Any, shard: int) -> None:
        """Make and commit part ``shard``."""

    def row_names(self, shard: int) -> list[str]:
        """Return the name of each row of a shard for messages, such as "response 'p3/1'"; runs in the driver."""

    def try_rows(self, loaded: Any, shard: int, rows: range) -> None:
        """Process some rows of a shard and keep nothing; used to find the row that kills actors."""

    def set_aside(self, shard: int, row: int, why: str) -> bool:
        """Leave a row out of its shard from now on; False where the configuration forbids it."""

    def halved(self) -> ShardJob | None:
        """Return the same job with passes of half the size, for less memory; None where they cannot be halved."""


class ShardWorker(Rank):
    """The actor: runs shards, and keeps the models of earlier jobs where they take little memory, and no GPU's.

    Without a GPU it may also be the one rank of a training.
    """

    def __init__(self, num_gpus: float) -> None:
        """Take the GPUs that Ray gave; where it gave none, it leaves the machine's visible."""
        gc.set_threshold(50_000)  # imports and models make no garbage
        if num_gpus == 0:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._keeps = num_gpus == 0
        self._opened: dict[str, Any] = {}
        self._seconds = shard_seconds()

    def open(self, job: ShardJob) -> None:
        """Load the models of a job, unless they are loaded."""
        if job.models not in self._opened:
            if not self._keeps or _held() >= LITTLE:
                self.rest()  # before the new ones are loaded
            self._opened[job.models] = job.load()

    def run(self, job: ShardJob, shard: int, work: str, key: str) -> None:
        """Process one shard; ``work`` tags its seconds in the metrics, under ``key`` the driver finds its rows done."""
        self.open(job)
        start = time.monotonic()
        with heard_by(RowsDone(key)):
            job.process(self._opened[job.models], shard)
        self._seconds.observe(time.monotonic() - start, {"work": work})

    def try_rows(self, job: ShardJob, shard: int, rows: range) -> None:
        """Process some rows of a shard and keep nothing."""
        self.open(job)
        job.try_rows(self._opened[job.models], shard, rows)

    def rest(self) -> float:
        """Let go of the models; return what this process still holds, as a share of the free memory."""
        self._opened.clear()
        gc.collect()
        return _held()


def _held() -> float:
    """Return what this process holds, as a share of the free memory."""
    return float(psutil.Process().memory_info().rss / psutil.virtual_memory().available)


class ActorPool:
    """Places for ``ShardWorker`` actors in one placement group; an actor is started when it is first asked for."""

    def __init__(self, cluster: Cluster, say: Callable[..., None]) -> None:
        """Reserve the places; ``say`` announces a wait for resources."""
        self.cluster = cluster
        self.num_actors = cluster.num_actors
        # where nodes or GPUs were given to the run, nobody else has their time
        self.starts_all = cluster.gpus_per_actor > 0 or address_of(cluster) is not None
        self.opening_s = 0.0  # the longest that an actor took to start and to open its models
        self._group = reserve(cluster, "actor", cluster.num_actors, say)
        self._actors: dict[int, Any] = {}
        self._trained: Any = None

    def _start(self, index: int) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        resources = {"num_cpus": self.cluster.cpus_per_actor, "num_gpus": self.cluster.gpus_per_actor}
        # no restarts by Ray: the ledger notices a dead actor at once and gives its shard to a new one
        options = {"max_restarts": 0, "max_task_retries": 0, **({} if self.cluster.gpus_per_actor else THREADS)}
        actor = ray.remote(ShardWorker).options(**resources, **options, scheduling_strategy=strategy)
        return actor.remote(self.cluster.gpus_per_actor)

    def has(self, slot: int) -> bool:
        """Return whether there is an actor at a place now."""
        return slot in self._actors

    def actor(self, slot: int) -> Any:
        """Return the handle of the actor at a place; start it where there is none."""
        if slot not in self._actors:
            self._actors[slot] = self._start(slot)
        return self._actors[slot]

    def replace(self, slot: int) -> None:
        """Kill an actor and start another in its place; it may be dead, hang, or be alive but unreachable."""
        ray.kill(self._actors[slot])
        self._actors[slot] = self._start(slot)

    def placed(self) -> bool:
        """Return whether every place is on a node; after a node is lost, Ray looks for another."""
        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def lend(self) -> Any:
        """Return an actor to be one rank on a CPU, all being idle from now on; None where they are to be closed.

        They are where GPUs are used, where the rank wants more than a CPU or than an actor's, and where memory is
        scarce. An actor trains once: DeepSpeed keeps state of a training for the life of its process.
        """
        cluster = self.cluster
        gpus, cpus = cluster.gpus_per_actor + cluster.gpus_per_worker, cluster.cpus_per_worker
        if cluster.num_workers > 1 or gpus > 0 or cpus > min(1.0, cluster.cpus_per_actor):
            return None
        try:
            held = ray.get([actor.rest.remote() for actor in self._actors.values()], timeout=REST_S)
        except (GetTimeoutError, RayError):  # one has died, or hangs
            return None
        if sum(held) >= LITTLE:
            return None
        slot = min(self._actors, default=0)
        if self.has(slot) and self._actors[slot] is self._trained:
            self.replace(slot)
        self._trained = self.actor(slot)
        return self._trained

    def close(self) -> None:
        """Kill the actors and release their resources."""
        for actor in self._actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)


def cause_of(error: Any) -> BaseException:
    """Return the job's own ``CanDistError``, or an ``EnvironmentProblem`` that says what happened.

    What the disk refused an actor is told as to the driver; anything unexpected with the remote traceback.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, CanDistError):
        return cause
    if isinstance(cause, OSError) and cause.errno in MACHINE and cause.filename is not None:
        return EnvironmentProblem(of_machine(cause))
    return EnvironmentProblem(f"a worker failed with an unexpected error:\n{error}")
