"""Reading score tables: the run's own, or any Parquet/Arrow/JSONL table a user already has."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.schemas import check_unique, null_rows, require_columns

TABLE_SUFFIXES = (".parquet", ".arrow", ".feather")
"""Files a table can be sharded over and streamed from."""


_PART_OF = re.compile(r"^(?P<stem>.*?)-?(?P<index>\d+)-of-(?P<count>\d+)$")


@dataclass(frozen=True)
class Scores:
    """Columns of a score table as arrays: prompt ids (N,), reward (N,) float64, utilities (N, J) float64."""

    prompt_N: np.ndarray
    reward_N: np.ndarray
    utility_NJ: np.ndarray


def read_score_table(path: Path) -> pa.Table:
    """Read a Parquet, Arrow IPC or JSONL file, a directory of Parquet/Arrow parts of one schema, or an artifact."""
    if (path / MANIFEST).is_file():
        return load_artifact(path).table
    paths = score_files(path)
    tables = [_read_file(part) for part in paths]
    for part, table in zip(paths[1:], tables[1:], strict=True):
        if difference := schema_difference(tables[0].schema, paths[0].name, table.schema, part.name):
            raise DataError(f"{part}: its schema differs from {paths[0].name}'s; write them alike.\n{difference}")
    _check_not_twice(paths, tables)
    return pa.concat_tables(tables)


def score_files(path: Path) -> list[Path]:
    """Return the files of a score table in order: the file itself, the parts of an artifact, or those of a folder."""
    if not path.exists():
        raise DataError(f"{path}: no such file. Give a Parquet, Arrow or JSONL table of scores.")
    if (path / MANIFEST).is_file():
        return load_artifact(path).parts
    if not path.is_dir():
        return [path]
    parts = sorted(p for p in path.iterdir() if p.suffix in TABLE_SUFFIXES and p.name[0] != ".")
    if not parts:
        raise DataError(f"{path}: no .parquet or .arrow file in the directory.")
    _check_none_missing(parts)
    return parts


def _check_none_missing(paths: Sequence[Path]) -> None:
    """Where files are named part-00001-of-00004, all four must be there."""
    found: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if match := _PART_OF.match(path.stem):
            found.setdefault((match["stem"], int(match["count"])), set()).add(int(match["index"]))
    for (stem, count), numbers in found.items():
        first = 0 if 0 in numbers else 1
        if missing := sorted(set(range(first, first + count)) - numbers):
            raise DataError(
                f"{paths[0].parent}: {len(missing)} of {count} parts of {stem!r} are missing: number "
                f"{', '.join(map(str, missing[:5]))}. Copy them, or score them again."
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
        raise DataError(f"{path}: the file is empty. Expected a table with a prompt_id column and scores.")
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read as a table, it may be truncated ({error}).") from None


def _read_file(path: Path) -> pa.Table:
    with unreadable(path):
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path, page_checksum_verification=True)
        if path.suffix in (".arrow", ".feather"):
            with pa.memory_map(str(path)) as source:
                if source.read(4) == b"\xff\xff\xff\xff":
                    raise DataError(
                        f"{path}: an Arrow stream, which reads short without an error when it is cut. Expected the "
                        "Arrow file format: write it with pyarrow.ipc.new_file, pyarrow.feather or as Parquet."
                    )
                return pa.ipc.open_file(source).read_all()
        if path.suffix in (".jsonl", ".json"):
            import pyarrow.json

            return pyarrow.json.read_json(path)
    raise DataError(f"{path}: unknown kind of file {path.suffix!r}. Expected .parquet, .arrow, .feather or .jsonl.")


def _check_not_twice(paths: Sequence[Path], tables: Sequence[pa.Table]) -> None:
    """Refuse a part whose every row is in another one; rows without response ids cannot tell it otherwise."""
    for number, table in enumerate(tables):
        for before in range(number):
            if table.num_rows and table.num_rows == tables[before].num_rows and table.equals(tables[before]):
                raise DataError(
                    f"{paths[number]}: the same rows as {paths[before].name}: a shard counted twice. Remove one."
                )


def score_arrays(table: pa.Table, reward: str, constraints: Sequence[str], where: str) -> Scores:
    """Take the columns a dual needs out of a table, checked; ``-cost`` is minus the column ``cost``.

    Raises
    ------
    DataError
        When a column is missing or not numeric, ids are null or repeated, scores are null, NaN or infinite (rows
        listed), the table is empty, or every prompt has a single response.
    """
    named = [source_column(name, table.column_names) for name in (reward, *constraints)]
    require_columns(table, ["prompt_id", *(column for column, _ in named)], where)
    check_distinct(reward, constraints, where)
    if table.num_rows == 0:
        raise DataError(f"{where}: the table has no rows.")
    prompt_N = _prompt_ids(table.column("prompt_id"), where)
    if "response_id" in table.column_names:
        check_unique(table, ["prompt_id", "response_id"], where)
    columns = [sign * _finite_column(table, column, where) for column, sign in named]
    _, counts = np.unique(prompt_N, return_counts=True)
    if counts.max() == 1:
        raise DataError(
            f"{where}: every prompt has one response (K = 1), so no response can be preferred to another and the dual "
            "knows nothing. Sample at least 2 responses per prompt (generate.num_responses)."
        )
    utilities = np.stack(columns[1:], axis=1) if constraints else np.empty((table.num_rows, 0))
    return Scores(prompt_N, columns[0], utilities)


def source_column(name: str, columns: Sequence[str]) -> tuple[str, float]:
    """Return the column that ``name`` reads and its sign, as :func:`can_dist.dual.frame.source_column` does."""
    turned = name.startswith("-") and name not in columns and name[1:] in columns
    return (name[1:], -1.0) if turned else (name, 1.0)


def _prompt_ids(column: pa.ChunkedArray, where: str) -> np.ndarray:
    if column.null_count:
        raise DataError(f"{where}: prompt_id is null at rows {null_rows(column)}.")
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind):
        raise DataError(f"{where}: prompt_id is {kind}, expected text or whole numbers.")
    if not pa.types.is_integer(kind):
        column = column.cast(pa.string())  # text that looks like dates is read from JSON as timestamps
    return np.asarray(column.to_pylist())


def _finite_column(table: pa.Table, name: str, where: str) -> np.ndarray:
    column = table.column(name)
    check_numeric(column.type, name, where)
    values = pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        ids = table.column("response_id" if "response_id" in table.column_names else "prompt_id")
        found = [column[int(row)].as_py() for row in bad[:5]]
        listed = "; ".join(f"row {row} ({ids[int(row)].as_py()}): {v}" for row, v in zip(bad[:5], found, strict=True))
        raise DataError(
            f"{where}: column {name!r} has {bad.size} value(s) that are null, NaN or infinite: {listed}. "
            "Remove these prompts or score them again."
        )
    return np.asarray(values, dtype=np.float64)


def check_distinct(reward: str, constraints: Sequence[str], where: str) -> None:
    """Raise ``DataError`` when the reward is a constraint too."""
    if reward in constraints:
        raise DataError(f"{where}: column {reward!r} is both the reward and a constraint. Name two different columns.")


def check_numeric(kind: pa.DataType, name: str, where: str) -> None:
    """Raise ``DataError`` unless a column of this type can hold scores."""
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise DataError(f"{where}: column {name!r} is {kind}, expected numbers.")
