"""Passes over a big score table: in this process, shard after shard, or as tasks on a Ray cluster.

A pass sends one λ to every shard and returns a few sums, so both ways give the same numbers. The answers of the shards
are kept in a small file until the solve ends: after a crash the same command repeats no finished shard.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from safetensors.numpy import load, save

from can_dist.cluster.actors import cause_of
from can_dist.cluster.connection import connect
from can_dist.config import Cluster
from can_dist.console import interruptible, progress
from can_dist.dual import Block, Column, ColumnScores, Pass, PassResult, run_pass, source_column
from can_dist.dual.columns import same_type
from can_dist.tables.artifacts import digest_of
from can_dist.tables.cache import cache_directory
from can_dist.tables.score_shards import (
    ShardIndex,
    check_complete,
    check_once,
    column_names,
    id_hashes,
    index_shard,
    open_score_shards,
    read_blocks,
)
from can_dist.tables.scores import check_distinct

Arrays = dict[str, np.ndarray]
Task = Callable[..., Arrays]


@contextmanager
def big_scores(
    path: Path,
    columns: Sequence[str | Column],
    *,
    cluster: Cluster | None = None,
    prompt_ids: pa.ChunkedArray | None = None,
) -> Iterator[ColumnScores]:
    """Open a sharded score table for :func:`can_dist.dual.solve_table` without ever holding it.

    Args:
        path: A Parquet or Arrow file, a directory of them, or a ``scores`` artifact.
        columns: The reward, then one utility per constraint: a score by its name, or what is made of scores;
            ``-cost`` is minus the column ``cost``.
        cluster: Run the passes as Ray tasks there; None streams in this process.
        prompt_ids: The ids that must be scored, no more and no fewer.

    Raises:
        DataError: shards that differ in schema, are cut, missing, counted twice or hold a bad score.
    """
    wanted = tuple(column if isinstance(column, Column) else Column(column, (column,)) for column in columns)
    there = column_names(path)
    first, *others = ([source_column(name, there)[0] for name in column.sources] for column in wanted)
    check_distinct(first[0], list(chain(*others)), str(path))
    sources = tuple(dict.fromkeys(chain(first, *others)))
    shards = open_score_shards(path, sources)
    states = [(str(shard.resolve()), shard.stat()) for shard in shards]
    files = [[path, state.st_size, state.st_mtime_ns] for path, state in states]
    key = digest_of({"columns": [asdict(column) for column in wanted], "shards": files})
    with _remembered(key) as memory:
        if cluster is not None:
            connect(cluster)
        work = _Shards(shards, sources, memory, cluster is not None)
        indexes = [
            ShardIndex(answer["counts"], answer["hashes"]) for answer in work.run("index", _index, [()] * len(shards))
        ]
        check_once(shards, indexes)
        if prompt_ids is not None:
            check_complete(path, np.concatenate([index.hash_P for index in indexes]), id_hashes(prompt_ids))
        counts = work.share([index.num_responses_P for index in indexes])

        def runner(one_pass: Pass) -> Iterator[PassResult]:
            arguments = [(wanted, count, one_pass) for count in counts]
            for answer in work.run(digest_of(asdict(one_pass)), _answer, arguments):
                yield PassResult(answer["sums"], float(answer["largest"]), answer["rows"])

        every = np.concatenate([index.num_responses_P for index in indexes])
        work.num_rows = [int(index.num_responses_P.sum()) for index in indexes]
        yield ColumnScores.survey(runner, every, len(columns) - 1)


def _index(path: Path, columns: tuple[str, ...]) -> Arrays:
    index = index_shard(path, columns)
    return {"counts": index.num_responses_P, "hashes": index.hash_P}


def _answer(
    path: Path, sources: tuple[str, ...], wanted: tuple[Column, ...], num_responses_P: np.ndarray, one_pass: Pass
) -> Arrays:
    blocks = (
        Block(counts, same_type([column.read(dict(zip(sources, scores, strict=True))) for column in wanted]))
        for counts, scores in read_blocks(path, sources, num_responses_P)
    )
    result = run_pass(blocks, one_pass)
    return {"sums": result.sums, "largest": np.array(result.largest), "rows": result.rows}


@dataclass
class _Shards:
    """The shards, the way to reach them, and their answers so far."""

    paths: list[Path]
    columns: tuple[str, ...]
    memory: _Memory
    on_ray: bool
    num_rows: list[int] | None = None
    num_passes: int = 0

    def share(self, values: list[Any]) -> list[Any]:
        """Put values into Ray's object store, where tasks read them; unchanged without Ray."""
        return [ray.put(value) for value in values] if self.on_ray else values

    def run(self, key: str, task: Task, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Arrays]:
        """Yield ``task(path, columns, *arguments)`` of every shard, in order, from memory where it is known."""
        names = [f"{key}/{number}" for number in range(len(self.paths))]
        known = [self.memory.get(name) for name in names]
        todo = [number for number, answer in enumerate(known) if answer is None]
        answers = (self._tasks if self.on_ray else self._here)(task, {number: arguments[number] for number in todo})
        sizes = self.num_rows or [path.stat().st_size for path in self.paths]
        self.num_passes += 1
        label, unit = f"pass {self.num_passes} over {len(sizes)} shards", "row" if self.num_rows else "B"
        with interruptible(), progress(label, sum(sizes), unit, delay=5) as bar:
            for number, known_answer in enumerate(known):
                answer = known_answer
                if answer is None:
                    answer = next(answers)
                    self.memory.put(names[number], answer)
                yield answer
                bar.update(sizes[number])

    def _here(self, task: Task, arguments: dict[int, tuple[Any, ...]]) -> Iterator[Arrays]:
        for number, values in arguments.items():
            yield task(self.paths[number], self.columns, *values)

    def _tasks(self, task: Task, arguments: dict[int, tuple[Any, ...]]) -> Iterator[Arrays]:
        """Run one Ray task per shard; Ray repeats a task whose worker died, and waits for a free CPU."""
        remote = ray.remote(_one_thread).options(num_cpus=1)
        refs = [
            remote.remote(task, str(self.paths[number].resolve()), self.columns, *values)
            for number, values in arguments.items()
        ]
        try:
            for ref in refs:
                try:
                    yield ray.get(ref)
                except RayTaskError as error:
                    raise cause_of(error) from None
        finally:
            for ref in refs:
                ray.cancel(ref)


def _one_thread(task: Task, path: str, *arguments: Any) -> Arrays:
    """Run a task with one thread: a Ray task has one CPU, and numba would take all of the machine."""
    import numba

    numba.set_num_threads(1)
    return task(Path(path), *arguments)


class _Memory:
    """Answers by name in one SQLite file, arrays as safetensors."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        connection.execute("CREATE TABLE IF NOT EXISTS answers (name TEXT PRIMARY KEY, arrays BLOB)")

    def get(self, name: str) -> Arrays | None:
        """Return the answer of that name, or None."""
        row = self._connection.execute("SELECT arrays FROM answers WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        arrays: Arrays = load(row[0])
        return arrays

    def put(self, name: str, arrays: Arrays) -> None:
        """Keep an answer; it is on disk when this returns."""
        with self._connection:
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (name, save(arrays)))


@contextmanager
def _remembered(key: str) -> Iterator[_Memory]:
    """Open the memory of a solve; it is deleted once the solve succeeds."""
    cache = cache_directory() / "passes"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = cache / f"{key}.sqlite"
    with closing(sqlite3.connect(path, timeout=60)) as connection:
        yield _Memory(connection)
    path.unlink(missing_ok=True)
