"""Score tables larger than memory: sharded Parquet or Arrow files, checked once and then read block by block.

The rows of a prompt lie side by side in one file, so that a shard is a sum over whole prompts. The ids are read once,
by :func:`index_shard`; later passes read the scores alone. What stays in memory is 16 bytes per prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from can_dist.errors import DataError
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.ids import coded_ids, plain_ids
from can_dist.tables.json_rows import is_json
from can_dist.tables.misfits import named, sound
from can_dist.tables.schemas import require_columns
from can_dist.tables.scores import check_distinct, check_numeric, doubles, schema_difference, score_files, unreadable

IntArray = npt.NDArray[np.int64]

BATCH_ROWS = 1 << 20
"""Rows read at a time: 16 MB for a reward and a utility."""


@dataclass(frozen=True)
class ShardIndex:
    """The prompts of a shard in the order of its rows: responses of each, and a 64-bit hash of its id."""

    num_responses_P: IntArray
    hash_P: npt.NDArray[np.uint64]


def open_score_shards(path: Path, columns: Sequence[str]) -> list[Path]:
    """Return the files of a score table after the checks that need no scores.

    Args:
        path: a Parquet or Arrow file, a directory of them, or an artifact.
        columns: the reward and the utilities.

    Raises:
        DataError: a missing or cut file, a part missing by its name (part-00001-of-00004), columns that are absent or
            not numbers, files whose schemas differ (shown side by side), or JSON.
    """
    if (path / MANIFEST).is_file():
        load_artifact(path).check()
    paths = score_files(path)
    if is_json(paths[0]):
        raise DataError(
            f"{path}: a JSON file cannot be read block by block.",
            "Write it as Parquet, or give --engine memory.",
        )
    check_distinct(columns[0], columns[1:], str(path))
    first = _schema(paths[0])
    require_columns(first.empty_table(), ["prompt_id", *columns], str(paths[0]))
    for name in columns:
        check_numeric(first.field(name).type, name, str(paths[0]))
    for other in paths[1:]:
        if difference := schema_difference(first, paths[0].name, _schema(other), other.name):
            raise DataError(f"{other}: its schema differs from {paths[0].name}'s; write them alike.\n{difference}")
    return paths


def column_names(path: Path) -> list[str]:
    """Return the names of a score table's columns; empty for JSON, whose columns are known once it is read.

    Raises:
        DataError: no file, or a cut one.
    """
    first = score_files(path)[0]
    names: list[str] = [] if is_json(first) else _schema(first).names
    return names


def index_shard(path: Path, columns: Sequence[str]) -> ShardIndex:
    """Read a shard once: group its rows by prompt and check every score.

    Raises:
        DataError: null ids, repeated response ids, rows of a prompt that are not side by side, and scores that are
            null, NaN or infinite, each with its row.
    """
    ids = [name for name in ("prompt_id", "response_id") if name in _schema(path).names]
    starts, hashes, row, last = [], [], 0, None
    seen: set[Any] = set()  # response ids so far of the prompt that a batch ends with
    for batch in _batches(path, [*ids, *columns]):
        for name in columns:
            _check_finite(batch, name, path, row)
        _check_no_null(batch.column(0), path, row)
        code_N, distinct = coded_ids(batch.column(0), "prompt_id", str(path), row)
        texts = distinct.cast(pa.string()).to_pylist()
        goes_on = texts[code_N[0]] == last
        first = np.flatnonzero(np.concatenate(([not goes_on], code_N[1:] != code_N[:-1])))
        starts.append(first + row)
        hashes.append(np.array([_hash(texts[code]) for code in code_N[first]], dtype=np.uint64))
        if "response_id" in ids:
            seen = _check_responses(path, batch.column(1), first, seen if goes_on else set(), row)
        row, last = row + batch.num_rows, texts[code_N[-1]]
    if row == 0:
        raise DataError(f"{path}: the shard has no rows.", "Remove it or write it again.")
    start_P = np.concatenate(starts)
    index = ShardIndex(np.diff(np.concatenate((start_P, [row]))).astype(np.int64), np.concatenate(hashes))
    _check_side_by_side(path, index, start_P)
    return index


def check_once(paths: Sequence[Path], indexes: Sequence[ShardIndex]) -> None:
    """Check by the ids that every prompt is in one shard; ``DataError`` names a shard counted twice."""
    hash_P = np.concatenate([index.hash_P for index in indexes])
    shard_P = np.repeat(np.arange(len(indexes)), [index.hash_P.size for index in indexes])
    order = np.argsort(hash_P, kind="stable")
    again = np.flatnonzero(hash_P[order][1:] == hash_P[order][:-1])
    if again.size:
        first, second = (int(shard_P[order[again[0] + step]]) for step in (0, 1))
        shared = np.intersect1d(indexes[first].hash_P, indexes[second].hash_P)
        names = ", ".join(_prompt_of(paths[second], indexes[second], value) for value in shared[:3])
        num_prompts = indexes[second].hash_P.size
        whole = shared.size == num_prompts
        raise DataError(
            f"{paths[second]}: {shared.size} of its {num_prompts} prompts ({names}) are in {paths[first].name} "
            f"too: {'a shard counted twice; remove one' if whole else 'write each prompt to one shard'}."
        )


def check_complete(place: Path, hash_P: npt.NDArray[np.uint64], expected_P: npt.NDArray[np.uint64]) -> None:
    """Check that the prompts with scores are those expected, by the hashes of their ids (:func:`id_hashes`).

    Raises:
        DataError: counts the prompts that are missing, and those that are not expected.
    """
    missing, unknown = np.setdiff1d(expected_P, hash_P), np.setdiff1d(hash_P, expected_P)
    if missing.size or unknown.size:
        raise DataError(
            f"{place}: {missing.size} of {expected_P.size} expected prompts have no scores, and {unknown.size} prompts "
            "with scores were not expected: a shard is missing, or one belongs to another run."
        )


def read_blocks(
    path: Path, columns: Sequence[str], num_responses_P: IntArray
) -> Iterator[tuple[IntArray, tuple[npt.NDArray[Any], ...]]]:
    """Yield K_i and the score columns of consecutive whole prompts, about ``BATCH_ROWS`` rows at a time.

    Columns are float32 where the file has all of them so, else float64.
    """
    narrow = all(pa.types.is_float32(_schema(path).field(name).type) for name in columns)
    end_P = np.cumsum(num_responses_P)
    done, begin, left = 0, 0, [np.empty(0, dtype=np.float32 if narrow else np.float64)] * len(columns)
    for batch in _batches(path, columns):
        arrays = [_floats(batch.column(c), narrow) for c in range(len(columns))]
        if left[0].size:
            arrays = [np.concatenate(pair) for pair in zip(left, arrays, strict=True)]
        last = int(np.searchsorted(end_P, begin + arrays[0].size, side="right"))
        if last > done:
            used = int(end_P[last - 1]) - begin
            yield num_responses_P[done:last], tuple(array[:used] for array in arrays)
            done, begin, arrays = last, begin + used, [array[used:] for array in arrays]
        left = arrays
    if done < num_responses_P.size or left[0].size:
        raise DataError(f"{path}: its rows changed since it was first read; leave the shards alone meanwhile.")


def id_hashes(ids: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return the hashes of distinct prompt ids, as in :class:`ShardIndex`."""
    texts = plain_ids(pc.unique(ids).drop_null(), "prompt_id", "the table of prompts").to_pylist()
    return np.array([_hash(str(text)) for text in texts], dtype=np.uint64)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _schema(path: Path) -> pa.Schema:
    with unreadable(path):
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
        else:
            with pa.OSFile(str(path)) as source:
                schema = pa.ipc.open_file(source).schema
        return named(schema)


