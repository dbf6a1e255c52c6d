"""The directories in which torch compiles DeepSpeed's extensions, and the locks that killed builds leave there.

A build takes a file ``lock`` in its directory; another process that needs the directory waits for it silently and
forever. A process that is killed while it builds leaves its lock behind.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from can_dist.errors import EnvironmentProblem

VARIABLE = "TORCH_EXTENSIONS_DIR"
STALE_S = 300.0  # the slowest build seen took 92 s
OPERATIONS = ("async_io", "cpu_adagrad", "cpu_adam", "cpu_lion", "deepspeed_shm_comm", "fused_adam", "fused_lamb",
              "fused_lion", "pin_memory", "utils")  # fmt: skip
"""What DeepSpeed compiles for a training."""


@dataclass(frozen=True)
class BuildLock:
    """A lock that no process of this machine holds, and which is older than any build."""

    path: Path
    age_s: float


@contextlib.contextmanager
def without_mlflow() -> Iterator[None]:
    """Import DeepSpeed in this block; its tuner would import MLflow where that is installed, a second of CPU."""
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules["mlflow"]


def extensions_directory() -> Path:
    """Return the private directory of a run's own ranks; torch's default is shared by all projects.

    It is that of this interpreter and this torch: code compiled for another is not loaded.
    """
    if VARIABLE in os.environ:
        return Path(os.environ[VARIABLE])
    here = f"{_python()}-torch{version('torch')}"
    return Path.home() / ".cache" / "can_dist" / "torch_extensions" / here


def operation_directories(*, launched: bool) -> list[Path]:
    """Return the directories, each of one operation, in which a training of this interpreter would compile.

    Args:
        launched: by the ranks that another launcher started, which share torch's own directory with other projects.
    """
    own = extensions_directory()
    if VARIABLE in os.environ or not launched:
        return sorted(path for path in own.glob("*") if path.is_dir())
    shared = Path.home() / ".cache" / "torch_extensions"
    return sorted(path for path in shared.glob(f"{_python()}_*/*") if path.name in OPERATIONS)


def stale_locks(directories: Iterable[Path]) -> list[BuildLock]:
    """Return the locks of builds that ended without removing them, in directories of one operation each."""
    locks = []
    for path in (directory / "lock" for directory in directories):
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # none, or the build has just ended
            continue
        if age > STALE_S:
            locks.append(BuildLock(path, age))
    held = _open_files() if locks else set()
    return [lock for lock in locks if lock.path.resolve() not in held]


def _python() -> str:
    return f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"


def unsafe_reason(path: Path) -> str:
    """Return why somebody else could plant code in an existing file or directory, or ''."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (id {status.st_uid})"
    if status.st_mode & stat.S_IWOTH:
        return "is writable by every user of this machine"
    if status.st_mode & stat.S_IWGRP:
        return f"is writable by its group (id {status.st_gid})"
    return ""


def unsafe_below(directory: Path) -> tuple[Path, str] | None:
    """Return the first path at or below ``directory`` in which others could plant code, and why, or None.

    Group rights below a directory that nobody else can enter let nobody in, so there only owners count.
    """
    if reason := unsafe_reason(directory):
        return directory, reason
    closed = directory.is_dir() and not directory.stat().st_mode & 0o077
    for path in sorted(directory.rglob("*")):
        reason = unsafe_reason(path)
        if reason and not (closed and reason.startswith("is writable")):
            return path, reason
    return None


def unsafe_build(*, launched: bool) -> tuple[Path, str] | None:
    """Return the first path in which others could plant code that a training would load, and why, or None."""
    own = extensions_directory()
    if VARIABLE in os.environ or not launched:
        return unsafe_below(own)
    reasons = (unsafe_below(directory) for directory in operation_directories(launched=True))
    return next(filter(None, reasons), None)


def check_build_directories(*, launched: bool) -> None:
    """Raise ``EnvironmentProblem`` for a stale lock, which would be waited for, or code that others can write."""
    if unsafe := unsafe_build(launched=launched):
        path, reason = unsafe
        raise EnvironmentProblem(
            f"{path}: {reason}, so compiled code of somebody else could be loaded here.",
            f"{unsafe_remedy(path)}.",
        )
    if locks := stale_locks(operation_directories(launched=launched)):
        raise EnvironmentProblem(
            "a killed build of a DeepSpeed extension left its lock, and training would wait for it without end: "
            f"{describe(locks)}.",
            "If nothing is compiling there on another machine, delete "
            f"{' and '.join(str(lock.path) for lock in locks)}.",
        )


def unsafe_remedy(path: Path) -> str:
    """Return the command that closes a directory of compiled code to others."""
    return f"Run 'chmod -R go-w {path}', or set {VARIABLE} to a directory of your own"


def describe(locks: list[BuildLock]) -> str:
    """'/cache/op/lock (12 min old)'."""
    return ", ".join(f"{lock.path} ({lock.age_s / 60:.0f} min old)" for lock in locks)


def _open_files() -> set[Path]:
    """Return the paths that processes of this machine have open, as far as this user may read them."""
    names = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            names.add(link.readlink())
        except OSError:  # another user's, or gone by now
            continue
    return names
