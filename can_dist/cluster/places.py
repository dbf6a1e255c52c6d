"""Places on a cluster: the resources of actors and ranks, reserved, or an error that says what is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from can_dist.config import Cluster
from can_dist.errors import EnvironmentProblem

QUIET_S = 10.0  # a shorter wait for places is not announced


def reserve(cluster: Cluster, role: str, number: int, say: Callable[..., None]) -> Any:
    """Reserve a placement group.

    Args:
        cluster: The resources of one actor or worker, and how long to wait.
        role: 'actor', spread over nodes, or 'worker' (a rank), packed on few nodes.
        number: Actors or workers.
        say: Called with a message when the wait is long.

    Returns:
        The placement group, one bundle per actor or worker.

    Raises:
        EnvironmentProblem: The cluster has no place for all of them within ``wait_resources_s``.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    strategy = {"actor": "SPREAD", "worker": "PACK"}[role]
    group = placement_group([bundle(cluster, role)] * number, strategy=strategy)
    if not group.wait(min(QUIET_S, cluster.wait_resources_s)):
        say(wanted(cluster, role, number), event="waiting")
        if not group.wait(cluster.wait_resources_s):
            remove_placement_group(group)
            raise gave_up(cluster, role, number)
    return group


def check_room_for_workers(cluster: Cluster, say: Callable[..., None]) -> None:
    """Wait until the cluster has room for the ranks of a training: Ray Train would wait forever, in silence."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(reserve(cluster, "worker", cluster.num_workers, say))


def bundle(cluster: Cluster, role: str) -> dict[str, float]:
    """Return the resources of one 'actor', or of one 'worker'."""
    cpus, gpus = {
        "actor": (cluster.cpus_per_actor, cluster.gpus_per_actor),
        "worker": (cluster.cpus_per_worker, cluster.gpus_per_worker),
    }[role]
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def wanted(cluster: Cluster, role: str, number: int) -> str:
    """Return a message: the resources that actors or workers wait for, and those of the cluster."""
    import ray

    whole, free = (
        {k: r.get(k, 0.0) for k in ("CPU", "GPU")} for r in (ray.cluster_resources(), ray.available_resources())
    )
    return f"waiting for {number} x {bundle(cluster, role)}; the cluster has {whole}, of which {free} are free"


def gave_up(cluster: Cluster, role: str, number: int) -> EnvironmentProblem:
    """Return the error after ``wait_resources_s``: the resources wanted, and those of the cluster."""
    return EnvironmentProblem(
        f"{wanted(cluster, role, number)}. Gave up after cluster.wait_resources_s = {cluster.wait_resources_s:g} s.",
        f"Lower cluster.num_{role}s, cpus_per_{role} or gpus_per_{role}, free the cluster, or add nodes.",
    )
