"""Models as other tools write them: the number on the model's card, or a refusal by name before anything is sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, PHI3, Family, make_model
from safetensors.torch import load_file, save_file
from tiny import make_tiny_classifier, make_tiny_lm
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from can_dist.config import Config, Guard, Model, MultiHead, SequenceClassifier, validate_config
from can_dist.doctor import Severity
from can_dist.doctor.inputs import check_inputs
from can_dist.doctor.preflight import preflight
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.formatter import open_formatter
from can_dist.modeling.loading import load_causal_lm
from can_dist.scoring.kinds import check_scorer_opens, load_scorer, scorer_identity
from can_dist.scoring.protocol import Response

WORDS = ["how", "do", "I", "bake", "bread", "mix", "flour", "cannot", "help", "?", "yes"]
QUESTION = "how do I bake bread ?"
ANSWERS = ["mix flour", "I cannot help", "yes", "mix flour I bake bread yes"]
ROWS = [Response(str(n), [{"role": "user", "content": QUESTION}], text, []) for n, text in enumerate(ANSWERS)]


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes one out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def put(directory: Path, **tensors: torch.Tensor) -> None:
    """Add tensors to a checkpoint."""
    file = directory / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})


def configure(directory: Path, **changes: Any) -> Config:
    """A configuration of models in a directory: ``lm``, and ``rm`` as the reward unless ``changes`` say otherwise."""
    rows = changes.pop("rows", [{"prompt": f"bread {word}"} for word in WORDS])
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = {
        "prompts": {"source": str(directory / "prompts.jsonl"), "num_test": 2},
        "reference": {"model": str(directory / "lm")},
        "reward": {"model": str(directory / "rm")},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
    }
    return validate_config(raw | changes)


def refused(config: Config, expected: type[Exception] = DataError) -> str:
    """The message with which both preflight and the doctor refuse a configuration."""
    with pytest.raises(expected) as caught:
        preflight(config)
    errors = [finding for finding in check_inputs(config) if finding.severity is Severity.ERROR]
    assert any(str(caught.value).startswith(finding.state) for finding in errors), (str(caught.value), errors)
    return str(caught.value)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    make_tiny_lm(tmp_path / "lm", WORDS)
    make_tiny_classifier(tmp_path / "rm", WORDS)
    return tmp_path


# ------------------------------------------------------------------------------------ tensors and keys nothing reads


def test_normalised_reward_model_is_refused_with_its_statistics(world: Path) -> None:
    edit(world / "rm" / "config.json", normalize_reward=True, mean=1.5, std=0.25)
    put(world / "rm", mean=torch.tensor([1.5]), std=torch.tensor([0.25]))
    message = refused(configure(world))
    assert "config.json has normalize_reward true: its maker's loader returns (score - mean) / std (mean 1.5" in message
    edit(world / "rm" / "config.json", normalize_reward=False)
    raw = load_scorer(SequenceClassifier(model=str(world / "rm")), "fp32").score(ROWS)
    model = AutoModelForSequenceClassification.from_pretrained(world / "rm").eval()
    assert raw == pytest.approx([by_hand(model, world / "rm", row) for row in ROWS], rel=1e-4)


def by_hand(model: Any, directory: Path, row: Response) -> float:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    whole = [*row.messages, {"role": "assistant", "content": row.text}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    with torch.no_grad():
        return float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0])


def test_statistics_without_a_word_on_them_are_refused(world: Path) -> None:
    put(world / "rm", mean=torch.tensor([1.5]), std=torch.tensor([0.25]))
    message = refused(configure(world))
    assert "holds mean and std of its scores, which nothing reads" in message
    assert '"normalize_reward": false' in message


@pytest.mark.parametrize("name", ["v_head.weight", "value_head.summary.weight", "gating.0.weight", "score.bias"])
def test_tensor_that_nothing_reads_is_refused_by_name(world: Path, name: str) -> None:
    put(world / "rm", **{name: torch.ones(1, 32)})
    assert f"holds tensors that nothing reads: {name};" in refused(configure(world))


def test_head_under_another_name_is_missing_by_both_names(world: Path) -> None:
    file = world / "rm" / "model.safetensors"
    weights = load_file(file)
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, file, {"format": "pt"})
    message = refused(configure(world))
    assert "missing from the checkpoint: score.weight; they would be random. It holds value_head.weight in" in message


def test_remains_of_the_language_model_are_told_and_change_nothing(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = SequenceClassifier(model=str(world / "rm"))
    before = load_scorer(spec, "fp32").score(ROWS)
    put(world / "rm", **{"lm_head.weight": torch.ones(len(WORDS), 32)})
    check_scorer_opens(spec)
    assert load_scorer(spec, "fp32").score(ROWS).tolist() == before.tolist()
    assert "nothing reads these tensors of the checkpoint" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- heads and configurations


@pytest.mark.parametrize("output", [None, 0])
def test_head_of_one_row_without_a_number_of_labels(world: Path, output: int | None) -> None:
    edit(world / "rm" / "config.json", id2label=None, label2id=None, num_labels=None)
    reward = {"model": str(world / "rm")} | ({} if output is None else {"kind": "multi_head", "output": output})
    message = refused(configure(world, reward=reward))
    assert "config.json has 2 outputs (num_labels, which is transformers' default where it says none)" in message
    assert 'score.weight has 1 row. Write "num_labels": 1 into its config.json.' in message


def test_head_of_three_rows_where_one_is_named(world: Path) -> None:
    make_tiny_classifier(world / "heads", WORDS, num_labels=3)
    edit(world / "heads" / "config.json", id2label={"0": "good"}, label2id={"good": 0})
    with pytest.raises(DataError, match=r"has 1 outputs .* score\.weight has 3 rows\. Write .num_labels.: 3 .* names"):
        check_scorer_opens(MultiHead(model=str(world / "heads"), output="good"))


@pytest.mark.parametrize("key", ["reference", "reward"])
def test_weights_of_another_shape_are_a_data_error(world: Path, key: str) -> None:
    directory = world / {"reference": "lm", "reward": "rm"}[key]
    put(directory, **{"model.norm.weight": torch.ones(16)})
    message = refused(configure(world))
    assert "the checkpoint's model.norm.weight has the shape [16], config.json makes it [32]" in message
    if key == "reference":  # a hub model is compared when it is opened
        with pytest.raises(DataError, match=r"model\.norm\.weight has the shape \[16\]"):
            load_causal_lm(Model(model=str(directory)), "fp32")


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("key", ["reference", "reward", "guard"])
def test_index_that_lists_a_file_that_is_not_there(world: Path, key: str) -> None:
    directory = world / {"reference": "lm", "reward": "rm", "guard": "guard"}[key]
    if key == "guard":
        make_tiny_lm(directory, [*WORDS, "safe", "unsafe"])
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    first, second = dict(list(weights.items())[:3]), dict(list(weights.items())[3:])
    save_file(first, directory / "model-00001-of-00002.safetensors", {"format": "pt"})
    places = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    places |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    reward = {"kind": "guard", "model": str(directory)} if key == "guard" else {"model": str(world / "rm")}
    message = refused(configure(world, reward=reward))
    assert (
        f"{directory}: model.safetensors.index.json lists 1 file(s) that are not there, the first is model-00002"
        in (message)
    )
    save_file(dict(list(second.items())[1:]), directory / "model-00002-of-00002.safetensors", {"format": "pt"})
    assert f"1 tensors of the index are missing, the first is {next(iter(second))}" in refused(
        configure(world, reward=reward)
    )


@pytest.mark.parametrize("length", [4, 100, -8])
def test_truncated_weights_are_named(world: Path, length: int) -> None:
    file = world / "rm" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert f"{file}: not a readable safetensors file" in refused(configure(world))


@pytest.mark.parametrize("key", ["reference", "reward"])
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "beside a model"])
def test_adapter_given_as_a_model(world: Path, key: str, whole: bool) -> None:
    directory = world / {"reference": "lm", "reward": "rm"}[key]
    if not whole:
        (directory / "config.json").unlink()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "modules_to_save": ["score"]}
    adapter["task_type"] = "SEQ_CLS" if key == "reward" else "CAUSAL_LM"
    (directory / "adapter_config.json").write_text(json.dumps(adapter))
    message = refused(configure(world))
    assert (
        "an adapter (LORA with score of its own; base model some/base), not a model. It is an adapter: merge" in message
    )
    kind = {"reference": "ForCausalLM", "reward": "ForSequenceClassification"}[key]
    assert f"peft.AutoPeftModel{kind}.from_pretrained(" in message
    assert ("Or remove adapter_config.json" in message) is whole


def test_lines_that_merge_an_adapter_are_right(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the message says to run, run: the merged model scores as the adapter does over its base."""
    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(world / "rm")
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(world / "adapter")
    AutoTokenizer.from_pretrained(world / "rm").save_pretrained(world / "adapter")
    expected = [by_hand(adapted, world / "rm", row) for row in ROWS]
    with pytest.raises(DataError) as caught:
        check_scorer_opens(SequenceClassifier(model=str(world / "adapter")))
    monkeypatch.chdir(world)
    import transformers

    for line in str(caught.value).splitlines()[1:]:
        eval(line.strip(), {"peft": peft, "transformers": transformers})
    merged = load_scorer(SequenceClassifier(model=str(world / "merged")), "fp32").score(ROWS)
    np.testing.assert_allclose(merged, expected, rtol=1e-4)


