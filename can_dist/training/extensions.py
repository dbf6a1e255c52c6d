"""The directories in which torch compiles DeepSpeed's extensions, and the locks that killed builds leave there.

A build takes a file ``lock`` in its directory; another process that needs the directory waits for it silently and
forever. A process that is killed while it builds leaves its lock behind.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from can_dist.errors import EnvironmentProblem

VARIABLE = "TORCH_EXTENSIONS_DIR"
STALE_S = 300.0  # the slowest build seen took 92 s


@dataclass(frozen=True)
class BuildLock:
    """A lock that no process of this machine holds, and which is older than any build."""

    path: Path
    age_s: float


def extensions_directory() -> Path:
    """Return the private directory of a run's own ranks; torch's default is shared by all environments."""
    return Path(os.environ.get(VARIABLE, Path.home() / ".cache" / "can_dist" / "torch_extensions"))


def build_directories() -> list[Path]:
    """Return the directories of a run's ranks and, without ``TORCH_EXTENSIONS_DIR``, of launched ranks."""
    own = extensions_directory()
    return [own] if VARIABLE in os.environ else [own, Path.home() / ".cache" / "torch_extensions"]


def stale_locks(directory: Path) -> list[BuildLock]:
    """Return the locks of builds that ended without removing them."""
    locks = []
    for path in sorted([*directory.glob("*/lock"), *directory.glob("*/*/lock")]):
        try:
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:  # the build has just ended
            continue
        if age > STALE_S:
            locks.append(BuildLock(path, age))
    held = _open_files() if locks else set()
    return [lock for lock in locks if lock.path.resolve() not in held]


def unsafe_reason(directory: Path) -> str:
    """Return why others could plant compiled code in an existing directory, or ''."""
    if not directory.is_dir():
        return ""
    status = directory.stat()
    if status.st_mode & stat.S_IWOTH:
        return "is writable by every user of this machine"
    if status.st_uid not in (os.getuid(), 0):
        return f"belongs to another user (id {status.st_uid})"
    return ""


def check_build_directories() -> None:
    """Raise ``EnvironmentProblem`` for a stale lock, which would be waited for, or a directory others can write."""
    for directory in build_directories():
        if reason := unsafe_reason(directory):
            raise EnvironmentProblem(
                f"{directory}: {reason}, who could have their compiled code loaded here.",
                f"Run 'chmod 700 {directory}', or set {VARIABLE} to a directory of your own.",
            )
        if locks := stale_locks(directory):
            raise EnvironmentProblem(
                "a killed build of a DeepSpeed extension left its lock, and training would wait for it without end: "
                f"{describe(locks)}.",
                "If nothing is compiling there on another machine, delete "
                f"{' and '.join(str(lock.path) for lock in locks)}.",
            )


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
