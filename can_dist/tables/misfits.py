"""How a value that does not fit is shown, and the one form of its error."""

from __future__ import annotations

import math
from typing import TypeVar

import pyarrow as pa

from can_dist.errors import DataError

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What Arrow raises for a damaged file."""
Data = TypeVar("Data", pa.Table, pa.RecordBatch)


def sound(data: Data) -> Data:
    """Return a table or a batch whose names, offsets and texts are what its file says; raise ``UNREADABLE``."""
    data.schema.names  # noqa: B018 (read here, or nowhere that expects an error)
    data.validate(full=True)
    return data


def named(schema: pa.Schema) -> pa.Schema:
    """Return a schema whose names are texts; raise ``UNREADABLE``."""
    schema.names  # noqa: B018 (read here, or nowhere that expects an error)
    return schema


def show(value: object) -> str:
    """Return ``repr(value)``, cut to fit a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def bad(place: str, field: str, value: object, expected: str, remedy: str) -> DataError:
    """Return the error of a field.

    Args:
        place: file and row.
        field: name of the field in the row.
        value: the value there.
        expected: the values that would be right.
        remedy: the step that the user can take.
    """
    return DataError(f"{place}, field '{field}': found {show(value)}, expected {expected}.\n", remedy)


def check_encodable(text: str, place: str, field: str) -> None:
    """Raise ``DataError`` for halves of surrogate pairs, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        remedy = "Write the file again with whole characters."
        raise bad(
            place, field, text[error.start : error.end], "Unicode text without lone surrogates", remedy
        ) from error


def is_nothing(value: object) -> bool:
    """Return whether a value says nothing: null, NaN, blank, or a list or dictionary of nothing else.

    ``False`` and 0 say something. Arrow writes an absent structure as one of nulls, pandas an absent text as NaN.
    """
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, list | tuple):
        return all(map(is_nothing, value))
    if isinstance(value, dict):
        return all(map(is_nothing, value.values()))
    return value is None or (isinstance(value, float) and math.isnan(value))
