"""Beaver, multi-head and guard models, made small in their published layouts, against plain torch text by text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_classifier, make_tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from can_dist.config import Beaver, Guard, Model, MultiHead, SequenceClassifier
from can_dist.errors import CanDistError, ConfigError, DataError
from can_dist.modeling.classifiers import load_sequence_classifier, output_weights
from can_dist.scoring.guard import guard_ids
from can_dist.scoring.kinds import check_scorer_opens, load_scorer, scorer_identity, shown_name
from can_dist.scoring.protocol import LogProb, Outputs, Response
from can_dist.tables.artifacts import MANIFEST

WORDS = [*(f"w{i}" for i in range(10)), "safe", "unsafe", "BEGINNING", "OF", "CONVERSATION:", "USER:"]
RESPONSES = [
    Response(f"r{n}", [{"role": "user", "content": "w1 w2"}], " ".join(WORDS[: n % 9 + 1]), []) for n in range(11)
]
# a tokenizer of whole words reads 'ASSISTANT:w0' as one word, so these words are in its vocabulary
BEAVER_WORDS = [*WORDS, "ASSISTANT:w0", "ASSISTANT:"]


# ----------------------------------------------------------------------------------------------------------- Beaver


def make_beaver(directory: Path, change: Callable[[dict[str, Any]], None] = lambda _: None, **config: Any) -> Path:
    """Save a Llama body and a score_head as safe-rlhf does; ``change`` edits the weights before they are written."""
    make_tiny_lm(directory, BEAVER_WORDS)
    weights = {key: value for key, value in load_file(directory / "model.safetensors").items() if "lm_head" not in key}
    torch.manual_seed(1)
    weights |= {"score_head.weight": 3 * torch.randn(1, 32), "score_head.bias": torch.tensor([9.0])}
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    raw = json.loads(path.read_text()) | {
        "architectures": ["LlamaModelForScore"],
        "score_type": "reward",
        "score_dim": 1,
        "bias": True,
        "do_normalize": False,
        "normalizer_type": None,
    }
    path.write_text(json.dumps(raw | config))
    return directory


def beaver_by_hand(directory: Path, response: Response) -> float:
    """The head at the end token of the published text, from the files alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = f"BEGINNING OF CONVERSATION: USER: w1 w2 ASSISTANT:{response.text}</s>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    assert ids[0, -1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    weights = load_file(directory / "model.safetensors")
    body = LlamaModel.from_pretrained(directory).eval()
    with torch.no_grad():
        hidden = body(ids).last_hidden_state[0, -1]
        return float(hidden @ weights["score_head.weight"][0] + weights["score_head.bias"][0])


def test_beaver_is_its_head_at_the_end_of_the_published_text(tmp_path: Path) -> None:
    directory = make_beaver(tmp_path)
    scores = load_scorer(Beaver(model=str(directory), tokens_per_pass=40), "fp32").score(RESPONSES)
    expected = [beaver_by_hand(directory, response) for response in RESPONSES]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_beaver_head_stays_in_float32_under_bf16(tmp_path: Path) -> None:
    directory = make_beaver(tmp_path)
    model = load_sequence_classifier(Beaver(model=str(directory)), "bf16")
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    saved = load_file(directory / "model.safetensors")["score_head.weight"]
    assert torch.equal(model.score_head.weight, saved)
    scores = load_scorer(Beaver(model=str(directory)), "bf16").score(RESPONSES)
    assert len(set(scores - np.round(scores * 16) / 16)) > 1, "steps of 1/16 are those of a head in bf16"


