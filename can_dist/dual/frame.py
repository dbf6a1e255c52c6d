"""A table with named columns (pandas, polars, pyarrow, or a dict of arrays), or three arrays → the dual's table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from can_dist.dual.table import ScoreTable, id_values
from can_dist.errors import ConfigError


class Frame(Protocol):
    """A table whose columns are read by name: a pandas or polars DataFrame, a pyarrow Table, a dict of arrays."""

    def __getitem__(self, name: str, /) -> Any:
        """Return a column."""


def score_table(
    scores: Any,
    utility_NJ: npt.ArrayLike | None,
    prompt_N: npt.ArrayLike | None,
    log_weight_N: npt.ArrayLike | None,
    *,
    names: Sequence[str],
    reward: str,
    prompt: str,
) -> ScoreTable:
    """Group and centre the columns ``reward``, ``names`` and ``prompt`` of a frame, or the arrays where all are given.

    ``-cost`` names the column ``cost`` with its sign turned, where there is no column of that very name.

    Raises:
        ConfigError: neither a frame nor three arrays, or a column that the frame has not.
        DataError: no rows, or scores that are not finite.
    """
    if utility_NJ is None and prompt_N is None:
        scores, utility_NJ, prompt_N = _columns(scores, reward, names, prompt)
    if utility_NJ is None or prompt_N is None:
        absent = "utility_NJ" if utility_NJ is None else "prompt_N"
        raise ConfigError(f"{absent}: not given; give reward_N, utility_NJ and prompt_N, or one table with columns.")
    return ScoreTable.build(scores, utility_NJ, prompt_N, log_weight_N, names=names)


def _columns(
    frame: Any, reward: str, names: Sequence[str], prompt: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    there = _column_names(frame)
    missing = [name for name in (prompt, reward, *names) if source_column(name, there)[0] not in there]
    if missing:
        raise ConfigError(
            f"table of scores: no column {', '.join(map(repr, missing))}; it has {', '.join(map(str, there))}. A "
            "constraint is named after its column; reward= and prompt= name the others."
        )
    prompt_N = id_values(frame[prompt])
    reward_N, *utilities = (
        sign * np.asarray(frame[column]) for column, sign in (source_column(name, there) for name in (reward, *names))
    )
    return reward_N, np.stack(utilities, axis=1) if names else np.empty((len(prompt_N), 0)), prompt_N


def source_column(name: str, columns: Sequence[Any]) -> tuple[str, float]:
    """Return the column that ``name`` reads and its sign: ``-cost`` is minus the column ``cost``, higher is better.

    A column of that very name comes first.

    >>> source_column("-cost", ["prompt_id", "cost"]), source_column("safety", ["safety"])
    (('cost', -1.0), ('safety', 1.0))
    """
    if name.startswith("-") and name not in columns and name[1:] in columns:
        return name[1:], -1.0
    return name, 1.0


def _column_names(frame: Any) -> list[Any]:
    if isinstance(frame, dict):
        return list(frame)
    for attribute in ("column_names", "columns"):  # in this order: pyarrow's columns are its data
        if hasattr(frame, attribute):
            return list(getattr(frame, attribute))
    raise ConfigError(
        f"scores: found one {type(frame).__name__}, expected a table with named columns (a DataFrame, a pyarrow Table, "
        "a dict of arrays), or the three arrays reward_N, utility_NJ and prompt_N."
    )
