"""The one rank of a training: in the process of an idle actor, which has imported the libraries, or in its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from can_dist.cluster.places import reserve
from can_dist.config import Cluster

TICK_S = 0.5  # a signal is handled as soon
THREADS = {"max_concurrency": 2}
"""Of an actor that may be a rank: it says that it lives beside its work, and works in a thread that is not the main
one, so that signals stay the driver's to handle."""


class Rank:
    """The actor."""

    def train(self, work: Callable[[str], None], spec: str, variables: Mapping[str, str]) -> None:
        """Do the work of the rank, with environment variables that DeepSpeed reads when it is imported."""
        with _environment({**variables, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}):
            work(spec)

    def alive(self) -> None:
        """Answer, beside the work."""


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def run_rank(
    cluster: Cluster,
    work: Callable[[str], None],
    spec: str,
    variables: Mapping[str, str],
    lent: Any,
    say: Callable[..., None],
) -> None:
    """Run ``work(spec)`` in another process, with environment variables, and wait for its end.

    Args:
        cluster: The resources of the rank.
        work: Importable by name.
        spec: Its argument.
        variables: Environment variables.
        lent: An idle actor to be the rank; None: a new one, in a place that it reserves.
        say: Called with a message when the wait for a place is long.

    Raises:
        EnvironmentProblem: The cluster has no place within ``wait_resources_s``.
        RayError: The process died, gave no sign of life for ``hang_timeout_s``, or the work raised something.
    """
    if lent is not None:
        _wait(lent, lent.train.remote(work, spec, variables), cluster.hang_timeout_s)
        return
    group = reserve(cluster, "worker", 1, say)
    rank = (
        ray.remote(Rank)
        .options(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            **THREADS,
        )
        .remote()
    )
    try:
        _wait(rank, rank.train.remote(work, spec, variables), cluster.hang_timeout_s)
    finally:
        ray.kill(rank)
        remove_placement_group(group)


def _wait(rank: Any, done: Any, hang_timeout_s: float) -> None:
    sign, since = rank.alive.remote(), time.monotonic()
    while not ray.wait([done], timeout=TICK_S)[0]:
        if ray.wait([sign], timeout=0)[0]:
            sign, since = rank.alive.remote(), time.monotonic()
        elif time.monotonic() - since > hang_timeout_s:
            raise GetTimeoutError(
                f"rank 0 gave no sign of life for cluster.hang_timeout_s = {hang_timeout_s:g} s: stopped, or cut off."
            )
    ray.get(done)
