"""The progress of every rank, and the end of a training that makes none.

A rank that hangs makes all others wait in a collective, where torch gives up after half an hour and names nobody. Here
a thread of every rank reports the rank's progress in a file that all can read, and kills the rank after
``hang_timeout_s`` without progress. The first live rank names the rank that stopped reporting or is behind, and its
last step.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from can_dist.errors import EnvironmentProblem
from can_dist.tables.artifacts import write_json

RANKS = "ranks"
HANG = "HANG.json"
TICK_S = 5.0  # between a rank's reports
OTHERS_S = 5.0
"""Grace before blameless ranks exit: a launcher kills all ranks when one exits, and the message must come first."""


class Heartbeat:
    """The progress of this rank, reported by a thread every few seconds."""

    def __init__(self, directory: Path, timeout_s: float) -> None:
        self._directory, self._timeout_s = directory / RANKS, timeout_s
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._thread_id = threading.get_ident()  # of the thread that trains
        self._end = threading.Event()
        self._ticks = self._beats = 0
        self.at("loading")
        self._directory.mkdir(exist_ok=True)
        self._report()

    def at(self, work: str) -> None:
        """Note that this rank begins the next piece of work; the pieces are the same on all ranks."""
        self._beats += 1
        self._work, self._since = work, time.monotonic()

    def watch(self) -> None:
        """Report this rank's progress until ``stop``; kill the process when it makes none."""
        earlier: list[dict[str, Any]] = []
        while not self._end.wait(min(TICK_S, self._timeout_s / 10)):
            self._report()
            stalled_s = time.monotonic() - self._since
            if stalled_s < self._timeout_s / 2:
                earlier = []
            elif not earlier:
                earlier = self._read()
            elif stalled_s > self._timeout_s:
                self._give_up(earlier, self._read())

    def stop(self) -> None:
        """End ``watch``."""
        self._end.set()

    def _report(self) -> None:
        self._ticks += 1
        frames = traceback.extract_stack(sys._current_frames()[self._thread_id])[-3:]
        code = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
        place = {"host": socket.gethostname(), "pid": os.getpid(), "ticks": self._ticks, "beats": self._beats}
        path = self._directory / f"{self._rank}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({**place, "at": self._work, "code": code}), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            print(f"can-dist: train: {self._directory}: {error}", file=sys.stderr, flush=True)

    def _read(self) -> list[dict[str, Any]]:
        return [self._read_one(rank) for rank in range(self._world_size)]

    def _read_one(self, rank: int) -> dict[str, Any]:
        try:
            place: dict[str, Any] = json.loads((self._directory / f"{rank}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {"host": "?", "pid": 0, "ticks": 0, "beats": 0, "at": "nowhere yet", "code": "?"}
        return place

    def _give_up(self, earlier: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
        try:
            silent = [rank for rank, place in enumerate(now) if place["ticks"] == earlier[rank]["ticks"]]
            if self._rank == min(set(range(self._world_size)) - set(silent), default=self._rank):
                message = describe_hang(now, silent, self._timeout_s)
                print(f"EnvironmentProblem: {message}", file=sys.stderr, flush=True)
                write_json(self._directory / HANG, {"message": message})
            else:
                time.sleep(OTHERS_S)
        finally:
            os._exit(EnvironmentProblem.exit_code)  # the thread that trains waits in a collective: nothing reaches it


@contextmanager
def heartbeat(directory: Path, timeout_s: float) -> Iterator[Heartbeat]:
    """Watch over this rank while the block runs in this thread."""
    beats = Heartbeat(directory, timeout_s)
    thread = threading.Thread(target=beats.watch, daemon=True)
    thread.start()
    try:
        yield beats
    finally:
        beats.stop()
        thread.join()


def describe_hang(places: list[dict[str, Any]], silent: list[int], timeout_s: float) -> str:
    """Return a message that names the ranks at fault: the silent ones, else those that are behind."""
    least = min(place["beats"] for place in places)
    behind = [rank for rank, place in enumerate(places) if place["beats"] == least]
    suspects = silent or behind
    if silent:
        fault = "gave no sign of life since then: stopped, killed or cut off"
    elif len(behind) < len(places):
        fault = "is behind the others"
    else:
        fault = "is as far as all others: a collective that some of them do not take part in, or a network that is down"
    lines = [
        f"rank {rank} (process {place['pid']} on {place['host']}): {place['at']}, in {place['code']}"
        for rank, place in enumerate(places)
        if rank in suspects[:8]
    ]
    waiting = next((place for rank, place in enumerate(places) if rank not in suspects), None)
    others = f" The others wait, at {waiting['at']}, in {waiting['code']}." if waiting else ""
    return (
        f"training made no progress for cluster.hang_timeout_s = {timeout_s:g} s. {'; '.join(lines)}; it {fault}."
        f"{others} Look at that process (py-spy dump --pid), its node and the network; the same command goes on from "
        "the newest checkpoint."
    )


def read_hang(directory: Path) -> str:
    """Return the message on a training that hung, or ''."""
    path = directory / RANKS / HANG
    return str(json.loads(path.read_text(encoding="utf-8"))["message"]) if path.is_file() else ""
