"""How many rows of a shard are done while an actor is at it: for the bar alone, nothing is decided by it.

The number lies in the key-value store of Ray's head, which every actor and the driver reach; an actor that works can be
asked nothing.
"""

from __future__ import annotations

import time

from ray.experimental import internal_kv

NAMESPACE = b"can_dist"
TELL_S = 1.0
"""Seconds between two numbers that an actor writes; a shard that takes less writes none."""


class RowsDone:
    """Counts the rows of one shard in an actor, and writes the number now and then."""

    def __init__(self, key: str) -> None:
        self._key, self._rows, self._told = key.encode(), 0, time.monotonic()

    def __call__(self, num_rows: int) -> None:
        """Add rows."""
        self._rows += num_rows
        if (now := time.monotonic()) - self._told >= TELL_S:
            self._told = now
            internal_kv._internal_kv_put(self._key, str(self._rows).encode(), namespace=NAMESPACE)


def rows_done(key: str) -> int:
    """Return the number that an actor wrote last, 0 where it wrote none."""
    return int(internal_kv._internal_kv_get(key.encode(), namespace=NAMESPACE) or 0)


def forget(prefix: str) -> None:
    """Remove the numbers whose keys begin so."""
    internal_kv._internal_kv_del(prefix.encode(), del_by_prefix=True, namespace=NAMESPACE)
