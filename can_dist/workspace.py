"""The part of a run that every stage needs: the directory, the configuration, the actors, and the log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from can_dist.config import Config, dump_yaml
from can_dist.console import interruptible, tell
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.tables.artifacts import Artifact, StageDirectory, find_finished, open_stage, write_text
from can_dist.tables.disk import naming
from can_dist.tables.urls import check_run_directory

if TYPE_CHECKING:
    from can_dist.cluster.actors import ActorPool, ShardJob

OWNER = ".owner"
OWNER_LINE = re.compile(r"process (?P<process>\d+) on (?P<host>\S+) since (?P<since>.+)")
TEXTS = {"stage", "label", "work", "message", "error"}
"""Fields of an event that hold a text, where it has them."""
SINCE = "%Y-%m-%d %H:%M:%S"
LOG = "log.jsonl"
SOLUTION, BELIEF = "solution.json", "belief.html"
"""Of a stage ``solve``; the page is in no manifest, since it decides nothing."""
REPORT, PAGE = "report.json", "report.html"
"""Of a stage ``evaluate``. A copy of either page is in the run directory, of the last."""
SWEEP_PAGE, SWEEP_RECORD = "sweep.html", "sweep.json"
"""Of the last sweep, in the run directory."""
FIELDS: dict[str, dict[str, Any]] = {
    "failed": {"error": str, "message": str},
    "shards": {"done": int, "waiting": int, "work": str},
    "actor died": {"work": str},
    "quarantined": {"work": str, "row": str},
    "done": {"seconds": int | float},
    "sweep": {"point": int, "points": list},
}
"""What readers of the log take from an event, by its kind."""
NUMBERS = {"seconds", "steps", "done", "waiting"}
LAST_TIME = 1e11  # seconds since 1970, of the year 5138
ARTIFACT = re.compile(r"[\w.-]{1,200}")
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
SHORTEST_SECRET = 8  # TOKENIZERS_PARALLELISM=false is not a secret


class StageReached(Exception):
    """Control flow of ``Run(until=...)``: the last stage wanted is finished."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(str(artifact.path))
        self.artifact = artifact


@dataclass(frozen=True)
class Owner:
    """The process that holds, or held, a run directory; ``alive`` is None where it ran on another machine."""

    process: int
    host: str
    since: str
    alive: bool | None


