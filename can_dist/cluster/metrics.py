"""Metrics of the scoring and generating stages for Prometheus, through the exporter that every Ray node runs.

Ray puts ``ray_`` before the names. Every metric has the tag ``work``, such as ``score (reward, reference on train)``.
"""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

COUNTERS = {
    "can_dist_shards_done": "Shards committed.",
    "can_dist_rows_done": "Rows (responses) of committed shards.",
    "can_dist_actor_failures": "Actors that died while they worked on a shard.",
}
WAITING = "can_dist_shards_waiting"
SECONDS = "can_dist_shard_seconds"
SECONDS_BOUNDARIES = [1, 5, 15, 60, 300, 900, 3600]


class Ledger:
    """The driver's ledger as metrics: shards done, actors lost, shards waiting."""

    def __init__(self, work: str) -> None:
        self._tags = {"work": work}
        self._counters = {name: Counter(name, text, tag_keys=("work",)) for name, text in COUNTERS.items()}
        self._waiting = Gauge(WAITING, "Shards that are not committed yet.", tag_keys=("work",))

    def waiting(self, shards: int) -> None:
        """Set the number of shards that are left."""
        self._waiting.set(shards, self._tags)

    def committed(self, rows: int) -> None:
        """Count one shard and its rows."""
        self._counters["can_dist_shards_done"].inc(1, self._tags)
        if rows:
            self._counters["can_dist_rows_done"].inc(rows, self._tags)

    def actor_died(self) -> None:
        """Count one dead actor."""
        self._counters["can_dist_actor_failures"].inc(1, self._tags)


def shard_seconds() -> Any:
    """Return the histogram of an actor's seconds per shard; create it once per actor."""
    return Histogram(SECONDS, "Seconds per shard.", boundaries=SECONDS_BOUNDARIES, tag_keys=("work",))
