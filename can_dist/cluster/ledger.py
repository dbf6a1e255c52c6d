"""The driver's ledger of shards: which are done, which are tried again, which are given up, and why.

An actor that dies or hangs is replaced, and its shard is tried again; nothing else is repeated. A shard commits its
part atomically: the part is whole or absent, whichever process dies. If a shard kills every actor, bisection finds the
row that does it.
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
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from can_dist.cluster.actors import ActorPool, ShardJob, cause_of
from can_dist.cluster.metrics import Ledger
from can_dist.cluster.places import QUIET_S, gave_up, wanted
from can_dist.cluster.rows_done import forget, rows_done
from can_dist.console import progress, tick
from can_dist.errors import EnvironmentProblem

TICK_S = 2.0  # the bar moves as often
MEDIANS = 10  # a shard hangs when it takes this many times the median of the finished ones
OPENINGS = 2  # another actor is started for work that takes this many times what its start takes
ALONE_S = 30.0  # a first actor that takes longer to start opens large models, for work that is large

MEMORY = re.compile(r"OOM kill reason: (?P<why>[^\n]+).*?actual memory used=(?P<used>[\d.]+ ?\w+)", re.DOTALL)
MEMORY_KILL = "killed by Ray's memory monitor"
LOST_ACTOR = (RayActorError, OutOfMemoryError, WorkerCrashedError, ray.exceptions.NodeDiedError)
"""Exceptions that mean the actor is gone; a kill by the memory monitor may raise any of them."""
POTENTIAL_CAUSES = " There are some potential root causes"  # Ray's list of guesses


def run_shards(pool: ActorPool, job: ShardJob, shards: Mapping[int, int], work: str, log: Callable[..., None]) -> None:
    """Process every shard on the actors of a pool.

    Args:
        pool: The actors.
        job: The work; it commits each part itself.
        shards: Number of each shard, with its rows (for the progress bar).
        work: Name of the work in messages, events and metrics.
        log: Called with the fields of an event: an actor died or hung, a row is left out, places are waited for.

    Raises:
        CanDistError: The job raised it.
        EnvironmentProblem: A row kills every actor (it is named); a shard kills every actor but none of its rows does
            alone; actors die while they load their models; or lost nodes are not replaced within
            ``wait_resources_s``.
    """
    with progress(work, total=sum(shards.values()), unit="row") as bar:
        run = _Run(pool, job, shards, work, log, bar, Ledger(work), deque(shards))
        try:
            for slot in run.slots:
                if slot == 0 or pool.has(slot) or pool.starts_all:
                    run.open(slot)
            while run.num_left():
                run.step()
        finally:
            for ref in run.calls:
                ray.cancel(ref, force=False)
    forget(run.name)  # where an error ends the work, its few bytes stay: the head may be gone, and asking it would hang


@dataclass(frozen=True)
class _Call:
    """A call of an actor: process a shard, or (None) load its models."""

    slot: int
    shard: int | None
    since: float
    key: str = ""


@dataclass
class _Run:
    pool: ActorPool
    job: ShardJob
    shards: Mapping[int, int]
    work: str
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
    name: str = field(default_factory=lambda: uuid4().hex)
    rows_committed: int = 0
    looked: float = field(default_factory=time.monotonic)
    without_place_since: float | None = None
    has_announced_wait: bool = False

    def job_of(self, slot: int) -> ShardJob:
        """Return the job for an actor: with smaller passes where its memory did not suffice."""
        return self.smaller.get(slot, self.job)

    @property
    def slots(self) -> range:
        """The places of the actors that have a shard to do, when all are started."""
        return range(min(self.pool.num_actors, len(self.shards)))

    def open(self, slot: int) -> None:
        """Let an actor load its models; it gets its first shard afterwards."""
        self.calls[self.pool.actor(slot).open.remote(self.job_of(slot))] = _Call(slot, None, time.monotonic())

    def open_another(self) -> None:
        """Start one more actor where what is left takes long beside its start: a process imports torch for seconds."""
        closed = [slot for slot in self.slots if not self.pool.has(slot)]
        if not self.waiting or not closed:
            return
        now = time.monotonic()
        since = {call.shard: now - call.since for call in self.calls.values()}
        opening_s = since.pop(None, 0.0)
        shard_s = max([*since.values(), statistics.median(self.seconds or [0.0])])
        left_s = shard_s * len(self.waiting) / (len(self.slots) - len(closed))
        if opening_s > ALONE_S or left_s > OPENINGS * self.pool.opening_s > 0:
            self.open(closed[0])

    def at_work(self) -> list[_Call]:
        """Return the calls that process shards."""
        return [call for call in self.calls.values() if call.shard is not None]

    def num_left(self) -> int:
        """Return the number of shards that are not committed."""
        return len(self.waiting) + len(self.at_work())

    def step(self) -> None:
        """Give shards to idle actors, wait for a while, and handle the calls that ended or hang."""
        while self.waiting and self.idle:
            slot, shard = self.idle.pop(), self.waiting.popleft()
            self.attempts[shard] += 1
            key = f"{self.name}/{shard}/{self.attempts[shard]}"
            ref = self.pool.actor(slot).run.remote(self.job_of(slot), shard, self.work, key)
            self.calls[ref] = _Call(slot, shard, time.monotonic(), key)
        soonest = min(call.since + self.deadline_s(call) for call in self.calls.values()) - time.monotonic()
        ended, _ = ray.wait(list(self.calls), timeout=min(max(soonest, 0.1), TICK_S))
        for ref in ended:
            self.collect(ref, self.calls.pop(ref))
        self.open_another()
        self.move_bar()
        self.ledger.waiting(self.num_left())
        self.look_for_places()
        self.kill_hanging()

    def collect(self, ref: Any, call: _Call) -> None:
        """Record the end of a call: loaded models, a finished shard, an error, or the loss of the actor."""
        try:
            ray.get(ref)
        except RayTaskError as error:
            raise cause_of(error) from None
        except LOST_ACTOR as error:
            self.lost(call, reason(error), dies_itself=getattr(error, "actor_init_failed", False))
            return
        self.idle.append(call.slot)
        self.lost_while_opening[call.slot] = 0
        if call.shard is None:
            self.pool.opening_s = max(self.pool.opening_s, time.monotonic() - call.since)
        else:
            self.seconds.append(time.monotonic() - call.since)
            self.rows_committed += self.shards[call.shard]
            self.ledger.committed(self.shards[call.shard])

    def move_bar(self) -> None:
        """Move the bar to the rows of the committed shards, and now and then to those done of shards at work too.

        It steps back where an actor is lost: what that had done of its shard is done again.
        """
        now = time.monotonic()
        if now - self.looked >= TICK_S or not self.num_left():
            self.looked = now
            at_work = [(self.shards[call.shard], call.key) for call in self.calls.values() if call.shard is not None]
            rows = self.rows_committed + sum(min(rows, rows_done(key)) for rows, key in at_work)
            self.bar.update(rows - self.bar.n)
        tick(self.bar)

    def deadline_s(self, call: _Call) -> float:
        """Return the seconds after which a call counts as hung."""
        cluster = self.pool.cluster
        if call.shard is None or not self.seconds:
            return max(cluster.first_deadline_s, cluster.min_deadline_s)
        return max(cluster.min_deadline_s, MEDIANS * statistics.median(self.seconds))

    def kill_hanging(self) -> None:
        """Replace the actors whose calls are past their deadlines."""
        now = time.monotonic()
        for ref, call in list(self.calls.items()):
            deadline_s = self.deadline_s(call)
            has_no_place = call.shard is None and self.without_place_since is not None
            if now - call.since > deadline_s and not has_no_place and not ray.wait([ref], timeout=0)[0]:
                del self.calls[ref]
                key = "first_deadline_s" if call.shard is None or not self.seconds else "min_deadline_s"
                self.lost(call, f"hung for {deadline_s:.0f} s; if it was at work, raise cluster.{key}")

    def lost(self, call: _Call, why: str, *, dies_itself: bool = False) -> None:
        """Replace the actor of a call; try its shard again, or search it for the row that kills actors."""
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
        message = f"{self.work}: an actor was lost {doing}, attempt {attempt}: {why}"
        self.log(event="actor died", work=self.work, shard=call.shard, attempt=attempt, message=message)
        self.bar.write(message, file=sys.stderr)
        if call.shard is None and (dies_itself or attempt >= self.pool.cluster.shard_attempts):
            raise EnvironmentProblem(message, "Look for memory, and in the actor's log.")
        if call.shard is not None:
            if attempt >= self.pool.cluster.shard_attempts:
                self.give_up(call.slot, call.shard, why)
            self.waiting.appendleft(call.shard)
        self.open(call.slot)

    def give_up(self, slot: int, shard: int, why: str) -> None:
        """Find the row of a shard that kills actors, and leave it out if the configuration allows; else raise."""
        names = self.job.row_names(shard)
        start = f"{self.work}: shard {shard} ended its actor {self.attempts[shard]} times"
        self.bar.write(f"{start}; looking for the row among {len(names)}", file=sys.stderr)
        row = self.row_that_kills(slot, shard, len(names))
        if row is None:
            raise EnvironmentProblem(
                f"{start}, its halves end none; the last time: {why}",
                "Look for memory; smaller shards or batches help.",
            )
        finding = f"{start}; {names[row]} (row {row} of the shard) does so by itself: {why}"
        if not self.job.set_aside(shard, row, why):
            raise EnvironmentProblem(
                finding,
                "Look at this row and at what the model or scorer does with it, or remove its prompt. A sampled "
                "response may be left out: cluster.max_quarantine. Finished shards are kept.",
            )
        message = f"{finding} It is left out."
        self.log(event="quarantined", work=self.work, shard=shard, row=names[row], message=message)
        self.bar.write(message, file=sys.stderr)
        self.attempts[shard] = 0

    def row_that_kills(self, slot: int, shard: int, num_rows: int) -> int | None:
        """Find by bisection a row that kills an actor alone; None when neither half of some range kills it."""
        rows = range(num_rows)
        while len(rows) > 1:
            middle = len(rows) // 2
            halves = (rows[:middle], rows[middle:])
            killing = next((half for half in halves if not self.survives(slot, shard, half)), None)
            if killing is None:
                return None
            rows = killing
        return rows[0]

    def survives(self, slot: int, shard: int, rows: range) -> bool:
        """Return whether an actor processes some rows; one that dies or hangs is replaced."""
        actor = self.pool.actor(slot)
        try:
            ray.get(actor.open.remote(self.job_of(slot)), timeout=self.deadline_s(_Call(slot, None, 0)))
        except (GetTimeoutError, *LOST_ACTOR) as error:
            raise EnvironmentProblem(
                f"{self.work}: shard {shard} ends its actors, and the one that was to find its row: {reason(error)}"
            ) from None
        try:
            ray.get(
                actor.try_rows.remote(self.job_of(slot), shard, rows), timeout=self.deadline_s(_Call(slot, shard, 0))
            )
        except RayTaskError as error:
            raise cause_of(error) from None
        except (GetTimeoutError, *LOST_ACTOR):
            self.pool.replace(slot)
            return False
        return True

    def look_for_places(self) -> None:
        """After a node is lost, announce what actors wait for; raise when none is at work and no place comes."""
        num_opening = len(self.calls) - len(self.at_work())
        if not num_opening or self.pool.placed():
            self.without_place_since, self.has_announced_wait = None, False
            return
        now = time.monotonic()
        self.without_place_since = self.without_place_since or now
        waited_s = now - self.without_place_since
        if not self.at_work() and waited_s > self.pool.cluster.wait_resources_s:
            raise gave_up(self.pool.cluster, "actor", num_opening)
        if not self.has_announced_wait and waited_s >= min(QUIET_S, self.pool.cluster.wait_resources_s / 2):
            self.has_announced_wait = True
            message = wanted(self.pool.cluster, "actor", num_opening)
            self.log(event="waiting", work=self.work, message=message)
            self.bar.write(message, file=sys.stderr)


def reason(error: Exception) -> str:
    """Condense Ray's error page into one line."""
    text = str(error)
    if memory := MEMORY.search(text):
        return f"{MEMORY_KILL} when it used {memory['used']}: {memory['why'].rstrip('.')}."
    lines = [line for line in text.splitlines() if line and line[0] != "\t"]
    sentence = " ".join(lines[1:] or lines).partition(POTENTIAL_CAUSES)[0]
    return sentence if sentence.endswith(".") else f"{sentence}."
