"""The ranks of a training on Ray: a worker group of Ray Train, or one plain actor where one rank is all.

A group that dies, or the one rank, is restarted from its newest checkpoint. The loop is the same, and so is the policy,
to the byte. Ray Train starts six processes beside its ranks, which one rank has no use for.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from can_dist.cluster.connection import connect
from can_dist.config import Cluster
from can_dist.console import interruptible
from can_dist.errors import CanDistError, EnvironmentProblem, Interrupted
from can_dist.tables.artifacts import write_json
from can_dist.training import STOP
from can_dist.training.extensions import extensions_directory
from can_dist.training.heartbeat import read_hang
from can_dist.training.ranks import BACKSTOP_S
from can_dist.training.spec import TrainSpec
from can_dist.workspace import Workspace

FAILURE = "FAILURE.json"


def run_ranks(work: Workspace, directory: Path, spec: str, lent: Any) -> None:
    """Run the ranks of a training; they leave its files, and where they fail in order ``FAILURE``, in ``directory``.

    Args:
        work: The run.
        directory: Of the training.
        spec: A ``TrainSpec`` as JSON.
        lent: An idle actor to be the one rank; None: it gets a process and a place of its own.

    Raises:
        EnvironmentProblem: Ranks died, or hung, more often than ``cluster.max_failures``; the message names them.
    """
    cluster = work.config.cluster
    connect(cluster)
    with interruptible((directory / STOP).touch, cluster.stop_grace_s):
        try:
            if cluster.num_workers == 1:
                _run_alone(work, spec, lent)
            else:
                _run_group(cluster, directory, spec)
        except CanDistError:
            raise
        except Exception as error:
            if type(error).__module__.startswith("ray."):
                goes_on = "The same command goes on from the newest checkpoint."
                why = read_hang(directory) or f"{_dead_ranks(error)}\n{goes_on}"
                raise EnvironmentProblem(f"training stopped, after {cluster.max_failures} restart(s): {why}") from error
            raise


def _run_alone(work: Workspace, spec: str, lent: Any) -> None:
    """Run one rank in the lent actor; again where it fails, in a process of its own."""
    from ray.exceptions import RayError

    from can_dist.cluster.rank import run_rank

    cluster = work.config.cluster
    variables = _worker_environment(cluster.gpus_per_worker > 0)
    for failures in range(cluster.max_failures + 1):
        try:
            run_rank(cluster, _alone, spec, variables, lent, work.say)
            return
        except RayError:
            if failures == cluster.max_failures:
                raise
            work.release_actors()
            lent = None


def _run_group(cluster: Cluster, directory: Path, spec: str) -> None:
    """Run the ranks as one Ray Train worker group."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = cluster.gpus_per_worker > 0
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": cluster.gpus_per_worker} if use_gpu else {})
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"spec": spec},
        scaling_config=ScalingConfig(num_workers=cluster.num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(cluster.hang_timeout_s + BACKSTOP_S)
        ),
        run_config=RunConfig(
            name="group",
            storage_path=str((directory / "ray").resolve()),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": _worker_environment(use_gpu)},
        ),
    )
    shutil.rmtree(directory / "ray", ignore_errors=True)
    trainer.fit()


def _dead_ranks(error: Exception) -> str:
    """Return which ranks' processes died; if none did, Ray's message with the ranks' own tracebacks."""
    from ray.exceptions import RayActorError

    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    # the other ranks fail because of them, with network errors
    died = {
        rank: str(failure)
        for rank, failure in failures.items()
        if type(failure).__name__ == "WorkerHealthCheckFailedError"
    }
    if isinstance(error, RayActorError):
        died = {0: str(error)}
    if not died:
        return str(error)
    places = {rank: re.search(r"pid: (\d+).*?ip: (\S+)", text, re.DOTALL) for rank, text in died.items()}
    named = [f"rank {rank}" + (f" (process {m[1]} on {m[2]})" if m else "") for rank, m in sorted(places.items())]
    return (
        f"{', '.join(named)} died. Killed, out of memory, or its node was lost: see the node's logs (dmesg), and raise "
        "cluster.max_failures if that is to be expected."
    )


def _ray_worker(config: dict[str, Any]) -> None:
    """Run one rank; a ``CanDistError`` reaches the driver by file: if it were raised, Ray would restart the group."""
    from can_dist.training.engine import train_worker

    try:
        train_worker(config["spec"])
    except (CanDistError, Interrupted) as error:
        if os.environ["RANK"] == "0":
            directory = TrainSpec.model_validate_json(config["spec"]).directory
            write_json(directory / FAILURE, {"type": type(error).__name__, "message": str(error)})


def _alone(spec: str) -> None:
    """Run the one rank, in a process that may score afterwards."""
    from can_dist.training.ranks import alone

    with alone():
        _ray_worker({"spec": spec})


def _worker_environment(use_gpu: bool) -> dict[str, str]:
    """Return the variables of a rank; Ray leaves the machine's GPUs visible to workers that were given none."""
    # DeepSpeed counts CPUs by a process at every update, and compiles an optimizer that is not in use: a second
    on_cpu = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "1", "TORCHDYNAMO_DISABLE": "1"}
    without = {} if use_gpu else on_cpu
    return {"RAY_TRAIN_RUN": "1", "TORCH_EXTENSIONS_DIR": _extensions_directory(), **without}


def _extensions_directory() -> str:
    path = extensions_directory()
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return str(path)
