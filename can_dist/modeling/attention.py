"""Which kernel computes the attention of packs on this machine, and why: one decision, one sentence.

Two kernels compute a pack in one call: flash-attn, and torch's varlen attention from 2.11 on. Both run on GPUs of
compute capability 8.0 or later, in half precision, with heads of a multiple of 8 up to 256 numbers. Everything else is
computed by torch's SDPA, segment by segment: the same numbers, slower on a GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

FLASH, VARLEN, SDPA = "flash_attn", "varlen_attn", "sdpa"
NEEDED = ("scale", "window_size")  # torch 2.10 has neither
OLDEST_CAPABILITY = (8, 0)
WIDEST_HEAD, HEAD_STEP = 256, 8
REMEDY = "install torch 2.11 or later, or flash-attn: pip install 'can-dist[gpu]'"
REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation flash-attn"
BROKEN_REMEDY = f"install torch 2.11 or later, or build flash-attn for this torch: {REBUILD}"


@dataclass(frozen=True)
class Machine:
    """What decides between the kernels.

    Attributes:
        device: 'cuda' or 'cpu'.
        capability: Compute capability of the GPU, None without one.
        torch_version: Version of torch.
        varlen: Parameters of torch's ``varlen_attn``, None where torch has none.
        flash_version: Version of flash-attn, None where it is not installed.
        flash_error: Why flash-attn cannot be imported, empty when it can (or is not installed).
    """

    device: str
    capability: tuple[int, int] | None
    torch_version: str
    varlen: frozenset[str] | None
    flash_version: str | None
    flash_error: str = ""


@dataclass(frozen=True)
class Attention:
    """The kernel that serves, and why it is this one.

    Attributes:
        kind: 'flash_attn', 'varlen_attn' or 'sdpa'.
        reason: A clause that says why.
        version: Version of the package that the kernel belongs to.
        remedy: What would give a faster kernel on this machine; empty when nothing would.
    """

    kind: str
    reason: str
    version: str
    remedy: str = ""

    def __str__(self) -> str:
        names = {
            FLASH: "flash-attn",
            VARLEN: "varlen_attn of torch",
            SDPA: "sdpa, segment by segment, of torch",
        }
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"attention by {names[self.kind]} {self.version} ({self.reason}{remedy})"


def choose_attention(machine: Machine, dtype: torch.dtype, widths: Collection[int] = ()) -> Attention:
    """Return the kernel for packs on a machine.

    Args:
        machine: What the machine offers.
        dtype: Dtype of queries, keys and values.
        widths: Numbers of a head of the queries and of the values; empty when no model is known.
    """

    def sdpa(reason: str, remedy: str = "") -> Attention:
        return Attention(SDPA, reason, machine.torch_version, remedy)

    if machine.device != "cuda":
        return sdpa("the kernels for packs need a GPU")
    if dtype not in (torch.bfloat16, torch.float16):
        return sdpa(f"the kernels for packs take bf16 and fp16, not {str(dtype).removeprefix('torch.')}")
    if machine.capability is not None and machine.capability < OLDEST_CAPABILITY:
        have, need = (".".join(map(str, version)) for version in (machine.capability, OLDEST_CAPABILITY))
        return sdpa(f"the kernels for packs need compute capability {need}, this GPU has {have}")
    if len(set(widths)) > 1:
        return sdpa(f"queries and values have heads of {' and '.join(map(str, widths))} numbers")
    if any(width % HEAD_STEP or width > WIDEST_HEAD for width in widths):
        width = next(iter(widths))
        return sdpa(
            f"a head has {width} numbers, the kernels for packs take multiples of {HEAD_STEP} up to {WIDEST_HEAD}"
        )
    if machine.flash_version is not None and not machine.flash_error:
        return Attention(FLASH, "it is installed", machine.flash_version)
    flash, remedy = _no_flash(machine)
    if machine.varlen is None:
        return sdpa(f"this torch has no varlen_attn, and {flash}", remedy)
    if missing := [name for name in NEEDED if name not in machine.varlen]:
        return sdpa(f"the varlen_attn of this torch takes no {' and no '.join(missing)}, and {flash}", remedy)
    return Attention(VARLEN, flash, machine.torch_version)


def _no_flash(machine: Machine) -> tuple[str, str]:
    """Say why flash-attn does not serve, and what would help where torch's own kernel does not either."""
    if machine.flash_version is None:
        return "flash-attn is not installed", REMEDY
    # a library that was compiled against another torch misses its symbols
    built = "is for another torch and " if "undefined symbol" in machine.flash_error else ""
    return f"flash-attn {machine.flash_version} {built}cannot be imported: {machine.flash_error}", BROKEN_REMEDY


@functools.cache
def this_machine(device: str) -> Machine:
    """Look at what this process has for tensors on a device ('cuda' or 'cpu'); flash-attn is imported on a GPU."""
    on_gpu = device == "cuda"
    has_gpu = on_gpu and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if has_gpu else None
    varlen = torch_varlen() if on_gpu else None
    version, error = _flash_attn() if on_gpu else (None, "")
    parameters = None if varlen is None else frozenset(inspect.signature(varlen).parameters)
    return Machine(device, capability, torch.__version__, parameters, version, error)


@functools.cache
def attention_for(device: str, dtype: torch.dtype, widths: tuple[int, ...] = ()) -> Attention:
    """Return the kernel that this process uses; see ``choose_attention``."""
    return choose_attention(this_machine(device), dtype, widths)


@functools.cache
def torch_varlen() -> Callable[..., Any] | None:
    """Return torch's ``varlen_attn``; None before torch 2.10."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.cache
def grouped(varlen: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``varlen_attn`` that takes fewer heads of the keys: 2.11 does without a word, later ones want one."""
    if "enable_gqa" in inspect.signature(varlen).parameters:
        return functools.partial(varlen, enable_gqa=True)
    return varlen


def _flash_attn() -> tuple[str | None, str]:
    """Return the version of flash-attn and why it cannot be imported; built for another torch, its symbols miss."""
    if importlib.util.find_spec("flash_attn") is None:
        return None, ""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return version, (str(error).splitlines() or [type(error).__name__])[0]
    return version, ""
