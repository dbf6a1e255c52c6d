"""Arrow schemas of the tables that pass between stages, and their check at every boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError
from can_dist.tables.ids import coded_ids

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

# columns of a score table: ln π_ref(y|x), and ln π(y|x) of a trained policy, in nats
LOGP_REFERENCE, LOGP_POLICY = "logp.reference", "logp.policy"

# responses of a data set with people's labels: 1 yes, 0 no, -1 not labelled
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
        ("target", pa.list_(pa.float64())),  # one number per response; the table's loss says its meaning
        ("weight", pa.float64()),  # multiplies the example's loss
    ]
)


def check_schema(table: pa.Table, schema: pa.Schema, source: str) -> pa.Table:
    """Return the table, whose columns must be those of ``schema``, without nulls.

    Args:
        table: it may have more columns.
        schema: names and types of the columns.
        source: the table's name in messages.

    Raises:
        DataError: a column is missing, of another type, or has nulls; the message names all of them.
    """
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
        raise DataError(f"{source}: " + "; ".join(problems) + f". Columns found: {', '.join(table.column_names)}.")
    return table


def null_rows(column: pa.ChunkedArray, limit: int = 5) -> list[int]:
    """Return the first row numbers that hold null."""
    rows: list[int] = pc.indices_nonzero(pc.is_null(column)).to_pylist()
    return rows[:limit]


def check_unique(table: pa.Table, columns: Sequence[str], source: str) -> None:
    """Check that no values of ``columns`` together occur twice.

    Raises:
        DataError: with up to five repeated values and their rows.
    """
    code_N = {name: coded_ids(table.column(name), name, source, nulls=True)[0] for name in columns}
    check_unique_codes(table, code_N, source)


def check_unique_codes(table: pa.Table, code_N: Mapping[str, npt.NDArray[np.int64]], source: str) -> None:
    """Check columns by a number for each row's value, as :func:`coded_ids` gives it; else as :func:`check_unique`."""
    key_N = np.zeros(table.num_rows, dtype=np.int64)
    for codes_N in code_N.values():
        key_N = key_N * (int(codes_N.max(initial=0)) + 1) + codes_N
    order = np.argsort(key_N, kind="stable")
    edge = np.flatnonzero(np.diff(key_N[order])) + 1
    if edge.size + 1 >= table.num_rows:
        return
    ends = zip(np.concatenate(([0], edge)).tolist(), np.concatenate((edge, [order.size])).tolist(), strict=True)
    repeated = sorted((order[begin:end] for begin, end in ends if end - begin > 1), key=lambda rows: int(rows[0]))
    columns, shown = list(code_N), []
    for rows in repeated[:5]:
        value = ", ".join(repr(table.column(name)[int(rows[0])].as_py()) for name in columns)
        shown.append(f"{value if len(columns) == 1 else f'({value})'} at rows {rows[:3].tolist()}")
    named = columns[0] if len(columns) == 1 else f"({', '.join(columns)})"
    raise DataError(
        f"{source}: {named} must be unique, {len(repeated)} value(s) repeat: {'; '.join(shown)}.",
        "Remove the duplicates.",
    )


def require_columns(table: pa.Table, columns: Sequence[str], source: str) -> None:
    """Check that each named column is there once.

    Raises:
        DataError: a column is absent or there twice; the message lists the columns of the table.
    """
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise DataError(
            f"{source}: no column {', '.join(map(repr, missing))}. Columns found: {', '.join(table.column_names)}."
        )
    twice = [name for name in columns if table.column_names.count(name) > 1]
    if twice:
        raise DataError(
            f"{source}: column {', '.join(map(repr, twice))} is there more than once.",
            "Rename or drop one.",
        )
