"""Reading score tables: the run's own, or any Parquet, Arrow or JSON table a user already has."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.ids import ID_COLUMNS, coded_ids, id_array, id_column
from can_dist.tables.json_rows import is_json, is_json_lines, json_rows
from can_dist.tables.misfits import UNREADABLE, show, sound
from can_dist.tables.schemas import check_unique_codes, null_rows, require_columns

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
"""Files a table can be sharded over and streamed from."""


_NUMBER = re.compile(r"-?[0-9.]+(?:[eE][-+]?[0-9]+)?|NaN|-?Infinity")
_PART_OF = re.compile(r"^(?P<stem>.*?)-?(?P<index>\d+)-of-(?P<count>\d+)$")


@dataclass(frozen=True)
class Scores:
    """Columns of a score table as arrays: prompt ids (N,), reward (N,) float64, utilities (N, J) float64."""

    prompt_N: np.ndarray
    reward_N: np.ndarray
    utility_NJ: np.ndarray


def read_score_table(path: Path, names: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet, Arrow IPC or JSON file, a directory of Parquet/Arrow parts of one schema, or an artifact.

    JSON may be lines or an array, plain or .gz. Its ids are the texts in the file, whatever they look like.

    Args:
        path: the file, directory or artifact.
        names: the scores that are needed, all of them columns: Parquet is read for them and the ids alone, and a text
            that is the id of many rows is held once.
    """
    if (path / MANIFEST).is_file():
        return load_artifact(path).table
    paths = score_files(path)
    tables = [_read_file(part, names) for part in paths]
    for part, table in zip(paths[1:], tables[1:], strict=True):
        if difference := schema_difference(tables[0].schema, paths[0].name, table.schema, part.name):
            raise DataError(f"{part}: its schema differs from {paths[0].name}'s; write them alike.\n{difference}")
    _check_not_twice(paths, tables)
    return pa.concat_tables(tables)


def score_files(path: Path) -> list[Path]:
    """Return the files of a score table in order: the file itself, the parts of an artifact, or those of a folder."""
    if not path.exists():
        raise DataError(f"{path}: no such file.", "Give a Parquet, Arrow or JSONL table of scores.")
    if (path / MANIFEST).is_file():
        return load_artifact(path).parts
    if not path.is_dir():
        return [path]
    parts = sorted(p for p in path.iterdir() if p.suffix in TABLE_SUFFIXES and p.name[0] != ".")
    other = sorted(p.name for p in path.iterdir() if is_json_lines(p) and p.name[0] != ".")
    if parts and other:
        raise DataError(
            f"{path}: {', '.join(other[:3])}{' and more' if len(other) > 3 else ''} beside {parts[0].name}, and a "
            "directory is read as the Parquet or Arrow parts of one table.",
            "Write all parts alike, or move what does not belong to the table.",
        )
    if not parts:
        raise DataError(f"{path}: no .parquet or .arrow file in the directory.")
    _check_none_missing(parts)
    return parts


def _check_none_missing(paths: Sequence[Path]) -> None:
    """Where files are named part-00001-of-00004, all four must be there."""
    parts: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := _PART_OF.match(path.stem):
            parts.setdefault((match["stem"], int(match["count"])), set()).add(int(match["index"]))
    for (stem, count), numbers in parts.items():
        first = 0 if 0 in numbers else 1
        if missing := sorted(set(range(first, first + count)) - numbers):
            raise DataError(
                f"{paths[0].parent}: {len(missing)} of {count} parts of {stem!r} are missing: number "
                f"{', '.join(map(str, missing[:5]))}.",
                "Copy them, or score them again.",
            )


