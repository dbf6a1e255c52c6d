"""Arrow schemas of the tables that pass between stages, and the one check at every boundary."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PROMPTS = pa.schema([("prompt_id", pa.string()), ("messages", MESSAGES), ("split", pa.string())])

RESPONSES = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("response_id", pa.string()),
        ("messages", MESSAGES),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),  # of the reference's tokenizer, its end-of-sequence included
        ("num_tokens", pa.int32()),
        ("finish_reason", pa.string()),  # stop, length, or given (brought by the user)
    ]
)

SCORE_KEYS = pa.schema([("prompt_id", pa.string()), ("response_id", pa.string())])

# responses that a data set brings, with people's labels of each: 1 yes, 0 no, -1 not labelled
GIVEN_RESPONSES = pa.schema(
    [
        *RESPONSES,
        ("better", pa.int8()),  # is the more helpful of its pair
        ("safer", pa.int8()),  # is the safer of its pair
        ("safe", pa.int8()),  # is safe by itself
    ]
)

# One row is one training example: a prompt and its responses, all lists in the same order.
PREFERENCES = pa.schema(
    [
        ("example_id", pa.string()),
        ("prompt_id", pa.string()),
        ("split", pa.string()),  # train or validation
        ("messages", MESSAGES),
        ("response_ids", pa.list_(pa.string())),
        ("texts", pa.list_(pa.string())),
        ("token_ids", pa.list_(pa.list_(pa.int32()))),
        ("logp_ref", pa.list_(pa.float64())),  # nats, sum over each response's tokens
        ("scores", pa.list_(pa.float64())),  # s = r + ⟨λ, g⟩ of each response; empty where people labelled
        ("target", pa.list_(pa.float64())),  # one number per response; its meaning is that of the table's loss
        ("weight", pa.float64()),  # multiplies the example's loss
    ]
)


def check_schema(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """Return the table if it has the columns of ``schema`` without nulls, or raise ``DataError`` naming each misfit."""
    problems = []
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            problems.append(f"column {field.name!r} is missing (expected {field.type})")
        elif not table.schema.field(index).type.equals(field.type):
            problems.append(f"column {field.name!r} is {table.schema.field(index).type}, expected {field.type}")
        elif table.column(field.name).null_count:
            problems.append(f"column {field.name!r} has nulls at rows {null_rows(table.column(field.name))}")
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems) + f". Columns found: {', '.join(table.column_names)}.")
    return table


def null_rows(column: pa.ChunkedArray, limit: int = 5) -> list[int]:
    """Return the first row numbers that hold null."""
    rows: list[int] = pc.indices_nonzero(pc.is_null(column)).to_pylist()
    return rows[:limit]


def check_unique(table: pa.Table, columns: Sequence[str], where: str) -> None:
    """Raise ``DataError`` with up to five values of ``columns`` together that occur more than once, and their rows."""
    counted = table.select(columns).append_column("row", pa.array(range(table.num_rows), pa.int64()))
    counted = counted.group_by(list(columns), use_threads=False).aggregate([("row", "count"), ("row", "list")])
    repeated = counted.filter(pc.greater(counted.column("row_count"), 1)).to_pylist()
    if not repeated:
        return
    shown = []
    for entry in repeated[:5]:
        value = ", ".join(repr(entry[name]) for name in columns)
        shown.append(f"{value if len(columns) == 1 else f'({value})'} at rows {entry['row_list'][:3]}")
    named = columns[0] if len(columns) == 1 else f"({', '.join(columns)})"
    raise DataError(
        f"{where}: {named} must be unique, {len(repeated)} value(s) repeat: {'; '.join(shown)}. Remove the duplicates."
    )


def require_columns(table: pa.Table, columns: Sequence[str], where: str) -> None:
    """Raise ``DataError`` when a named column is absent or there twice, listing what is there."""
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{where}: no column {', '.join(map(repr, missing))}. Columns found: {', '.join(table.column_names)}."
        )
    twice = [name for name in columns if table.column_names.count(name) > 1]
    if twice:
        raise DataError(f"{where}: column {', '.join(map(repr, twice))} is there more than once. Rename or drop one.")
