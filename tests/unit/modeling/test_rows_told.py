"""Sampling tells of each response that is whole, so that a bar can move within a shard."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from can_dist.config.sections import Generate
from can_dist.modeling import sampling


@pytest.mark.parametrize(("is_served", "expected"), [(True, [1] * 6), (False, [3, 3])])
def test_rows_are_told_when_they_are_whole(
    is_served: bool, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_lm(tmp_path, ["w1", "w2"])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    assert sampling.serves(model)
    monkeypatch.setattr(sampling, "serves", lambda _: is_served)
    options = Generate(num_responses=3, max_new_tokens=8, batch_prompts=1, shard_prompts=2)
    prompts = [tokenizer("w1").input_ids] * 3 + [tokenizer("w2 w1").input_ids] * 3
    told: list[int] = []
    samples = sampling.sample(model, tokenizer, prompts, range(6), options, [tokenizer.eos_token_id], told=told.append)
    assert len(samples) == 6
    assert told == expected
