"""people's labels → preferences: what a data set calls better, or safer, without any score (DPO, KTO, SACPO)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from can_dist.config import Human
from can_dist.config.base import identity
from can_dist.errors import DataError
from can_dist.stages.examples import Examples, Row, commit, example, join, listed, note, pair_id, useless
from can_dist.tables.artifacts import Artifact
from can_dist.workspace import Workspace

Criterion = Literal["helpful", "safe"]
COLUMN: dict[Criterion, str] = {"helpful": "better", "safe": "safer"}
CONFLICT = "safer_response_id contradicts is_response_i_safe"


def label_human(
    work: Workspace, pairs: Artifact, logps: Artifact, *, criterion: Criterion, human: Human | None = None
) -> Artifact:
    """Return the ``preferences`` table of people's labels on a data set's own pairs (``ingest_pairs``).

    With the loss ``dpo`` an example is a pair with the targets 1 − ε and ε. With ``kto`` it is one response, desirable
    or not. On safety, desirable is by default what the data set flags safe, because KTO judges a response by itself:
    of two unsafe responses the safer one is still unsafe (so does SACPO's code, with the weight n_des/n_undes).

    Pairs without a label, with an empty response or with twice the same tokens are set aside; pairs whose safer
    response is flagged unsafe and the other one safe are kept, set aside, or refused (``label.human.on_conflict``).
    All are counted, and listed in ``noted_examples.json``.

    Args:
        work: the run.
        pairs: of ``ingest_pairs`` (schema ``GIVEN_RESPONSES``).
        logps: ln π of the pairs, in nats, under the model that training is relative to.
        criterion: 'helpful' takes ``better_response_id``, 'safe' takes ``safer_response_id``; of chosen and rejected
            responses both take the chosen one.
        human: how to label; by default ``label.human``.

    Returns:
        The table ``preferences`` (schema ``PREFERENCES``).

    Raises:
        DataError: the data set has no label of the criterion, or conflicts are to be refused and there are some.
    """
    options, seed = human or work.config.label.human, work.config.seed
    validation = work.config.label.validation_fraction
    decides = {
        **identity(options, exclude=("preferences",)),
        "validation_fraction": validation,
        "criterion": criterion,
        "seed": seed,
    }
    stage = work.open("label", f"{criterion} preferences", decides, {"responses": pairs, "scores": logps})
    if stage.finished:
        return stage.finished
    with work.timed("label", f"{criterion} preferences"):
        usable, noted = _usable_pairs(join(pairs, logps).to_pylist(), pairs, criterion, options)
        if options.loss == "dpo":
            kept = [_pair(a, b, criterion, options.smoothing, validation, seed) for (a, _), (b, _) in usable]
        else:
            kept, unflagged = _responses(usable, criterion, options, validation, seed, str(pairs.path))
            noted += unflagged
        examples = Examples(stage)
        for row in kept:
            examples.add(row)
        return commit(work, examples, noted, logps, loss={"dpo": "sigmoid", "kto": "kto"}[options.loss])


Given = tuple[Row, Row | None]
"""A response, and the one of another prompt that stands beside it for KTO."""


def _given_pairs(rows: list[Row], mismatched: bool) -> Iterator[tuple[Given, Given]]:
    if mismatched:
        for a, other_a, b, other_b in zip(rows[::4], rows[1::4], rows[2::4], rows[3::4], strict=True):
            yield (a, other_a), (b, other_b)
    else:
        for a, b in zip(rows[::2], rows[1::2], strict=True):
            yield (a, None), (b, None)


def _usable_pairs(
    rows: list[Row], pairs: Artifact, criterion: Criterion, options: Human
) -> tuple[list[tuple[Given, Given]], list[Row]]:
    """Return the pairs to learn from, and what is noted about them and the others."""
    usable, noted = [], []
    for given_a, given_b in _given_pairs(rows, pairs.info["mismatched"]):
        a, b = given_a[0], given_b[0]
        reason = useless(a, b) or ("" if a[COLUMN[criterion]] >= 0 else "no label")
        conflict = not reason and criterion == "safe" and _contradicts(a, b)
        if reason or conflict:
            keep = conflict and options.on_conflict == "keep"
            noted.append(note(pair_id(a, b), reason or CONFLICT, kept=keep))
        if not reason and (not conflict or options.on_conflict == "keep"):
            usable.append((given_a, given_b))
    counts = Counter(entry["reason"] for entry in noted)
    if options.on_conflict == "fail" and counts[CONFLICT]:
        ids = [entry["example_id"] for entry in noted if entry["reason"] == CONFLICT]
        raise DataError(
            f"{pairs.path}: {len(ids)} pair(s) whose {CONFLICT}: {', '.join(ids[:5])}. "
            "Correct them, or set label.human.on_conflict to 'drop' or 'keep'."
        )
    if not usable and counts["no label"]:
        raise DataError(
            f"{pairs.path}: no pair has a label for criterion {criterion!r} ({listed(noted)}): column "
            f"'{COLUMN[criterion]}_response_id' is missing or null. Use the other criterion, or add the column."
        )
    return usable, noted


def _contradicts(a: Row, b: Row) -> bool:
    """Whether the response called safer is flagged unsafe and the other one safe."""
    safer, other = (a, b) if a["safer"] == 1 else (b, a)
    return bool(safer["safe"] == 0 and other["safe"] == 1)


def _pair(a: Row, b: Row, criterion: Criterion, smoothing: float, validation: float, seed: int) -> Row:
    p = 1.0 - smoothing if a[COLUMN[criterion]] == 1 else smoothing
    return example(pair_id(a, b), [a, b], (p, 1.0 - p), validation, seed)


def _responses(
    usable: list[tuple[Given, Given]],
    criterion: Criterion,
    options: Human,
    validation: float,
    seed: int,
    place: str,
) -> tuple[list[Row], list[Row]]:
    """Return each response of the pairs as an example of its own, weighted by λ_D or λ_U, and those left out."""
    column = "safe" if criterion == "safe" and options.safe_flags else COLUMN[criterion]
    given = [response for pair in usable for response in pair if response[0][column] >= 0]
    unflagged = [row for pair in usable for row, _ in pair if row[column] < 0]
    num_desirable = sum(row[column] for row, _ in given)
    num_undesirable = len(given) - num_desirable
    if not num_desirable or not num_undesirable:
        raise DataError(
            f"{place}: KTO needs desirable and undesirable responses, found {num_desirable} and {num_undesirable} by "
            f"the label {column!r}. Bring data with both"
            + (", or set label.human.safe_flags to false to go by safer_response_id." if column == "safe" else ".")
        )
    undesirable = options.undesirable_weight
    if undesirable is None:
        undesirable = options.desirable_weight * num_desirable / num_undesirable
    kept: list[Row] = []
    for row, other in given:
        good = row[column]
        weight = options.desirable_weight if good else undesirable
        responses: list[Any] = [row, other]
        kept.append(example(row["response_id"], responses, (good, 1 - good), validation, seed, weight))
    return kept, [note(row["response_id"], "no safety flag", kept=False) for row in unflagged]
