"""Ids of prompts and responses: the texts in the file, whatever they look like."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError
from can_dist.tables.misfits import show

ID_COLUMNS = ("prompt_id", "response_id")


def id_text(value: object) -> str | None:
    """Return an id as text, or None where the value is no id: null, blank, a truth value, a fraction, a list."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0:  # how SQL types large whole numbers
        return str(value)
    return None


def id_column(values: Sequence[object], name: str, place: str, *, coded: bool = False) -> pa.Array:
    """Return the ids of a JSON file as a column: whole numbers where all are small ones, else their texts.

    Args:
        values: the ids as JSON reads them, one per row; null stays null.
        name: of the column.
        place: the file.
        coded: return texts dictionary-encoded, each once.

    Raises:
        DataError: a value is no id, or one id is written both as a number and as a text.
    """
    kept = [value for value in values if value is not None]
    for row, value in enumerate(values):
        if value is not None and id_text(value) is None:
            raise DataError(
                f"{place}, row {row}, field '{name}': found {show(value)}, expected a text that is not empty, or a "
                "whole number.\n",
                "Write the id as text.",
            )
    numbers = {value for value in kept if isinstance(value, int)}
    if len(numbers) and all(isinstance(value, int) for value in kept) and all(-(2**63) <= n < 2**63 for n in numbers):
        return pa.array(values, pa.int64())
    if both := {str(number) for number in numbers} & {value for value in kept if isinstance(value, str)}:
        raise DataError(
            f"{place}: {len(both)} value(s) of {name} are written both as a number and as a text, such as "
            f"{min(both)!r}.\n",
            "Expected one spelling of an id; write all ids as texts.",
        )
    texts = [None if value is None else id_text(value) for value in values]
    if not coded:
        return pa.array(texts, pa.string())
    code_of = {text: code for code, text in enumerate(dict.fromkeys(text for text in texts if text is not None))}
    codes = pa.array([None if text is None else code_of[text] for text in texts], pa.int32())
    return pa.DictionaryArray.from_arrays(codes, pa.array(list(code_of), pa.string()))


def plain_ids(column: pa.ChunkedArray | pa.Array, name: str, place: str, first_row: int = 0) -> pa.Array:
    """Return a table's ids as whole numbers or as texts.

    Args:
        column: N ids of any type, without nulls.
        name: of the column.
        place: the file.
        first_row: number of the first row, where the column is a piece of the file's.

    Raises:
        DataError: a type whose values are no ids: truth values, fractions, lists, bytes.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        return _whole(column, name, place, first_row)
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    whole = pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)
    if not (texts or whole or pa.types.is_temporal(kind)):
        raise DataError(f"{place}: {name} is {kind}, expected text or whole numbers.", "Write the ids as texts.")
    if pa.types.is_integer(kind):
        return column.cast(kind)
    return column.cast(pa.string())


def coded_ids(
    column: pa.ChunkedArray | pa.Array, name: str, place: str, first_row: int = 0, *, nulls: bool = False
) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Return a number for each row's id, and the distinct ids by that number; no text is copied row by row.

    Args:
        column: N ids of any type.
        name: of the column.
        place: the file.
        first_row: number of the first row, where the column is a piece of the file's.
        nulls: count null as an id; else there are none.

    Raises:
        DataError: a type whose values are no ids, as in :func:`plain_ids`.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind) and not nulls:
        column = _whole(
            column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column, name, place, first_row
        )
    if pa.types.is_nested(kind):
        raise DataError(f"{place}: {name} is {kind}, expected text or whole numbers.", "Write the ids as texts.")
    if not isinstance(column, pa.ChunkedArray):
        column = pa.chunked_array([column])
    given = pa.types.is_dictionary(column.type)
    encoded = column.unify_dictionaries() if given else pc.dictionary_encode(column, null_encoding="encode")
    if encoded.num_chunks == 0:
        return np.empty(0, dtype=np.int64), pa.array([], pa.string())
    values = encoded.chunk(0).dictionary if nulls else plain_ids(encoded.chunk(0).dictionary, name, place)
    index = pa.concat_arrays([chunk.indices for chunk in encoded.chunks])
    code_N = pc.fill_null(index, len(values)).to_numpy(zero_copy_only=False).astype(np.int64)
    if given:  # whose values may repeat, and whose nulls stand in the indices
        values = pc.dictionary_encode(pa.concat_arrays([values, pa.nulls(1, values.type)]), null_encoding="encode")
        code_N, values = values.indices.to_numpy()[code_N].astype(np.int64), values.dictionary
        values = values if nulls else values[:-1]
    return code_N, values


def id_array(code_N: npt.NDArray[np.int64], distinct: pa.Array) -> npt.NDArray[Any]:
    """Return N ids, as :func:`coded_ids` gives them: whole numbers, or Python texts of which equal ones are one object.

    NumPy's own texts have one width for all rows, that of the longest.
    """
    if pa.types.is_integer(distinct.type):
        numbers: npt.NDArray[Any] = distinct.to_numpy()[code_N]
        return numbers
    texts: npt.NDArray[Any] = np.array([*distinct.to_pylist(), None], dtype=object)[:-1]
    return texts[code_N]


def _whole(column: pa.Array, name: str, place: str, first_row: int) -> pa.Array:
    """Return ids that pandas made floating point, as the whole numbers they were; others are refused."""
    values: npt.NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    exact = np.isfinite(values) & (np.abs(values) <= 2.0**53) & (values == np.trunc(values))
    if not exact.all():
        row = int(np.flatnonzero(~exact)[0])
        raise DataError(
            f"{place}: {name} is floating point, and {float(values[row])!r} at row {first_row + row} is no whole "
            "number that such a type holds exactly.",
            "Write the ids as texts.",
        )
    return pa.array(values.astype(np.int64))
