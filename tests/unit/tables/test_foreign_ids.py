"""Ids are the texts in the file, and score tables are read as pandas, SQL and datasets write them."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from foreign_rows import PKU, USER, refusal, write

from can_dist.cli import cli
from can_dist.errors import DataError
from can_dist.tables.foreign.formats import read_preferences, read_prompts, read_responses
from can_dist.tables.score_shards import id_hashes, index_shard, open_score_shards
from can_dist.tables.scores import read_score_table, score_arrays

SPELLINGS = [
    "2024-01-01",
    "2024-01-01 00:00:00",
    "2024-01-01T00:00:00",
    "2024-01-01T00:00:00Z",
    "1",
    "01",
    "1.0",
    "1e0",
    "true",
    "True",
    "null",
    "None",
    "NaN",
    "12345678901234567890123",
    "9007199254740993",
    "9007199254740992",
    " a",
    "a",
    "é",
    "e\u0301",
]
"""Texts of which a reader that guesses types makes fewer."""


def scores(ids: list[Any]) -> list[dict[str, Any]]:
    return [
        {"prompt_id": name, "response_id": f"{name!r}/{k}", "reward": n + k / 3, "safety": k - n / 7}
        for n, name in enumerate(ids)
        for k in range(3)
    ]


def ids_of(path: Path) -> list[Any]:
    ids: list[Any] = score_arrays(read_score_table(path), "reward", ["safety"], "x").prompt_N[::3].tolist()
    return ids


def score_refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        ids_of(path)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- ids


def test_ids_of_score_tables_are_the_texts_in_the_file(tmp_path: Path) -> None:
    assert ids_of(Path(write(tmp_path / "a.jsonl", scores(SPELLINGS)))) == SPELLINGS
    (tmp_path / "a.json").write_text(json.dumps(scores(SPELLINGS)))
    assert ids_of(tmp_path / "a.json") == SPELLINGS
    assert ids_of(Path(write(tmp_path / "a.parquet", scores(SPELLINGS)))) == SPELLINGS


def test_response_ids_that_look_like_one_instant_are_not_repeated(tmp_path: Path) -> None:
    rows = [{"prompt_id": "p", "response_id": text, "reward": 0, "safety": 0} for text in SPELLINGS]
    path = Path(write(tmp_path / "a.jsonl", rows))
    assert score_arrays(read_score_table(path), "reward", ["safety"], "x").prompt_N.size == len(SPELLINGS)


def test_ids_of_prompts_and_pairs_are_the_texts_in_the_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        path = write(tmp_path / name, [{**PKU, "prompt": f"w{n}", "prompt_id": t} for n, t in enumerate(SPELLINGS)])
        assert read_prompts(path).table.column("prompt_id").to_pylist() == SPELLINGS
        assert read_preferences(path).table.column("prompt_id").to_pylist() == SPELLINGS


def test_solution_does_not_depend_on_what_ids_look_like(tmp_path: Path) -> None:
    draw = random.Random(0)
    days = [f"2024-01-{1 + p // 2:02d}" + (" 00:00:00" if p % 2 else "") for p in range(40)]
    rows = [
        {"prompt_id": day, "reward": draw.gauss(3 * (p % 2), 1), "safety": draw.gauss(-2 * (p % 2), 1)}
        for p, day in enumerate(days)
        for _ in range(6)
    ]
    for name, prefix in (("dates", ""), ("texts", "id ")):
        write(tmp_path / f"{name}.jsonl", [{**row, "prompt_id": f"{prefix}{row['prompt_id']}"} for row in rows])
    dates, texts = solved(tmp_path / "dates.jsonl"), solved(tmp_path / "texts.jsonl")
    assert dates["predicted"] == texts["predicted"]
    assert dates["lam"] == texts["lam"]


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, 2**64, 10**30, -5])
def test_whole_numbers_are_ids_to_their_last_digit(tmp_path: Path, number: int) -> None:
    path = Path(write(tmp_path / "a.jsonl", scores([number, number + 1])))
    assert [str(value) for value in ids_of(path)] == [str(number), str(number + 1)]
    rows = [{"prompt": f"w{n}", "prompt_id": number + n} for n in range(2)]
    ids = read_prompts(write(tmp_path / "b.jsonl", rows)).table.column("prompt_id").to_pylist()
    assert ids == [str(number), str(number + 1)]


@pytest.mark.parametrize("value", [1.0, 1.5, True, "", " ", [1], {"a": 1}])
def test_ids_that_are_none_are_refused_with_their_row(tmp_path: Path, value: Any) -> None:
    path = Path(write(tmp_path / "a.jsonl", scores([7, value])))
    assert f"a.jsonl, row 3, field 'prompt_id': found {value!r}, expected a text" in score_refusal(path)
    prompts = [{"prompt": "a", "prompt_id": 7}, {"prompt": "b", "prompt_id": value}]
    assert "row 1, field 'prompt_id': found" in refusal(write(tmp_path / "b.jsonl", prompts))


def test_one_id_as_number_and_as_text_is_refused(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "a.jsonl", scores([1, "1", "p2"])))
    assert "1 value(s) of prompt_id are written both as a number and as a text, such as '1'" in score_refusal(path)
    assert ids_of(Path(write(tmp_path / "b.jsonl", scores([1, "01", "p2"])))) == ["1", "01", "p2"]


def test_ids_that_are_numbers_first_and_texts_later_are_read(tmp_path: Path) -> None:
    ids = [*range(2000), *(f"p{n}" for n in range(10))]
    assert ids_of(Path(write(tmp_path / "late.jsonl", scores(ids)))) == list(map(str, ids))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1.0, 2.0]), [1, 2]),  # pandas makes whole numbers floating point
        (pa.array([decimal.Decimal(10**30), decimal.Decimal(1)], pa.decimal128(38, 0)), [str(10**30), "1"]),
        (pa.array([2**64 - 1, 2**64 - 2], pa.uint64()), [2**64 - 1, 2**64 - 2]),
        (pa.array(["01", "1"]).dictionary_encode(), ["01", "1"]),
    ],
)
def test_typed_ids_keep_their_values(tmp_path: Path, column: pa.Array, expected: list[Any]) -> None:
    table = pa.table({"prompt_id": column.take(pa.array([0, 0, 0, 1, 1, 1])), "reward": range(6), "safety": range(6)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert ids_of(tmp_path / "a.parquet") == expected
    index = index_shard(tmp_path / "a.parquet", ["reward", "safety"])
    texts = pa.chunked_array([pa.array([str(value) for value in expected])])
    assert index.hash_P.tolist() == id_hashes(texts).tolist()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([0.5, 1.0]), "prompt_id is floating point, and 0.5 at row 0 is no whole number"),
        (pa.array([2.0**60, 1.0]), "at row 0 is no whole number that such a type holds exactly"),
        (pa.array([True, False]), "prompt_id is bool, expected text or whole numbers"),
        (pa.array([b"\xff", b"a"]), "prompt_id is binary, expected text or whole numbers"),
    ],
)
def test_typed_ids_that_may_merge_are_refused(tmp_path: Path, column: pa.Array, message: str) -> None:
    table = pa.table({"prompt_id": column.take(pa.array([0, 0, 0, 1, 1, 1])), "reward": range(6), "safety": range(6)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert message in score_refusal(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"prompt_id is"):
        index_shard(tmp_path / "a.parquet", ["reward", "safety"])


# ----------------------------------------------------------------------------------------------------- score tables


def solved(path: Path, *more: str) -> dict[str, Any]:
    options = ["--reward", "reward", "--constraint", "safety:margin=0.1", "--beta", "0.5", "--json", "-"]
    result = CliRunner().invoke(cli, ["solve", "--scores", str(path), *options, *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    return record


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scores in every spelling; ``base.jsonl`` is the plainest."""
    folder, draw = tmp_path_factory.mktemp("scores"), random.Random(0)
    rows = [
        {"prompt_id": p, "reward": round(draw.gauss(0, 1), 6), "safety": round(draw.gauss(0, 1), 6)}
        for p in range(30)
        for _ in range(6)
    ]
    write(folder / "base.jsonl", rows)
    (folder / "array.json").write_text(json.dumps(rows, indent=1))
    (folder / "array.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    text = (folder / "base.jsonl").read_text()
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "lines.ndjson").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n\r\n").encode())
    write(folder / "late.jsonl", [{**r, "prompt_id": n // 6 if n < 150 else f"p{n // 6}"} for n, r in enumerate(rows)])
    frame = pd.DataFrame(rows)
    frame.to_json(folder / "records.json", orient="records")
    frame.to_json(folder / "cols.json")
    for orient in ("split", "table", "index", "values"):
        frame.to_json(folder / f"{orient}.json", orient=orient)
    (folder / "indented.json").write_text(frame.to_json(indent=1))
    frame["safety"] = [decimal.Decimal(f"{x:.6f}") for x in frame["safety"]]
    frame.to_parquet(folder / "decimal.parquet")
    return folder


@pytest.mark.parametrize(
    "name",
    ["array.json", "array.json.gz", "lines.jsonl.gz", "lines.ndjson", "late.jsonl", "records.json", "decimal.parquet"],
)
def test_scores_are_the_same_in_every_file(tables: Path, name: str) -> None:
    base, same = solved(tables / "base.jsonl"), solved(tables / name)
    for key in ("lam", "lam_se", "centre"):
        assert same[key]["safety"] == pytest.approx(base[key]["safety"], rel=1e-9)
    read = score_arrays(read_score_table(tables / name), "reward", ["safety"], "x")
    plain = score_arrays(read_score_table(tables / "base.jsonl"), "reward", ["safety"], "x")
    assert np.array_equal(read.utility_NJ, plain.utility_NJ)  # decimals to the last bit
    assert np.array_equal(read.reward_N, plain.reward_N)


@pytest.mark.parametrize("name", ["cols.json", "split.json", "table.json", "index.json", "indented.json"])
def test_tables_of_pandas_that_are_no_rows_are_refused_truthfully(tables: Path, name: str) -> None:
    message = score_refusal(tables / name)
    assert f"{name}: the file is one JSON object" in message
    assert "orient='records', lines=True" in message
    assert "truncated" not in message
    assert message == refusal(tables / name)  # prompts are told the same


def test_rows_without_names_are_refused(tables: Path) -> None:
    assert "values.json, row 0: found [0, " in score_refusal(tables / "values.json")


def test_decimals_are_the_nearest_doubles_in_memory_and_in_blocks(tmp_path: Path) -> None:
    texts = ["0.1", "0.3", "-0.000001", "1234567.654321", "0.7", "2.2"]
    decimals = pa.array([decimal.Decimal(text) for text in texts], pa.decimal128(20, 6))
    table = pa.table({"prompt_id": list("aaabbb"), "reward": decimals, "safety": decimals.cast(pa.decimal256(50, 20))})
    pq.write_table(table, tmp_path / "a.parquet")
    read = score_arrays(read_score_table(tmp_path / "a.parquet"), "reward", ["safety"], "x")
    assert read.reward_N.tolist() == read.utility_NJ[:, 0].tolist() == list(map(float, texts))
    from can_dist.tables.score_shards import read_blocks

    (path,) = open_score_shards(tmp_path / "a.parquet", ["reward", "safety"])
    index = index_shard(path, ["reward", "safety"])
    ((_, columns),) = read_blocks(path, ["reward", "safety"], index.num_responses_P)
    assert [column.tolist() for column in columns] == [list(map(float, texts))] * 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0.5", "column 'reward' is string, expected numbers. Row 2 holds '\"0.5\"'; write numbers"),
        (True, "column 'reward' is string, expected numbers. Row 2 holds 'true'"),
        ({"a": 1}, "column 'reward' is string, expected numbers. Row 2 holds '{\"a\": 1}'"),
        (None, "column 'reward' has 1 value(s) that are null, NaN or infinite: row 2"),
        (float("nan"), "column 'reward' has 1 value(s) that are null, NaN or infinite: row 2"),
        (10**400, "column 'reward' has 1 value(s) that are null, NaN or infinite: row 2"),
    ],
)
def test_mixed_column_is_refused_with_the_row_that_is_no_number(tmp_path: Path, value: Any, message: str) -> None:
    rows = [{**row, "note": value} for row in scores(["a", "b"])]
    assert ids_of(Path(write(tmp_path / "ok.jsonl", rows))) == ["a", "b"]  # another column may hold anything
    rows[2]["reward"] = value
    assert message in score_refusal(Path(write(tmp_path / "a.jsonl", rows)))


def test_truth_values_are_no_scores_and_missing_names_are_nulls(tmp_path: Path) -> None:
    rows = scores(["a", "b"])
    path = write(tmp_path / "a.jsonl", [{**row, "safety": True} for row in rows])
    assert "column 'safety' is bool, expected numbers" in score_refusal(Path(path))
    del rows[4]["safety"]
    assert "column 'safety' has 1 value(s) that are null" in score_refusal(Path(write(tmp_path / "b.jsonl", rows)))
    del rows[4]["prompt_id"]
    assert "prompt_id is null at rows [4]" in score_refusal(Path(write(tmp_path / "c.jsonl", rows)))


def test_json_is_not_streamed_and_says_so(tables: Path) -> None:
    with pytest.raises(DataError, match=r"a JSON file cannot be read block by block\. Write it as Parquet"):
        open_score_shards(tables / "base.jsonl", ["reward", "safety"])


# ------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_name_twice_in_an_object_is_refused(tmp_path: Path, name: str) -> None:
    lines = ['{"prompt": "a"}', '{"prompt": "b", "prompt": "c"}']
    text = "\n".join(lines) if name == "a.jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / name).write_text(text)
    assert "the name 'prompt' comes twice in one object" in refusal(tmp_path / name)
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "a", "content": "b"}]}')
    assert "b.jsonl, line 1: malformed JSON (the name 'content' comes twice" in refusal(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"prompt_id": "a", "reward": 1, "reward": 2, "safety": 0}')
    assert "the name 'reward' comes twice" in score_refusal(tmp_path / "c.jsonl")