def test_home_directory_in_the_path_of_a_model(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    config = configure(world, reference={"model": "~/lm"}, reward={"model": "~/rm"})
    preflight(config)
    assert config.reference == Model(model=str(world / "lm"))
    assert Guard(model="~/lm").model == str(world / "lm")
    with pytest.raises(ConfigError, match=r"reference\.model: there is no such home directory"):
        configure(world, reference={"model": "~nobody-of-this-name/lm"})


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "model.embed_tokens"])
def test_adapters_on_tied_embeddings_are_refused(world: Path, target: str) -> None:
    make_tiny_lm(world / "tied", WORDS)
    edit(world / "tied" / "config.json", tie_word_embeddings=True)
    weights = load_file(world / "tied" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, world / "tied" / "model.safetensors", {"format": "pt"})
    lora = {"lora": {"target_modules": ["q_proj", target]}}
    tied = configure(world, reference={"model": str(world / "tied")}, train=lora)
    message = refused(tied, ConfigError)
    assert f"train.lora.target_modules: {target!r} is the {'head' if 'head' in target else 'embedding'} of" in message
    assert "(tie_word_embeddings)" in message
    preflight(configure(world, train=lora))  # of two tensors each can be adapted
    for harmless in (["q_proj"], "all-linear"):
        preflight(
            configure(world, reference={"model": str(world / "tied")}, train={"lora": {"target_modules": harmless}})
        )


