"""The stage estimate: what no estimate can be made of is refused before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm
from trained_run import WORDS, TrainedRun

from can_dist.config import Model
from can_dist.errors import DataError
from can_dist.stages.estimate import estimate

NO_SCORES: Any = None  # they are not looked at


@pytest.fixture
def world(tmp_path: Path) -> TrainedRun:
    return TrainedRun(tmp_path)


def refusal(world: TrainedRun, policy: Path) -> str:
    with pytest.raises(DataError) as caught:
        estimate(world.work, Model(model=str(policy)), world.reference, world.solution, NO_SCORES, reward="reward")
    assert not list(world.run.glob("estimate-*")), "nothing is begun"
    return str(caught.value)


def test_a_policy_with_another_tokenizer_is_refused(world: TrainedRun, tmp_path: Path) -> None:
    message = refusal(world, make_tiny_lm(tmp_path / "other", [*WORDS[:-1], "tree"]))
    assert str(tmp_path / "other") in message
    assert "A log-ratio needs both models to see the same tokens" in message


def test_a_policy_of_another_shape_is_refused(world: TrainedRun, tmp_path: Path) -> None:
    policy = make_tiny_lm(tmp_path / "wider", WORDS, seed=1)
    weights = load_file(policy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
    message = refusal(world, policy)
    assert name in message
    assert "this policy is not the reference plus a difference" in message
    assert "Give a policy that was trained from this reference." in message


def test_a_policy_without_a_tensor_is_refused(world: TrainedRun, tmp_path: Path) -> None:
    policy = make_tiny_lm(tmp_path / "less", WORDS, seed=1)
    weights = load_file(policy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, policy / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(world, policy)
