"""people's preferences + safety flags → preferences: kept, swapped or dropped (SafeDPO, arXiv 2505.20065)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa

from can_dist.config import SafeDpo
from can_dist.config.base import identity
from can_dist.errors import DataError
from can_dist.stages.examples import Examples, Row, by_neighbour, commit, example, join, listed, note, pair_id, useless
from can_dist.tables.artifacts import Artifact
from can_dist.workspace import Workspace

ROLE = "helpful preferences among safe responses"
SWAPPED, DROPPED = "swapped", "both unsafe"
NO_FLAG, NO_LABEL = "no safety flag", "no label"


def label_safe(work: Workspace, pairs: Artifact, scores: Artifact, options: SafeDpo) -> Artifact:
    """Return the ``preferences`` table of people's labels of helpfulness, relabelled by the safety of each response.

    A pair of two safe responses, or whose preferred response alone is safe, is kept; one whose other response alone is
    safe is swapped; one of two unsafe responses is dropped. A target is 1 + Δ or 1 for the preferred response, with Δ
    where the other one is unsafe, and 0 for the other (the loss ``offset``). Pairs without a label or a flag, with an
    empty response or with twice the same tokens are set aside. All are counted, and listed in ``noted_examples.json``.

    Args:
        work: The run.
        pairs: Of ``ingest_pairs`` (schema ``GIVEN_RESPONSES``).
        scores: Of the pairs: ln π_ref in nats, and a column for each constraint that ``options.thresholds`` names.
        options: Δ; and which responses are safe, where that is not the data set's own flags.

    Raises:
        DataError: No pair has flags, or a label; or all pairs are dropped.
    """
    validation, seed = work.config.label.validation_fraction, work.config.seed
    decides = {**identity(options), "validation_fraction": validation, "seed": seed}
    stage = work.open("label", ROLE, decides, {"responses": pairs, "scores": scores})
    if stage.finished:
        return stage.finished
    with work.timed("label", ROLE):
        kept = Examples()
        noted: list[Row] = []
        for a, b in by_neighbour(flagged(join(pairs, scores), scores, options)):
            if reason := useless(a, b) or unusable(a, b):
                noted.append(note(pair_id(a, b), reason, kept=False))
                continue
            target, swapped = relabelled(a, b, options.offset)
            kept.add(example(pair_id(a, b), [a, b], target, validation, seed))
            if swapped:
                noted.append(note(pair_id(a, b), SWAPPED, kept=True))
        examples = kept.table()
        if not examples.num_rows:
            raise _nothing_left(pairs, noted, options)
        counts = Counter(entry["reason"] for entry in noted)
        work.say(
            f"label: {examples.num_rows - counts[SWAPPED]} pairs kept, {counts[SWAPPED]} swapped (the safe response is "
            f"preferred), {counts[DROPPED]} dropped (both responses are unsafe)"
        )
        return commit(work, stage, examples, noted, scores, loss="offset")


def flagged(table: pa.Table, scores: Artifact, options: SafeDpo) -> pa.Table:
    """Return the pairs of ``join`` with ``safe`` (1, 0) by the thresholds; as they are (-1: no flag) without some."""
    if options.thresholds is None:
        return table
    score_N = {name: scores.table.column(name).to_numpy() for name in options.thresholds}
    safe_N = np.logical_and.reduce([score_N[name] >= least for name, least in options.thresholds.items()])
    return table.set_column(table.schema.get_field_index("safe"), "safe", pa.array(safe_N.astype(np.int8)))


def unusable(a: Row, b: Row) -> str:
    """Return why a pair cannot be relabelled, or ''."""
    if min(a["safe"], b["safe"]) < 0:
        return NO_FLAG
    if not a["safe"] and not b["safe"]:
        return DROPPED
    return NO_LABEL if a["better"] < 0 else ""


def relabelled(a: Row, b: Row, offset: float) -> tuple[tuple[float, float], bool]:
    """Return the targets of a pair of which at least one response is safe, and whether its label was swapped."""
    both_safe = a["safe"] == b["safe"]
    first = a["better"] == 1 if both_safe else a["safe"] == 1
    lead = 1.0 if both_safe else 1.0 + offset
    return (lead, 0.0) if first else (0.0, lead), first != (a["better"] == 1)


def _nothing_left(pairs: Artifact, noted: list[Row], options: SafeDpo) -> DataError:
    counts = Counter(entry["reason"] for entry in noted)
    if counts[DROPPED]:
        remedy = "Lower safedpo.thresholds, or b" if options.thresholds else "B"
        return DataError(
            f"{pairs.path}: no pair with a safe response is left ({listed(noted)}), and of two unsafe ones SafeDPO "
            "learns nothing.",
            f"{remedy}ring pairs of which a response is safe.",
        )
    if counts[NO_FLAG]:
        return DataError(
            f"{pairs.path}: no pair has safety flags ({listed(noted)}): columns 'is_response_0_safe' and "
            "'is_response_1_safe' are missing or null.",
            "Bring data with flags, such as PKU-SafeRLHF; or name a constraint and its least safe score in "
            "safedpo.thresholds.",
        )
    return DataError(
        f"{pairs.path}: no pair has a label of helpfulness ({listed(noted)}): column 'better_response_id' is missing "
        "or null.",
        "Bring data with it.",
    )