def schema_difference(first: pa.Schema, first_name: str, other: pa.Schema, other_name: str) -> str:
    """Return the columns in which two schemas differ, side by side; empty where they agree."""
    names = list(dict.fromkeys([*first.names, *other.names]))
    types = [
        [str(schema.field(name).type) if name in schema.names else "(absent)" for schema in (first, other)]
        for name in names
    ]
    rows = [(name, *pair) for name, pair in zip(names, types, strict=True) if pair[0] != pair[1]]
    if not rows:
        return "" if first.names == other.names else f"  order of columns: {first.names}\n  {other_name}: {other.names}"
    rows = [("column", first_name, other_name), *rows]
    widths = [max(len(row[c]) for row in rows) for c in range(3)]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn what Arrow says of a damaged file into one message."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.", "Expected a table with a prompt_id column and scores.")
    try:
        yield
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as a table, it may be truncated ({error}).") from None


def _read_file(path: Path, names: Sequence[str] | None) -> pa.Table:
    if is_json(path):
        return _read_json(path, coded=names is not None)
    with unreadable(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            columns = None if names is None else _needed(pq.read_schema(path).names, names)
            coded = [] if columns is None else list(ID_COLUMNS)
            table = pq.read_table(
                path, columns=columns, read_dictionary=coded, page_checksum_verification=True, partitioning=None
            )  # pyarrow 21 makes a column of a folder named a=b
            return sound(table)
        if path.suffix in (".arrow", ".feather"):
            with pa.memory_map(str(path)) as source:
                start = source.read(4)
                if start == b"FEA1":
                    raise DataError(
                        f"{path}: Feather version 1, which is no longer written.",
                        "Expected version 2: write it with pandas' to_feather or as Parquet.",
                    )
                if start == b"\xff\xff\xff\xff":
                    raise DataError(
                        f"{path}: an Arrow stream, which reads short without an error when it is cut.",
                        "Expected the Arrow file format: write it with pyarrow.ipc.new_file, pyarrow.feather or as "
                        "Parquet.",
                    )
                return sound(pa.ipc.open_file(source).read_all())
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}.", "Expected .parquet, .arrow, .feather or .jsonl.")


def _needed(columns: Sequence[str], names: Sequence[str]) -> list[str] | None:
    """Return the columns to read: ids and ``names``; None, which is all, where one is there twice, to be refused."""
    needed = [name for name in columns if name in ID_COLUMNS or name in names]
    return None if len(set(needed)) < len(needed) else needed


def _read_json(path: Path, *, coded: bool) -> pa.Table:
    """Return the columns of a JSON file: ids as :func:`id_column` reads them, numbers, truth values, else texts."""
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty.", "Expected a table with a prompt_id column and scores.")
    values: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    num_rows = 0
    for row in json_rows(path):
        for name, value in row.items():
            column = values.setdefault(name, [])
            column.extend([None] * (num_rows - len(column)))
            column.append(texts.setdefault(value, value) if name in ID_COLUMNS and isinstance(value, str) else value)
        num_rows += 1
    for column in values.values():
        column.extend([None] * (num_rows - len(column)))
    return pa.table({name: _json_column(name, column, str(path), coded) for name, column in values.items()})