def test_beaver_cost_model_is_known_by_its_configuration(tmp_path: Path) -> None:
    directory = make_beaver(tmp_path, score_type="cost", architectures=["LlamaForScore"])
    with pytest.raises(DataError, match=r"it is a cost model, the configuration gives sign 1\. Set sign to -1"):
        check_scorer_opens(Beaver(model=str(directory)))
    check_scorer_opens(Beaver(model=str(directory), sign=-1))
    assert scorer_identity(Beaver(model=str(directory), sign=-1), "fp32")["template"].endswith(" ASSISTANT:")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda w: w.pop("score_head.weight"),
            {},
            "weights missing from the checkpoint: score_head.weight; they",
        ),
        (lambda w: w.pop("score_head.bias"), {}, "weights missing from the checkpoint: score_head.bias"),
        (lambda w: w.pop("model.norm.weight"), {}, "weights missing from the checkpoint: model.norm.weight"),
        (
            lambda w: w.update({"value_head.weight": torch.ones(1, 32)}),
            {},
            "holds weights of another layout: value_head.weight. Give a Beaver score model",
        ),
        (lambda w: w.pop("score_head.bias"), {"bias": False}, ""),
        (lambda w: w.update({"normalizer.mean": torch.ones(1)}), {}, ""),
        (lambda w: None, {"do_normalize": True}, "config.json has do_normalize True, only False is supported"),
        (lambda w: None, {"score_dim": 2}, "config.json has score_dim 2, only 1 is supported"),
        (
            lambda w: None,
            {"architectures": ["LlamaForCausalLM"]},
            "its checkpoint is a LlamaForCausalLM, expected LlamaForScore or LlamaModelForScore. For another",
        ),
    ],
)
def test_beaver_layout_is_checked_by_name(tmp_path: Path, change: Any, config: dict[str, Any], message: str) -> None:
    directory = make_beaver(tmp_path, change, **config)
    spec = Beaver(model=str(directory))
    if not message:
        assert np.isfinite(load_scorer(spec, "fp32").score(RESPONSES[:1])).all()
        return
    with pytest.raises(DataError) as caught:
        load_scorer(spec, "fp32")
    assert message in str(caught.value)
    assert str(directory) in str(caught.value)


def test_beaver_weights_are_safetensors_only(tmp_path: Path) -> None:
    directory = make_beaver(tmp_path)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"only pickled weights \(pytorch_model\.bin\), which are not loaded"):
        load_scorer(Beaver(model=str(directory)), "fp32")


# ------------------------------------------------------------------------------------------------------- multi-head


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = make_tiny_classifier(tmp_path_factory.mktemp("heads"), WORDS, num_labels=3)
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"id2label": {"0": "helpful", "1": "harmless", "2": "verbose"}}
    raw |= {"label2id": {"helpful": 0, "harmless": 1, "verbose": 2}}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.fixture(scope="module")
def outputs_NL(heads: Path) -> np.ndarray:
    """Every output for every response, from transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(heads)
    model = AutoModelForSequenceClassification.from_pretrained(heads).eval()
    body, found = model.model, []
    for response in RESPONSES:
        ids = tokenizer(f"<user>w1 w2<assistant>{response.text}</s>", return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model.score(body(ids).last_hidden_state[0, -1]).numpy())
    return np.stack(found).astype(np.float64)


@pytest.mark.parametrize(
    ("choice", "weight_L"),
    [
        ({"output": 1}, [0, 1, 0]),
        ({"output": "verbose"}, [0, 0, 1]),
        ({"weights": {"helpful": 0.7, "verbose": -0.3}}, [0.7, 0, -0.3]),
    ],
)
def test_multi_head_score_is_the_chosen_output(
    heads: Path, outputs_NL: np.ndarray, choice: dict[str, Any], weight_L: list[float]
) -> None:
    spec = MultiHead(model=str(heads), tokens_per_pass=40, **choice)
    assert output_weights(spec, AutoConfig.from_pretrained(heads)) == weight_L
    found_NL = load_scorer(Outputs(body=spec), "fp32").score(RESPONSES)
    assert np.ptp(found_NL @ weight_L) > 1e-3
    np.testing.assert_allclose(found_NL, outputs_NL, atol=1e-6)


@pytest.mark.parametrize("choice", [{"output": 3}, {"output": -1}, {"output": "honest"}, {"weights": {"honest": 1.0}}])
def test_output_that_does_not_exist_is_named_with_those_that_do(heads: Path, choice: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no single output (3|-1|honest)\. Its outputs are 0: helpful, 1: harmless, 2"):
        check_scorer_opens(MultiHead(model=str(heads), **choice))


def test_classifier_of_several_outputs_points_to_multi_head(heads: Path) -> None:
    with pytest.raises(DataError, match=r"has 3 outputs, expected 1 score per response\. Choose one with 'kind: multi"):
        check_scorer_opens(SequenceClassifier(model=str(heads)))


def test_outputs_of_one_model_are_different_scorers(heads: Path) -> None:
    one, other = (scorer_identity(MultiHead(model=str(heads), output=name), "fp32") for name in ("helpful", "verbose"))
    assert one["weights"] == other["weights"]
    assert one != other


def test_outputs_of_one_model_are_one_pass_whatever_is_chosen_of_them(heads: Path) -> None:
    one, other = (
        scorer_identity(Outputs(body=MultiHead(model=str(heads), **choice)), "fp32")
        for choice in ({"output": "helpful"}, {"weights": {"verbose": 1.0}, "sign": -1, "tokens_per_pass": 7})
    )
    assert one == other


# ------------------------------------------------------------------------------------------------------------ guards


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("guard"), WORDS, seed=5)


def guard_by_hand(directory: Path, response: Response, before: str = "") -> tuple[float, float]:
    """Logits of 'safe' and 'unsafe' after the conversation and the guard's turn, from the whole vocabulary's."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    text = f"<user>w1 w2<assistant>{response.text}</s><assistant>{before}"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double()
    return logits[tokenizer.convert_tokens_to_ids("safe")].item(), logits[
        tokenizer.convert_tokens_to_ids("unsafe")
    ].item()


