"""The precision and the device that a model runs in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from can_dist.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch


OLDEST_BF16 = (8, 0)  # compute capability of a GPU


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
