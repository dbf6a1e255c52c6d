"""The process group: joining it, failing together, leaving it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from can_dist import errors
from can_dist.errors import CanDistError, EnvironmentProblem
from can_dist.modeling.precision import say_accelerator
from can_dist.training.extensions import check_build_directories, without_mlflow

Value = TypeVar("Value")
BACKSTOP_S = 60.0  # collectives give up later than the heartbeat, whose message names the rank
_stop = threading.Event()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Make a process group of this one rank, which needs no port; take back what ZeRO-3 puts in torch's place."""
    linear = torch.nn.functional.linear
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        yield
    finally:
        torch.nn.functional.linear = linear


def join(hang_timeout_s: float) -> None:
    """Initialise the process group of a launched rank, or take the one that was made for it under Ray.

    From here on SIGTERM and SIGINT only set a flag in a launched rank, see ``stop_wanted``.

    Raises:
        EnvironmentProblem: when the ranks do not find each other; or, on all ranks, when one of them would wait for the
            lock of a killed build. The group is left.
    """
    if threading.current_thread() is threading.main_thread():  # in Ray's workers the driver handles signals
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _stop.set())
    # DeepSpeed calls collectives by names that torch is renaming
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    say_accelerator()
    with without_mlflow():
        import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # transformers checks its tensor-parallel plan, which is not in use, and complains
    logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
    if get_accelerator().device_name() == "cpu":
        # used by inference only, and building it takes a compiler and a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = "gloo"
    else:
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        timeout = timedelta(seconds=hang_timeout_s + BACKSTOP_S)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    except dist.DistError as error:
        here = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        raise EnvironmentProblem(
            f"the ranks did not find each other ({here}): {str(error).splitlines()[0]} "
            "Start as many ranks as WORLD_SIZE, each RANK once, on a port that is free."
        ) from None
    try:
        with agreed():  # every node has its own
            check_build_directories(launched=True)
    except CanDistError:
        leave()
        raise


def leave() -> None:
    """Leave the group together. Every rank must call this; a rank that failed alone must not."""
    dist.barrier()
    dist.destroy_process_group()


def stop_wanted() -> bool:
    """Return whether this process was sent SIGTERM or SIGINT."""
    return _stop.is_set()


def gathered(value: Value) -> list[Value]:
    """Return the values of all ranks, in order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def of_first(value: Value) -> Value:
    """Return the value of rank 0."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def say(message: str) -> None:
    """Print a line, on rank 0."""
    if dist.get_rank() == 0:
        print(f"can-dist: train: {message}", file=sys.stderr, flush=True)


def require_same(value: str, name: str) -> None:
    """Raise ``EnvironmentProblem`` on all ranks when ``value``, called ``name``, differs between them."""
    values = gathered(value)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise EnvironmentProblem(
            f"rank(s) {different} were started with another {name} than rank 0. "
            "Start all ranks with the same command, on the same files."
        )


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Raise a ``CanDistError`` that any rank meets in this block on all ranks, so that none waits for another.

    An ``OSError`` becomes an ``EnvironmentProblem``. The block must not contain collectives.
    """
    failure: tuple[str, str] | None = None
    try:
        yield
    except CanDistError as error:
        failure = type(error).__name__, str(error)
    except OSError as error:  # its text names the file and the cause
        failure = EnvironmentProblem.__name__, str(error)
    reports = gathered(failure)
    failures = [(rank, *report) for rank, report in enumerate(reports) if report]
    if failures:
        rank, kind, message = failures[0]
        place = "" if len(failures) == len(reports) or len(reports) == 1 else f"on rank {rank} only: "
        raise getattr(errors, kind)(place + message)