def test_guard_score_is_the_log_odds_of_safe(guard: Path) -> None:
    scores = load_scorer(Guard(model=str(guard), tokens_per_pass=40), "fp32").score(RESPONSES)
    expected = [safe - unsafe for safe, unsafe in (guard_by_hand(guard, response) for response in RESPONSES)]
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_guard_probability_is_softmax_over_the_two_words(guard: Path) -> None:
    spec = Guard(model=str(guard), output="probability", before_verdict="w7")
    scores = load_scorer(spec, "fp32").score(RESPONSES)
    by_hand = torch.tensor([guard_by_hand(guard, response, "w7") for response in RESPONSES], dtype=torch.float64)
    np.testing.assert_allclose(scores, by_hand.softmax(dim=1)[:, 0].numpy(), atol=1e-6)


def test_what_a_guard_writes_first_is_not_joined_to_its_prompt() -> None:
    """Llama Guard 3 writes two line breaks after the two of its header; Llama 3 has a token for all four."""
    vocabulary = {token: number for number, token in enumerate(["</s>", "<h>", "w", "Ċ", "ĊĊ", "ĊĊĊĊ"])}
    bpe = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = "{% for m in messages %}<h>{{ m.content }}{% endfor %}{{ '<h>\n\n' }}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<h>"]})
    response = Response("r", [{"role": "user", "content": "w"}], "w", [])
    ids = guard_ids(tokenizer, Guard(model="guard", before_verdict="\n\n"), response)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<h>", "w", "<h>", "w", "<h>", "ĊĊ", "ĊĊ"]
    assert tokenizer("\n\n\n\n").input_ids == [vocabulary["ĊĊĊĊ"]], "as one text they would be one token"


def test_guard_whose_head_is_its_embedding_is_read_right(tmp_path: Path) -> None:
    """Gemma and small Llamas tie the two; the two rows in float32 must not change the embedding."""
    directory = make_tiny_lm(tmp_path, WORDS, seed=6)
    weights = load_file(directory / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(raw))
    scores = load_scorer(Guard(model=str(directory)), "fp32").score(RESPONSES[:3])
    expected = [safe - unsafe for safe, unsafe in (guard_by_hand(directory, one) for one in RESPONSES[:3])]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.isfinite(load_scorer(Guard(model=str(directory)), "bf16").score(RESPONSES[:3])).all()


def test_guard_template_gets_its_options(guard: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(guard)
    template = "{{ guideline }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(guard).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one, other = (
        load_scorer(Guard(model=str(tmp_path), template_options={"guideline": word}), "fp32").score(RESPONSES[:1])[0]
        for word in ("w3", "w4")
    )
    assert abs(one - other) > 1e-5


