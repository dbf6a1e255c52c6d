"""Actors and ranks that were given no GPU see none, whatever the machine has: Ray hides nothing from them."""

from __future__ import annotations

import os

import pytest

from can_dist.cluster.actors import ShardWorker
from can_dist.stages.train_on_ray import _worker_environment


@pytest.mark.parametrize(("num_gpus", "visible"), [(0, ""), (0.5, "0,1"), (1, "0,1")])
def test_an_actor_sees_the_gpus_that_it_was_given(
    num_gpus: float, visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # as Ray sets it for those that were given some
    ShardWorker(num_gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_a_rank_sees_the_gpus_that_it_was_given() -> None:
    assert "CUDA_VISIBLE_DEVICES" not in _worker_environment(use_gpu=True)
    assert _worker_environment(use_gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