def _batches(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Read a file batch by batch, these columns only; empty batches are passed over."""
    with unreadable(path):
        if path.suffix == ".parquet":
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)):
                    if batch.num_rows:
                        yield sound(batch.select(list(columns)))
            return
        fields = [_schema(path).get_field_index(name) for name in columns]
        with pa.OSFile(str(path)) as source:
            reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=fields))
            for number in range(reader.num_record_batches):
                batch = sound(reader.get_batch(number).select(list(columns)))
                for begin in range(0, batch.num_rows, BATCH_ROWS):
                    yield batch.slice(begin, BATCH_ROWS)


def _floats(column: pa.Array, narrow: bool) -> npt.NDArray[Any]:
    values = column if narrow else doubles(column)
    array: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def _check_no_null(column: pa.Array, path: Path, row: int) -> None:
    if column.null_count:
        null = row + int(pc.index(pc.is_null(column), True).as_py())
        raise DataError(f"{path}: prompt_id is null at row {null}.", "Every row needs the id of its prompt.")


def _check_finite(batch: pa.RecordBatch, name: str, path: Path, row: int) -> None:
    values = pc.fill_null(doubles(batch.column(name)), float("nan")).to_numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        value = batch.column(name)[int(bad[0])].as_py()
        raise DataError(
            f"{path}: column {name!r} has {bad.size} value(s) that are null, NaN or infinite in rows {row} to "
            f"{row + batch.num_rows - 1}, first row {row + int(bad[0])} ({batch.column(0)[int(bad[0])].as_py()}): "
            f"{value}.",
            "Remove these prompts or score them again.",
        )


def _check_responses(path: Path, column: pa.Array, first_Q: IntArray, seen: set[Any], row: int) -> set[Any]:
    """Refuse a response id that a prompt has twice; returns those of the last prompt, which the next batch may go on.

    Args:
        path: the file, for messages.
        column: response ids of a batch.
        first_Q: rows of the batch at which a prompt begins.
        seen: ids, in earlier batches, of the prompt that goes on at row 0.
        row: number of the batch's first row.
    """
    code_N, distinct = coded_ids(column, "response_id", str(path), row, nulls=True)
    run_N = np.searchsorted(first_Q, np.arange(code_N.size), side="right")
    pair_N = run_N * len(distinct) + code_N
    ids = distinct.to_pylist()
    _, index_U = np.unique(pair_N, return_index=True)
    repeated = np.setdiff1d(np.arange(code_N.size), index_U)
    going_on = range(int(first_Q[0]) if first_Q.size else code_N.size)
    repeated = np.concatenate([repeated, [k for k in going_on if ids[code_N[k]] in seen]]).astype(np.int64)
    if repeated.size:
        again = int(repeated.min())
        raise DataError(
            f"{path}: response_id {ids[code_N[again]]!r} at row {row + again} is there before, for the same prompt.",
            "Every response of a prompt needs its own; remove the duplicates.",
        )
    last = int(first_Q[-1]) if first_Q.size else 0
    return {ids[code] for code in code_N[last:]} | (set() if first_Q.size else seen)


def _check_side_by_side(path: Path, index: ShardIndex, start_P: IntArray) -> None:
    order = np.argsort(index.hash_P, kind="stable")
    again = np.flatnonzero(index.hash_P[order][1:] == index.hash_P[order][:-1])
    if again.size:
        first, second = int(order[again[0]]), int(order[again[0] + 1])
        raise DataError(
            f"{path}: the rows of prompt {_prompt_of(path, index, index.hash_P[first])} are not side by side (from "
            f"row {start_P[first]}, and again from row {start_P[second]}).",
            "Sort the table by prompt_id, or give --engine memory.",
        )


def _prompt_of(path: Path, index: ShardIndex, value: np.uint64) -> str:
    """Return the id behind a hash, for a message."""
    row = int(index.num_responses_P[: int(np.flatnonzero(index.hash_P == value)[0])].sum())
    for batch in _batches(path, ["prompt_id"]):
        if row < batch.num_rows:
            return str(batch.column(0)[row].as_py())
        row -= batch.num_rows
    raise AssertionError("the index has more rows than the file")
