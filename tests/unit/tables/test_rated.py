"""Data sets of ratings and of strengths of preference: recognised, paired, counted; rows as published, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_rows import USER, data, refusal, write

from can_dist.tables.foreign.formats import PreferencesRead, prompt_id, read_preferences, read_prompts
from can_dist.tables.foreign.known_formats import KNOWN
from can_dist.tables.foreign.rated import AGAIN, BOTH, SAME


def aspects(*ratings: str) -> dict[str, Any]:
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {name: {"Rating": rating, "Rationale": "..."} for name, rating in zip(names, ratings, strict=True)}


def completion(response: str, *ratings: str) -> dict[str, Any]:
    return {
        "model": "m",
        "principle": "honesty",
        "custom_system_prompt": "Be honest.",
        "response": response,
        "critique": "...",
        "overall_score": 7.0,
        "fine-grained_score": 4.0,
        "annotations": aspects(*ratings),
    }


def ultrafeedback(*completions: dict[str, Any], instruction: str = "Hi?") -> dict[str, Any]:
    answers = {"correct_answers": ["None"], "incorrect_answers": ["None"]}
    return {"source": "sharegpt", "instruction": instruction, "models": ["m"], "completions": [*completions], **answers}


def beavertails(response: str, safe: Any, prompt: str = "Hi?") -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "category": {"animal_abuse": not safe}, "is_safe": safe}


def helpsteer(response: str, helpfulness: Any, prompt: str = "Hi?") -> dict[str, Any]:
    others = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, **others}


HELPSTEER2 = {
    "split": "train",
    "prompt": "Hi?",
    "response_1": "Hello.",
    "response_2": "Go away.",
    "preference_strength": -2,
    "preference_statement": "...",
    "preference_elaboration": "...",
}
HELPSTEER3 = {
    "domain": "general",
    "language": "english",
    "context": [USER],
    "response1": "Hello.",
    "response2": "Go away.",
    "overall_preference": -2,
    "individual_preference": [{"score": -2, "reasoning": "..."}],
}
BINARIZED = {  # HuggingFaceH4/ultrafeedback_binarized
    "prompt": "Hi?",
    "prompt_id": "a1",
    "chosen": [USER, {"role": "assistant", "content": "Hello."}],
    "rejected": [USER, {"role": "assistant", "content": "Go away."}],
    "messages": [USER, {"role": "assistant", "content": "Hello."}],
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}


def pairs(read: PreferencesRead) -> list[tuple[str, str, int, int]]:
    return [(p["response_a"], p["response_b"], p["better"], p["safer"]) for p in read.table.to_pylist()]


@pytest.mark.parametrize(
    ("rows", "key", "labels"),
    [
        ([beavertails("Hello.", True), beavertails("Go away.", False)], "beavertails", (-1, 0)),
        ([helpsteer("Go away.", 0), helpsteer("Hello.", 4)], "helpsteer", (0, -1)),
        ([HELPSTEER2], "helpsteer2-preference", (0, -1)),
        ([HELPSTEER3], "helpsteer3-preference", (0, -1)),
        ([ultrafeedback(completion("Go away.", *"1234"), completion("Hello.", *"5555"))], "ultrafeedback", (0, -1)),
        ([BINARIZED], "preference-conversational", (0, 0)),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_format_is_found_and_its_pair_is_labelled_by_its_criterion(
    tmp_path: Path, name: str, rows: list[Any], key: str, labels: tuple[int, int]
) -> None:
    path = write(tmp_path / name, rows)
    read = read_preferences(path)
    assert read.format == key
    assert pairs(read) == [("Hello.", "Go away.", *labels)]
    assert read.names_criteria == (key != "preference-conversational")
    assert (read.counts["rows"], read.counts["used"], read.counts["set_aside"]) == (len(rows), len(rows), 0)
    prompts = read_prompts(path)
    assert prompts.format == key
    assert prompts.table.column("messages").to_pylist() == [[USER]]
    assert prompts.table.column("prompt_id").to_pylist() == [rows[0].get("prompt_id", prompt_id([USER]))]


def test_best_and_worst_are_paired_inwards_and_each_response_once(tmp_path: Path) -> None:
    ratings = {"c": 2, "a": 4, "e": 0, "b": 3, "d": 2}
    rows = [helpsteer(text, rating) for text, rating in ratings.items()]
    read = read_preferences(write(tmp_path / "a.jsonl", [*rows, helpsteer("x", 1, "Bye?"), helpsteer("y", 2, "Bye?")]))
    assert [pair[:2] for pair in pairs(read)] == [("a", "e"), ("b", "d"), ("y", "x")]
    assert (read.counts["rows"], read.counts["used"], read.counts["prompts"]) == (7, 6, 2)
    assert read.reasons == {SAME: 1}
    assert read.set_aside == (f"{tmp_path / 'a.jsonl'}, row 0: {SAME}",)
    assert "7 rows, 3 pairs, 2 distinct prompts, 1 rows set aside (1 × no response" in read.announcement
    assert read_preferences(tmp_path / "a.jsonl", limit=2).table.num_rows == 2


def test_rows_without_a_pair_are_counted_by_reason(tmp_path: Path) -> None:
    rows = [
        beavertails("x", True),
        beavertails("x", False),  # contradicts the one before: neither can be believed
        beavertails("y", True),
        beavertails("y", True),
        beavertails("z", False),
        beavertails("alone", True, "Bye?"),
    ]
    read = read_preferences(write(tmp_path / "a.jsonl", rows))
    assert [(p["response_a"], p["response_b"], p["safe_a"], p["safe_b"]) for p in read.table.to_pylist()] == [
        ("y", "z", True, False)
    ]
    assert read.reasons == {BOTH: 2, AGAIN: 1, SAME: 1}
    assert (read.counts["used"], read.counts["set_aside"]) == (2, 4)
    assert "all 1 rows were set aside (1 × no response to" in refusal(
        write(tmp_path / "b.jsonl", [rows[5]]), pairs=True
    )


def test_ultrafeedback_is_rated_by_the_mean_of_its_aspects_not_by_the_overall_score(tmp_path: Path) -> None:
    flattered = completion("flattered", *"1112") | {"overall_score": 10.0}  # as in the first version of the data
    row = ultrafeedback(flattered, completion("good", "5", "N/A", "5", "5"), completion("fair", *"3333"))
    unrated = ultrafeedback(completion("unrated", *["N/A"] * 4), instruction="Bye?")
    read = read_preferences(write(tmp_path / "a.jsonl", [row, unrated]))
    assert [pair[:2] for pair in pairs(read)] == [("good", "flattered")]
    assert read.reasons == {"no completion has a rating": 1}


def test_helpsteer_marks_of_further_turns_become_messages(tmp_path: Path) -> None:
    prompt = "Hi?\n\n<extra_id_1>Assistant\nHello.\n\n<extra_id_1>User\nSing"
    read = read_prompts(write(tmp_path / "a.jsonl", [helpsteer("La", 3, prompt), helpsteer("No", 1, "Hi?")]))
    first, second = read.table.column("messages").to_pylist()
    assert [(m["role"], m["content"]) for m in first] == [("user", "Hi?"), ("assistant", "Hello."), ("user", "Sing")]
    assert second == [USER]


@pytest.mark.parametrize(("strength", "better"), [(-3, 0), (-1, 0), (0, -1), (1, 1), (3, 1)])
def test_sign_of_a_preference_is_the_better_response_and_zero_is_no_label(
    tmp_path: Path, strength: int, better: int
) -> None:
    for row in (HELPSTEER2 | {"preference_strength": strength}, HELPSTEER3 | {"overall_preference": strength}):
        read = read_preferences(write(tmp_path / "a.jsonl", [row]))
        assert pairs(read) == [("Hello.", "Go away.", better, -1)]
        assert "chosen comes first" not in read.announcement


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (beavertails("x", None), "field 'is_safe': found None, expected true or false"),
        (beavertails("x", "yes"), "field 'is_safe': found 'yes', expected true, false or null"),
        (beavertails(None, True), "field 'response': found None, expected a string"),  # type: ignore[arg-type]
        (helpsteer("x", "4"), "field 'helpfulness': found '4', expected a number"),
        (helpsteer("x", float("nan")), "field 'helpfulness': found nan, expected a number"),
        (helpsteer("x", 1, "a\n<extra_id_1>Assistant\nb"), "expected a prompt that ends before the assistant's turn"),
        (HELPSTEER2 | {"preference_strength": 4}, "field 'preference_strength': found 4, expected a number from -3 to"),
        (HELPSTEER3 | {"overall_preference": None}, "field 'overall_preference': found None, expected a number"),
        (HELPSTEER3 | {"context": []}, "field 'context': found [], expected at least one message"),
        (ultrafeedback() | {"completions": "x"}, "field 'completions': found 'x', expected a list of completions"),
        (ultrafeedback({"annotations": {}}), "field 'completions[0].response': found None, expected a string"),
        (
            ultrafeedback(completion("x", *"1111") | {"annotations": {"honesty": {}}}),
            "field 'completions[0].annotations': found {'honesty': {}}, expected annotations with ",
        ),
    ],
)
def test_bad_rows_name_file_row_field_found_and_expected(tmp_path: Path, row: dict[str, Any], found: str) -> None:
    path = write(tmp_path / "a.jsonl", [row])
    message = refusal(path, pairs=True)
    assert message.startswith(f"{path}, row 0, field")
    assert found in message
    assert message.count("\n  ") == 1  # and what to do


def test_unknown_columns_list_every_format(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b", "is_safe": True}]), pairs=True)
    for known in (
        "BeaverTails ratings: prompt, response, is_safe",
        "HelpSteer ratings: prompt, response, helpfulness",
        "HelpSteer2 preferences: prompt, response_1, response_2, preference_strength",
        "HelpSteer3 preferences: context, response1, response2, overall_preference",
        "UltraFeedback ratings: instruction, completions",
        "PKU-SafeRLHF pairs: prompt, response_0, response_1, and better_response_id or safer_response_id",
        "Nearest: BeaverTails ratings, missing response.",
    ):
        assert known in message


def test_split_of_a_clone_is_the_whole_name_of_its_shards(tmp_path: Path) -> None:
    """ultrafeedback_binarized has train_prefs, train_sft and train_gen side by side."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train_prefs", "train_sft", "test_prefs"):
        rows = [BINARIZED | {"prompt": split, "chosen": None, "rejected": None}]
        pq.write_table(pa.Table.from_pylist([{"prompt": row["prompt"]} for row in rows]), _shard(folder, split))
    assert read_prompts(tmp_path, split="train_prefs").table.column("messages").to_pylist() == [
        [{"role": "user", "content": "train_prefs"}]
    ]
    assert read_prompts(tmp_path, split="test").counts["rows"] == 1
    message = refusal(tmp_path)
    assert "split 'train' may be any of train_prefs, train_sft. Set split to one of them." in message


def _shard(folder: Path, split: str) -> Path:
    return folder / f"{split}-00000-of-00001.parquet"


@pytest.mark.real_data
def test_real_beavertails_has_98_pairs_of_a_safe_and_an_unsafe_answer() -> None:
    read = read_preferences(data("preferences/beavertails_30k_test_qa.jsonl.gz"))
    assert (read.counts["rows"], read.counts["pairs"], read.counts["used"]) == (3021, 98, 196)
    assert sum(read.reasons.values()) == 3021 - 196
    assert read.reasons[AGAIN] == 2  # counted apart from the reader: 2 answers stand there twice, none with both flags
    assert BOTH not in read.reasons
    flags = zip(*(read.table.column(name).to_pylist() for name in ("safe_a", "safe_b")), strict=True)
    assert set(flags) == {(True, False)}
    json.dumps(read.reasons)  # goes into the manifest


def test_docs_list_every_format_with_its_columns() -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    for form in KNOWN:
        cells = ", ".join(f"`{name}`" for name in form.needs)
        assert f"| {form.title} | {cells}" in page
