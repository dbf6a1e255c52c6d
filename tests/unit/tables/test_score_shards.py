"""Sharded score tables: read block by block they are the same numbers, and what is wrong with them is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from can_dist.errors import DataError
from can_dist.tables import score_shards
from can_dist.tables.score_shards import (
    check_complete,
    check_once,
    id_hashes,
    index_shard,
    open_score_shards,
    read_blocks,
)

COLUMNS = ("reward", "safety")


def table(first: int = 0, num_prompts: int = 50, **changes: Any) -> pa.Table:
    """Prompts ``first`` and on, K = 1, 2, 3, 1, ... responses each."""
    rng = np.random.default_rng(first)
    counts = np.arange(num_prompts) % 3 + 1
    prompt = np.repeat([f"p{first + i}" for i in range(num_prompts)], counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    columns: dict[str, Any] = {
        "prompt_id": prompt,
        "response_id": [f"{p}/{k}" for p, k in zip(prompt, numbers, strict=True)],
        "reward": rng.standard_normal(counts.sum()),
        "safety": rng.standard_normal(counts.sum()),
    }
    return pa.table(columns | changes)


def write(path: Path, data: pa.Table) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(data, path, row_group_size=17)
    else:
        feather.write_feather(data, path, chunksize=17, compression="uncompressed")
    return path


def refusal(action: Any) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_blocks_hold_every_score_of_whole_prompts(tmp_path: Path, suffix: str, dtype: Any, monkeypatch) -> None:
    monkeypatch.setattr(score_shards, "BATCH_ROWS", 10)
    data = table()
    data = data.set_column(2, "reward", pa.array(data["reward"].to_numpy().astype(dtype)))
    data = data.set_column(3, "safety", pa.array(data["safety"].to_numpy().astype(dtype)))
    path = write(tmp_path / f"scores{suffix}", data)
    assert open_score_shards(tmp_path, COLUMNS) == [path]
    index = index_shard(path, COLUMNS)
    np.testing.assert_array_equal(index.num_responses_P, np.arange(50) % 3 + 1)
    blocks = list(read_blocks(path, COLUMNS, index.num_responses_P))
    assert len(blocks) > 3, "it was streamed"
    assert all(counts.sum() == columns[0].size for counts, columns in blocks)
    for number, name in enumerate(COLUMNS):
        joined = np.concatenate([columns[number] for _, columns in blocks])
        assert joined.dtype == dtype
        np.testing.assert_array_equal(joined, data[name].to_numpy())


def test_whole_numbers_and_mixed_types_become_float64(tmp_path: Path) -> None:
    data = table()
    data = data.set_column(2, "reward", pa.array(np.arange(data.num_rows, dtype=np.int32)))
    path = write(tmp_path / "a.parquet", data)
    (_, columns), *_ = read_blocks(path, COLUMNS, index_shard(path, COLUMNS).num_responses_P)
    assert {column.dtype for column in columns} == {np.dtype(np.float64)}


def test_f14_schemas_that_differ_are_shown_side_by_side(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", table())
    other = table(100)
    other = other.set_column(2, "reward", other["reward"].cast(pa.float32())).drop_columns(["safety"])
    write(tmp_path / "part-1.parquet", other.append_column("harm", pa.array([0.0] * other.num_rows)))
    assert refusal(lambda: open_score_shards(tmp_path, COLUMNS)) == (
        f"{tmp_path / 'part-1.parquet'}: its schema differs from part-0.parquet's; write them alike.\n"
        "  column  part-0.parquet  part-1.parquet\n"
        "  reward  double          float\n"
        "  safety  double          (absent)\n"
        "  harm    (absent)        double"
    )


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
def test_f12_truncated_shard_is_refused_by_name(tmp_path: Path, suffix: str, kept: float) -> None:
    write(tmp_path / f"part-0{suffix}", table())
    path = write(tmp_path / f"part-1{suffix}", table(100))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    said = refusal(lambda: open_score_shards(tmp_path, COLUMNS))
    assert said.startswith(f"{path}: ")
    assert "the file is empty" in said or "it may be truncated" in said


def test_f15_shard_counted_twice_is_found_by_its_ids(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", table())
    write(tmp_path / "part-1.parquet", table())
    paths = open_score_shards(tmp_path, COLUMNS)
    said = refusal(lambda: check_once(paths, [index_shard(path, COLUMNS) for path in paths]))
    assert said.startswith(f"{paths[1]}: 50 of its 50 prompts (p")
    assert said.endswith("are in part-0.parquet too: a shard counted twice; remove one.")


def test_f15_prompt_spread_over_shards_is_named(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", table(0, 30))
    write(tmp_path / "part-1.parquet", table(29, 30))
    paths = open_score_shards(tmp_path, COLUMNS)
    said = refusal(lambda: check_once(paths, [index_shard(path, COLUMNS) for path in paths]))
    assert said == f"{paths[1]}: 1 of its 30 prompts (p29) are in part-0.parquet too: write each prompt to one shard."


def test_f16_missing_shard_is_found_by_the_ids_expected(tmp_path: Path) -> None:
    paths = [write(tmp_path / "part-0.parquet", table(0, 30)), write(tmp_path / "part-1.parquet", table(30, 30))]
    hashes = [index_shard(path, COLUMNS).hash_P for path in paths]
    expected = id_hashes(pa.chunked_array([[f"p{i}" for i in range(60)]]))
    check_complete(tmp_path, np.concatenate(hashes), expected)
    said = refusal(lambda: check_complete(tmp_path, hashes[0], expected))
    assert said.startswith(f"{tmp_path}: 30 of 60 expected prompts have no scores, and 0 prompts with scores were not")
    said = refusal(lambda: check_complete(tmp_path, np.concatenate(hashes), expected[:50]))
    assert "0 of 50 expected prompts have no scores, and 10 prompts with scores were not expected" in said


@pytest.mark.parametrize(("there", "missing"), [((0, 1, 3), "number 2"), ((2, 3, 4), "number 1")])
def test_f16_missing_part_is_found_by_its_name(tmp_path: Path, there: tuple[int, ...], missing: str) -> None:
    for number in there:
        write(tmp_path / f"train-{number:05d}-of-00004.parquet", table(100 * number))
    said = refusal(lambda: open_score_shards(tmp_path, COLUMNS))
    assert said.startswith(f"{tmp_path}: 1 of 4 parts of 'train' are missing: {missing}.")


def test_rows_of_a_prompt_apart_are_refused(tmp_path: Path) -> None:
    data = pa.concat_tables([table(), table().slice(3, 1).set_column(1, "response_id", pa.array(["new"]))])
    path = write(tmp_path / "a.parquet", data)
    said = refusal(lambda: index_shard(path, COLUMNS))
    assert said.startswith(f"{path}: the rows of prompt p2 are not side by side (from row 3, and again from row 99)")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_f17_bad_score_is_named_with_its_row_and_prompt(tmp_path: Path, bad: float | None) -> None:
    data = table()
    values = data["safety"].to_pylist()
    values[40] = bad
    path = write(tmp_path / "a.parquet", data.set_column(3, "safety", pa.array(values)))
    said = refusal(lambda: index_shard(path, COLUMNS))
    assert said.startswith(f"{path}: column 'safety' has 1 value(s) that are null, NaN or infinite")
    assert f"first row 40 ({data['prompt_id'][40]}): {bad}." in said


def test_f15_repeated_response_is_refused(tmp_path: Path) -> None:
    data = table()
    ids = data["response_id"].to_pylist()
    ids[2] = ids[1]
    path = write(tmp_path / "a.parquet", data.set_column(1, "response_id", pa.array(ids)))
    assert refusal(lambda: index_shard(path, COLUMNS)).startswith(
        f"{path}: response_id 'p1/0' at row 2 is there before, for the same prompt."
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (table().drop_columns(["safety"]), "no column 'safety'"),
        (table(safety=["x"] * table().num_rows), "column 'safety' is string, expected numbers"),
    ],
)
def test_column_that_is_absent_or_text_is_refused(tmp_path: Path, data: pa.Table, message: str) -> None:
    path = write(tmp_path / "a.parquet", data)
    assert refusal(lambda: open_score_shards(path, COLUMNS)).startswith(f"{path}: {message}")


def test_null_prompt_id_is_refused(tmp_path: Path) -> None:
    data = table()
    ids = data["prompt_id"].to_pylist()
    ids[7] = None
    path = write(tmp_path / "a.parquet", data.set_column(0, "prompt_id", pa.array(ids)))
    assert refusal(lambda: index_shard(path, COLUMNS)) == (
        f"{path}: prompt_id is null at row 7. Every row needs the id of its prompt."
    )


def test_shard_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", table())
    counts = index_shard(path, COLUMNS).num_responses_P
    write(path, table(0, 40))
    assert "its rows changed since it was first read" in refusal(lambda: list(read_blocks(path, COLUMNS, counts)))
