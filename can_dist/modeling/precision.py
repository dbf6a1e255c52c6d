"""The precision and the device that a model runs in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from can_dist.errors import ConfigError, EnvironmentProblem

if TYPE_CHECKING:
    import torch

    from can_dist.config import Config


OLDEST_BF16 = (8, 0)  # compute capability of a GPU


def run_precision(config: Config) -> str:
    """Return the precision of a run's models, 'bf16' or 'fp32'.

    auto is fp32 where ``cluster`` gives neither actors nor workers a GPU, else what this machine's GPU computes in: the
    process that starts a run decides for all, so that every stage has the same.

    Raises:
        EnvironmentProblem: When GPUs are asked for and this machine has none to look at, or bf16 is given and its GPU
            does not compute in it.
    """
    import torch

    asks = max(config.cluster.gpus_per_actor, config.cluster.gpus_per_worker) > 0
    if config.precision != "auto":
        return resolve_precision(config.precision) if asks else config.precision
    if asks and not torch.cuda.is_available():
        raise EnvironmentProblem(
            "precision: auto looks at the GPU of the machine that starts the run, and torch sees none here, while "
            "cluster.gpus_per_actor or cluster.gpus_per_worker asks for GPUs.",
            "Set precision: bf16 (for GPUs of compute capability 8.0 or later: A100, L40S, H100) or fp32; or set both "
            "numbers of GPUs to 0.",
        )
    return resolve_precision("auto") if asks else "fp32"


def require_known_gpus(config: Config) -> None:
    """Raise ``ConfigError`` in a launched rank that would train in fp32 on a GPU that nobody gave the run."""
    import torch

    asks = max(config.cluster.gpus_per_actor, config.cluster.gpus_per_worker) > 0
    if config.precision == "auto" and not asks and torch.cuda.is_available():
        raise ConfigError(
            "precision: auto is fp32, since cluster.gpus_per_actor and cluster.gpus_per_worker are 0, and the launched "
            "ranks see GPUs.",
            "Set cluster.gpus_per_worker: 1, or the precision.",
        )


def say_accelerator() -> None:
    """Set DS_ACCELERATOR=cpu before DeepSpeed is imported on a machine without a GPU; its own detection warns.

    transformers imports it too, when it saves a model.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def resolve_precision(precision: str) -> str:
    """Return 'bf16' or 'fp32'; auto is bf16 on a GPU that computes in it (a CPU is 30-170 times slower in it).

    Raises:
        EnvironmentProblem: When bf16 is given and this machine's GPU does not compute in it.
    """
    import torch

    if precision == "fp32" or not torch.cuda.is_available():
        return "fp32" if precision == "auto" else precision
    capability = torch.cuda.get_device_capability()
    if capability >= OLDEST_BF16:
        return "bf16"
    if precision == "auto":
        return "fp32"
    have, need = (".".join(map(str, version)) for version in (capability, OLDEST_BF16))
    raise EnvironmentProblem(
        f"precision: bf16: {torch.cuda.get_device_name()} has compute capability {have}, bf16 needs {need}.",
        "Set precision: fp32, or take a newer GPU.",
    )


def torch_dtype(precision: str) -> torch.dtype:
    """Return the torch dtype of a precision name."""
    import torch

    return torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32


def device() -> str:
    """Return the device that models live on in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
