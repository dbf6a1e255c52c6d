"""How a value that does not fit is shown, and the one form of its error."""

from __future__ import annotations

import math

from can_dist.errors import DataError


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
