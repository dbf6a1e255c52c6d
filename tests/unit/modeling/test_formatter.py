"""The one formatter: prompt, response and whole text agree with each other and with the chat template."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm, make_tiny_tokenizer
from transformers import AutoTokenizer

from can_dist.config import Model
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.formatter import Formatter, render_chat
from can_dist.modeling.loading import load_tokenizer

MESSAGES = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture
def tokenizer(tmp_path: Path):
    make_tiny_tokenizer(tmp_path, [f"w{i}" for i in range(5)] + ["USER:", "ASSISTANT:"])
    return AutoTokenizer.from_pretrained(tmp_path)


def test_prompt_and_response_make_the_whole_conversation(tokenizer) -> None:
    formatter = Formatter(tokenizer)
    whole = formatter.full_ids(MESSAGES, "w3 w4")
    assert formatter.prompt_ids(MESSAGES) + formatter.response_ids(MESSAGES, "w3 w4") == whole
    assert tokenizer.decode(whole) == "<user> w1 w2 <assistant> w3 w4 </s>"


def test_chat_template_is_what_transformers_renders(tokenizer) -> None:
    conversation = [*MESSAGES, {"role": "assistant", "content": "w3"}, {"role": "user", "content": "w4"}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert Formatter(tokenizer).prompt_ids(conversation) == expected


def test_date_in_a_chat_template_is_the_same_every_day(tokenizer) -> None:
    """Llama 3.2 writes today's date: generated today and trained on tomorrow, a prompt would be two texts."""
    clock = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %B %Y-%m-%d') }}|{% endif %}"
    tokenizer.chat_template = "\n" + clock + "{{ messages[0].content }}"
    assert render_chat(tokenizer, MESSAGES) == "\n26 Jul 2024, July 2024-07-26|w1 w2"


def test_plain_template_ends_with_the_end_token(tokenizer) -> None:
    formatter = Formatter(tokenizer, "USER: {prompt} ASSISTANT:")
    assert tokenizer.decode(formatter.prompt_ids(MESSAGES)) == "USER: w1 w2 ASSISTANT:"
    assert formatter.response_ids(MESSAGES, "w3")[-1] == tokenizer.eos_token_id
    assert formatter.full_ids(MESSAGES, " w3")[-1] == tokenizer.eos_token_id


def test_plain_template_begins_with_the_token_that_the_tokenizer_adds(shared_data: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260K")
    ids = Formatter(tokenizer, "{prompt}").prompt_ids([{"role": "user", "content": "Once upon"}])
    assert ids == tokenizer("Once upon").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]


def test_space_that_the_template_puts_before_a_response_is_part_of_it(shared_data: Path) -> None:
    """The template writes 'ASSISTANT: text</s>': a given response must be tokenised as the model would say it."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories3M-qa-sft")
    formatter = Formatter(tokenizer)
    ids = formatter.response_ids(MESSAGES, "Hello there")
    assert tokenizer.decode(ids).strip() == "Hello there</s>"
    assert tokenizer.decode(formatter.prompt_ids(MESSAGES) + ids) == tokenizer.decode(
        formatter.full_ids(MESSAGES, "Hello there")
    )
    assert ids[-1] == tokenizer.eos_token_id
    assert formatter.prompt_ids(MESSAGES).count(tokenizer.bos_token_id) == 1


def test_response_that_the_tokenizer_joins_to_the_prompt_is_encoded_on_its_own(tokenizer) -> None:
    """Words split at spaces: 'ASSISTANT:w3' would be one unknown word."""
    formatter = Formatter(tokenizer, "USER: {prompt} ASSISTANT:")
    assert tokenizer.decode(formatter.response_ids(MESSAGES, "w3")) == "w3 </s>"


def test_conversation_is_rendered_twice_however_many_responses_it_has(tokenizer, monkeypatch) -> None:
    """Once up to the response, once with one; conversations that are encoded together are what each is by itself."""
    others = [{"role": "user", "content": "w4"}]
    alone = [Formatter(tokenizer).frame(messages) for messages in (MESSAGES, others)]
    rendered = []

    def counted(*arguments: Any, **options: Any) -> str:
        rendered.append(options)
        return render_chat(*arguments, **options)

    monkeypatch.setattr("can_dist.modeling.formatter.render_chat", counted)
    formatter = Formatter(tokenizer)
    frames = formatter.frames([MESSAGES, others])
    assert frames == alone
    tokens = formatter.framed_ids([(frame, text, True) for frame in frames for text in ("w3", "w3 w4", "")])
    assert len(tokens) == 6
    assert len(rendered) == 4
    assert tokens[1] == formatter.response_ids(MESSAGES, "w3 w4")


def test_no_chat_template_is_a_clear_error(tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"has no chat template. Set template for it"):
        Formatter(tokenizer)


def test_conversation_that_the_chat_template_refuses_is_named(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    conversation = [{"role": "system", "content": "w1"}, *MESSAGES]
    with pytest.raises(
        DataError, match=r"refuses a conversation of system, user: System role not supported\. See which"
    ):
        Formatter(tokenizer).prompt_ids(conversation)


def test_dialogue_does_not_fit_a_plain_template(tokenizer) -> None:
    with pytest.raises(DataError, match="a conversation of 3 messages does not fit the plain template"):
        Formatter(tokenizer, "{prompt}").prompt_ids(MESSAGES * 3)


def test_saved_tokenizer_does_not_tell_of_the_machine_that_loaded_it(tmp_path: Path) -> None:
    """Its file is part of a policy's digest: an offline rank and one with a network must write the same."""
    make_tiny_lm(tmp_path / "lm", ["a", "b"])
    load_tokenizer(Model(model=str(tmp_path / "lm"))).save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {"is_local", "local_files_only"}.isdisjoint(saved), saved
    assert saved["eos_token"] == "</s>"