class Workspace:
    """A run directory held by this process, and the Ray actors that work for it."""

    def __init__(self, directory: str | Path, config: Config, *, only_stage: str | None = None) -> None:
        """Hold the directory; ``only_stage`` is the one stage that may compute, the others must be finished."""
        check_run_directory(str(directory))
        self.directory = directory = Path(directory).expanduser()
        self.config = config
        self._only_stage = only_stage
        # a launcher starts one stage in every rank; the variables that it sets mean nothing to a whole run
        self.rank = int(os.environ["RANK"]) if only_stage and "RANK" in os.environ else None
        self._pool: ActorPool | None = None
        self._opened: dict[tuple[str, str], str] = {}
        self.checked: set[str] = set()  # identities of the scorers that were seen to open
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = None if self.rank else _hold(directory)  # the first rank holds the run for all
        if self._lock is not None:
            _end_cut_line(directory / LOG)
        self.log(event="began", process=os.getpid(), host=socket.gethostname(), only_stage=only_stage)
        if not only_stage:
            write_text(directory / "config.yaml", dump_yaml(config))

    def open(
        self, stage: str, label: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> StageDirectory:
        """Open a stage's directory, and print whether its work is reused, or why it is not."""
        place = open_stage(self.directory, stage, label, identity, inputs)
        self._opened[stage, label] = place.path.name
        if place.finished:
            named = {"stage": stage, "label": label, "artifact": place.path.name}
            self.say(f"{stage} ({label}): reusing {place.path.name}", event="reused", **named)
            return place
        self.log(event="opened", stage=stage, label=label, artifact=place.path.name)
        if self._only_stage not in (None, stage):
            raise DataError(
                f"{self.directory}: {stage} ({label}) is not finished for this configuration. "
                f"Run 'can-dist label --config FILE --run {self.directory}' first."
            )
        if place.reason:
            self.say(f"{stage} ({label}): {place.reason}", event="changed", stage=stage, label=label)
        return place

    def finished(
        self, stage: str, label: str, identity: Mapping[str, Any], inputs: Mapping[str, Artifact]
    ) -> Artifact | None:
        """Return a stage's artifact where it is finished; nothing is opened."""
        return find_finished(self.directory, stage, label, identity, inputs)

    @contextlib.contextmanager
    def timed(self, stage: str, label: str, **counts: Any) -> Iterator[None]:
        """Log a stage's start, end and seconds; the manifest holds no time, which would change its digest."""
        start = time.monotonic()
        event = {"stage": stage, "label": label, "artifact": self._opened.get((stage, label))}
        self.say(f"{stage} ({label}): started", event="started", **event, **counts)
        yield
        seconds = round(time.monotonic() - start, 2)
        self.say(f"{stage} ({label}): done in {seconds:.1f} s", event="done", **event, seconds=seconds)

    def run_shards(self, job: ShardJob, shards: Mapping[int, int], work: str) -> None:
        """Run the shards of a job on the actors; start Ray and the actors when needed.

        Args:
            job: The work of an actor.
            shards: Number of each shard that is left, with its rows.
            work: Name of the work in messages, events and metrics.
        """
        if not shards:
            return
        from can_dist.cluster.actors import ActorPool
        from can_dist.cluster.connection import connect
        from can_dist.cluster.ledger import run_shards

        counts = {"done": len(list(job.out.glob("part-*.arrow"))), "waiting": len(shards), "rows": sum(shards.values())}
        self.log(event="shards", work=work, artifact=job.out.name, **counts)
        connect(self.config.cluster)
        with interruptible():
            if self._pool is None:
                self._pool = ActorPool(self.config.cluster, self.say)
            run_shards(self._pool, job, shards, work, self.log)

    def release_actors(self) -> None:
        """Kill the actors, so that training gets their CPUs and GPUs."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def lend_actor(self) -> Any:
        """Return an idle actor to be a training's one rank; None, and no actors, where that has its own process."""
        if self._pool is not None and (actor := self._pool.lend()) is not None:
            return actor
        self.release_actors()
        return None

    def say(self, message: str, **event: Any) -> None:
        """Print a line for the user, and append it to RUN/log.jsonl."""
        if not self.rank:
            tell(message)
        self.log(**event, message=message)

    def log(self, **event: Any) -> None:
        """Append an event to RUN/log.jsonl, without the values of secrets in the environment."""
        if self.rank:
            return
        line = json.dumps({"time": round(time.time(), 3), **event}, ensure_ascii=False)
        path = self.directory / LOG
        with naming(path), path.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(redacted(line, os.environ) + "\n")

    def ended(self, error: BaseException | None) -> None:
        """Log how the process ends: with an error, or without."""
        if error is None:
            self.log(event="ended")
        else:
            with contextlib.suppress(OSError):  # of a full disk: what ended the run is told, not this
                self.log(event="failed", error=type(error).__name__, message=str(error))

    def close(self) -> None:
        """Kill the actors and release the run directory."""
        self.release_actors()
        if self._lock is not None:
            (self.directory / OWNER).unlink(missing_ok=True)  # while no other process can hold it
            self._lock.release()


def read_owner(directory: Path) -> Owner | None:
    """Return the process that holds a run directory, or was killed while it held it; None without one."""
    try:
        text = (directory / OWNER).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = OWNER_LINE.fullmatch(text.strip())
    if match is None:  # its holder is writing it
        return None
    process, host, since = int(match["process"]), match["host"], match["since"]
    here = host == socket.gethostname()
    return Owner(process, host, since, _has_run_since(process, since) if here else None)


def _has_run_since(process: int, since: str) -> bool:
    """Return whether a process runs here that began before ``since``; numbers of processes are used again."""
    try:
        began = psutil.Process(process).create_time()
        held = time.mktime(time.strptime(since, SINCE))
    except (psutil.Error, ValueError):
        return False
    return bool(began <= held + 1)  # ``since`` has whole seconds


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a log; a line that is being written, or that a kill or a bad byte damaged, is left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_event(event):
            events.append(event)
    return events


def _is_event(value: Any) -> bool:
    """Return whether a line of a log has what every event has, and the fields that readers of its kind use."""
    if not isinstance(value, dict) or not isinstance(value.get("event"), str):
        return False
    numbers = [value.get("time"), *(value[key] for key in NUMBERS & value.keys() if value[key] is not None)]
    if any(isinstance(n, bool) or not isinstance(n, int | float) or not 0 <= n < LAST_TIME for n in numbers):
        return False
    if "artifact" in value and not (isinstance(value["artifact"], str) and ARTIFACT.fullmatch(value["artifact"])):
        return False
    if any(not isinstance(value[key], str) for key in TEXTS & value.keys()):
        return False
    return all(isinstance(value.get(key), kind) for key, kind in FIELDS.get(value["event"], {}).items())


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """Return ``text``, which may be JSON, with the values of secrets replaced by the names of their variables."""
    for name, value in environment.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST_SECRET:
            for written in (value, json.dumps(value, ensure_ascii=False)[1:-1], json.dumps(value)[1:-1]):
                text = text.replace(written, f"<{name}>")
    return text


def _end_cut_line(log: Path) -> None:
    """Append a newline to a line that a full disk or a crash cut, so that the next event has its own line."""
    if log.is_file() and not log.read_bytes().endswith(b"\n"):
        with naming(log), log.open("a", encoding="utf-8") as file:
            file.write("\n")


def _hold(directory: Path) -> Any:
    """Lock the run directory for this process, or raise an error that names its holder."""
    from filelock import FileLock, Timeout

    lock = FileLock(directory / ".lock")
    owner = directory / OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = owner.read_text(encoding="utf-8").strip() if owner.is_file() else "another process"
        raise EnvironmentProblem(
            f"run directory {directory} is in use by {holder}. Wait for it, stop it, or give another --run."
        ) from None
    since = time.strftime(SINCE)
    with naming(owner):
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n", encoding="utf-8")
    return lock
