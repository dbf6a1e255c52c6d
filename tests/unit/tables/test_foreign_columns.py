"""What stands beside a prompt: carried into it, refused by its name, or ignored where no two prompts become one."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from foreign_rows import ANSWER, HH, OTHER, PKU, USER, refusal, write

from can_dist.errors import DataError
from can_dist.tables.foreign.formats import read_preferences, read_prompts, read_responses

SYSTEM = {"role": "system", "content": "Answer in French."}
PROMPT_ONLY = ({"prompt": "Hi?"}, {"prompt": [USER]}, {"messages": [USER]}, {"instruction": "Hi?"})
PAIRS = (
    {"prompt": "Hi?", "chosen": "a", "rejected": "b"},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    {"instruction": "Hi?", "chosen": "a", "rejected": "b"},
    {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    HH,
    PKU,
    {"prompt": "Hi?", "response_1": "a", "response_2": "b", "preference_strength": 1},
    {"context": [USER], "response1": "a", "response2": "b", "overall_preference": 1},
)


def prompts(path: str | Path) -> list[list[dict[str, str]]]:
    messages: list[list[dict[str, str]]] = read_prompts(path).table.column("messages").to_pylist()
    return messages


# ---------------------------------------------------------------------------------------------------------- Alpaca


def test_inputs_of_alpaca_are_joined_to_their_instruction_and_announced(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Summarise.", "input": "Rivers run.", "output": "x"},
        {"instruction": "Summarise.", "input": "Cats sleep.", "output": "x"},
        {"instruction": "Name a bird.", "input": "", "output": "x"},
        {"instruction": "Name a tree.", "input": None, "output": "x"},
        {"instruction": "Name a fish.", "output": "x"},
    ]
    read = read_prompts(write(tmp_path / "a.jsonl", rows))
    said = [messages[0]["content"] for messages in read.table.column("messages").to_pylist()]
    assert said == [
        "Summarise.\nRivers run.",
        "Summarise.\nCats sleep.",
        "Name a bird.",
        "Name a tree.",
        "Name a fish.",
    ]
    assert "(found instruction, input): 5 rows, 5 distinct prompts, 2 inputs joined to their" in read.announcement
    assert "ignored columns: output" in read.announcement
    assert read.carried == {"inputs joined to their instruction": 2}


def test_alpaca_pairs_are_read_with_and_without_input(tmp_path: Path) -> None:
    row = {"instruction": "Summarise.", "chosen": "a", "rejected": "b"}
    path = write(tmp_path / "a.jsonl", [{**row, "input": "Rivers."}, {**row, "input": ""}])
    table = read_preferences(path).table.to_pylist()
    assert [pair["messages"][0]["content"] for pair in table] == ["Summarise.\nRivers.", "Summarise."]
    assert [(pair["response_a"], pair["response_b"], pair["better"]) for pair in table] == [("a", "b", 0)] * 2
    assert len(prompts(path)) == 2


def test_input_that_cannot_be_joined_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": [1, 2]}]))
    assert "row 0, field 'input': found [1, 2], expected a text" in message


# ---------------------------------------------------------------------------------------------------------- system


@pytest.mark.parametrize("name", ["system", "system_prompt", "System Message", "systemPrompt"])
@pytest.mark.parametrize("row", [*PROMPT_ONLY, *PAIRS])
def test_system_column_is_the_first_message_of_every_format(tmp_path: Path, row: dict[str, Any], name: str) -> None:
    rows = [{**row, name: "Answer in French."}, {**row, name: "Answer in German."}, {**row, name: ""}]
    path = write(tmp_path / "a.jsonl", [*rows, {**row, name: None}])
    german = {**SYSTEM, "content": "Answer in German."}
    assert prompts(path) == [[SYSTEM, USER], [german, USER], [USER]]
    assert "2 rows whose system column became the first message" in read_prompts(path).announcement
    assert "ignored" not in read_prompts(path).announcement
    if row in PAIRS:
        pairs = read_preferences(path)
        assert pairs.table.column("messages").to_pylist() == [[SYSTEM, USER], [german, USER], [USER], [USER]]


def test_system_column_beside_ratings(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "response": "a", "is_safe": True}
    rows = [row, {**row, "response": "b", "is_safe": False}]
    path = write(tmp_path / "a.jsonl", [{**row, "system": text} for text in ("French", "German") for row in rows])
    pairs = read_preferences(path).table.to_pylist()
    assert [pair["messages"][0]["content"] for pair in pairs] == ["French", "German"]


def test_system_column_beside_brought_responses(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi?", "system": text, "responses": [text]} for text in ("French", "German")]
    read = read_responses(write(tmp_path / "a.jsonl", rows))
    assert list(read.texts.values()) == [["French"], ["German"]]
    assert "2 rows whose system column became the first message" in read.announcement


def test_system_turn_said_twice_is_one_and_two_different_ones_are_refused(tmp_path: Path) -> None:
    row = {"messages": [SYSTEM, USER], "system": "Answer in French."}
    assert prompts(write(tmp_path / "a.jsonl", [row])) == [[SYSTEM, USER]]
    message = refusal(write(tmp_path / "b.jsonl", [{**row, "system": "Be brief."}]))
    assert "row 0, field 'system': found 'Be brief.', expected the system turn of the messages, 'Answer in" in message
    message = refusal(write(tmp_path / "c.jsonl", [{"prompt": "a", "system": "x", "system_prompt": "y"}]))
    assert "field 'system_prompt': found 'y', expected the text of column 'system'" in message
    message = refusal(write(tmp_path / "d.jsonl", [{"prompt": "a", "system": {"a": 1}}]))
    assert "field 'system': found {'a': 1}, expected a text: the system turn" in message


def test_system_column_that_begins_after_the_first_rows_is_carried(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "Hi?", "system": "Answer in French."}])
    assert prompts(path)[-1] == [SYSTEM, USER]


# --------------------------------------------------------------------------------------------- columns that are more


CALL = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", CALL),
        ("tools", json.dumps(CALL)),
        ("functions", CALL),
        ("tool_calls", CALL),
        ("function_call", {"name": "weather"}),
        ("tool_call_id", "1"),
        ("reasoning_content", "First,"),
        ("images", ["a.png"]),
        ("image", {"bytes": None, "path": "a.png"}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("documents", [{"title": "a"}]),
        ("history", [["Hello", "Hi"]]),
        ("context", "The moon has no air."),
        ("input", "The moon has no air."),
        ("developer", "Be brief."),
    ],
)
@pytest.mark.parametrize("row", [{"prompt": "Hi?"}, {"prompt": "Hi?", "chosen": "a", "rejected": "b"}, PKU])
def test_column_that_changes_the_task_is_refused_and_empty_it_is_not(
    tmp_path: Path, row: dict[str, Any], name: str, value: Any
) -> None:
    path = write(tmp_path / "a.jsonl", [row, {**row, name: value}])
    for pairs in (False, True) if len(row) > 1 else (False,):
        message = refusal(path, pairs=pairs)
        assert message.startswith(f"{path}, row 1, field '{name}': found ")
        assert "the model is asked something else" in message
    for empty in (None, "", [], {}, float("nan"), {"a": None}, [None], "[]"):
        assert prompts(write(tmp_path / "b.jsonl", [row, {**row, name: empty}])) == [[USER]]


def test_only_row_of_a_file_may_hold_objects(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"prompt": USER}]))
    assert "a.jsonl, row 0, field 'prompt': found {'role': 'user'" in message


def test_dolly_context_is_refused_beside_an_instruction(tmp_path: Path) -> None:
    row = {"instruction": "When?", "context": "In 1969.", "response": "1969", "category": "qa"}
    assert "row 0, field 'context': found 'In 1969.'" in refusal(write(tmp_path / "a.jsonl", [row]))
    said = {**row, "instruction": "In 1969. When?"}  # the context is in the prompt already
    assert prompts(write(tmp_path / "b.jsonl", [said]))[0][0]["content"] == "In 1969. When?"


# -------------------------------------------------------------------------------------------------- ignored columns


@pytest.mark.parametrize("form", [*PROMPT_ONLY, *PAIRS])
@pytest.mark.parametrize("ids", [False, True])
def test_rows_that_differ_in_a_dropped_column_alone_are_refused(
    tmp_path: Path, form: dict[str, Any], ids: bool
) -> None:
    rows = [{**form, "target_language": language} for language in ("French", "German")]
    if ids:
        rows = [{**row, "prompt_id": f"p{n}"} for n, row in enumerate(rows)]
    message = refusal(write(tmp_path / "a.jsonl", rows))
    assert "a.jsonl, row 1, field 'target_language': found 'German', but" in message
    assert "a.jsonl, row 0 has another value beside the same prompt" in message
    if form in PAIRS:
        assert "field 'target_language'" in refusal(tmp_path / "a.jsonl", pairs=True)
    alike = [{**row, "target_language": "French"} for row in rows]
    read = read_prompts(write(tmp_path / "b.jsonl", alike))
    assert read.table.num_rows == 1
    assert "ignored columns: target_language" in read.announcement
    missing = [rows[0], {name: value for name, value in rows[1].items() if name != "target_language"}]
    assert "field 'target_language': found None" in refusal(write(tmp_path / "c.jsonl", missing))


def test_brought_responses_that_differ_in_a_dropped_column_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi?", "responses": ["a"], "language": language} for language in ("French", "German")]
    with pytest.raises(DataError, match="row 1, field 'language': found 'German'"):
        read_responses(write(tmp_path / "a.jsonl", rows))
    rows = [{"prompt": "Hi?", "responses": ["a"], "seed": seed, "id": seed} for seed in (0, 1)]  # of the responses
    assert list(read_responses(write(tmp_path / "b.jsonl", rows)).texts.values()) == [["a", "a"]]
    rows = [{"prompt": "Hi?", "responses": ["a"], "prompt_id": n} for n in (0, 1)]
    read = read_responses(write(tmp_path / "c.jsonl", rows))
    assert "1 prompts; ignored columns: prompt_id" in read.announcement  # they are joined by what they say


def test_rows_of_one_prompt_may_differ_in_their_names_and_their_responses(tmp_path: Path) -> None:
    rows = [{"instruction": "Hi?", "id": n, "output": str(n), "generator": f"m{n}"} for n in range(2)]
    read = read_prompts(write(tmp_path / "a.jsonl", rows))
    assert read.table.num_rows == 1
    assert "ignored columns: id, output, generator" in read.announcement
    rows = [{**PKU, "response_0_source": f"m{n}", "prompt_source": f"s{n}", "score_chosen": n} for n in range(2)]
    assert len(prompts(write(tmp_path / "b.parquet", rows))) == 1


def test_json_rows_in_which_a_column_of_another_format_begins_late_are_refused(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "x", "prompt_id": "mine"}])
    assert "row 100, field 'prompt_id': found 'mine', a name that the first rows of the file do not have" in refusal(
        path
    )
    path = write(tmp_path / "b.jsonl", [*rows, {"prompt": "x", "chosen": "a", "rejected": "b"}])
    assert read_prompts(path).table.num_rows == 101  # as prompts the same


# --------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", CALL),
        ("toolCalls", CALL),
        ("function_call", {"name": "weather", "arguments": "{}"}),
        ("tool_call_id", "1"),
        ("name", "weather"),
        ("reasoning_content", "First,"),
        ("thinking", "First,"),
        ("images", ["a.png"]),
        ("refusal", "No."),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
@pytest.mark.parametrize("content", ["", "18 C", None])
def test_message_that_says_more_than_its_content_is_refused(tmp_path: Path, key: str, value: Any, content: Any) -> None:
    earlier = {"role": "assistant", "content": content, key: value}
    path = write(tmp_path / "a.jsonl", [{"messages": [USER]}, {"messages": [USER, earlier, USER]}])
    assert refusal(path).startswith(f"{path}, row 1, field 'messages[1].{key}': found ")
    pair = {"prompt": [USER], "chosen": [earlier], "rejected": [OTHER]}
    path = write(tmp_path / "b.jsonl", [pair])
    assert refusal(path, pairs=True).startswith(f"{path}, row 0, field 'chosen[0].{key}': found ")
    path = write(tmp_path / "c.jsonl", [{"prompt": [USER, earlier, USER], "responses": ["x"]}])
    with pytest.raises(DataError, match=rf"field 'prompt\[1\].{key}'"):
        read_responses(path)
    empty = [{**USER, key: nothing} for nothing in (None, [], "", {"name": None})]
    for number, message in enumerate(empty):
        assert prompts(write(tmp_path / f"d{number}.jsonl", [{"messages": [message]}])) == [[USER]]


def test_messages_of_datasets_with_every_key_null_are_read_from_parquet(tmp_path: Path) -> None:
    message = {**USER, "tool_calls": None, "name": None, "reasoning_content": None}
    kind = pa.list_(pa.struct([(key, pa.string()) for key in message]))
    pq.write_table(pa.table({"messages": pa.array([[message]], kind)}), tmp_path / "a.parquet")
    assert prompts(tmp_path / "a.parquet") == [[USER]]


def test_key_that_no_template_writes_is_announced_and_merges_nothing(tmp_path: Path) -> None:
    rows = [{"messages": [{**USER, "toxic": toxic}]} for toxic in (1, 1)]
    read = read_prompts(write(tmp_path / "a.jsonl", rows))
    assert "ignored columns: messages[].toxic" in read.announcement
    rows = [{"messages": [{**USER, "persona": persona}]} for persona in ("a cook", "a king")]
    assert "row 1, field 'messages[].persona': found [(0, 'a king')], but" in refusal(write(tmp_path / "b.jsonl", rows))


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "Hi?"}],
        [{"type": "text", "text": "Hi?"}, {"type": "image_url", "image_url": {"url": "a.png"}}],
    ],
)
def test_content_parts_are_refused_as_values_and_as_text(tmp_path: Path, parts: list[Any]) -> None:
    for value in (parts, json.dumps(parts), repr(parts)):
        message = refusal(write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": value}]}]))
        assert "row 0, field 'messages[0].content': found " in message
        assert "Join the text parts into one text" in message


# ------------------------------------------------------------------------------------------------- values as text

CONVERSATION = [{"role": "system", "content": "Be \"brief\" 'now'."}, {"role": "user", "content": "Hi?\nThere é"}]
AS_TEXT = [
    json.dumps(CONVERSATION),
    json.dumps(CONVERSATION, indent=2),
    "\n " + json.dumps(CONVERSATION) + " \n",
    json.dumps(json.dumps(CONVERSATION)),
    repr(CONVERSATION),
    json.dumps(CONVERSATION[1]),
    json.dumps([{"from": "human", "value": "Hi?"}]),
    json.dumps([{"role": "user", "content": None, "tool_calls": CALL}]),
    "[{'role': 'system', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]",  # as NumPy prints an array
    "array([{'role': 'user', 'content': 'b'}], dtype=object)",
]


@pytest.mark.parametrize("text", AS_TEXT)
@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Hi?"}, "prompt"),
        ({"instruction": "Hi?"}, "instruction"),
        ({"instruction": "Hi?", "input": "x"}, "input"),
        ({"messages": [USER]}, "messages"),
        ({"prompt": "Hi?", "system": "x"}, "system"),
        *(({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, name) for name in ("prompt", "chosen", "rejected")),
        *((HH, name) for name in ("chosen", "rejected")),
        *((PKU, name) for name in ("prompt", "response_0", "response_1")),
        ({"prompt": "Hi?", "response": "a", "is_safe": True}, "response"),
    ],
)
def test_conversation_written_as_text_is_refused_in_every_column(
    tmp_path: Path, row: dict[str, Any], name: str, text: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{**row, name: text}])
    message = refusal(path, pairs="chosen" in row or "response_0" in row)
    assert message.startswith(f"{path}, row 0, field '{name}': found ")
    assert "a conversation written as text, as CSV, SQL and pandas do: parse the column" in message


def test_conversation_as_text_among_brought_responses_is_refused(tmp_path: Path) -> None:
    for row in ({"prompt": AS_TEXT[0], "responses": ["a"]}, {"prompt": "Hi?", "responses": ["a", AS_TEXT[0]]}):
        with pytest.raises(DataError, match="a conversation written as text"):
            read_responses(write(tmp_path / "a.jsonl", [row]))


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        '{"name": "Ann", "age": 3}',
        "[{'a': 1}]",
        "What is wrong with " + AS_TEXT[0],
        AS_TEXT[0] + "\nWhat is wrong here?",
        "[see below] {x}",
        "{" * 2000,
    ],
)
def test_text_that_a_user_may_type_is_a_prompt(tmp_path: Path, text: str) -> None:
    assert prompts(write(tmp_path / "a.jsonl", [{"prompt": text}])) == [[{"role": "user", "content": text}]]


def test_user_who_types_a_conversation_is_let_through_as_a_message(tmp_path: Path) -> None:
    typed = {"role": "user", "content": AS_TEXT[0]}
    assert prompts(write(tmp_path / "a.jsonl", [{"messages": [typed]}])) == [[typed]]


RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi? [/INST]",
    "<start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n",
    "<|user|>\nHi?</s>\n<|assistant|>\n",
    "BEGINNING OF CONVERSATION: USER: Hi? ASSISTANT:",
    "Human: Hi?\n\nAssistant:",
)
"""Prompts that a chat template wrote already, as training files of other tools hold them."""


@pytest.mark.parametrize("text", RENDERED)
def test_prompt_that_a_template_wrote_already_is_refused(tmp_path: Path, text: str) -> None:
    for field in ("prompt", "instruction"):
        message = refusal(write(tmp_path / "a.jsonl", [{field: text}]))
        assert f"a.jsonl, row 0, field '{field}': found " in message
        assert "a conversation that a chat template wrote already" in message
        assert "Write its turns as a list of messages" in message
    typed = [{"role": "user", "content": text}]
    assert prompts(write(tmp_path / "b.jsonl", [{"prompt": typed}])) == [typed]


@pytest.mark.parametrize("text", ["What does <|im_start|>assistant mean?", "User: and Human: are marks", "Assistant:"])
def test_prompt_that_names_the_marks_of_turns_is_read(tmp_path: Path, text: str) -> None:
    assert prompts(write(tmp_path / "a.jsonl", [{"prompt": text}])) == [[{"role": "user", "content": text}]]


# ------------------------------------------------------------------------------------------------ the way out of a file


@pytest.mark.skipif(shutil.which("jq") is None, reason="the command is jq's")
@pytest.mark.parametrize("name", ["a b.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_command_that_drops_a_column_makes_a_json_file_readable(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "Hi?", "data-source": source, "category": "x"} for source in "ab"]
    text = "".join(map(line, rows)) if "jsonl" in name else json.dumps(rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    follow(refusal(tmp_path / name), tmp_path)
    read = read_prompts(tmp_path / "without.jsonl")
    assert read.table.num_rows == 1
    assert "ignored columns: category" in read.announcement


@pytest.mark.parametrize("name", ["a.parquet", "a.feather"])
def test_command_that_drops_a_column_makes_a_table_readable(tmp_path: Path, name: str) -> None:
    table = pa.Table.from_pylist([{"prompt": "Hi?", "source": source} for source in "ab"])
    (pq.write_table if name.endswith("parquet") else pyarrow.feather.write_feather)(table, str(tmp_path / name))
    follow(refusal(tmp_path / name), tmp_path)
    assert read_prompts(tmp_path / "without.parquet").table.num_rows == 1


def line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def follow(message: str, directory: Path) -> None:
    """Run the command in the last line of a message."""
    command = message.splitlines()[-1].strip()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], check=True, cwd=directory, env={**os.environ, "PATH": path})


# -------------------------------------------------------------------------------------------------- published columns


def test_columns_of_alpaca_and_alpacaeval_that_follow_the_answer_merge_nothing(tmp_path: Path) -> None:
    below = "Below is an instruction.\n\n### Instruction:\nHi?\n\n### Response:\n"
    rows = [{"instruction": "Hi?", "input": "", "output": output, "text": below + output} for output in "ab"]
    assert read_prompts(write(tmp_path / "a.jsonl", rows)).table.num_rows == 1
    other = [{**rows[0], "text": text} for text in ("Cats sleep.", "Rivers run.")]
    assert "row 1, field 'text': found 'Rivers run.'" in refusal(write(tmp_path / "b.jsonl", other))
    rows = [{"instruction": "Hi?", "output": "a", "generator": "g", "dataset": name} for name in ("koala", "vicuna")]
    assert read_prompts(write(tmp_path / "c.jsonl", rows)).table.num_rows == 1


def test_system_turn_in_messages_beside_a_prompt_is_not_dropped(tmp_path: Path) -> None:
    row = {"prompt": "Hi?", "messages": [SYSTEM, USER, ANSWER]}
    message = refusal(write(tmp_path / "a.jsonl", [row]))
    assert "a.jsonl, row 0, field 'messages[0]': found {'role': 'system', 'content': 'Answer in French.'}" in message
    said = {**row, "prompt": [SYSTEM, USER]}
    assert prompts(write(tmp_path / "b.jsonl", [said])) == [[SYSTEM, USER]]
    assert prompts(write(tmp_path / "c.jsonl", [{**row, "messages": [USER, ANSWER]}])) == [[USER]]


@pytest.mark.parametrize("name", ["chat_history", "conversationHistory", "previous_turns", "passage"])
def test_what_was_said_before_is_refused_under_its_other_names(tmp_path: Path, name: str) -> None:
    assert f"row 0, field '{name}': found 'x'" in refusal(write(tmp_path / "a.jsonl", [{"prompt": "And?", name: "x"}]))
