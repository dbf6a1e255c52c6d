"""Score tables that users bring: every format read, every defect answered with its file, column, rows and cure."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from can_dist.errors import DataError
from can_dist.tables.artifacts import open_stage, write_part
from can_dist.tables.scores import read_score_table, score_arrays

GOOD: dict[str, Any] = {
    "prompt_id": ["a", "a", "b", "b"],
    "response_id": ["a/0", "a/1", "b/0", "b/1"],
    "reward": [1.0, 2.0, 3.0, 4.0],
    "safety": [0.0, 1.0, 0.5, -1.0],
}


def write(path: Path, table: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, str(path))
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return path


def arrays(columns: dict[str, Any], reward: str = "reward", constraints: tuple[str, ...] = ("safety",)) -> Any:
    return score_arrays(pa.table(columns), reward, constraints, "my.parquet")


def refusal(columns: dict[str, Any], reward: str = "reward", constraints: tuple[str, ...] = ("safety",)) -> str:
    with pytest.raises(DataError) as caught:
        arrays(columns, reward, constraints)
    return str(caught.value)


def reading_refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_score_table(path)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------- reading

SUFFIXES = [".parquet", ".arrow", ".feather", ".jsonl", ".json"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_each_kind_is_read(tmp_path: Path, suffix: str) -> None:
    table = pa.table(GOOD)
    assert read_score_table(write(tmp_path / f"scores{suffix}", table)).equals(table)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_directory_is_read_in_the_order_of_its_names(tmp_path: Path, suffix: str) -> None:
    table = pa.table(GOOD)
    write(tmp_path / f"b{suffix}", table.slice(2))
    write(tmp_path / f"a{suffix}", table.slice(0, 2))
    assert read_score_table(tmp_path).equals(table)


@pytest.mark.parametrize("name", [".tmp-x", ".part.parquet", "notes.txt", "part-00000.json"])
def test_other_files_of_a_directory_are_not_read(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.parquet", pa.table(GOOD))
    (tmp_path / name).write_bytes(b"junk")
    assert read_score_table(tmp_path).num_rows == 4


def test_directory_named_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    (tmp_path / "split=x").mkdir()
    path = write(tmp_path / "split=x" / "scores.parquet", pa.table(GOOD))
    assert read_score_table(path).column_names == list(GOOD)


def test_artifact_of_a_run_is_read_by_its_manifest(tmp_path: Path) -> None:
    place = open_stage(tmp_path, "scores", "reference", {}, {})
    write_part(place.path, 0, pa.table(GOOD))
    place.commit()
    write_part(place.path, 1, pa.table(GOOD))  # not in the manifest
    assert read_score_table(place.path).num_rows == 4


def test_f13_damaged_artifact_of_a_run_is_refused(tmp_path: Path) -> None:
    place = open_stage(tmp_path, "scores", "reference", {}, {})
    write_part(place.path, 0, pa.table(GOOD))
    place.commit()
    write_part(place.path, 0, pa.table(GOOD).slice(0, 2))
    assert "the manifest says" in reading_refusal(place.path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent.parquet"
    assert reading_refusal(path) == f"{path}: no such file. Give a Parquet, Arrow or JSONL table of scores."


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scores{suffix}"
    path.touch()
    assert reading_refusal(path) == (f"{path}: the file is empty. Expected a table with a prompt_id column and scores.")


@pytest.mark.parametrize("name", ["scores.csv", "scores", "scores.parquet.gz"])
def test_unknown_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"x")
    assert reading_refusal(path) == (
        f"{path}: unknown kind of file {path.suffix!r}. Expected .parquet, .arrow, .feather or .jsonl."
    )


@pytest.mark.parametrize("fraction", [0.3, 0.4, 0.999])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather", ".jsonl"])
def test_f12_truncated_file_is_refused(tmp_path: Path, suffix: str, fraction: float) -> None:
    path = write(tmp_path / f"scores{suffix}", pa.table(GOOD))
    content = path.read_bytes().rstrip(b"\n")
    path.write_bytes(content[: int(len(content) * fraction)])
    words = "line " if suffix == ".jsonl" else "cannot be read as a table, it may be truncated ("
    assert re.match(f"{re.escape(str(path))}[,:] {re.escape(words)}", reading_refusal(path))


def test_f12_arrow_stream_is_refused_because_it_reads_short_when_cut(tmp_path: Path) -> None:
    path, table = tmp_path / "scores.arrow", pa.table(GOOD)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert f"{path}: an Arrow stream, which reads short without an error when it is cut." in reading_refusal(path)


def test_feather_of_version_1_is_named_and_not_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "scores.feather"
    pyarrow.feather.write_feather(pa.table(GOOD), str(path), version=1)
    with pytest.raises(DataError, match="Feather version 1, which is no longer written") as caught:
        read_score_table(path)
    assert "truncated" not in str(caught.value)


def test_directory_without_tables_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert reading_refusal(tmp_path) == f"{tmp_path}: no .parquet or .arrow file in the directory."


def test_f14_shards_of_different_schema_are_refused_with_both_schemas(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"prompt_id": ["a"], "reward": [1.0]}))
    write(tmp_path / "b.parquet", pa.table({"prompt_id": ["a"], "reward": ["1.0"]}))
    assert reading_refusal(tmp_path) == (
        f"{tmp_path}/b.parquet: its schema differs from a.parquet's; write them alike.\n"
        "  column  a.parquet  b.parquet\n  reward  double     string"
    )


def test_f12_truncated_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table(GOOD))
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    assert reading_refusal(tmp_path).startswith(f"{tmp_path / 'b.parquet'}: cannot be read as a table")


# --------------------------------------------------------------------------------------------------------- columns


def test_columns_become_arrays() -> None:
    scores = arrays({**GOOD, "honesty": [1, 2, 3, 4]}, constraints=("honesty", "safety"))
    assert scores.prompt_N.tolist() == GOOD["prompt_id"]
    assert scores.reward_N.tolist() == GOOD["reward"]
    assert scores.utility_NJ.tolist() == [[1, 0], [2, 1], [3, 0.5], [4, -1]]
    assert scores.reward_N.dtype == scores.utility_NJ.dtype == np.float64


def test_no_constraint_gives_no_column() -> None:
    assert arrays(GOOD, constraints=()).utility_NJ.shape == (4, 0)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3, 4], pa.int8()),
        pa.array([1, 2, 3, 4], pa.uint64()),
        pa.array([1, 2, 3, 4], pa.float32()),
        pa.array(np.array([1, 2, 3, 4], dtype=np.float16)),
    ],
)
def test_scores_of_every_number_type_are_taken(values: pa.Array) -> None:
    assert arrays({**GOOD, "reward": values}).reward_N.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_whole_number_too_large_for_a_double_is_rounded() -> None:
    assert arrays({**GOOD, "reward": [0, 1, 2, 2**60 + 1]}).reward_N[3] == 2.0**60


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([7, 7, 8, 8]), [7, 7, 8, 8]),
        (pa.array(["x", "x", "y", "y"]).dictionary_encode(), ["x", "x", "y", "y"]),
        (pa.array(["x", "x", "y", "y"], pa.large_string()), ["x", "x", "y", "y"]),
        (pa.array([datetime.date(2024, 1, d) for d in (1, 1, 2, 2)]), ["2024-01-01"] * 2 + ["2024-01-02"] * 2),
    ],
)
def test_prompt_ids_of_any_plain_type_are_taken(ids: pa.Array, expected: list[Any]) -> None:
    assert arrays({**GOOD, "prompt_id": ids}).prompt_N.tolist() == expected


def test_prompt_ids_that_look_like_dates_group_as_given(tmp_path: Path) -> None:
    dates = ["2024-01-01", "2024-01-01", "2024-01-02", "2024-01-02"]
    path = write(tmp_path / "scores.jsonl", pa.table({**GOOD, "prompt_id": dates}))
    found = score_arrays(read_score_table(path), "reward", ["safety"], "x").prompt_N
    assert (found[0] == found[1], found[1] == found[2], found[2] == found[3]) == (True, False, True)


@pytest.mark.parametrize(("reward", "constraint"), [("rewrd", "safety"), ("reward", "rewrd")])
def test_missing_column_is_refused_with_the_columns_there(reward: str, constraint: str) -> None:
    assert refusal(GOOD, reward, (constraint,)) == (
        "my.parquet: no column 'rewrd'. Columns found: prompt_id, response_id, reward, safety."
    )


def test_table_without_prompt_id_is_refused() -> None:
    without = {name: values for name, values in GOOD.items() if name != "prompt_id"}
    assert "no column 'prompt_id'" in refusal(without)


def test_column_there_twice_is_refused() -> None:
    table = pa.table(GOOD).append_column("reward", pa.array([0.0] * 4))
    with pytest.raises(DataError, match=r"column 'reward' is there more than once\. Rename or drop one"):
        score_arrays(table, "reward", ["safety"], "my.parquet")


def test_reward_named_as_constraint_is_refused() -> None:
    assert refusal(GOOD, "reward", ("safety", "reward")) == (
        "my.parquet: column 'reward' is both the reward and a constraint. Name two different columns."
    )


def test_table_without_rows_is_refused() -> None:
    assert refusal({name: values[:0] for name, values in GOOD.items()}) == "my.parquet: the table has no rows."


def test_null_prompt_id_is_refused_with_its_rows() -> None:
    assert refusal({**GOOD, "prompt_id": ["a", None, "b", None]}) == (
        "my.parquet: prompt_id is null at rows [1, 3]. Give every row the id of its prompt."
    )


def test_prompt_id_of_a_nested_type_is_refused() -> None:
    assert "prompt_id is list<item: string>, expected text or whole numbers" in refusal(
        {**GOOD, "prompt_id": [["a"], ["a"], ["b"], ["b"]]}
    )


def test_f15_duplicate_response_id_is_refused_with_value_and_rows() -> None:
    assert refusal({**GOOD, "response_id": ["a/0", "a/0", "b/0", "b/1"]}) == (
        "my.parquet: (prompt_id, response_id) must be unique, 1 value(s) repeat: ('a', 'a/0') at rows [0, 1]. Remove "
        "the duplicates."
    )


def test_response_ids_may_count_within_each_prompt() -> None:
    scores = score_arrays(pa.table({**GOOD, "response_id": [0, 1, 0, 1]}), "reward", ["safety"], "my.parquet")
    assert scores.reward_N.tolist() == GOOD["reward"]


@pytest.mark.parametrize(
    ("bad", "shown"), [(None, "None"), (float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")]
)
@pytest.mark.parametrize("column", ["reward", "safety"])
def test_f17_score_that_is_no_finite_number_is_refused_with_row_and_id(
    column: str, bad: float | None, shown: str
) -> None:
    values = [*GOOD[column][:2], bad, GOOD[column][3]]
    assert refusal({**GOOD, column: values}) == (
        f"my.parquet: column {column!r} has 1 value(s) that are null, NaN or infinite: row 2 (b/0): {shown}. "
        "Remove these prompts or score them again."
    )


def test_first_five_bad_scores_are_listed_and_all_counted() -> None:
    columns = {"prompt_id": ["a"] * 9, "reward": [None] * 7 + [1.0, 2.0], "safety": [0.0] * 9}
    message = refusal(columns)
    assert "has 7 value(s)" in message
    assert "row 4 (a): None. Remove" in message


def test_column_of_nulls_alone_is_refused_with_its_rows() -> None:
    assert "column 'reward' has 4 value(s) that are null" in refusal({**GOOD, "reward": pa.nulls(4)})


@pytest.mark.parametrize(
    ("values", "kind", "remedy"),
    [
        (["1", "2", "3", "4"], "string", "Write it as numbers."),
        ([True, False, True, False], "bool", "Write 1 for true and 0 for false."),
        ([[1.0]] * 4, "list<item: double>", "Write it as numbers."),
    ],
)
def test_column_that_is_no_number_is_refused(values: list[Any], kind: str, remedy: str) -> None:
    assert refusal({**GOOD, "safety": values}) == (f"my.parquet: column 'safety' is {kind}, expected numbers. {remedy}")


def test_first_text_that_is_no_number_is_shown_as_pandas_types_texts() -> None:
    texts = pa.array(["1", "2", "n/a", "4"], pa.large_string())
    assert refusal({**GOOD, "safety": texts}).endswith("Row 2 holds 'n/a'; write numbers, without quotation marks.")


def test_f20_one_response_per_prompt_everywhere_is_refused() -> None:
    message = refusal({**GOOD, "prompt_id": ["a", "b", "c", "d"]})
    assert "my.parquet: every prompt has one response (K = 1), so no response can be preferred to another" in message
    assert "Sample at least 2 responses per prompt (generate.num_responses)." in message


def test_f20_one_response_for_some_prompts_is_accepted() -> None:
    assert arrays({**GOOD, "prompt_id": ["a", "a", "b", "c"]}).prompt_N.tolist() == ["a", "a", "b", "c"]


@pytest.mark.parametrize(
    ("ending", "row", "told"),
    [
        ("jsonl", '{"prompt_id": "\\ud800", "reward": 1}', "line 2, field 'prompt_id': found '\\ud800', expected"),
        ("jsonl", '{"prompt_id": "p", "re\\uDC00ward": 1}', "line 2, field 're\\udc00ward': found '\\udc00', expected"),
        ("json", '{"prompt_id": "p", "more": ["\\ud83d"]}', "row 1, field 'more': found '\\ud83d', expected"),
    ],
)
def test_half_of_a_surrogate_pair_is_refused_with_its_row(tmp_path: Path, ending: str, row: str, told: str) -> None:
    path, sound = tmp_path / f"scores.{ending}", '{"prompt_id": "\\ud83d\\ude00", "reward": 1}'
    path.write_text(f"[{sound}, {row}]" if ending == "json" else f"{sound}\n{row}\n")
    with pytest.raises(DataError) as refused:
        read_score_table(path)
    assert told in str(refused.value)
    assert "expected Unicode text without lone surrogates" in str(refused.value)
    path.write_text(f"[{sound}]" if ending == "json" else sound)
    assert read_score_table(path).column("prompt_id").to_pylist() == ["😀"]


def test_parquet_column_whose_name_is_no_text_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"prompt_id": ["p"], "reward": [1.0]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"reward", b"\xb5eward"))
    with pytest.raises(DataError, match=r"scores.parquet: cannot be read as a table"):
        read_score_table(path)
