"""Responses without a score, because they end every actor that scores them: recorded, and left out everywhere alike."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact

QUARANTINED = "quarantined"


def quarantined(scores: Artifact) -> dict[str, str]:
    """Return the reason why each response that scores leave out has none, by response id."""
    return dict(scores.info.get(QUARANTINED, {}))


def without(table: pa.Table, response_ids: Collection[str]) -> pa.Table:
    """Return the rows of a table but those of some responses."""
    if not response_ids:
        return table
    left_out = pa.array(sorted(response_ids), pa.string())
    return table.filter(pc.invert(pc.is_in(table.column("response_id"), value_set=left_out)))


def scored_responses(responses: Artifact, scores: Artifact) -> pa.Table:
    """Return the responses that scores are about, row by row: all but the quarantined ones.

    Raises:
        DataError: the scores are those of other responses.
    """
    table = without(responses.table, quarantined(scores))
    if not table.column("response_id").equals(scores.table.column("response_id")):
        raise DataError(f"{scores.path}: its response ids are not those of {responses.path}.")
    return table
