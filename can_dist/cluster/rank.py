"""The one rank of a training as a plain actor, in places of its own or in those of idle actors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from can_dist.cluster.places import reserve
from can_dist.config import Cluster

TICK_S = 1.0  # a signal is handled as soon


class Rank:
    """The actor; its work runs in a thread that is not the main one, so that signals stay the driver's to handle."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        """Set environment variables, before the libraries that read them are imported."""
        os.environ |= {**variables, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}

    def run(self, work: Callable[[str], None], spec: str) -> None:
        """Do the work of the rank."""
        work(spec)

    def alive(self) -> None:
        """Answer, beside the work."""


def run_rank(
    cluster: Cluster,
    work: Callable[[str], None],
    spec: str,
    variables: Mapping[str, str],
    lent: Any,
    say: Callable[..., None],
) -> None:
    """Run ``work(spec)`` in a process of its own, with environment variables, and wait for its end.

    Args:
        cluster: The resources of the rank.
        work: Importable by name.
        spec: Its argument.
        variables: Environment variables.
        lent: The placement group of idle actors, whose CPUs are the rank's meanwhile; None: it reserves its own.
        say: Called with a message when the wait for a place is long.

    Raises:
        EnvironmentProblem: The cluster has no place within ``wait_resources_s``.
        RayError: The process died, gave no sign of life for ``hang_timeout_s``, or the work raised something.
    """
    group = reserve(cluster, "worker", 1, say) if lent is None else lent
    resources = {"num_cpus": 0} if lent is not None else {"num_cpus": cluster.cpus_per_worker}
    rank = (
        ray.remote(Rank)
        .options(
            **resources,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=2,  # more than one, so that methods run in threads
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        )
        .remote(variables)
    )
    try:
        _wait(rank, rank.run.remote(work, spec), cluster.hang_timeout_s)
    finally:
        ray.kill(rank)
        if lent is None:
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
