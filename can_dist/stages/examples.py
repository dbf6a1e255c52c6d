"""Training examples and their artifact, for labels from scores and from people."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact, StageDirectory, write_json, write_part
from can_dist.tables.quarantine import scored_responses
from can_dist.tables.schemas import LOGP_REFERENCE, PREFERENCES
from can_dist.workspace import Workspace

NOTED = "noted_examples.json"

Row = dict[str, Any]


def join(responses: Artifact, scores: Artifact) -> list[Row]:
    """Return the scored responses as rows with their reference log-probability, ``logp_ref`` (nats)."""
    rows: list[Row] = scored_responses(responses, scores).to_pylist()
    for row, logp_ref in zip(rows, scores.table.column(LOGP_REFERENCE).to_pylist(), strict=True):
        row["logp_ref"] = logp_ref
    return rows


def example(
    example_id: str,
    responses: Sequence[Row],
    target: Sequence[float],
    validation: float,
    seed: int,
    weight: float = 1.0,
) -> Row:
    """Return a row of the preferences table.

    Args:
        example_id: Id of the row.
        responses: Rows of ``join``, all of one prompt.
        target: One number per response; its meaning is that of the table's loss.
        validation: Share of the prompts whose examples are not trained on.
        seed: Root of the draw of these prompts.
        weight: Multiplies the example's loss.
    """
    first = responses[0]
    return {
        "example_id": example_id,
        "prompt_id": first["prompt_id"],
        "split": "validation" if draw(seed, f"validation:{first['prompt_id']}") < validation else "train",
        "messages": first["messages"],
        "response_ids": [response["response_id"] for response in responses],
        "texts": [response["text"] for response in responses],
        "token_ids": [response["token_ids"] for response in responses],
        "logp_ref": [response["logp_ref"] for response in responses],
        "scores": [response["score"] for response in responses if "score" in response],
        "target": list(target),
        "weight": weight,
    }


def pair_id(a: Row, b: Row) -> str:
    """Return the id of a pair of responses to one prompt."""
    return f"{a['response_id']}|{b['response_id'].rsplit('/', 1)[1]}"


def useless(a: Row, b: Row) -> str:
    """Return why a pair of responses teaches nothing, or ''."""
    if not a["text"].strip() or not b["text"].strip():
        return "empty response"
    return "equal responses" if a["token_ids"] == b["token_ids"] else ""


def note(example_id: str, reason: str, *, kept: bool) -> Row:
    """Return a line of ``noted_examples.json``."""
    return {"example_id": example_id, "reason": reason, "kept": kept}


def listed(noted: Sequence[Row]) -> str:
    """Return the number of noted examples per reason, for messages."""
    return ", ".join(f"{n} {reason}" for reason, n in Counter(e["reason"] for e in noted).items()) or "none noted"


def draw(seed: int, name: str) -> float:
    """Return the first number of the random stream ``name``, uniform in [0, 1)."""
    return float(np.random.default_rng(stream(seed, name)).random())


def stream(seed: int, name: str) -> int:
    """Return the seed of the random stream ``name``, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def commit(
    work: Workspace, stage: StageDirectory, kept: list[Row], noted: list[Row], scores: Artifact, *, loss: str
) -> Artifact:
    """Write the examples and the notes on the others, print their numbers, and commit.

    ``scores`` holds the reference's log-probabilities, and records the template that they were computed with.

    Raises:
        DataError: No example is left to train on.
    """
    if not any(row["split"] == "train" for row in kept):
        raise DataError(f"{stage.path}: no example is left to train on ({listed(noted)}). Bring more data.")
    write_part(stage.path, 0, pa.Table.from_pylist(kept, schema=PREFERENCES))
    write_json(stage.path / NOTED, noted)
    counts = Counter(entry["reason"] for entry in noted)
    counts["examples"] = len(kept)
    splits = Counter(row["split"] for row in kept)
    work.say("label: " + ", ".join(f"{n} {name}" for name, n in (counts | splits).items()))
    text = scores.info.get("scorers", {}).get(LOGP_REFERENCE, {}).get("text")
    return stage.commit([NOTED], info={"loss": loss, "counts": dict(counts), "splits": dict(splits), "text": text})
