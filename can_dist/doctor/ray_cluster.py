"""The Ray cluster that a run would use: whether it can be reached, by whom, and what it has."""

from __future__ import annotations

import os
import socket

from can_dist.cluster.local_ray import private_directory, token_exposure, token_path
from can_dist.config import Cluster
from can_dist.doctor.finding import Finding, Severity, error, note, ok, refusal, warning
from can_dist.errors import EnvironmentProblem

TIMEOUT_S = 3


def check_ray(cluster: Cluster) -> list[Finding]:
    """Connect to the cluster that the configuration or RAY_ADDRESS names; starts none."""
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return [_local()]
    if address.startswith("http"):
        remedy = "Give the driver host:port of the head (6379 by default); the URL is for ray job submit."
        return [error("Ray", f"{address} is the address of a job server, not of a cluster", remedy)]
    if problem := _unreachable(address):
        return [error("Ray", problem, "Start the head, or correct cluster.address or RAY_ADDRESS.")]
    return _connected(cluster, address)


def _local() -> Finding:
    """Say where a local Ray would keep its sessions, and whether anybody else could command it."""
    try:
        directory = private_directory()
    except EnvironmentProblem as problem:
        return refusal("Ray", problem)
    state = f"no address given: a run starts a local Ray on the loopback interface, whose sessions lie in {directory}"
    path = token_path()
    if path is not None and path.exists() and (exposed := token_exposure(path)):
        new = "A run closes it to others. Delete it if anybody may have read it and no cluster uses it."
        return warning("Ray", f"{state}; its token {path} {exposed}", new)
    return ok("Ray", f"{state}; it demands a token that only you can read")


def _unreachable(address: str) -> str:
    """Return why nothing listens at ``host:port``, or ''; Ray itself would try for 20 seconds."""
    host, separator, port = address.rpartition(":")
    if address in ("auto", "local") or address.startswith("ray://"):
        return ""
    if not separator or not port.isdigit():
        return f"{address}: expected host:port"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
    except OSError as cause:
        return f"{address}: nothing answers ({cause})"
    return ""


def _connected(cluster: Cluster, address: str) -> list[Finding]:
    import ray

    from can_dist.cluster.connection import connect, open_to_the_network

    before = ray.is_initialized()
    try:
        connect(cluster)
    except EnvironmentProblem as problem:
        return [refusal("Ray", problem)]
    try:
        exposed = open_to_the_network()
        if exposed:
            authentication = refusal("Ray authentication", exposed, Severity.WARNING)
        else:
            authentication = ok("Ray authentication", "the job server refuses strangers, or answers on loopback only")
        totals = {name: float(number) for name, number in ray.cluster_resources().items()}
        return [ok("Ray", f"{address}: Ray {ray.__version__}"), authentication, resources(cluster, totals)]
    finally:
        if not before:
            ray.shutdown()


def resources(cluster: Cluster, totals: dict[str, float]) -> Finding:
    """Compare the resources that the stages request with those of the cluster."""
    requests = {
        "actors": (cluster.num_actors, {"CPU": cluster.cpus_per_actor, "GPU": cluster.gpus_per_actor}),
        "workers": (cluster.num_workers, {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}),
    }
    short = [
        f"cluster.num_{role} = {number} with {each:g} {unit} each, the cluster has {totals.get(unit, 0):g} {unit}"
        for role, (number, bundle) in requests.items()
        for unit, each in bundle.items()
        if number * each > totals.get(unit, 0)
    ]
    shown = ", ".join(f"{totals.get(unit, 0):g} {unit}" for unit in ("CPU", "GPU"))
    if short:
        remedy = f"Lower them, or add nodes; an autoscaling cluster has {cluster.wait_resources_s:g} s to do so."
        return warning("Ray resources", "; ".join(short), remedy)
    return ok("Ray resources", shown) if totals else note("Ray resources", "none reported")
