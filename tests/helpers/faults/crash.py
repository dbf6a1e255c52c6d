"""Kill a process at its n-th change of a directory: for what a crash at the worst place leaves.

Python tells an audit hook of every open, rename, link, unlink and mkdir before it happens, whoever asks for it; of
fsync it does not, so that one is wrapped. What Arrow writes itself lies between the creation of the temporary file
and its fsync, which both count.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
TEMPORARY = re.compile(r"\.tmp-[a-z0-9_]{8}$")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def arm(directory: Path, sentence: Callable[[], tuple[int, int]]) -> None:
    """From now on, count the changes below ``directory`` and die before one of them.

    ``sentence`` is called at the first change; it returns the number of the change to die at (0: none) and the file
    descriptor that each change is written to, a line each. That file must lie elsewhere.
    """
    root, count, sentenced = os.path.realpath(directory), 0, (0, -1)

    def change(what: str, path: object) -> None:
        nonlocal count, sentenced
        if not isinstance(path, str | bytes | os.PathLike) or not below(root, os.fsdecode(path)):
            return
        if count == 0:
            sentenced = sentence()
        count += 1
        name = TEMPORARY.sub(".tmp", os.path.relpath(os.fsdecode(path), root))
        os.write(sentenced[1], f"{what} {name}\n".encode())
        if count == sentenced[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (flags or 0) & WRITING or (isinstance(mode, str) and set(mode) & set("wax+")):
                change("open", path)
        elif event in CHANGES:
            # a rename changes where it goes to
            change(event.removeprefix("os."), arguments[1] if event in ("os.rename", "os.link") else arguments[0])

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        change("fsync", Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    os.fsync = counted_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


def below(root: str, path: str) -> bool:
    """Tell whether a path lies in a directory."""
    return str(Path(path).absolute()).startswith(root + os.sep)


def open_log(path: Path) -> int:
    """Return the descriptor of a new log; ``FileExistsError`` when there is one of that name."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
