"""Training examples and their artifact, for labels from scores and from people."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact, StageDirectory, write_json, write_part
from can_dist.tables.quarantine import scored_responses
from can_dist.tables.schemas import LOGP_REFERENCE, PREFERENCES
from can_dist.workspace import Workspace

NOTED = "noted_examples.json"

PROMPTS_AT_A_TIME, ROWS_AT_A_TIME = 1024, 8192
PART_ROWS, PART_BYTES = 65_536, 2**30
OFFSETS_REACH = 2**31  # bytes of texts

Row = dict[str, Any]


def join(responses: Artifact, scores: Artifact) -> pa.Table:
    """Return the scored responses with their reference log-probability, ``logp_ref`` (nats)."""
    return scored_responses(responses, scores).append_column("logp_ref", scores.table.column(LOGP_REFERENCE))


def by_prompt(table: pa.Table) -> Iterator[list[Row]]:
    """Yield the rows of each prompt, in the order in which the prompts first appear; few of them are rows at a time."""
    # numbered by first appearance
    prompt_N = table.column("prompt_id").combine_chunks().dictionary_encode().indices.to_numpy()
    if not (np.diff(prompt_N) >= 0).all():
        order_N = np.argsort(prompt_N, kind="stable")
        table, prompt_N = table.take(order_N), prompt_N[order_N]
    starts = np.flatnonzero(np.diff(prompt_N, prepend=-1))[::PROMPTS_AT_A_TIME].tolist()
    for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
        rows = table.slice(start, end - start).to_pylist()
        for _, members in groupby(rows, key=itemgetter("prompt_id")):
            yield list(members)


def by_neighbour(table: pa.Table) -> Iterator[list[Row]]:
    """Yield the rows two by two, as a data set's own pairs stand in their table."""
    for start in range(0, table.num_rows, 2 * PROMPTS_AT_A_TIME):
        rows = table.slice(start, 2 * PROMPTS_AT_A_TIME).to_pylist()
        yield from map(list, zip(rows[::2], rows[1::2], strict=True))


class Examples:
    """The examples of a stage: written in parts as they are made, so that memory holds a part."""

    def __init__(self, stage: StageDirectory) -> None:
        """Start with none; what is added goes to the directory of ``stage``, which :func:`commit` completes."""
        self.stage = stage
        self.splits: Counter[str] = Counter()
        self.num_parts = 0
        self._tables: list[pa.Table] = []
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        """Take one more."""
        self.splits[row["split"]] += 1
        self._rows.append(row)
        if len(self._rows) == ROWS_AT_A_TIME:
            self._store()
            if len(self._tables) * ROWS_AT_A_TIME >= PART_ROWS or _num_bytes(self._tables) >= PART_BYTES:
                self._write()

    def finish(self) -> None:
        """Write those that are not written yet."""
        self._store()
        if self.num_parts == 0 or sum(table.num_rows for table in self._tables):
            self._write()

    def _store(self) -> None:
        """Make a table of the rows, which takes a fifth of their memory."""
        self._tables.append(pa.Table.from_pylist(self._rows, schema=PREFERENCES))
        self._rows = []

    def _write(self) -> None:
        table = pa.concat_tables(self._tables)
        if table.nbytes < OFFSETS_REACH:
            table = table.combine_chunks()
        write_part(self.stage.path, self.num_parts, table)
        self.num_parts += 1
        self._tables = []


def _num_bytes(tables: Sequence[pa.Table]) -> int:
    return sum(table.nbytes for table in tables)


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


def commit(work: Workspace, kept: Examples, noted: list[Row], scores: Artifact, *, loss: str) -> Artifact:
    """Write the last examples and the notes on the others, print their numbers, and commit.

    ``scores`` holds the reference's log-probabilities, and records the template that they were computed with.

    Raises:
        DataError: No example is left to train on.
    """
    stage, splits = kept.stage, kept.splits
    if not splits["train"]:
        raise DataError(f"{stage.path}: no example is left to train on ({listed(noted)}). Bring more data.")
    kept.finish()
    write_json(stage.path / NOTED, noted)
    counts = Counter(entry["reason"] for entry in noted)
    counts["examples"] = splits.total()
    work.say("label: " + ", ".join(f"{n} {name}" for name, n in (counts | splits).items()))
    text = scores.info.get("scorers", {}).get(LOGP_REFERENCE, {}).get("text")
    info = {"loss": loss, "counts": dict(counts), "splits": dict(splits), "text": text}
    return stage.commit([NOTED], info=info, parts=range(kept.num_parts))
