"""Ray: connecting to it, and the actors that run the shards of a stage: placed, started, and replaced as they die."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from can_dist.config import Cluster
from can_dist.errors import CanDistError, EnvironmentProblem, Interrupted
from can_dist.job_server import exposure
from can_dist.ray_directory import session_directory
from can_dist.ray_metrics import shard_seconds, tags

# what the driver hands on to the workers of a cluster: never a secret, because Ray shows and logs these.
# OMP_NUM_THREADS is not among them: Ray gives every worker its own share of the CPUs
FORWARDED = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "GLOO_SOCKET_IFNAME",
    "HF_DATASETS_CACHE",
    "HF_DATASETS_OFFLINE",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_OFFLINE",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_IB_HCA",
    "NCCL_SOCKET_IFNAME",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
    "TP_SOCKET_IFNAME",
    "TRANSFORMERS_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
)
QUIET_S = 10.0
"""Actors that find their places sooner are not told of."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job


class ShardJob(Protocol):
    """What an actor does: load once, then process shards. Instances are pickled to the actors."""

    @property
    def out(self) -> Path:
        """The directory of the stage."""

    def load(self) -> Any:
        """Open models; runs in the actor, once per job."""

    def process(self, loaded: Any, shard: int) -> None:
        """Make and commit part ``shard``."""

    def row_names(self, shard: int) -> list[str]:
        """Return what people call each row that goes into a shard, such as "response 'p3/1'"; runs in the driver."""

    def try_rows(self, loaded: Any, shard: int, rows: range) -> None:
        """Do the work of some rows of a shard and keep nothing, to find the row that kills actors."""

    def set_aside(self, shard: int, row: int, why: str) -> bool:
        """Have a shard done without a row from now on; False where this row may not be left out."""

    def halved(self) -> ShardJob | None:
        """Return the same work in passes of half the size, which takes less memory; None where they cannot be."""


class ShardWorker:
    """The actor: keeps what the newest job loaded and runs its shards."""

    def __init__(self) -> None:
        self._job: ShardJob | None = None
        self._loaded: Any = None
        self._seconds = shard_seconds()

    def open(self, job: ShardJob) -> None:
        """Load what a job needs, unless it is there."""
        if job != self._job:
            self._loaded = None  # free the old models before the new ones are loaded
            self._loaded, self._job = job.load(), job

    def run(self, job: ShardJob, shard: int, what: str) -> None:
        """Process one shard."""
        self.open(job)
        start = time.monotonic()
        job.process(self._loaded, shard)
        self._seconds.observe(time.monotonic() - start, tags(what))

    def try_rows(self, job: ShardJob, shard: int, rows: range) -> None:
        """Do the work of some rows of a shard and keep nothing."""
        self.open(job)
        job.try_rows(self._loaded, shard, rows)

    def process_id(self) -> int:
        """Return the process id of the actor."""
        return os.getpid()


