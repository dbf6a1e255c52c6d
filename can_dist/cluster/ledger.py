"""The driver's ledger of shards: which are done, which are tried again, which are given up, and for what reason.

An actor that dies or hangs is replaced and its shard is tried again; nothing else is repeated. A shard commits its own
part atomically, so a part is either there or not, whoever dies. A shard that ends every actor it meets is searched, by
halves, for the row that does it.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from can_dist.cluster.actors import ActorPool, ShardJob, cause_of
from can_dist.cluster.metrics import Ledger
from can_dist.cluster.places import QUIET_S, gave_up, wanted
from can_dist.console import progress
from can_dist.errors import EnvironmentProblem

TICK_S = 5.0
MEDIANS = 10
"""A shard that takes this many times the median of the finished ones hangs."""

MEMORY = re.compile(r"OOM kill reason: (?P<why>[^\n]+).*?actual memory used=(?P<used>[\d.]+ ?\w+)", re.DOTALL)
MEMORY_KILL = "killed by Ray's memory monitor"
POTENTIAL_CAUSES = " There are some potential root causes"  # Ray's list of guesses


def run_shards(pool: ActorPool, job: ShardJob, shards: Mapping[int, int], what: str, log: Callable[..., None]) -> None:
    """Process every shard; ``shards`` maps its number to its rows (for the progress bar).

    ``log`` is told, as an event, of every actor that died or hung, and of what is waited for.

    Raises
    ------
    CanDistError
        As raised by the job.
    EnvironmentProblem
        When a row ends every actor (it is named), a shard does without one of its rows doing it, actors die while they
        open their models, or lost nodes are not replaced within ``wait_resources_s``.
    """
    import ray

    with progress(what, total=sum(shards.values()), unit="row") as bar:
        run = _Run(pool, job, shards, what, log, bar, Ledger(what), deque(shards))
        try:
            for slot in range(min(pool.num_actors, len(shards))):
                run.open(slot)
            while run.num_left():
                run.step()
        finally:
            for ref in run.calls:
                ray.cancel(ref, force=False)


@dataclass(frozen=True)
class _Call:
    """What an actor was asked: a shard, or (None) to open its models."""

    slot: int
    shard: int | None
    since: float


@dataclass
class _Run:
    pool: ActorPool
    job: ShardJob
    shards: Mapping[int, int]
    what: str
    log: Callable[..., None]
    bar: Any
    ledger: Ledger
    waiting: deque[int]
    calls: dict[Any, _Call] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)
    attempts: Counter[int] = field(default_factory=Counter)
    lost_while_opening: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    smaller: dict[int, ShardJob] = field(default_factory=dict)
    without_place_since: float | None = None
    told: bool = False

    def job_of(self, slot: int) -> ShardJob:
        """Return the job as an actor does it: in smaller passes where its memory did not suffice."""
        return self.smaller.get(slot, self.job)

    def open(self, slot: int) -> None:
        """Have an actor open its models; it gets its first shard when it has."""
        self.calls[self.pool.actor(slot).open.remote(self.job_of(slot))] = _Call(slot, None, time.monotonic())

    def at_work(self) -> list[_Call]:
        """Return the calls that are shards."""
        return [call for call in self.calls.values() if call.shard is not None]

    def num_left(self) -> int:
        """Return the number of shards that are not committed."""
        return len(self.waiting) + len(self.at_work())

    def step(self) -> None:
        """Hand out what can be, wait for a while, and deal with what happened."""
        import ray

        while self.waiting and self.idle:
            slot, shard = self.idle.pop(), self.waiting.popleft()
            self.attempts[shard] += 1
            ref = self.pool.actor(slot).run.remote(self.job_of(slot), shard, self.what)
            self.calls[ref] = _Call(slot, shard, time.monotonic())
        soonest = min(call.since + self.deadline_s(call) for call in self.calls.values()) - time.monotonic()
        done, _ = ray.wait(list(self.calls), timeout=min(max(soonest, 0.1), TICK_S))
        self.bar.refresh()
        self.ledger.waiting(self.num_left())
        for ref in done:
            self.collect(ref, self.calls.pop(ref))
        self.look_for_places()
        self.end_what_hangs()

    def collect(self, ref: Any, call: _Call) -> None:
        """Book what a call brought: an open actor, a finished shard, an error, or the loss of the actor."""
        import ray
        from ray.exceptions import RayTaskError

        try:
            ray.get(ref)
        except RayTaskError as error:
            raise cause_of(error) from None
        except lost_actor() as error:
            self.lost(call, reason(error), dies_itself=getattr(error, "actor_init_failed", False))
            return
        self.idle.append(call.slot)
        self.lost_while_opening[call.slot] = 0
        if call.shard is not None:
            self.seconds.append(time.monotonic() - call.since)
            self.bar.update(self.shards[call.shard])
            self.ledger.committed(self.shards[call.shard])

    def deadline_s(self, call: _Call) -> float:
        """Return the seconds after which a call counts as hung."""
        cluster = self.pool.cluster
        if call.shard is None or not self.seconds:
            return max(cluster.first_deadline_s, cluster.min_deadline_s)
        return max(cluster.min_deadline_s, MEDIANS * statistics.median(self.seconds))

    def end_what_hangs(self) -> None:
        """Kill the actors whose calls are beyond their deadlines."""
        import ray

        now = time.monotonic()
        for ref, call in list(self.calls.items()):
            deadline_s = self.deadline_s(call)
            has_no_place = call.shard is None and self.without_place_since is not None
            if now - call.since > deadline_s and not has_no_place and not ray.wait([ref], timeout=0)[0]:
                del self.calls[ref]
                key = "first_deadline_s" if call.shard is None or not self.seconds else "min_deadline_s"
                self.lost(call, f"hung for {deadline_s:.0f} s; if it was at work, raise cluster.{key}")

    def lost(self, call: _Call, why: str, *, dies_itself: bool = False) -> None:
        """Replace the actor of a call, and try its shard again or find out what is wrong with it."""
        self.pool.replace(call.slot)
        self.ledger.actor_died()
        if call.shard is None:
            self.lost_while_opening[call.slot] += "its node has died" not in why
            attempt, doing = self.lost_while_opening[call.slot], "while it opened its models"
        else:
            attempt, doing = self.attempts[call.shard], f"at shard {call.shard}"
        if why.startswith(MEMORY_KILL) and call.shard is not None and (smaller := self.job_of(call.slot).halved()):
            self.smaller[call.slot] = smaller
            why += " Its successor makes passes of half the size."
        message = f"{self.what}: an actor was lost {doing}, attempt {attempt}: {why}"
        self.log(event="actor died", work=self.what, shard=call.shard, attempt=attempt, message=message)
        self.bar.write(message, file=sys.stderr)
        if call.shard is None and (dies_itself or attempt >= self.pool.cluster.shard_attempts):
            raise EnvironmentProblem(f"{message} Look for memory, and in the actor's log.")
        if call.shard is not None:
            if attempt >= self.pool.cluster.shard_attempts:
                self.give_up(call.slot, call.shard, why)
            self.waiting.appendleft(call.shard)
        self.open(call.slot)

    def give_up(self, slot: int, shard: int, why: str) -> None:
        """Find the row of a shard that was tried often enough, and set it aside if that is allowed; else raise."""
        names = self.job.row_names(shard)
        start = f"{self.what}: shard {shard} ended its actor {self.attempts[shard]} times"
        self.bar.write(f"{start}; looking for the row among {len(names)}", file=sys.stderr)
        row = self.row_that_kills(slot, shard, len(names))
        if row is None:
            raise EnvironmentProblem(
                f"{start}, its halves end none; the last time: {why} Look for memory; smaller shards or batches help."
            )
        found = f"{start}; {names[row]} (row {row} of the shard) does so by itself: {why}"
        if not self.job.set_aside(shard, row, why):
            raise EnvironmentProblem(
                f"{found} Look at this row and at what the model or scorer does with it, or remove its prompt. A "
                "sampled response may be left out: cluster.max_quarantine. Finished shards are kept."
            )
        message = f"{found} It is left out."
        self.log(event="quarantined", work=self.what, shard=shard, row=names[row], message=message)
        self.bar.write(message, file=sys.stderr)
        self.attempts[shard] = 0

    def row_that_kills(self, slot: int, shard: int, num_rows: int) -> int | None:
        """Return the first row found, by halving, that ends an actor by itself; None: both halves of a range do not."""
        rows = range(num_rows)
        while len(rows) > 1:
            middle = len(rows) // 2
            halves = (rows[:middle], rows[middle:])
            found = next((half for half in halves if not self.survives(slot, shard, half)), None)
            if found is None:
                return None
            rows = found
        return rows[0]

    def survives(self, slot: int, shard: int, rows: range) -> bool:
        """Tell whether an actor does the work of some rows; the one that does not is replaced."""
        import ray
        from ray.exceptions import GetTimeoutError, RayTaskError

        actor = self.pool.actor(slot)
        try:
            ray.get(actor.open.remote(self.job_of(slot)), timeout=self.deadline_s(_Call(slot, None, 0)))
        except (GetTimeoutError, *lost_actor()) as error:
            raise EnvironmentProblem(
                f"{self.what}: shard {shard} ends its actors, and the one that was to find its row: {reason(error)}"
            ) from None
        try:
            ray.get(
                actor.try_rows.remote(self.job_of(slot), shard, rows), timeout=self.deadline_s(_Call(slot, shard, 0))
            )
        except RayTaskError as error:
            raise cause_of(error) from None
        except (GetTimeoutError, *lost_actor()):
            self.pool.replace(slot)
            return False
        return True

    def look_for_places(self) -> None:
        """Say what actors wait for after the loss of a node; give up when nothing works and no place comes."""
        num_opening = len(self.calls) - len(self.at_work())
        if not num_opening or self.pool.placed():
            self.without_place_since, self.told = None, False
            return
        now = time.monotonic()
        self.without_place_since = self.without_place_since or now
        waited_s = now - self.without_place_since
        if not self.at_work() and waited_s > self.pool.cluster.wait_resources_s:
            raise gave_up(self.pool.cluster, "actor", num_opening)
        if not self.told and waited_s >= min(QUIET_S, self.pool.cluster.wait_resources_s / 2):
            self.told = True
            message = wanted(self.pool.cluster, "actor", num_opening)
            self.log(event="waiting", work=self.what, message=message)
            self.bar.write(message, file=sys.stderr)


def lost_actor() -> tuple[type[Exception], ...]:
    """Return the exceptions by which Ray tells that an actor is no more; the memory monitor's kills are one of each."""
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError


def reason(error: Exception) -> str:
    """Return a line on how an actor was lost, of the page that Ray gives."""
    text = str(error)
    if memory := MEMORY.search(text):
        return f"{MEMORY_KILL} when it used {memory['used']}: {memory['why'].rstrip('.')}."
    lines = [line for line in text.splitlines() if line and line[0] != "\t"]
    told = " ".join(lines[1:] or lines).partition(POTENTIAL_CAUSES)[0]
    return told if told.endswith(".") else f"{told}."
