"""Where a local Ray keeps its sessions: a path short enough for its sockets, and private."""

from __future__ import annotations

import getpass
import os
import stat
import sys
import tempfile
from pathlib import Path

from can_dist.errors import EnvironmentProblem

LONGEST_SOCKET = 103 if sys.platform == "darwin" else 107
"""Bytes of the path of a Unix socket, without its closing zero."""
UNDER_RAY = 64
"""Bytes that Ray adds: /session_<date>_<time>_<process>/sockets/plasma_store."""
SYSTEM = Path("/tmp")
"""The temporary directory of the system, whatever TMPDIR says."""


def session_directory() -> str:
    """Return the directory of a local Ray's sessions, which nobody but this user can enter.

    It lies in RAY_TMPDIR, else in TMPDIR, else, where that is too long for Ray's sockets as batch systems set it, in
    /tmp.

    Raises:
        EnvironmentProblem: RAY_TMPDIR is too long, or the directory cannot be made or is not the user's own.
    """
    chosen, name = os.environ.get("RAY_TMPDIR"), f"ray-{_user()}"
    directory = Path(chosen or tempfile.gettempdir()) / name
    if chosen and not _fits(directory / "s"):
        raise EnvironmentProblem(
            f"RAY_TMPDIR={chosen}: {_bytes(Path(chosen))} bytes, and Ray's sockets lie {UNDER_RAY + len(name) + 3} "
            f"bytes below it in a path of at most {LONGEST_SOCKET}.",
            "Set RAY_TMPDIR to a shorter directory of yours, or unset it.",
        )
    if not _fits(directory / "s"):
        directory = SYSTEM / name
    # inside it, since Ray opens the directory that it is given to everybody
    return str(_own_directory(directory) / "s")


def _own_directory(path: Path) -> Path:
    """Make a directory that only this user can enter, or check that it is one."""
    remedy = "Set RAY_TMPDIR to a short directory of yours."
    if not _fits(path / "s"):
        raise EnvironmentProblem(
            f"{path}: too long for the sockets of a local Ray ({LONGEST_SOCKET} bytes).",
            remedy,
        )
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise EnvironmentProblem(
            f"{path}: the directory of a local Ray's sessions cannot be made ({error.strerror}).", remedy
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise EnvironmentProblem(f"{path}: not a directory of yours that nobody else can enter.", remedy)
    return path


def _fits(path: Path) -> bool:
    return _bytes(path) + UNDER_RAY <= LONGEST_SOCKET


def _bytes(path: Path) -> int:
    return len(os.fsencode(path))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as containers have
        return str(os.getuid())