def _json_column(name: str, values: list[Any], place: str, coded: bool) -> pa.Array:
    if name in ID_COLUMNS:
        return id_column(values, name, place, coded=coded)
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.nulls(len(values))
    if kinds <= {int, float}:
        return pa.array([None if value is None else _float(value) for value in values], pa.float64())
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def _float(value: float) -> float:
    """Return a JSON number as a double; whole numbers beyond the largest one are infinite, which is refused later."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_not_twice(paths: Sequence[Path], tables: Sequence[pa.Table]) -> None:
    """Refuse a part whose every row is in another one; rows without response ids cannot tell it otherwise."""
    for number, table in enumerate(tables):
        for before in range(number):
            if table.num_rows and table.num_rows == tables[before].num_rows and table.equals(tables[before]):
                raise DataError(
                    f"{paths[number]}: the same rows as {paths[before].name}: a shard counted twice.",
                    "Remove one.",
                )


def score_arrays(table: pa.Table, reward: str, constraints: Sequence[str], place: str) -> Scores:
    """Take the columns a dual needs out of a table, checked.

    Args:
        table: N rows with ``prompt_id`` and the columns named.
        reward: name of the reward's column.
        constraints: names of the utilities' columns, J of them.
        place: the file, for messages.

    Raises:
        DataError: a column is missing or not numeric, ids are null, repeated or of a type that is none, scores are
            null, NaN or infinite (rows listed), the table is empty, or every prompt has a single response.
    """
    require_columns(table, ["prompt_id", reward, *constraints], place)
    check_distinct(reward, constraints, place)
    if table.num_rows == 0:
        raise DataError(f"{place}: the table has no rows.")
    if table.column("prompt_id").null_count:
        rows = null_rows(table.column("prompt_id"))
        raise DataError(f"{place}: prompt_id is null at rows {rows}.", "Give every row the id of its prompt.")
    code_N, distinct = coded_ids(table.column("prompt_id"), "prompt_id", place)
    if "response_id" in table.column_names:
        response_N, _ = coded_ids(table.column("response_id"), "response_id", place, nulls=True)
        check_unique_codes(table, {"prompt_id": code_N, "response_id": response_N}, place)
    columns = [_finite_column(table, name, place) for name in (reward, *constraints)]
    if len(distinct) == table.num_rows:
        raise DataError(
            f"{place}: every prompt has one response (K = 1), so no response can be preferred to another and the dual "
            "knows nothing.",
            "Sample at least 2 responses per prompt (generate.num_responses).",
        )
    utilities = np.stack(columns[1:], axis=1) if constraints else np.empty((table.num_rows, 0))
    return Scores(id_array(code_N, distinct), columns[0], utilities)


def _finite_column(table: pa.Table, name: str, place: str) -> npt.NDArray[np.float64]:
    column = table.column(name)
    check_numeric(column.type, name, place, column)
    values = pc.fill_null(doubles(column), float("nan")).to_numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        ids = table.column("response_id" if "response_id" in table.column_names else "prompt_id")
        listed = "; ".join(
            f"row {row} ({ids[int(row)].as_py()}): {column[int(row)].as_py()}" for row in bad[:5].tolist()
        )
        raise DataError(
            f"{place}: column {name!r} has {bad.size} value(s) that are null, NaN or infinite: {listed}.",
            "Remove these prompts or score them again.",
        )
    return np.asarray(values, dtype=np.float64)


def doubles(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Return numbers of any type as float64, the nearest ones.

    Decimals go through their text: Arrow's own conversion makes 0.09999999999999999 of 0.1 (measured, 26.0.1).
    """
    if pa.types.is_decimal(column.type):
        column = column.cast(pa.string())
    return column.cast(pa.float64(), safe=False)


def check_distinct(reward: str, constraints: Sequence[str], place: str) -> None:
    """Raise ``DataError`` when the reward is a constraint too."""
    if reward in constraints:
        raise DataError(
            f"{place}: column {reward!r} is both the reward and a constraint.",
            "Name two different columns.",
        )


def check_numeric(kind: pa.DataType, name: str, place: str, column: pa.ChunkedArray | None = None) -> None:
    """Raise ``DataError`` unless a column of this type can hold scores.

    Args:
        kind: type of the column.
        name: of the column.
        place: the file.
        column: its values, of which the first that is no number is shown.
    """
    if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return
    remedy = "Write 1 for true and 0 for false." if pa.types.is_boolean(kind) else ""
    if column is not None and not remedy:
        remedy = _first_text(column)
    raise DataError(f"{place}: column {name!r} is {kind}, expected numbers.", remedy or "Write it as numbers.")


def _first_text(column: pa.ChunkedArray) -> str:
    """Say which row of a column of texts is the first that is not spelled like a number; '' where none is."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return ""
    for row, text in enumerate(column.to_pylist()):
        if text is not None and not _NUMBER.fullmatch(text):
            return f"Row {row} holds {show(text)}; write numbers, without quotation marks."
    return ""
