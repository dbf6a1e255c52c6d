"""Where no weight is divided, a training without ZeRO-3's hooks ends with the same bytes, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import train_world as tw
from plain_losses import LORA

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tw.World:
    return tw.make_world(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def persists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSpeed file by which all weights of the tiny model are whole on every rank."""
    file = tmp_path_factory.mktemp("files") / "persists.json"
    config = json.loads((tw.ROOT / "ds_configs" / "zero3_cpu.json").read_text())
    del config["zero_optimization"]["stage3_param_persistence_threshold"]  # 10⁵ elements
    file.write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("num_ranks", "lora", "divided"),
    [(1, None, True), (1, LORA, True), (2, None, False)],
    ids=["one rank", "adapters on one rank", "small weights on two"],
)
def test_same_bytes_without_hooks(
    world: tw.World, persists: Path, num_ranks: int, lora: dict | None, divided: bool
) -> None:
    name, options = f"{num_ranks}-{bool(lora)}", {"lora": lora, "checkpoint_every": 2}
    options |= {} if divided else {"ds_config": str(persists)}
    with_hooks, without, killed = (world.spec(f"{name}-{way}", **options) for way in ("with", "without", "killed"))
    for spec, hook in ((with_hooks, "keep_hooks"), (without, ""), (killed, "")):
        if spec == killed:
            assert tw.launch(spec, num_ranks, hook="kill:0:4").codes[0] == -9
        outcome = tw.launch(spec, num_ranks, hook=hook)
        assert set(outcome.codes) == {0}, outcome.output
    assert "going on from checkpoint step-000004" in outcome.output
    for spec in (without, killed):
        assert tw.policy_bytes(spec) == tw.policy_bytes(with_hooks)
        for key in ("loss", "grad_norm", "eval_loss"):
            assert tw.read_metrics(spec, key) == tw.read_metrics(with_hooks, key)