def test_adapters_on_no_module_are_refused_with_those_there_are(world: Path) -> None:
    message = refused(configure(world, train={"lora": {"target_modules": ["c_attn"]}}), ConfigError)
    assert "'c_attn' is no module of" in message
    assert "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in message


@pytest.mark.parametrize(("target", "kind"), [("self_attn", "LlamaAttention"), ("norm", "LlamaRMSNorm")])
def test_adapters_on_modules_that_take_none_are_refused(world: Path, target: str, kind: str) -> None:
    message = refused(configure(world, train={"lora": {"target_modules": ["q_proj", target]}}), ConfigError)
    assert f"train.lora.target_modules: {target!r} is a {kind} in" in message
    peft = pytest.importorskip("peft")
    model = load_causal_lm(Model(model=str(world / "lm")), "fp32")
    with pytest.raises(ValueError, match="is not supported"):  # of peft itself, after everything was sampled
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", target]))


def test_directory_without_a_tokenizer_is_named(world: Path) -> None:
    for file in world.glob("lm/*token*"):
        file.unlink()
    assert "no tokenizer in the directory (tokenizer.json, tokenizer.model). Copy" in refused(
        configure(world), DataError
    )


# ------------------------------------------------------------------------------------------------------ chat templates


@pytest.mark.parametrize("key", ["reference", "reward", "guard"])
def test_named_templates_without_a_default(world: Path, key: str) -> None:
    directory = world / {"reference": "lm", "reward": "rm", "guard": "guard"}[key]
    if key == "guard":
        make_tiny_lm(directory, [*WORDS, "safe", "unsafe"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    template = tokenizer.chat_template
    (directory / "chat_template.jinja").unlink()
    tokenizer.chat_template = {"rag": template, "tool_use": template}
    tokenizer.save_pretrained(directory)
    reward = {"kind": "guard", "model": str(directory)} if key == "guard" else {"model": str(world / "rm")}
    message = refused(configure(world, reward=reward), ConfigError)
    assert "several chat templates and none called default: rag, tool_use. Copy the one to use, such as" in message
    # what it says to do
    named = directory / "additional_chat_templates" / "rag.jinja"
    (directory / "chat_template.jinja").write_text(named.read_text())
    preflight(configure(world, reward=reward))


SYSTEM_ROWS = [
    {"prompt": [{"role": "system", "content": word}, {"role": "user", "content": "bread ?"}]} for word in WORDS
]


@pytest.mark.parametrize("key", ["reference", "reward"])
def test_template_that_drops_a_role_is_refused(world: Path, key: str) -> None:
    dropping = make_model(world / "dropping", FAMILIES["no system"])
    judge = make_model(
        world / "judge", FAMILIES["no system"], __import__("transformers").LlamaForSequenceClassification,
        num_labels=1,
    )  # fmt: skip
    models_of = {"reference": {"model": str(dropping)}} if key == "reference" else {"reward": {"model": str(judge)}}
    message = refused(configure(world, rows=SYSTEM_ROWS, **models_of))
    path = dropping if key == "reference" else judge
    assert (
        f"{key} {str(path)!r}: its chat template does not write message 0 (role 'system') of a conversation of"
        in message
    )
    preflight(configure(world, **models_of))


def test_plain_template_of_a_scorer_is_met_before_sampling(world: Path) -> None:
    reward = {"model": str(world / "rm"), "template": "USER: {prompt} ASSISTANT:"}
    message = refused(configure(world, rows=SYSTEM_ROWS, reward=reward))
    assert f"reward {str(world / 'rm')!r}, prompt '" in message
    assert "a conversation of 2 messages does not fit the plain template" in message


def test_request_for_one_prompt_is_met_before_sampling(world: Path) -> None:
    reward = {
        "kind": "http", "url": "http://localhost:9/score", "model": "m", "value": "score",
        "request": {"prompt": "{prompt}", "answer": "{response}"},
    }  # fmt: skip
    assert "a conversation of 2 messages is no single {prompt}" in refused(
        configure(world, rows=SYSTEM_ROWS, reward=reward)
    )
    preflight(configure(world, reward=reward))


def test_benign_prompts_are_written_too(world: Path) -> None:
    make_model(world / "phi", Family("bytes", PHI3, "", "<|end|>"))
    rows = [
        {
            "prompt": [
                *SYSTEM_ROWS[0]["prompt"],
                {"role": "assistant", "content": "yes"},
                {"role": "tool", "content": "1"},
            ]
        }
    ]
    (world / "benign.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    config = configure(
        world,
        reference={"model": str(world / "phi")},
        evaluate={"benign_prompts": {"source": str(world / "benign.jsonl")}},
    )
    assert "does not write message 3 (role 'tool')" in refused(config)


def test_thoughts_that_a_template_leaves_out_of_earlier_turns_are_told(world: Path) -> None:
    make_model(world / "r1", FAMILIES["deepseek-r1"])
    turns = [
        {"role": "user", "content": "bread ?"},
        {"role": "assistant", "content": "<think>mix</think>yes"},
        {"role": "user", "content": "how ?"},
    ]
    rows = [{"prompt": [*turns[:2], {"role": "user", "content": word}]} for word in WORDS]
    notes = preflight(configure(world, rows=rows, reference={"model": str(world / "r1")}))
    assert [note.partition(": ")[2].partition(", as of")[0] for note in notes] == [
        "its chat template leaves the thoughts out of earlier turns"
    ]


# ------------------------------------------------------------------------------------ responses that come as text


TEXTS = [{"prompt": f"bread {word}", "responses": ["yes", "mix"]} for word in WORDS]


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}assistant: ", "holds none of"),
        (
            "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}",
            "begins a response with '",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write the assistant's"),
    ],
    ids=["no end token", "no generation prompt", "no assistant"],
)  # fmt: skip
def test_template_that_tells_no_response_is_refused(world: Path, chat: str, message: str) -> None:
    make_model(world / "odd", Family("bytes", chat, ""))
    (world / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    brought = {"num_responses": 2, "responses": {"source": str(world / "texts.jsonl")}}
    assert message in refused(configure(world, reference={"model": str(world / "odd")}, generate=brought))


def test_options_of_a_chat_template_are_part_of_the_identity_where_given(world: Path) -> None:
    make_model(world / "qwen", FAMILIES["qwen3"])
    without, thinking = (
        Model(model=str(world / "qwen"), template_options=options) for options in ({}, {"enable_thinking": False})
    )
    assert open_formatter(without).digest != open_formatter(thinking).digest
    plain = scorer_identity(SequenceClassifier(model=str(world / "rm")), "fp32")
    assert set(plain) == {"kind", "sign", "weights", "template", "max_length", "precision", "computation"}
    with pytest.raises(ConfigError, match=r"does not read template_options enable_thinkin\. Correct"):
        open_formatter(Model(model=str(world / "qwen"), template_options={"enable_thinkin": False}))
    with pytest.raises(ConfigError, match="a plain template reads no options"):
        configure(world, reference={"model": "lm", "template": "{prompt}", "template_options": {"a": 1}})


# ---------------------------------------------------------------------------------- encoders that read pairs of texts


def encoder_tokenizer(
    directory: Path, *, types: bool, names: Sequence[str] = ("[CLS]", "[SEP]"), ends: bool = False
) -> int:
    """Write a tokenizer of whole words that joins two texts as BERT's or RoBERTa's does; return its size."""
    cls, sep = names
    ids = {word: number for number, word in enumerate(["[PAD]", cls, sep, "[UNK]", *WORDS])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    second = ":1" if types else ""
    inner.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {sep} $B{second} {sep}{second}", special_tokens=[(cls, 1), (sep, 2)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    marks = {"bos_token": cls, "eos_token": sep} if ends else {}
    PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token=cls, sep_token=sep, pad_token="[PAD]", unk_token="[UNK]",
        model_input_names=inputs, **marks,
    ).save_pretrained(directory)  # fmt: skip
    return len(ids)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1,
         "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(params=["electra", "bert", "roberta"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / request.param
    if request.param == "roberta":
        size = encoder_tokenizer(directory, types=False, names=("<s>", "</s>"), ends=True)
        config, kind = RobertaConfig(vocab_size=size, type_vocab_size=1, **SIZES), RobertaForSequenceClassification
    else:
        size = encoder_tokenizer(directory, types=True, ends=request.param == "electra")
        config, kind = {
            "electra": (ElectraConfig(vocab_size=size, embedding_size=32, **SIZES), ElectraForSequenceClassification),
            "bert": (BertConfig(vocab_size=size, **SIZES), BertForSequenceClassification),
        }[request.param]
    torch.manual_seed(1)
    kind(config).save_pretrained(directory)
    return directory


def card(directory: Path, *texts: str) -> float:
    """What the models' cards compute: ``model(**tokenizer(question, answer))``."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return float(model(**AutoTokenizer.from_pretrained(directory)(*texts, return_tensors="pt")).logits)


def test_pair_encoder_has_the_numbers_of_its_card(encoder: Path) -> None:
    spec = SequenceClassifier(model=str(encoder), text_pair=True, tokens_per_pass=30)
    check_scorer_opens(spec)
    expected = [card(encoder, QUESTION, text) for text in ANSWERS]
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(load_scorer(spec, "fp32").score(ROWS), expected, rtol=1e-4)


def test_single_text_of_an_encoder_is_as_its_tokenizer_marks_it(encoder: Path) -> None:
    spec = SequenceClassifier(model=str(encoder), text_pair=False, template="{prompt} ")
    expected = [card(encoder, f"{QUESTION} {text}") for text in ANSWERS]
    np.testing.assert_allclose(load_scorer(spec, "fp32").score(ROWS), expected, rtol=1e-4)


@pytest.mark.parametrize("template", [None, "{prompt} ", "{prompt} [SEP] "])
def test_encoder_must_say_how_it_reads(encoder: Path, template: str | None) -> None:
    spec = SequenceClassifier(model=str(encoder), template=template)
    with pytest.raises(ConfigError, match=r"its tokenizer joins two texts as a pair .* Set text_pair: true"):
        check_scorer_opens(spec)


def test_separator_in_the_template_is_the_pair_where_there_are_no_token_types(tmp_path: Path) -> None:
    size = encoder_tokenizer(tmp_path / "rm", types=False, ends=True)
    torch.manual_seed(2)
    config = RobertaConfig(vocab_size=size, type_vocab_size=1, **SIZES)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "rm")
    spec = SequenceClassifier(model=str(tmp_path / "rm"), template="{prompt} [SEP] ")
    expected = [card(tmp_path / "rm", QUESTION, text) for text in ANSWERS]
    np.testing.assert_allclose(load_scorer(spec, "fp32").score(ROWS), expected, rtol=1e-4)


def test_pair_is_part_of_the_identity_and_of_what_fits(encoder: Path, world: Path) -> None:
    pair, text = (SequenceClassifier(model=str(encoder), text_pair=value) for value in (True, False))
    assert scorer_identity(pair, "fp32") != scorer_identity(text, "fp32")
    with pytest.raises(ConfigError, match="text_pair is true, but its tokenizer puts no mark between two texts"):
        check_scorer_opens(SequenceClassifier(model=str(world / "rm"), text_pair=True))
    with pytest.raises(ConfigError, match=r"reward: text_pair reads the prompt and the response as they are"):
        configure(world, reward={"model": str(encoder), "text_pair": True, "template": "{prompt}"})
    reward = {"model": str(encoder), "text_pair": True}
    message = refused(configure(world, rows=SYSTEM_ROWS, reward=reward))
    assert "a conversation of system, user is no single question, which text_pair reads" in message


# ------------------------------------------------------------------------------------------------- beginnings of texts


@pytest.mark.parametrize("kind", ["reference", "classifier"])
def test_beginning_token_spelled_out_or_not_is_there_once(tmp_path: Path, kind: str) -> None:
    family = FAMILIES["llama3"]
    directory = make_model(tmp_path / "lm", family)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for beginning in ("", family.bos):
        spec = Model if kind == "reference" else SequenceClassifier
        formatter = open_formatter(spec(model=str(directory), template=f"{beginning}USER: {{prompt}} ASSISTANT: "))
        prompt = formatter.prompt_ids(ROWS[0].messages)
        assert prompt == tokenizer(f"USER: {QUESTION} ASSISTANT: ").input_ids
        assert prompt.count(tokenizer.bos_token_id) == 1
        whole = formatter.full_ids(ROWS[0].messages, "yes")
        assert whole == tokenizer(f"USER: {QUESTION} ASSISTANT: yes{family.eos}").input_ids


def test_gpt2_reward_model_with_its_old_buffers_opens(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "rm", FAMILIES["gpt2"])
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64, num_labels=1)
    config.pad_token_id = None
    GPT2ForSequenceClassification(config).save_pretrained(directory)
    put(directory, **{"transformer.h.0.attn.masked_bias": torch.ones(1)})
    edit(directory / "config.json", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    spec = SequenceClassifier(model=str(directory), template="{prompt}\n")
    assert np.isfinite(load_scorer(spec, "fp32").score(ROWS)).all()
