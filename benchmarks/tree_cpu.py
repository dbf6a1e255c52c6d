"""CPU seconds of a command and of all that it starts, by what each process calls itself.

The kernel's sum over children misses what Ray's daemons start, so /proc is read twice a second. A process is known by
its id and its start, once it was seen below the command; of each, what it does after the last look is missed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

INTERVAL_S = 0.5
TICKS = os.sysconf("SC_CLK_TCK")
KINDS = {
    "ray::ShardWorker": "actors",
    "ray::RayTrainWorker": "ranks",
    "ray::Rank": "ranks",
    "ray::TrainController": "driver",
}
OTHER = "Ray"

Process = tuple[int, int]
"""Id and start."""


def metered(command: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Run a command; return what it printed, and CPU seconds (user and system) of ranks, actors, driver and Ray.

    Raises:
        CalledProcessError: The command failed.
    """
    parent_of: dict[Process, int] = {}
    seconds: dict[Process, tuple[str, float]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as root:
        while root.poll() is None:
            look(root.pid, parent_of, seconds)
            time.sleep(INTERVAL_S)
        assert root.stdout is not None
        printed = root.stdout.read()
    if root.returncode:
        raise subprocess.CalledProcessError(root.returncode, command)
    total: Counter[str] = Counter()
    for kind, taken in seconds.values():
        total[kind] += taken
    return printed, {kind: round(taken, 1) for kind, taken in sorted(total.items())}


def look(root: int, parent_of: dict[Process, int], seconds: dict[Process, tuple[str, float]]) -> None:
    """Note the CPU seconds of the root, of its descendants, and of those that were seen to be descendants."""
    now: dict[int, Process] = {}
    taken: dict[Process, float] = {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        process = (int(directory.name), int(fields[19]))
        now[process[0]] = process
        parent_of.setdefault(process, int(fields[1]))
        taken[process] = (int(fields[11]) + int(fields[12])) / TICKS
    known = {process[0] for process in seconds if now.get(process[0]) == process} | {root}
    while more := {pid for pid, process in now.items() if parent_of[process] in known} - known:
        known |= more
    for pid in known & set(now):
        before, _ = seconds.get(now[pid], (OTHER, 0.0))
        kind = kind_of(pid, root)
        seconds[now[pid]] = (before if kind == OTHER else kind, taken[now[pid]])  # at its end a process has no title


def kind_of(pid: int, root: int) -> str:
    """Return what a process is by its title."""
    if pid == root:
        return "driver"
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        title = ""
    return next((kind for name, kind in KINDS.items() if title.startswith(name)), OTHER)


if __name__ == "__main__":
    import sys

    print(metered(sys.argv[1:]))
