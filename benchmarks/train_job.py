"""One training of the benchmarks: what is to be done, and what both sides share."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

BETA, SEED = 0.1, 3
# at 2e-5 losses in bf16 are a third apart after four steps, whatever computes them
LEARNING_RATE = {"cpu": 2e-5, "cuda": 1e-6}


@dataclass(frozen=True)
class Job:
    """What a side is to do.

    Attributes:
        side: 'ours', 'trl' (precomputed reference), 'trl_zero3' (the same under our ZeRO-3), or 'trl_default'.
        work: A name of ``pairs.SHAPES`` or ``pairs.REAL``.
        model: Directory of a language model.
        output: File that the record is appended to, as a line of JSON.
        num_pairs: Pairs to train on, once.
        batch_size: Pairs of a step.
        context: Tokens that a pair may have at most.
        device: 'cpu' or 'cuda'.
        core: The core that the process is pinned to; None for all.
        tokens_per_pack: Ours.
        micro_batch: TRL's, in pairs.
        strategy: TRL's order of the pairs.
        activation_checkpointing: On both sides.
        lora: Adapters instead of all weights (ours).
        kernels: 'liger', or None (ours).
        profile: Whether one of our steps is profiled, which makes it slower.
    """

    side: str
    work: str
    model: str
    output: str
    num_pairs: int
    batch_size: int
    context: int
    device: str = "cpu"
    core: int | None = None
    tokens_per_pack: int = 2048
    micro_batch: int = 1
    strategy: str = "group_by_length"
    activation_checkpointing: bool = False
    lora: bool = False
    kernels: str | None = None
    profile: bool = False


def forget(job: Job) -> None:
    """Give a GPU's memory back, and count its peak anew."""
    import torch

    gc.collect()
    if job.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def wait(job: Job) -> None:
    """Wait for a GPU, so that a time is that of the work and not of asking for it."""
    import torch

    if job.device == "cuda":
        torch.cuda.synchronize()


def precision_of(job: Job) -> str:
    """Return what our precision 'auto' is on the job's device."""
    return "bf16" if job.device == "cuda" else "fp32"


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """Be the only rank of a launch; afterwards TRL must not take this process for a rank."""
    port = str(free_port())
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= names
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
