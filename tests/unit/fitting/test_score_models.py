"""A score model learns what can be learned, and says what a user can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from can_dist.demo import world as demo_world
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.fitting import score_models
from can_dist.fitting.score_models import (
    ScoreExample,
    ScorePair,
    area_under_curve,
    fit_score_model,
    save_model,
    scores_of,
)
from can_dist.modeling.formatter import Formatter


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """An untrained causal language model with the demo's tokenizer."""
    tokenizer = demo_world.build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    save_model(LlamaForCausalLM(config), tokenizer, directory)
    return directory


def _toy(num: int) -> tuple[list[ScorePair], list[ScoreExample]]:
    asked, _ = demo_world.questions(0, num)
    messages = [demo_world.user_message(question.prompt) for question in asked]
    good, bad = "Just knead the dough, and go slowly.", "Just knead the dough, and skip the gloves."
    pairs = [ScorePair(message, good, bad) for message in messages]
    return pairs, [ScoreExample(m, *((good, 1) if index % 2 else (bad, 0))) for index, m in enumerate(messages)]


def test_a_separable_toy_is_learned_and_the_saved_model_gives_the_same_scores(tiny, tmp_path):
    pairs, examples = _toy(160)
    encode = Formatter(AutoTokenizer.from_pretrained(tiny)).full_ids
    options = {"encode": encode, "examples": examples, "epochs": 4, "lr": 3e-3, "batch_size": 16}
    result = fit_score_model(tiny, pairs, tmp_path / "head", **options)
    assert result.pair_accuracy == 1.0
    assert result.auc == 1.0
    assert result.num_held_out_pairs == result.num_held_out_examples == 24
    assert result.num_truncated == 0
    assert json.loads((tmp_path / "head" / "fit.json").read_text())["num_steps"] == result.num_steps
    assert not list(tmp_path.glob(".*"))  # no temporary folder left

    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = [encode(pair.messages, text) for pair in pairs[:10] for text in (pair.better, pair.worse)]
    scores = scores_of(model, ids, batch_size=7).reshape(-1, 2)
    assert (scores[:, 0] > 0).all()
    assert (scores[:, 1] < 0).all()
    with torch.inference_mode():  # Hugging Face's own forward, one sequence at a time, reads the same token
        alone = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    assert scores.ravel() == pytest.approx(alone, abs=1e-5)

    again = fit_score_model(tiny, pairs, tmp_path / "again", **options)
    assert again.train_loss == pytest.approx(result.train_loss, rel=1e-4)


def test_held_out_rows_share_no_prompt_with_training_rows():
    keys = ["a", "b", "a", "c", "d", "b"]
    aside = score_models._split(keys, 0.5, seed=0)
    assert {key for key, out in zip(keys, aside, strict=True) if out}.isdisjoint(
        {key for key, out in zip(keys, aside, strict=True) if not out}
    )
    assert len({key for key, out in zip(keys, aside, strict=True) if out}) == 2


def test_long_sequences_lose_their_end_and_are_counted(tiny):
    encode = Formatter(AutoTokenizer.from_pretrained(tiny)).full_ids
    pairs, examples = _toy(4)
    rows, num_truncated = score_models._encode_rows(pairs, examples, encode, 6)
    assert num_truncated == 12
    assert all(len(ids) == 6 for row in rows for ids in row.ids)


def test_what_a_user_can_get_wrong_is_said(tiny, tmp_path):
    encode = Formatter(AutoTokenizer.from_pretrained(tiny)).full_ids
    pairs, examples = _toy(4)
    with pytest.raises(DataError, match="no pairs and no examples"):
        fit_score_model(tiny, [], tmp_path / "out", encode=encode)
    wrong = [ScoreExample(examples[0].messages, "Use glue.", 2)]
    with pytest.raises(DataError, match="expected 0 or 1"):
        fit_score_model(tiny, pairs, tmp_path / "out", encode=encode, examples=wrong)
    pad_id = AutoTokenizer.from_pretrained(tiny).pad_token_id
    with pytest.raises(DataError, match=r"a text ends with the padding token \(\d+\), before which transformers"):
        fit_score_model(tiny, pairs, tmp_path / "out", encode=lambda *turn: [*encode(*turn), pad_id])
    with pytest.raises(EnvironmentProblem, match="exists already"):
        fit_score_model(tiny, pairs, tmp_path, encode=encode)


def test_area_under_curve():
    assert area_under_curve(np.array([3.0, 2.0, 1.0, 1.0]), np.array([1, 1, 0, 1])) == pytest.approx(2.5 / 3)
    assert area_under_curve(np.array([1.0, 2.0]), np.array([1, 1])) is None
