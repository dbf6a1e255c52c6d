"""Scores → utilities: what the constraints are on, as columns of a score table (docs/dual.md, Tails)."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from can_dist.dual import Column
from can_dist.errors import DataError
from can_dist.tables.scores import doubles


def with_utilities(table: pa.Table, columns: Sequence[Column], place: str) -> pa.Table:
    """Return a score table in which every constraint's column holds its utility, made from its scores.

    The one place of a run where this is done: what the dual reads, what examples are labelled by, what a policy is
    estimated, measured and certified by. A ``cvar`` without τ stays the score itself.

    Args:
        table: N rows with the source columns; the other columns are kept.
        columns: one per constraint.
        place: the file, for messages.

    Raises:
        DataError: a column has no source in the table.
    """
    derived = [column for column in columns if not column.is_score]
    for column in derived:
        if absent := [source for source in column.sources if source not in table.column_names]:
            raise DataError(
                f"{place}: no column {absent[0]!r}, of which constraint {column.name!r} ({column.of}) is made. "
                f"Columns: {', '.join(table.column_names)}.",
                "Score the responses with every scorer of the configuration.",
            )
    made = {
        column.name: column.values([doubles(table.column(source)).to_numpy() for source in column.sources])
        for column in derived
    }
    for name, value_N in made.items():
        field, values = pa.field(name, pa.float64()), pa.array(value_N, pa.float64())
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), field, values)
        else:
            table = table.append_column(field, values)
    return table
