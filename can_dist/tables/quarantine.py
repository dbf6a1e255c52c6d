"""Responses that kill every actor that scores them: they have no score, are recorded, and are left out everywhere."""

from __future__ import annotations

from collections.abc import Collection

import pyarrow as pa

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact

QUARANTINED = "quarantined"


def quarantined(scores: Artifact) -> dict[str, str]:
    """Return by response id the reason why a response has no score."""
    return dict(scores.info.get(QUARANTINED, {}))


def without(table: pa.Table, response_ids: Collection[str]) -> pa.Table:
    """Return a table without the rows of some responses."""
    if not response_ids:
        return table
    import pyarrow.compute as pc  # 8 MB, which `status` needs not

    left_out = pa.array(sorted(response_ids), pa.string())
    return table.filter(pc.invert(pc.is_in(table.column("response_id"), value_set=left_out)))


def scored_responses(responses: Artifact, scores: Artifact) -> pa.Table:
    """Return the responses of a score table, row by row: all but the quarantined ones.

    Raises:
        DataError: the scores belong to other responses.
    """
    table = without(responses.table, quarantined(scores))
    if not table.column("response_id").equals(scores.table.column("response_id")):
        raise DataError(f"{scores.path}: its response ids are not those of {responses.path}.")
    return table
