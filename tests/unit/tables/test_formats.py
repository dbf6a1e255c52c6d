"""Readers of other people's data: every format, every refusal, and the real files' known counts."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from foreign_rows import ANSWER, HH, OTHER, PKU, USER, data, refusal, write

from can_dist.errors import ConfigError
from can_dist.tables.foreign.formats import PREFERENCES_READ, prompt_id, read_preferences, read_prompts

# ---------------------------------------------------------------------------------------------- formats: prompts


def test_prompt_id_is_that_of_the_canonical_json() -> None:
    text = '[["user","Grüße \\"x\\""]]'
    assert prompt_id([{"role": "user", "content": 'Grüße "x"'}]) == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "Hi?"}, "prompt"),
        ({"prompt": [USER]}, "prompt-conversational"),
        ({"messages": [USER]}, "messages"),
        ({"instruction": "Hi?", "output": "x"}, "instruction"),
        ({"prompt": "\n\nHuman: Hi?\n\nAssistant:"}, "prompt"),
        ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, "preference"),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, "preference-conversational"),
        ({"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "preference-conversational"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "preference-implicit"),
        (HH, "hh-rlhf"),
        (PKU, "pku-saferlhf"),
    ],
)
def test_prompts_of_every_format_are_the_same_prompt(tmp_path: Path, row: dict[str, Any], key: str) -> None:
    read = read_prompts(write(tmp_path / "a.jsonl", [row]))
    assert read.format == key
    assert read.table.to_pylist() == [{"prompt_id": prompt_id([USER]), "messages": [USER]}]


def test_dialogue_text_becomes_turns(tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: Sing \n\nAssistant:"
    rows = [{"chosen": dialogue + " La", "rejected": dialogue}]
    read = read_preferences(write(tmp_path / "a.jsonl", rows))
    pair = read.table.to_pylist()[0]
    assert pair["messages"] == [USER, ANSWER, {"role": "user", "content": "Sing"}]
    assert (pair["response_a"], pair["response_b"], pair["better"]) == ("La", "", 0)
    assert read.counts["empty_responses"] == 1
    assert "HH-RLHF pairs (found chosen, rejected)" in read.announcement


def test_own_prompt_ids_are_used_and_checked(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "prompt_id": 7}, {"prompt": "b", "prompt_id": "x"}, {"prompt": "a", "prompt_id": "y"}]
    read = read_prompts(write(tmp_path / "a.jsonl", rows))
    assert read.table.column("prompt_id").to_pylist() == ["7", "x"]  # of two ids of a conversation the first
    assert "1 repeated rows merged, 1 of them under another prompt_id" in read.announcement
    assert read.counts["same_messages"] == 1
    message = refusal(write(tmp_path / "b.jsonl", [*rows, rows[0], *[rows[1]] * 9]))
    assert "10 row(s) repeat an id: '7' at" in message
    assert "b.jsonl, row 0 and" in message
    assert "b.jsonl, row 3; 'x' at" in message
    assert message.count(" at ") == 5
    for bad in ({"prompt": "c"}, {"prompt": "c", "prompt_id": ""}, {"prompt": "c", "prompt_id": True}):
        assert "row 3, field 'prompt_id': found" in refusal(write(tmp_path / "c.jsonl", [*rows, bad]))


def test_pairs_may_share_an_id_but_not_stretch_it_over_two_prompts(tmp_path: Path) -> None:
    rows = [{**PKU, "prompt_id": "p"}, {**PKU, "prompt_id": "p", "response_1": "Leave."}]
    path = write(tmp_path / "a.jsonl", rows)
    assert read_prompts(path).table.num_rows == 1
    assert read_preferences(path).table.column("prompt_id").to_pylist() == ["p", "p"]
    path = write(tmp_path / "b.jsonl", [*rows, {**PKU, "prompt_id": "p", "prompt": "Bye?"}])
    for pairs in (False, True):
        assert "prompt_id must stand for one prompt, 1 row(s) repeat an id: 'p' at" in refusal(path, pairs=pairs)


def test_limit_counts_prompts_and_pairs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PKU, PKU, {**PKU, "prompt": "b"}, {**PKU, "prompt": None}])
    assert read_prompts(path, limit=2).counts["rows"] == 3
    assert read_preferences(path, limit=2).table.num_rows == 2
    with pytest.raises(ConfigError, match="limit is 0"):
        read_prompts(path, limit=0)


def test_arguments_that_mean_nothing_for_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [PKU])
    with pytest.raises(ConfigError, match="is one file and has no split 'test'"):
        read_prompts(path, split="test")
    with pytest.raises(ConfigError, match="'subset' and 'revision' select on the hub only"):
        read_prompts(path, revision="main")


# ---------------------------------------------------------------------------------------- formats: preferences


def test_pku_labels_of_both_criteria(tmp_path: Path) -> None:
    rows = [PKU, {**PKU, "better_response_id": None, "is_response_1_safe": None}]
    path = write(tmp_path / "a.parquet", rows)
    read = read_preferences(path)
    assert read.table.schema == PREFERENCES_READ
    assert read.table.to_pylist()[0] == {
        "prompt_id": prompt_id([USER]),
        "messages": [USER],
        "response_a": "Hello.",
        "response_b": "Go away.",
        "better": 1,
        "safer": 0,
        "safe_a": True,
        "safe_b": False,
    }
    assert read.table.column("better").to_pylist() == [1, -1]
    assert read.table.column("safer").to_pylist() == [0, 0]
    assert read.table.column("safe_b").to_pylist() == [False, None]
    assert read.counts["disagreements"] == 1
    assert "2 rows, 2 pairs, 1 distinct prompts, 1 pairs where better and safer differ" in read.announcement


def test_conflicts_equal_and_empty_responses_are_counted(tmp_path: Path) -> None:
    rows = [PKU, {**PKU, "safer_response_id": 1}, {**PKU, "response_1": "Hello."}, {**PKU, "response_1": " "}]
    path = write(tmp_path / "a.jsonl", rows)
    read = read_preferences(path)
    assert [read.counts[name] for name in ("pairs", "conflicts", "equal_responses", "empty_responses")] == [4, 1, 1, 1]


def test_safety_only_files_have_no_better_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{k: v for k, v in PKU.items() if k != "better_response_id"}])
    table = read_preferences(path).table
    assert (table.column("better").to_pylist(), table.column("safer").to_pylist()) == ([-1], [0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        HH,
    ],
)
def test_chosen_is_response_a_in_every_format(tmp_path: Path, row: dict[str, Any]) -> None:
    read = read_preferences(write(tmp_path / "a.jsonl", [row]))
    pair = read.table.to_pylist()[0]
    assert (pair["messages"], pair["response_a"], pair["response_b"]) == ([USER], "Hello.", "Go away.")
    assert (pair["better"], pair["safer"], pair["safe_a"], pair["safe_b"]) == (0, 0, None, None)
    assert "chosen comes first by construction" in read.announcement


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"chosen": HH["chosen"], "rejected": "\n\nHuman: Ho?\n\nAssistant: x"},
            "the dialogues part before the last turn",
        ),
        ({"chosen": HH["chosen"] + HH["chosen"] + "\n\nHuman: x", "rejected": HH["rejected"]}, "does not end with the"),
        ({k: v.replace("Assistant: ", "Assistant: x\n\nAssistant: ") for k, v in HH.items()}, "end with a user's turn"),
    ],
)
def test_dialogues_without_a_common_prompt_are_set_aside_and_listed(tmp_path: Path, row: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", [HH, row])
    for read in (read_preferences(path), read_prompts(path)):
        assert read.table.num_rows == 1
        assert read.counts["set_aside"] == 1
        assert read.set_aside[0].startswith(f"{path}, row 1: ")
        assert reason in read.set_aside[0]
    assert "all 1 rows were set aside" in refusal(write(tmp_path / "b.jsonl", [row]), pairs=True)


def test_message_lists_without_a_common_prompt_are_set_aside(tmp_path: Path) -> None:
    good = {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    parting = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]}
    read = read_preferences(write(tmp_path / "a.jsonl", [good, parting]))
    assert "the dialogues part before the last turn" in read.set_aside[0]
    several = {"prompt": [USER], "chosen": [ANSWER, USER, ANSWER], "rejected": [OTHER]}
    read = read_preferences(
        write(tmp_path / "b.jsonl", [{"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, several]),
    )
    assert "a response has several turns" in read.set_aside[0]


# ------------------------------------------------------------------------------------------------------- bad rows


def test_unknown_columns_list_the_formats_and_the_nearest(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}]))
    assert "a.jsonl: unknown format.\n  Columns found: question, answer." in message
    assert "PKU-SafeRLHF pairs: prompt, response_0, response_1, and better_response_id or safer_response_id" in message
    for title in ("TRL preference: prompt, chosen, rejected", "TRL prompt-only: prompt", "messages", "instruction"):
        assert title in message
    typo = {"prompt": "a", "response_0": "b", "respons_1": "c", "better_response_id": 0}
    message = refusal(write(tmp_path / "b.jsonl", [typo]), pairs=True)
    assert "Nearest: PKU-SafeRLHF pairs, missing response_1 (is 'respons_1' meant to be 'response_1'?)" in message


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "field 'prompt': found None, expected a string or a list of messages"),
        (5, "field 'prompt': found 5, expected a string or a list of messages"),
        ("", "field 'prompt': found '', expected a prompt that is not empty"),
        (" \n", "expected a prompt that is not empty"),
        ("a\ud800", "expected Unicode text without lone surrogates"),
        ([], "field 'prompt': found [], expected at least one message"),
        (["Hi"], "field 'prompt[0]': found 'Hi', expected a message {role, content}"),
        ([{"content": "x"}], "field 'prompt[0].role': found 'no such key', expected a string role"),
        ([{"role": "user"}], "field 'prompt[0].content': found 'no such key', expected a string content"),
        ([{"role": "user", "content": None}], "field 'prompt[0].content': found None"),
        ([{"role": "human", "content": "x"}], "field 'prompt[0].role': found 'human', expected one of system"),
        ([{"role": "user", "content": " "}], "expected a last message that is not empty"),
        ([{"role": "system", "content": "x"}], "expected a message of role user"),
        ([USER, ANSWER], "expected a prompt that ends before the assistant's turn"),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant:", "expected a prompt that ends before the assistant's turn"),
    ],
)
def test_bad_prompts_name_file_row_field_found_and_expected(tmp_path: Path, value: Any, found: str) -> None:
    good = [USER] if isinstance(value, list) else "Hi?"
    path = write(tmp_path / "a.jsonl", [{"prompt": good}, {"prompt": value}])
    message = refusal(path)
    place = "line 2" if value == "a\ud800" else "row 1"  # a text that JSON should not hold is met while it is read
    assert message.startswith(f"{path}, {place}, field 'prompt")
    assert found in message
    assert message.count("\n  ") == 1  # and what to do


def test_missing_field_and_mixed_rows(tmp_path: Path) -> None:
    assert "row 1, field 'prompt': found None" in refusal(write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"b": 1}]))
    message = refusal(write(tmp_path / "b.jsonl", [{"prompt": "a"}, {"prompt": [USER]}]))
    assert "row 1: a row in format 'prompt-conversational', but the rows before are in format 'prompt'" in message
    assert "field 'messages': found 'x'" in refusal(write(tmp_path / "c.jsonl", [{"messages": "x"}]))


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": [OTHER]},
            "chosen is a string, rejected is a list), expected the same",
        ),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "field 'chosen': found None, expected a string or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "field 'rejected': found 3, expected a string or a list"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, "expected a last message of role assistant"),
        ({"prompt": "No", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "expected a dialogue that starts with"),
        ({"prompt": "\n\nHuman: Hi?\n\nAssistant:", **HH}, "expected the response alone, beside a column prompt"),
        ({"chosen": "b", "rejected": "c"}, "field 'chosen': found 'b', expected a dialogue with turns"),
        ({"chosen": "x" + HH["chosen"], "rejected": "x" + HH["rejected"]}, "expected a dialogue that starts with"),
        ({"chosen": [], "rejected": []}, "field 'chosen': found [], expected a last message of role assistant"),
        ({**PKU, "better_response_id": 2}, "field 'better_response_id': found 2, expected 0, 1 or null"),
        ({**PKU, "better_response_id": "0"}, "field 'better_response_id': found '0', expected 0, 1 or null"),
        ({**PKU, "safer_response_id": True}, "field 'safer_response_id': found True, expected 0, 1 or null"),
        ({**PKU, "is_response_0_safe": "yes"}, "field 'is_response_0_safe': found 'yes', expected true, false or null"),
        ({**PKU, "response_1": None}, "field 'response_1': found None, expected a string"),
        ({**PKU, "prompt": ""}, "field 'prompt': found '', expected a prompt that is not empty"),
    ],
)
def test_bad_pairs_name_file_row_field_found_and_expected(tmp_path: Path, row: dict[str, Any], found: str) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    message = refusal(path, pairs=True)
    assert message.startswith(f"{path}, row 0, field")
    assert found in message


# ------------------------------------------------------------------------------------------------------ real files


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "key", "rows", "prompts"),
    [
        ("prompts/pku_saferlhf_test_prompts.jsonl.gz", "prompt", 8211, 7495),
        ("prompts/xstest_v2_prompts.jsonl.gz", "prompt", 450, 450),
        ("prompts/can_problem_safety.json", "prompt", 83, 83),
        ("prompts/can_problem_help.json", "instruction", 129, 129),
        ("prompts/sacpo_helpful_problem.json", "prompt", 129, 129),
        ("preferences/beavertails_30k_test_qa.jsonl.gz", "beavertails", 3021, 2526),
    ],
)
def test_real_prompts(name: str, key: str, rows: int, prompts: int) -> None:
    read = read_prompts(data(name))
    assert (read.format, read.counts["rows"], read.table.num_rows) == (key, rows, prompts)
    assert len(set(read.table.column("prompt_id").to_pylist())) == prompts


@pytest.mark.real_data
def test_real_pku_pairs_disagree_in_117_rows() -> None:
    path = data("preferences/pku_saferlhf_dual_500.jsonl.gz")
    read = read_preferences(path)
    pairs = zip(read.table.column("better").to_pylist(), read.table.column("safer").to_pylist(), strict=True)
    assert sum(b != s for b, s in pairs) == read.counts["disagreements"] == 117
    assert (read.counts["rows"], read.counts["prompts"], read.counts["conflicts"]) == (500, 490, 0)


@pytest.mark.real_data
def test_real_safety_pairs_have_930_prompts() -> None:
    read = read_preferences(data("preferences/pku_saferlhf_safety_pairs_5135.jsonl.gz"))
    assert (read.counts["rows"], read.counts["pairs"], read.counts["prompts"]) == (5135, 5135, 930)
    safe = zip(*(read.table.column(name).to_pylist() for name in ("safe_a", "safe_b")), strict=True)
    assert all(a != b for a, b in safe)  # one safe, one unsafe in every row


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "rows", "set_aside", "doubled"), [("harmless", 2312, 5, 4), ("helpful", 2354, 9, 6)])
def test_real_hh_pairs(name: str, rows: int, set_aside: int, doubled: int) -> None:
    read = read_preferences(data(f"preferences/hh_{name}-base_test.jsonl.gz"))
    assert (read.format, read.counts["rows"], read.counts["set_aside"]) == ("hh-rlhf", rows, set_aside)
    assert read.table.num_rows == rows - set_aside
    prompts = read.table.column("messages").to_pylist()
    assert sum(any(a["role"] == b["role"] for a, b in itertools.pairwise(prompt)) for prompt in prompts) == doubled
    for messages in prompts:
        assert messages[0]["role"] == messages[-1]["role"] == "user"
        assert not any("\n\nHuman:" in m["content"] or "\n\nAssistant:" in m["content"] for m in messages)
