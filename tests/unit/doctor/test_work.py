"""The work of a run against numbers made by hand: tokens, hours, disk, actors."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from can_dist.cli.plan import work_text
from can_dist.config import validate_config
from can_dist.config.sections import Generate
from can_dist.doctor.work import Work, cache_bytes, count_work, parse_rates
from can_dist.errors import ConfigError
from can_dist.training.plan import Plan

JUDGE = {"model": "not/here"}
SHAPE = SimpleNamespace(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
PLAN = Plan(**{field.name: 0 for field in dataclasses.fields(Plan)} | {"precision": "bf16", "elements": 8 * 10**9})
ON_GPU = dataclasses.replace(PLAN, on_gpu=True, trained_elements=10**9)


def work(rates: dict[str, float] | None = None, size: int | None = 100, plan: Plan = PLAN, **sections: Any) -> Work:
    base = {
        "prompts": {"source": "p.jsonl", "num_train": 1000, "num_test": 50, "num_validation": 200},
        "reference": {"model": "lm"},
        "reward": JUDGE,
        "constraints": {"safety": {"scorer": {"kind": "callable", "function": "builtins:len"}, "margin": 1}},
        "generate": {"num_responses": 8, "max_new_tokens": 256, "batch_prompts": 4, "shard_prompts": 8},
        "label": {"validation_fraction": 0},
        "train": {"num_epochs": 3},
        "evaluate": {"num_responses": 2},
        "cluster": {"num_actors": 4, "num_workers": 2},
    }
    return count_work(validate_config({**base, **sections}), plan, SHAPE, rates or {}, size)


def test_tokens_are_responses_times_their_mean() -> None:
    counted = work()
    assert counted.responses == 1000 * 8 + 200 * 8 + 2 * 50 * 2
    assert counted.tokens["generate"] == 100 * counted.responses
    # one judge is a model: it and ln π_ref on the reference's, it twice and ln π twice on the held-out ones
    assert counted.tokens["score"] == 100 * (9600 * 2 + 100 * 4)
    assert counted.tokens["train"] == 100 * 3 * 8000, "a list holds each response once"
    assert counted.unknown == ()
    assert work(size=None).tokens["train"] == 256 * 3 * 8000
    assert work(size=None).is_most


@pytest.mark.parametrize(
    ("sections", "responses"),
    [
        ({"label": {"labels": "sampled", "validation_fraction": 0}}, 3 * 1000 * 2 * 28),
        ({"label": {"pairs_per_prompt": 5, "validation_fraction": 0}}, 3 * 1000 * 2 * 5),
        ({"label": {"labels": "listwise", "validation_fraction": 0.25}}, 3 * 750 * 8),
        ({"train": {"num_epochs": 3, "max_steps": 10, "batch_size": 16}}, 10 * 16 * 8),
        ({"method": "cdpo", "cdpo": {"rounds": 4}}, 4 * 3 * 8000),
        ({"method": "caid", "caid": {"rounds": 2, "epochs": 1}}, (3 + 2) * 8000),
        ({"method": "primal_dual", "primal_dual": {"rounds": 6, "epochs": 2}}, 6 * 2 * 8000),
        ({"basis": True}, 2 * 3 * 8000),
    ],
)
def test_trained_responses_by_labels_and_methods(sections: dict[str, Any], responses: int) -> None:
    assert work(**sections).tokens["train"] == 100 * responses


def test_loops_sample_and_score_their_policies() -> None:
    plain, loop = work(), work(method="cdpo", cdpo={"rounds": 4})
    assert loop.responses == plain.responses + 4 * 8000
    assert loop.tokens["score"] == plain.tokens["score"] + 100 * 4 * 8000 * 2


def test_what_is_not_known_is_said_and_not_counted() -> None:
    unknown = work(prompts={"source": "p.jsonl", "num_validation": 200})
    assert unknown.tokens["train"] is None
    assert "give prompts.num_train" in work_text(unknown)
    people = work(method="dpo_s", label={"preferences": {"source": "pairs.jsonl"}})
    assert people.tokens["train"] is None
    assert people.responses == 2 * 100
    assert "not counted: the data set's own pairs" in work_text(people)
    assert work(generate={"num_responses": 8, "responses": {"source": "r.jsonl"}}).tokens["generate"] == 100 * 200


def test_hours_are_of_a_stated_rate_or_of_the_model_on_gpus() -> None:
    stated = work(rates={"generate": 2000, "train": 500})
    assert stated.hours["generate"] == pytest.approx((980_000 / 2000 / 4 / 3600,) * 2)
    assert stated.hours["train"] == pytest.approx((2_400_000 / 500 / 2 / 3600,) * 2)
    assert "score" not in stated.hours
    assert "train" not in work().hours, "nothing is known of a CPU"
    low, high = work(plan=ON_GPU).hours["train"]
    assert (low, high) == pytest.approx((2.4e6 / 4600 / 2 / 3600, 2.4e6 / 2300 / 2 / 3600))
    text = work_text(work(rates={"generate": 2000}, plan=ON_GPU))
    assert "generate  1.0 M tokens on 4 actor(s): 0.034 h at 2,000 tokens/s of each" in text
    assert "for hours give --rate score=TOKENS/s of each" in text
    assert "0.072 to 0.14 h, at 4,600 to 2,300 tokens/s of each, by a model" in text
    assert stated.host_hours == pytest.approx(9800 * 105e-6 / 3600)


def test_disk_and_actors() -> None:
    counted = work(plan=ON_GPU)
    assert counted.disk_bytes == {
        "2 policies": 2 * 16 * 10**9,
        "3 checkpoints while it trains": 3 * 16 * 10**9,
        "responses": 8 * 980_000,
    }
    assert "1 policy" in work(strength=1).disk_bytes
    assert counted.actor_bytes == {"generate, ln π": 16 * 10**9, "reward": None}
    assert counted.cache_bytes == 4 * 8 * 256 * (2 * 32 * 8 * 128) * 2
    assert work(generate={"num_responses": 512}).cache_bytes == 32768 * (2 * 32 * 8 * 128) * 2
    vllm = work(generate={"num_responses": 8, "engine": "vllm"})
    assert vllm.cache_bytes is None
    assert "decoded at once: what vLLM takes" in work_text(vllm)
    assert "reward not in reach" in work_text(counted)


@pytest.mark.parametrize("text", ["train", "train=", "train=fast", "train=0", "train=-1", "train=inf", "label=3"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--rate .*: expected STAGE=TOKENS"):
        parse_rates((text,))


def test_a_rate_twice_is_refused() -> None:
    assert parse_rates(("train=3e3", "score=5")) == {"train": 3000.0, "score": 5.0}
    with pytest.raises(ConfigError, match="at most once"):
        parse_rates(("train=3", "train=4"))


def test_keys_and_values_take_what_a_cache_of_transformers_does() -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    options = Generate(num_responses=2, batch_prompts=1, max_new_tokens=7)
    for config in (
        LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2),
        LlamaConfig(**shape, num_attention_heads=4),
        Qwen3Config(**shape, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    ):
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
        size = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert cache_bytes(options, config, 4) == size
    within = options.model_copy(update={"tokens_at_once": 7})
    assert cache_bytes(within, config, 4) == size / 2