def test_brought_responses_of_bytes_windows_writes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "Hi?", "responses": ["a\\r\\n"]}\r\n')
    assert list(read_responses(tmp_path / "a.jsonl").texts.values()) == [["a\r\n"]]


# ----------------------------------------------------------------------------------------- datasets' and Arrow's Json

CONVERSATIONS = [
    {"messages": [USER, {"role": "assistant", "content": "Where?", "extra": 1}, {"role": "user", "content": "Paris"}]},
    {"messages": [USER]},
]
MEANT = [[USER, {"role": "assistant", "content": "Where?"}, {"role": "user", "content": "Paris"}], [USER]]


def test_json_type_of_datasets_is_read_from_every_file(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", minversion="4.7")
    features = datasets.Features({"messages": datasets.List(datasets.Json())})
    table = datasets.Dataset.from_list(CONVERSATIONS, on_mixed_types="use_json", features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (tmp_path / "a.parquet", tmp_path / "saved"):
        read = read_prompts(source)
        assert read.table.column("messages").to_pylist() == MEANT
        assert "ignored columns: messages[].extra" in read.announcement
    calling = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"a": 1}]}, USER]}]
    table = datasets.Dataset.from_list(calling, on_mixed_types="use_json", features=features)
    table.to_parquet(str(tmp_path / "b.parquet"))
    assert "row 0, field 'messages[1].tool_calls': found [{'a': 1}]" in refusal(tmp_path / "b.parquet")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("by_type", [False, True])
