"""Scores kept across runs, so that no text is scored twice: one SQLite file, by scorer and text.

A key is the SHA-256 of the scorer's identity (weights or declared model, text convention, sign, precision) and of the
conversation, the response and its tokens. A value is the number as the score column holds it, bit for bit. No text is
kept. Only the driver opens the file, so actors on other machines need not share it.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from can_dist.errors import EnvironmentProblem
from can_dist.tables.artifacts import canonical_json
from can_dist.tables.cache import cache_directory

AT_ONCE = 500
"""Keys per query; SQLite takes 999 parameters."""

NAN = np.array(np.nan, dtype="<f8").tobytes()


@contextmanager
def open_cache() -> Iterator[sqlite3.Connection]:
    """Open ``can_dist/scores.sqlite`` in XDG_CACHE_HOME or ~/.cache; other processes may have it open too.

    Raises:
        EnvironmentProblem: It cannot be opened, is damaged, or stays locked for a minute.
    """
    path = cache_directory() / "scores.sqlite"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID")
            yield connection
    except sqlite3.Error as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(f"score cache {path}: {error}. Delete the file, or set cluster.score_cache to false.")


def score_keys(identity: str, responses: pa.Table) -> list[bytes]:
    """Return the key of every response under a scorer's identity (canonical JSON), in order."""
    scorer = hashlib.sha256(identity.encode()).digest()
    rows = responses.select(["messages", "text", "token_ids"]).to_pylist()
    return [hashlib.sha256(scorer + canonical_json(row).encode()).digest() for row in rows]


def look_up(cache: sqlite3.Connection, keys: Sequence[bytes], shape: tuple[int, ...] = ()) -> np.ndarray:
    """Return the scores of these keys, (N, *shape) float64, NaN for a key without one."""
    kept: dict[bytes, bytes] = {}
    for start in range(0, len(keys), AT_ONCE):
        some = keys[start : start + AT_ONCE]
        marks = ",".join("?" * len(some))
        kept.update(cache.execute(f"SELECT key, value FROM scores WHERE key IN ({marks})", some))
    unknown = NAN * math.prod(shape)
    values = np.frombuffer(b"".join(kept.get(key, unknown) for key in keys), dtype="<f8").astype(np.float64)
    return values.reshape(len(keys), *shape)


def keep(cache: sqlite3.Connection, keys: Sequence[bytes], value_N: np.ndarray) -> None:
    """Keep finite scores, (N, …) float64; a key that has a score keeps it. They are on disk when this returns."""
    # as 8 bytes each: SQLite's own numbers would turn -0.0 into 0.0
    rows = [(key, v.tobytes()) for key, v in zip(keys, value_N.astype("<f8"), strict=True) if np.isfinite(v).all()]
    with cache:
        cache.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", rows)
