"""Rows of JSON lines and JSON arrays, plain or compressed, with the values that are written there.

Nothing is guessed: a text that looks like a date stays a text. A name twice in one object is refused, since JSON's
readers keep one of the two values without a word.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from can_dist.errors import DataError
from can_dist.tables.misfits import check_encodable, show

Row = dict[str, Any]
"""One row of a source: column name to value."""

JSON_ENDINGS = tuple(f".{name}{gz}" for gz in ("", ".gz") for name in ("jsonl", "ndjson", "json"))
ARRAY_ENDINGS = (".json", ".json.gz")
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a surrogate pair, as JSON writes it; two of them may be a character."""
ORIENT = "to_json(path, orient='records', lines=True)"


def is_json(path: Path) -> bool:
    """Return whether a file is JSON, by its name."""
    return path.name.lower().endswith(JSON_ENDINGS)


def is_json_lines(path: Path) -> bool:
    """Return whether a file is rows of JSON, one a line, by its name: a .json may be anything beside a table."""
    return is_json(path) and not path.name.lower().endswith(ARRAY_ENDINGS)


def json_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON array (a .json file that starts with ``[``) or of JSON lines; blank lines are skipped.

    Raises:
        DataError: malformed or truncated JSON, a row that is no object, a name twice in an object, or a file that is
            one object of columns, as ``to_json()`` of pandas writes by default.
    """
    name = path.name.lower()
    try:
        with cast("IO[bytes]", gzip.open(path) if name.endswith(".gz") else path.open("rb")) as file:
            if name.endswith(ARRAY_ENDINGS) and file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                file.seek(0)
                yield from _json_array(path, file.read())
                return
            file.seek(0)
            yield from _json_lines(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or truncated gzip ({error}).", "Download or compress it again.") from error


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Row]:
    held: Row | None = None  # the first row, until a second one shows that the file has rows
    num_rows = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = _json_object(path, line, number)
        except DataError:
            if number == 1 and path.name.lower().endswith(ARRAY_ENDINGS):
                _refuse_one_object(path, line + file.read())
            raise
        num_rows += 1
        if num_rows == 1:
            held = row
            continue
        if held is not None:
            yield held
            held = None
        yield row
    if held is not None:
        _refuse_columns(path, held)
        yield held


def _refuse_one_object(path: Path, text: bytes) -> None:
    """Raise ``DataError`` where a file is one JSON object over several lines."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    raise _one_object(path, value)


def _refuse_columns(path: Path, row: Row) -> None:
    """Raise ``DataError`` where the only row of a file is a whole table: pandas' other orientations, or ``data``."""
    values = list(row.values())
    inner = [name for value in values if isinstance(value, dict) for name in value]
    numbered = all(map(str.isdecimal, row)) or all(map(str.isdecimal, inner))  # pandas' labels of rows
    columns = bool(inner) and all(isinstance(value, dict) for value in values) and numbered
    wrapped = isinstance(row.get("data"), list) and bool({"columns", "schema", "index"} & row.keys() or len(row) == 1)
    if columns or wrapped:
        raise _one_object(path, row)


def _one_object(path: Path, value: object) -> DataError:
    names = f" of {', '.join(map(repr, list(value)[:4]))}" if isinstance(value, dict) else ""
    return DataError(
        f"{path}: the file is one JSON object{names}, a whole table and not rows (pandas writes such files unless "
        "told otherwise).\n",
        f"Expected one object per row. With pandas: {ORIENT}.",
    )


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of its names and values; raise ``ValueError`` for a name that comes twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} comes twice in one object")
    return row


def _json_object(path: Path, line: bytes, number: int) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}, line {number}: malformed JSON ({error}).\n  Found "
            f"{show(line.decode('utf-8', 'replace').strip())}; expected one JSON object per line.",
            "Correct the line or write the file again.",
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{path}, line {number}: found {show(row)}, expected one JSON object per line.",
            "Correct the line.",
        )
    if HALF.search(line):
        _check_whole(row, f"{path}, line {number}")
    return row


def _check_whole(row: Row, place: str) -> None:
    """Raise ``DataError`` where a name or a text of a row has half of a surrogate pair."""
    for name, value in row.items():
        check_encodable(name, place, ascii(name)[1:-1])
        check_encodable(json.dumps(value, ensure_ascii=False), place, name)


def _json_array(path: Path, text: bytes) -> list[Row]:
    try:
        rows = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: malformed JSON ({error}).",
            "Expected an array of objects; write the file again.",
        ) from error
    has_halves = HALF.search(text) is not None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: found {show(row)}, expected an object.", "Correct the row.")
        if has_halves:
            _check_whole(row, f"{path}, row {number}")
    return cast("list[Row]", rows)
