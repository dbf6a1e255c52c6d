"""What the name of a score means: which column it reads, and with which sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def source_column(name: str, columns: Sequence[Any]) -> tuple[str, float]:
    """Return the column that ``name`` reads and its sign: ``-cost`` is minus the column ``cost``, higher is better.

    A column of that very name comes first.

    >>> source_column("-cost", ["prompt_id", "cost"]), source_column("safety", ["safety"])
    (('cost', -1.0), ('safety', 1.0))
    """
    if name.startswith("-") and name not in columns and name[1:] in columns:
        return name[1:], -1.0
    return name, 1.0