@pytest.mark.parametrize("before", ["", "w7"])
def test_guard_that_would_write_something_else_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str
) -> None:
    """Llama Guard 3 without its before_verdict: two words are compared that nobody would write there."""
    directory = make_tiny_lm(tmp_path, WORDS)
    weights = load_file(directory / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids(["<assistant>", "w7", "safe"])
    # a model of bigrams: 'w7' follows the guard's mark, 'safe' follows 'w7'
    embedding, head = torch.zeros(2, *weights["lm_head.weight"].shape)
    embedding[ids, [0, 1, 2]] = 100.0
    head[ids[1], 0] = head[ids[2], 1] = 10.0
    weights |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    load_scorer(Guard(model=str(directory), before_verdict=before), "fp32")
    said = "does not expect its verdict: 'safe' and 'unsafe' have" in (text := capsys.readouterr().err)
    assert said == (before == ""), text
    assert ("the likeliest is 'w7'" in text) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template_options": {"guidline": "x"}}, "its chat template does not read template_options guidline. Correct"),
        ({"unsafe_word": "w1 w2"}, r"unsafe_word 'w1 w2' is 2 tokens \['w1', 'w2'\], expected one known"),
        ({"safe_word": "Yes"}, r"safe_word 'Yes' is 1 tokens \['<unk>'\], expected one known to the tokenizer"),
        ({"unsafe_word": "safe"}, "safe_word 'safe' and unsafe_word 'safe' are the same token. Give the words its"),
    ],
)
def test_verdict_or_option_that_cannot_be_is_named(guard: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_scorer_opens(Guard(model=str(guard), **options))


def changed_template(guard: Path, directory: Path, template: str | None) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(guard)
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(guard).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "its tokenizer has no chat template, which says how the conversation is shown"),
        ("{{ raise_exception('no assistant turn') }}", "its chat template refuses response 'r0': no assistant turn"),
    ],
)
def test_guard_template_that_is_missing_or_refuses_is_named(
    guard: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    directory = changed_template(guard, tmp_path, template)
    with pytest.raises(CanDistError, match=message):
        load_scorer(Guard(model=str(directory)), "fp32").score(RESPONSES)


def test_guard_refuses_a_text_longer_than_its_context(guard: Path) -> None:
    with pytest.raises(DataError, match=r"response 'r7' has 14 tokens with its prompt, the model takes 13"):
        load_scorer(Guard(model=str(guard), max_length=13), "fp32").score(RESPONSES)


def test_identity_of_a_guard_is_what_decides_its_number(guard: Path) -> None:
    base = scorer_identity(Guard(model=str(guard)), "fp32")
    assert base == scorer_identity(Guard(model=str(guard), tokens_per_pass=20), "fp32")
    for change in (
        {"output": "probability"},
        {"safe_word": "w1"},
        {"before_verdict": "w2"},
        {"template_options": {"a": 1}},
    ):
        assert base != scorer_identity(Guard(model=str(guard), **change), "fp32")


def test_code_shipped_with_a_model_is_part_of_its_digest(guard: Path, tmp_path: Path) -> None:
    shutil.copytree(guard, tmp_path / "model")
    code, spec = tmp_path / "model" / "modeling_mine.py", Guard(model=str(tmp_path / "model"))
    code.write_text("SCALE = 1")
    before = scorer_identity(spec, "fp32")
    code.unlink()
    code.write_text("SCALE = -1")
    assert scorer_identity(spec, "fp32") != before


@pytest.mark.parametrize("run", ["run", "elsewhere/run"])
def test_policy_of_a_run_is_named_by_its_artifact(tmp_path: Path, run: str) -> None:
    """The name is recorded in the manifests of its scores, whose digests hold in whatever path the run lies."""
    policy = tmp_path / run / "train-0123456789abcdef" / "policy"
    policy.mkdir(parents=True)
    spec = LogProb(model=Model(model=str(policy)))
    assert shown_name(spec) == str(policy)
    (policy.parent / MANIFEST).touch()
    assert shown_name(spec) == "train-0123456789abcdef/policy"
