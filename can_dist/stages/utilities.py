"""Constraints → the columns that they are on, and these columns in a table of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from can_dist.config.sections import Constraint
from can_dist.dual import Column
from can_dist.tables.utilities import with_utilities


def columns_of(constraints: Mapping[str, Constraint]) -> tuple[Column, ...]:
    """Return what each constraint is on; a ``cvar`` has no τ yet."""
    return tuple(
        Column(name, tuple(c.scorers(name)), of=c.of, level=c.level, alpha=c.alpha) for name, c in constraints.items()
    )


def column_keys(columns: Sequence[Column]) -> dict[str, Any]:
    """Return what of the columns is a part of a stage's identity: nothing where all are means of scores."""
    derived = [column for column in columns if column.of != "mean"]
    keys = {
        column.name: {
            "of": column.of,
            "sources": list(column.sources),
            "level": column.level,
            "alpha": column.alpha,
            "tau": column.tau,
        }
        for column in derived
    }
    return {"columns": keys} if keys else {}


def measured(table: pa.Table, columns: Sequence[Column], place: str) -> pa.Table:
    """Return the scores of fresh responses with every constraint's utility, a ``cvar`` at the τ of these responses.

    The mean over prompts of such a column is the CVaR of the responses, whatever τ the policy was trained at.
    """
    prompt_N = table.column("prompt_id").to_numpy(zero_copy_only=False)
    at_own = [
        column.at_own_tau(table.column(column.name).to_numpy(), prompt_N) if column.of == "cvar" else column
        for column in columns
    ]
    return with_utilities(table, at_own, place)
