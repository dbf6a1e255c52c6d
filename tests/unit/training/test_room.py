"""A GPU's memory is compared with the plan before the model is loaded; a GPU too old for bf16 is refused it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from can_dist.config import Cluster, Model
from can_dist.config.sections import Lora, Train
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling.precision import require_known_gpus, resolve_precision, run_precision
from can_dist.training import memory as m
from can_dist.training import room
from can_dist.training.batches import Example
from can_dist.training.deepspeed_config import build_ds_config
from can_dist.training.room import (
    Demand,
    count,
    largest_pack,
    mean_response,
    peak_bytes,
    require_room,
    require_room_here,
)
from can_dist.training.spec import TrainSpec


@pytest.fixture(scope="module")
def demand(tmp_path_factory: pytest.TempPathFactory) -> Demand:
    root = tmp_path_factory.mktemp("lm")
    LlamaConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2
    ).save_pretrained(root)
    # small buckets: the weights decide, as they do in a large model
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000, "sub_group_size": 10**6}
    ds_config = build_ds_config({"zero_optimization": zero}, Train(), "bf16")
    return Demand(Model(model=str(root)), Train(), "bf16", ds_config, num_ranks=1, tokens=4096, response_tokens=60)


def checked(demand: Demand, memory_bytes: float) -> list[str]:
    said: list[str] = []
    require_room(demand, int(memory_bytes), said.append)
    return said


def test_what_fits_is_trained_in_silence_and_what_may_not_is_said(demand: Demand) -> None:
    peak = peak_bytes(demand, count(demand))
    assert checked(demand, 1.01 * peak / (1 - m.SPARE)) == []
    (warning,) = checked(demand, peak)
    assert warning.startswith("warning: training needs about 0.")
    assert "it may run out of memory. Ways out, each alone:" in warning
    assert len(checked(demand, 1.01 * peak / (1 + m.AGREEMENT))) == 1, "a plan may count too much"


def test_too_little_memory_is_refused_with_three_ways_out(demand: Demand) -> None:
    peak = peak_bytes(demand, count(demand))
    with pytest.raises(EnvironmentProblem) as refused:
        checked(demand, peak / 4)
    message = str(refused.value)
    assert message.startswith(f"training needs about {peak / 1e9:,.1f} GB of this GPU's {peak / 4e9:,.1f} GB")
    train = demand.train.model_copy(update={"activation_checkpointing": True})
    cheaper = replace(demand, train=train)
    assert f"train.activation_checkpointing=true needs {peak_bytes(cheaper, count(cheaper)) / 1e9:,.1f} GB" in message
    assert "train.lora.r=8 needs" in message
    assert "cluster.num_workers=" in message


def test_the_number_of_ranks_is_the_smallest_doubling_that_fits(demand: Demand) -> None:
    counted = count(demand)
    memory = 1.01 * peak_bytes(replace(demand, num_ranks=4), counted) / (1 - m.SPARE)
    assert peak_bytes(replace(demand, num_ranks=2), counted) > memory * (1 - m.SPARE)
    assert "cluster.num_workers=4 needs" in room._ways_out(demand, counted, int(memory))


def test_a_base_in_4_bits_is_not_counted_and_trains(demand: Demand) -> None:
    quantized = replace(demand, train=demand.train.model_copy(update={"lora": Lora(quantize="nf4")}))
    (sentence,) = checked(quantized, 1)
    assert "is not counted beforehand: train.lora.quantize: a base in 4 bits is not counted." in sentence


def test_counting_draws_no_random_numbers(demand: Demand) -> None:
    adapters = replace(demand, train=demand.train.model_copy(update={"lora": Lora()}))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    count(adapters)
    assert torch.rand(1) == expected


def test_a_pack_is_no_larger_than_a_batch_can_make_it() -> None:
    examples = [Example("", [1] * 10, [[1] * size, [1] * 2], [], [], 1.0) for size in (8, 18, 4)]  # 20, 30, 16 tokens
    assert largest_pack(examples, Train(batch_size=3, tokens_per_pack=10**6), num_ranks=1) == 66 + 30
    assert largest_pack(examples, Train(batch_size=3, tokens_per_pack=40), num_ranks=1) == 40
    assert largest_pack(examples, Train(batch_size=3, tokens_per_pack=1), num_ranks=1) == 30, "a longer one is a pack"
    assert mean_response(examples) == 6


@pytest.mark.parametrize(
    ("capability", "precision", "resolved"),
    [((8, 0), "auto", "bf16"), ((7, 5), "auto", "fp32"), ((9, 0), "bf16", "bf16"), ((7, 5), "fp32", "fp32")],
)
def test_precision_is_what_the_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, resolved: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert resolve_precision(precision) == resolved


def test_bf16_on_a_gpu_that_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(EnvironmentProblem, match=r"Tesla T4 has compute capability 7.5, bf16 needs 8.0. Set precision"):
        resolve_precision("bf16")


def settings(precision: str = "auto", **gpus: float) -> Any:
    return SimpleNamespace(precision=precision, cluster=Cluster(**gpus))


@pytest.mark.parametrize(
    ("given", "capability", "resolved"),
    [
        (settings(), (9, 0), "fp32"),  # a GPU that the run is not given
        (settings(gpus_per_worker=1), (9, 0), "bf16"),
        (settings(gpus_per_actor=0.5), (9, 0), "bf16"),
        (settings(gpus_per_actor=1), (7, 5), "fp32"),
        (settings("fp32", gpus_per_actor=1), None, "fp32"),
        (settings("bf16", gpus_per_actor=1), None, "bf16"),  # the GPUs are those of other machines
        (settings("bf16"), (7, 5), "bf16"),  # on the CPU, slowly, as is asked
        (settings(), None, "fp32"),
    ],
)
def test_the_precision_of_a_run_follows_the_gpus_that_it_is_given(
    monkeypatch: pytest.MonkeyPatch, given: Any, capability: tuple[int, int] | None, resolved: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert run_precision(given) == resolved


def test_auto_is_not_decided_on_a_head_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentProblem, match=r"torch sees none here, while .* Set precision: bf16 \(for GPUs"):
        run_precision(settings(gpus_per_worker=1))


def test_launched_ranks_do_not_train_in_fp32_on_gpus_that_the_configuration_does_not_know_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"Set cluster.gpus_per_worker: 1, or the precision"):
        require_known_gpus(settings())
    require_known_gpus(settings(gpus_per_worker=1))
    require_known_gpus(settings("fp32"))


def test_a_rank_asks_for_its_own_gpu_before_the_model_is_loaded(
    demand: Demand, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = TrainSpec(
        directory=tmp_path,
        preferences=tmp_path,
        reference=demand.model,
        start=demand.model,
        train=Train(tokens_per_pack=64),
        beta=0.1,
        seed=0,
        precision="bf16",
    )
    examples = [Example("", [1] * 10, [[1] * 20, [1] * 30], [], [], 1.0)]
    device = SimpleNamespace(total_memory=10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    with pytest.raises(EnvironmentProblem, match=r"training needs about 0\.\d GB of this GPU's 0\.0 GB"):
        require_room_here(spec, demand.ds_config, examples, 1, print)


def test_model_directory_is_all_that_is_read(demand: Demand) -> None:
    assert [file.name for file in Path(demand.model.model).iterdir()] == ["config.json"]