def connect(cluster: Cluster) -> None:
    """Connect to the cluster that the config or RAY_ADDRESS names, or start a local Ray; once per process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # what the workers print stays in Ray's logs: errors come back as exceptions, progress through the driver's bars
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # since Ray 2.59 a local Ray makes itself a token and demands it; naming the mode here would skip the making
        # what the driver can import, its workers can: a user's scorer lies in the current directory
        paths = [str(Path.cwd()), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": session_directory()}
    else:
        options |= {"address": address, "runtime_env": {"env_vars": forwarded(os.environ)}}
    try:
        with _own_sigterm():
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EnvironmentProblem(
            f"Ray at {address or 'this machine'} cannot be reached: {error}. "
            "If the cluster uses tokens, export RAY_AUTH_MODE=token and its token."
        ) from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's handler of SIGTERM while Ray starts, which sets one that ends it with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def open_to_the_network() -> str:
    """Return what is wrong when anyone on the network can run commands on the connected cluster, else ''."""
    import ray

    with _own_sigterm():
        dashboard = ray.init(ignore_reinit_error=True, logging_level="ERROR").dashboard_url or ""
    return exposure(ray.get_runtime_context().gcs_address, dashboard)


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the driver that the workers of a cluster get too: those of ``FORWARDED`` that are set.

    What a job's own ``--runtime-env-json`` sets reaches the workers anyway, and Ray refuses a second value.
    """
    submitted = json.loads(environment.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    given = submitted.get("env_vars") or {}
    return {name: environment[name] for name in FORWARDED if name in environment and name not in given}


@contextmanager
def interruptible(ask: Callable[[], object] | None = None, grace_s: float = 0.0) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into ``Interrupted`` (exit code 75) in the main thread.

    With ``ask`` the first signal calls it, and what runs has ``grace_s`` seconds to end by itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    patience = threading.Timer(grace_s, os.kill, (os.getpid(), signal.SIGTERM))  # comes as the second signal
    patience.daemon = True

    def stop(number: int, _frame: Any) -> None:
        if ask is not None and not patience.is_alive() and not patience.finished.is_set():
            patience.start()
            ask()
            return
        kept = "shards are" if ask is None else "work is"
        raise Interrupted(f"stopped by {signal.Signals(number).name}; finished {kept} kept, run again to continue.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except SystemError as error:
        # what a handler raises while Ray deserialises comes out of its compiled code as the cause of one
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise
    finally:
        patience.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


class ActorPool:
    """A fixed number of ``ShardWorker`` actors in one placement group, replaced as they die."""

    def __init__(self, cluster: Cluster, say: Callable[..., None]) -> None:
        """``say`` is told what is waited for."""
        self.cluster = cluster
        self._group = reserve(cluster, "actor", cluster.num_actors, say)
        self._actors = [self._start(index) for index in range(cluster.num_actors)]

    def _start(self, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        return (
            ray.remote(ShardWorker)
            .options(
                num_cpus=self.cluster.cpus_per_actor,
                num_gpus=self.cluster.gpus_per_actor,
                max_restarts=0,  # a dead actor is seen at once, and its shard goes to a new one
                max_task_retries=0,
                scheduling_strategy=strategy,
            )
            .remote()
        )

    @property
    def num_actors(self) -> int:
        """Number of actors, and of the places they have."""
        return len(self._actors)

    def actor(self, slot: int) -> Any:
        """Return the handle of the actor that has a place now."""
        return self._actors[slot]

    def replace(self, slot: int) -> None:
        """Kill an actor, which may be dead, hang, or be cut off and alive, and start another in its place."""
        import ray

        ray.kill(self._actors[slot])
        self._actors[slot] = self._start(slot)

    def placed(self) -> bool:
        """Tell whether every place lies on a node; after the loss of one, Ray looks for others."""
        from ray.util.placement_group import placement_group_table

        return bool(placement_group_table(self._group)["state"] == "CREATED")

    def process_ids(self) -> list[int]:
        """Return the process ids of the actors."""
        import ray

        ids: list[int] = ray.get([actor.process_id.remote() for actor in self._actors])
        return ids

    def close(self) -> None:
        """Stop the actors and give their resources back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


def reserve(cluster: Cluster, role: str, number: int, say: Callable[..., None]) -> Any:
    """Return a placement group for so many 'actor's, spread over nodes, or 'worker's (ranks), close to each other.

    Raises
    ------
    EnvironmentProblem
        When the cluster has no place for all of them within ``wait_resources_s``; ``say`` is told of waiting before.
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
    """Wait until the cluster has room for the ranks of a training: Ray Train itself waits without end, in silence."""
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
    """Say what actors or workers wait for, and what there is."""
    import ray

    whole, free = (
        {k: r.get(k, 0.0) for k in ("CPU", "GPU")} for r in (ray.cluster_resources(), ray.available_resources())
    )
    return f"waiting for {number} x {bundle(cluster, role)}; the cluster has {whole}, of which {free} are free"


def gave_up(cluster: Cluster, role: str, number: int) -> EnvironmentProblem:
    """Return the error after ``wait_resources_s``: what was asked, and what there is."""
    return EnvironmentProblem(
        f"{wanted(cluster, role, number)}. Gave up after cluster.wait_resources_s = {cluster.wait_resources_s:g} s. "
        f"Lower cluster.num_{role}s, cpus_per_{role} or gpus_per_{role}, free the cluster, or add nodes."
    )


def cause_of(error: Any) -> BaseException:
    """Return the job's own exception; anything not ours keeps the remote traceback in its message."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, CanDistError):
        return cause
    return EnvironmentProblem(f"a worker failed with an unexpected error:\n{error}")


@contextmanager
def progress(what: str, total: int, unit: str, *, delay: float = 0.0) -> Iterator[Any]:
    """A tqdm bar with rate and remaining time; where the output is no terminal, one line a minute.

    Work done within ``delay`` seconds shows none.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        unit_scale=total > 1_000_000,
        mininterval=0.5 if terminal else 60,
        dynamic_ncols=terminal,
        smoothing=0.1,
        delay=delay,
    ) as bar:
        yield bar
