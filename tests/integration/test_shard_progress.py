"""The bar moves within a shard, on a real actor, and nothing of it stays in Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.experimental import internal_kv
from scored_world import make_responses, scored

from can_dist.cluster import ledger
from can_dist.cluster.rows_done import NAMESPACE


@pytest.mark.slow
def test_bar_moves_within_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    responses = make_responses(tmp_path, parts=1, prompts=4)
    drawn: list[int] = []

    def drawn_at(bar: Any) -> None:
        drawn.append(bar.n)

    monkeypatch.setattr(ledger, "tick", drawn_at)
    monkeypatch.setattr(ledger, "TICK_S", 0.5)
    scores = scored(tmp_path, responses, "slow", batch_size=2, num_actors=1)
    assert scores.table.num_rows == 16
    assert len({rows for rows in drawn if 0 < rows < 16}) >= 2, drawn
    assert drawn == sorted(drawn)
    assert drawn[-1] == 16
    assert internal_kv._internal_kv_list(b"", namespace=NAMESPACE) == []