def test_json_type_is_known_by_arrow_type_or_metadata(tmp_path: Path, whole: bool, by_type: bool) -> None:
    values: list[Any] = [[json.dumps(m) for m in row["messages"]] for row in CONVERSATIONS]
    feature: dict[str, Any] = {"_type": "Json"} if whole else {"feature": {"_type": "Json"}, "_type": "List"}
    if whole:
        values = [json.dumps(row["messages"]) for row in CONVERSATIONS]
    kind = pa.json_() if by_type else pa.string()
    array = pa.array(values, pa.string() if whole else pa.list_(pa.string())).cast(kind if whole else pa.list_(kind))
    metadata = {} if by_type else {"huggingface": json.dumps({"info": {"features": {"messages": feature}}})}
    pq.write_table(pa.table({"messages": array}).replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet").table.column("messages").to_pylist() == MEANT
    if not by_type:  # nobody says that these texts are JSON
        pq.write_table(pa.table({"messages": array}), tmp_path / "b.parquet")
        assert "a conversation written as text" in refusal(tmp_path / "b.parquet")


def test_json_type_that_holds_no_json_is_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ['"a"', '{"'], "day": [datetime.date(2024, 1, 1)] * 2})
    features = {"prompt": {"_type": "Json"}, "day": {"dtype": "date32", "_type": "Value"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    assert "a.parquet, row 1, field 'prompt': found '{\"', expected JSON texts" in refusal(tmp_path / "a.parquet")
