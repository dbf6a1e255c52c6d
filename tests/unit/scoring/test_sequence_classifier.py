"""Classifier scorers of different architectures, against one forward pass per text with plain transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_classifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from can_dist.config import SequenceClassifier
from can_dist.errors import DataError
from can_dist.scoring.protocol import Response
from can_dist.scoring.sequence_classifier import ClassifierScorer

WORDS = [f"w{i}" for i in range(10)]
RESPONSES = [
    Response(f"r{n}", [{"role": "user", "content": "w1 w2"}], " ".join(WORDS[: n % 9 + 1]), []) for n in range(11)
]


def make_encoder(directory: Path) -> Path:
    """A RoBERTa with one output; its tokenizer adds <s> and </s>, as published encoder reward models do."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(directory)
    return directory


def test_encoder_is_scored_as_it_scores_each_text_alone(tmp_path: Path) -> None:
    directory = make_encoder(tmp_path / "encoder")
    spec = SequenceClassifier(model=str(directory), template="{prompt} ", tokens_per_pass=40)
    scores = ClassifierScorer(spec, "fp32").score(RESPONSES)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for response, score in zip(RESPONSES, scores, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(f"w1 w2 {response.text}", return_tensors="pt")).logits.item()
        assert score == pytest.approx(alone, abs=1e-5)


def test_decoder_whose_padding_is_its_end_token_is_read_at_the_last_token(tmp_path: Path) -> None:
    """transformers would pool before the end token here; the end of the response is part of the text."""
    directory = make_tiny_classifier(tmp_path / "decoder", WORDS)
    scorer = ClassifierScorer(SequenceClassifier(model=str(directory), tokens_per_pass=30), "fp32")
    expected = scorer.score(RESPONSES)
    assert scorer.passes.layout == "shared"
    scorer.passes.layout = "padded"
    scorer.pad_id = scorer.model.config.pad_token_id = scorer.formatter.tokenizer.eos_token_id
    np.testing.assert_allclose(scorer.score(RESPONSES), expected, atol=1e-6)


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_decoder_is_read_where_transformers_reads_it(tmp_path: Path, pad: str | None) -> None:
    """TRL pads with the end token where there is no other, and writes so: such a model learned to be read before it."""
    directory = make_tiny_classifier(tmp_path / "decoder", WORDS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["pad_token_id"] = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    (directory / "config.json").write_text(json.dumps(config))
    scores = ClassifierScorer(SequenceClassifier(model=str(directory), tokens_per_pass=40), "fp32").score(RESPONSES)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    for response, score in zip(RESPONSES, scores, strict=True):
        conversation = [*response.messages, {"role": "assistant", "content": response.text}]
        with torch.no_grad():
            alone = model(**tokenizer.apply_chat_template(conversation, return_tensors="pt")).logits.item()
        assert score == pytest.approx(alone, abs=1e-5)


def test_text_longer_than_the_positions_behind_the_padding_is_refused(tmp_path: Path) -> None:
    """RoBERTa's positions begin behind the padding token's, so 64 of them are 62 tokens."""
    scorer = ClassifierScorer(SequenceClassifier(model=str(make_encoder(tmp_path)), template="{prompt} "), "fp32")
    fits, longer = (Response(f"r{n}", [{"role": "user", "content": "w1"}], " ".join(["w2"] * n), []) for n in (59, 60))
    assert np.isfinite(scorer.score([fits])).all()
    with pytest.raises(DataError, match=r"response 'r60' has 63 tokens with its prompt, the model takes 62"):
        scorer.score([longer])


def test_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    directory = make_tiny_classifier(tmp_path / "decoder", WORDS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(directory)
    with pytest.raises(DataError, match="its tokenizer has no end-of-sequence token"):
        ClassifierScorer(SequenceClassifier(model=str(directory)), "fp32")
