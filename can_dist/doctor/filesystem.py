"""The storage of a run directory: what it guarantees, how full it is, and temporary files of killed processes."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from can_dist.doctor.finding import Finding, error, note, ok, warning
from can_dist.tables.disk import sync
from can_dist.workspace import read_owner

DAY_S = 86400.0
LEFTOVERS = (".tmp-*", "*/.tmp-*")


def check_filesystem(run: Path, needed_bytes: int | None, *, clean: bool) -> list[Finding]:
    """Test on the run's storage what the commits rely on; check space, owner and leftovers.

    Writes nothing but a temporary directory, which is removed; with ``clean``, temporary files that killed processes
    left more than a day ago are removed.
    """
    place = next(parent for parent in (run.absolute(), *run.absolute().parents) if parent.exists())
    if not place.is_dir():
        return [error("run directory", f"{place} is a file", "Give another --run.")]
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=place) as directory:
            findings = [check(Path(directory)) for check in (replaces_atomically, links, locks)]
    except OSError as cause:
        return [error("run directory", f"{place} cannot be written: {cause.strerror}", "Give another --run.")]
    free = shutil.disk_usage(place).free
    return [*findings, space(free, needed_bytes, place), *held(run), *leftovers(run, clean=clean)]


def replaces_atomically(directory: Path) -> Finding:
    """Check that a rename replaces a file and keeps its new content: every commit is a rename."""
    old, new = directory / "committed", directory / "temporary"
    old.write_text("old")
    try:
        new.write_text("new")
        sync(new)
        new.replace(old)
        sync(directory)
        replaced = old.read_text() == "new" and not new.exists()
    except OSError as cause:
        return error("rename", f"fails: {cause.strerror}", "Put the run directory on a POSIX file system.")
    if not replaced:
        return error("rename", "does not replace the old file", "Put the run directory on a POSIX file system.")
    return ok("rename", "replaces a file, and is synchronised")


def links(directory: Path, link: Callable[[Path, Path], None] = os.link) -> Finding:
    """Check for hard links; can-dist does not need them."""
    file = directory / "file"
    file.touch()
    try:
        link(file, directory / "link")
    except OSError as cause:
        return note("hard link", f"not supported ({cause.strerror}); commits use rename, so nothing is lost")
    return ok("hard link", "supported")


def locks(directory: Path, flock: Callable[[int, int], None] = fcntl.flock) -> Finding:
    """Check that a second lock on a file is refused: it is what keeps two drivers off one run directory."""
    path = directory / "lock"
    remedy = "Start only one process at a time on this run directory, or mount the file system with locks."
    with path.open("w") as first, path.open("w") as second:
        try:
            flock(first.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            return error("lock", f"cannot be taken ({cause.strerror}), so no run can start here", remedy)
        try:
            flock(second.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return ok("lock", "a second process is refused")
    return warning("lock", "two processes could hold this run directory at the same time", remedy)


def space(free: int, needed: int | None, place: Path) -> Finding:
    """Compare the free space with what training needs, where that is known."""
    if needed is None:
        state = f"{_gigabytes(free)} at {place}; what is needed is said with --config, once its reference opens"
        return note("free space", state)
    if free < needed:
        state = f"{_gigabytes(free)} at {place}; checkpoints and policy need about {_gigabytes(needed)}"
        return error("free space", state, "Free some, give another --run, or train adapters (train.lora).")
    return ok("free space", f"{_gigabytes(free)} at {place}; about {_gigabytes(needed)} are needed")


def held(run: Path) -> list[Finding]:
    """Report the process that holds the run directory."""
    owner = read_owner(run)
    if owner is None:
        return []
    holder = f"process {owner.process} on {owner.host} since {owner.since}"
    if owner.alive is False:
        return [note("run lock", f"left by {holder}, which is gone", "None needed: the next command takes it over.")]
    remedy = "Wait for it, or stop it by SIGTERM; can-dist status tells how far it is."
    return [note("run lock", f"held by {holder}", remedy)]


def leftovers(run: Path, *, clean: bool) -> list[Finding]:
    """Find temporary files of killed processes; with ``clean`` remove those older than a day, and nothing else."""
    files = [(path, path.lstat()) for pattern in LEFTOVERS for path in sorted(run.glob(pattern))]
    files = [(path, status) for path, status in files if stat.S_ISREG(status.st_mode)]
    old = [(path, status.st_size) for path, status in files if time.time() - status.st_mtime > DAY_S]
    size = _gigabytes(sum(size for _, size in old))
    findings = []
    if young := len(files) - len(old):
        findings.append(note("temporary files", f"{young} younger than a day, perhaps being written"))
    if old and clean:
        for path, _ in old:
            path.unlink(missing_ok=True)
        findings.append(ok("temporary files", f"{len(old)} older than a day removed ({size})"))
    elif old:
        state = f"{len(old)} older than a day, left by killed processes ({size})"
        findings.append(warning("temporary files", state, f"can-dist doctor --run {run} --clean removes them."))
    return findings


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
