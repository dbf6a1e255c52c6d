"""The connection to a Ray cluster, or a Ray of this machine's own."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from can_dist.cluster.exposure import exposure
from can_dist.cluster.local_ray import listen_on_loopback, make_private, own_session
from can_dist.config import Cluster
from can_dist.errors import EnvironmentProblem

# variables that the driver passes to the workers of a cluster: never a secret, because Ray shows and logs them.
# OMP_NUM_THREADS is left out: Ray gives every worker its own share of the CPUs
FORWARDED = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME",
    "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_DISABLE_PROGRESS_BARS",
    "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY",
)  # fmt: skip
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job


def address_of(cluster: Cluster) -> str | None:
    """Return the address of the Ray cluster to connect to; None: a Ray of this machine's own."""
    return cluster.address or os.environ.get("RAY_ADDRESS")


def connect(cluster: Cluster) -> None:
    """Connect to the cluster that the config or RAY_ADDRESS names, or start a local Ray; once per process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    address = address_of(cluster)
    # the workers' prints stay in Ray's logs: errors return as exceptions, progress through the driver's bars
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # since Ray 2.59 a local Ray demands a token unless told otherwise
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": make_private()}
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # Ray would start a worker for each CPU
        # Ray would put the current directory first on the workers' import path; ``import_callable`` searches it last
        options["job_config"] = ray.job_config.JobConfig(_client_job=True)
    else:
        listen_on_loopback(False)
        options |= {"address": address, "runtime_env": {"env_vars": forwarded(os.environ)}}
    try:
        with _own_sigterm(), own_session():
            ray.init(**options)
        # Ray prints deaths, at any time and on standard output, where programs read paths; our messages tell of them
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
    except Exception as error:
        # Ray raises a plain Exception where a node does not start in time
        if not isinstance(error, (ConnectionError, RuntimeError, ValueError)) and type(error) is not Exception:
            raise
        raise EnvironmentProblem(
            f"Ray at {address or 'this machine'} cannot be reached: {str(error).rstrip('.')}.",
            "If the cluster uses tokens, export RAY_AUTH_MODE=token and its token.",
        ) from None


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the process's handler of SIGTERM: Ray's start replaces it by one that exits with code 15.

    It does so before it starts its processes, which takes seconds. Between the start of its compiled core and the end
    of ``ray.init`` a handler of that core kills.
    """
    import ray._private.utils

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, theirs = signal.getsignal(signal.SIGTERM), ray._private.utils.set_sigterm_handler
    ray._private.utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        ray._private.utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, before)


def open_to_the_network() -> EnvironmentProblem | None:
    """Return the error if anyone on the network can run commands on the connected cluster, else None."""
    import ray

    with _own_sigterm():
        dashboard = ray.init(ignore_reinit_error=True, logging_level="ERROR").dashboard_url or ""
    return exposure(ray.get_runtime_context().gcs_address, dashboard)


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the driver that are passed to the workers: those of ``FORWARDED`` that are set.

    Variables of a job's own ``--runtime-env-json`` reach the workers anyway, and Ray refuses a second value.
    """
    submitted = json.loads(environment.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    given = submitted.get("env_vars") or {}
    return {name: environment[name] for name in FORWARDED if name in environment and name not in given}
