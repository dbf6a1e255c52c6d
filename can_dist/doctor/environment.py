"""The machine and what is installed on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from can_dist.config import Config
from can_dist.doctor.finding import Finding, error, note, ok, warning
from can_dist.training.extensions import (
    describe,
    extensions_directory,
    operation_directories,
    stale_locks,
    unsafe_build,
    unsafe_remedy,
)

if TYPE_CHECKING:
    from can_dist.modeling.attention import Attention


def check_environment(config: Config | None) -> list[Finding]:
    """Check Python, the packages, GPUs, communication, attention and the directories of compiled extensions."""
    return [
        ok("Python", f"{platform.python_version()} at {sys.executable}"),  # older ones cannot import this
        *packages(declared(), installed_version),
        *gpus(config),
        communication(),
        attention(attention_here()),
        *extensions(),
    ]


def declared() -> list[str]:
    """Return what can-dist requires, as its installed metadata say; empty when it runs from a copy."""
    try:
        return importlib.metadata.requires("can-dist") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages(requirements: Iterable[str], version_of: Callable[[str], str | None]) -> list[Finding]:
    """Compare what is installed with the bounds; extras may be absent."""
    findings, good = [], []
    for text in requirements:
        requirement = Requirement(text)
        is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
        if requirement.marker is not None and not is_extra and not requirement.marker.evaluate():
            continue
        version = version_of(requirement.name)
        if version is None and is_extra:
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            state = f"{version or 'not installed'}, required is {requirement.specifier}"
            remedy = f"pip install '{requirement.name}{requirement.specifier}', or run make setup."
            findings.append((warning if is_extra else error)(requirement.name, state, remedy))
        elif requirement.name in ("ray", "deepspeed", "torch", "transformers"):
            good.append(f"{requirement.name} {version}")
    if findings or good:
        return [*findings, ok("packages", ", ".join(good) or "see above")] if good else findings
    return [note("packages", "can-dist is not installed here, so its requirements are not known", "pip install -e .")]


def gpus(config: Config | None) -> list[Finding]:
    """List the GPUs that torch sees, and compare with what the configuration asks of this machine."""
    import torch

    from can_dist.modeling.precision import OLDEST_BF16

    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    per_process = max(config.cluster.gpus_per_actor, config.cluster.gpus_per_worker) if config else 0
    if names:
        shown = ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in names)
        is_old = torch.cuda.get_device_capability() < OLDEST_BF16
        seen = f"{shown}; CUDA {torch.version.cuda}, {'fp32: too old for bf16' if is_old else 'bf16'}"
        if config is not None and not per_process:
            remedy = "Set cluster.gpus_per_actor and cluster.gpus_per_worker to 1."
            return [warning("GPUs", f"{seen}; the configuration asks for none, models run in fp32 on the CPU", remedy)]
        if is_old and config is not None and config.precision == "bf16":
            return [error("GPUs", f"{seen}, which the configuration asks for", "Set precision: fp32.")]
        return [ok("GPUs", seen)]
    state = f"none that torch {torch.__version__} can use; models run in fp32 on CPU"
    if shutil.which("nvidia-smi"):
        remedy = "Install a torch that is built for the CUDA version that nvidia-smi shows."
        return [warning("GPUs", f"{state}, though nvidia-smi is there", remedy)]
    if per_process and config is not None and not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        remedy = (
            "Set cluster.gpus_per_actor and cluster.gpus_per_worker to 0, or cluster.address to a cluster with GPUs."
        )
        return [warning("GPUs", f"{state}, and the configuration asks for {per_process:g} each", remedy)]
    return [note("GPUs", state)]


def communication() -> Finding:
    """Check the library through which the ranks would communicate."""
    import torch

    needed = "nccl" if torch.cuda.is_available() else "gloo"
    distributed = torch.distributed
    is_available = {
        "nccl": distributed.is_available() and distributed.is_nccl_available(),
        "gloo": distributed.is_available() and distributed.is_gloo_available(),
    }
    shown = ", ".join(f"{name} {'there' if yes else 'absent'}" for name, yes in is_available.items())
    if not is_available[needed]:
        return error("communication", f"{shown}; {needed} is needed", "Install torch from its official wheels.")
    return ok("communication", f"{shown}; ranks use {needed}")


def attention(chosen: Attention) -> Finding:
    """Report the attention of scoring and training, with its reason, and that of sampling."""
    from can_dist.modeling.attention import HEAD_STEP, SDPA, VARLEN, WIDEST_HEAD

    reach = "" if chosen.kind == SDPA else f", for heads of a multiple of {HEAD_STEP} up to {WIDEST_HEAD} numbers"
    state = f"scoring and training: {chosen}{reach}; sampling: torch's sdpa (transformers' default)"
    if chosen.remedy:
        return warning("attention", state, f"{chosen.remedy[0].upper()}{chosen.remedy[1:]}.")
    if chosen.kind == VARLEN:
        return note("attention", state, "To score and train by flash-attn: pip install 'can-dist[gpu]'.")
    return ok("attention", state)


def attention_here() -> Attention:
    """Return the attention of packs on this machine, in the precision that ``auto`` means here."""

    from can_dist.modeling.attention import attention_for
    from can_dist.modeling.precision import device, torch_dtype

    return attention_for(device(), torch_dtype("auto"))


def extensions() -> list[Finding]:
    """Look for locks of killed builds, and for places where others could plant compiled code."""
    findings = []
    if unsafe := unsafe_build(launched=False):
        path, reason = unsafe
        findings.append(error("compiled extensions", f"{path} {reason}", f"{unsafe_remedy(path)}."))
    if locks := stale_locks(operation_directories(launched=False)):
        state = f"left by a killed build, and waited for without end: {describe(locks)}"
        remedy = f"If nothing compiles there now: rm {' '.join(str(lock.path) for lock in locks)}"
        findings.append(error("compiled extensions", state, remedy))
    return findings or [ok("compiled extensions", f"no stale lock in {extensions_directory()}")]
