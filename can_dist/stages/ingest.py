"""Other people's data → our tables: prompts with a held-out split, and the response pairs of preference data."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import DataSource, Model, Prompts
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import model_digest
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, file_digest, write_part
from can_dist.tables.formats import read_preferences, read_prompts
from can_dist.tables.schemas import PROMPTS, RESPONSES

SHARD_ROWS = 512


def ingest_prompts(work: Workspace, prompts: Prompts) -> Artifact:
    """Read the prompts and split them, by prompt, into ``train`` and ``test``.

    Which prompts are held out follows from the seed and the prompt's id alone, so adding prompts moves none of the
    others' roles at random.

    Raises
    ------
    DataError
        When the source cannot be read, or holds too few prompts for ``num_test`` and one for training.
    """
    what = {"source": source_identity(prompts), "num_train": prompts.num_train, "num_test": prompts.num_test}
    stage = work.open("prompts", "prompts", {**what, "seed": work.config.seed}, {})
    if stage.finished:
        return stage.finished
    read = read_prompts(prompts.source, split=prompts.split, subset=prompts.subset, revision=prompts.revision)
    work.say(read.announcement)
    table = read.table
    if table.num_rows <= prompts.num_test:
        raise DataError(
            f"{prompts.source}: {table.num_rows} distinct prompts, of which prompts.num_test = {prompts.num_test} are "
            "to be held out; none would be left to train on. Lower prompts.num_test or bring more prompts."
        )
    ids: list[str] = table.column("prompt_id").to_pylist()
    order = sorted(ids, key=lambda prompt_id: hashlib.sha256(f"{work.config.seed}:{prompt_id}".encode()).digest())
    test = set(order[: prompts.num_test])
    last = None if prompts.num_train is None else prompts.num_test + prompts.num_train
    train = set(order[prompts.num_test : last])
    splits = ["test" if i in test else "train" if i in train else None for i in ids]
    table = table.append_column("split", pa.array(splits, pa.string()))
    kept = table.filter(pc.is_valid(table.column("split"))).cast(PROMPTS)
    write_part(stage.path, 0, kept.combine_chunks())
    counts = {**read.counts, "train": len(train), "test": len(test)}
    return stage.commit(info={"format": read.format, "counts": counts, "set_aside": list(read.set_aside)})


def ingest_pairs(work: Workspace, source: DataSource, reference: Model, prompts: Artifact) -> Artifact:
    """Read a preference data set's own response pairs as a ``responses`` table, tokenised as the reference would.

    Responses ``<prompt_id>/<row>a`` and ``.../<row>b`` are a pair. Pairs of held-out prompts are left out and counted.
    """
    from can_dist.modeling.formatter import Formatter
    from can_dist.modeling.loading import load_tokenizer

    what = {
        "source": source_identity(source),
        "reference": model_digest(reference),
        "template": reference.template,
    }
    stage = work.open("pairs", "given pairs", what, {"prompts": prompts})
    if stage.finished:
        return stage.finished
    read = read_preferences(
        source.source, criterion=None, split=source.split, subset=source.subset, revision=source.revision
    )
    work.say(read.announcement)
    splits = prompts.table.filter(pc.equal(prompts.table.column("split"), "test"))
    held_out = set(splits.column("prompt_id").to_pylist())
    formatter = Formatter(load_tokenizer(reference), reference.template)
    rows: list[dict[str, Any]] = []
    num_held_out = 0
    for number, pair in enumerate(read.table.to_pylist()):
        if pair["prompt_id"] in held_out:
            num_held_out += 1
            continue
        for side in "ab":
            text = pair[f"response_{side}"]
            tokens = formatter.response_ids(pair["messages"], text)
            rows.append(
                {
                    "prompt_id": pair["prompt_id"],
                    "response_id": f"{pair['prompt_id']}/{number}{side}",
                    "messages": pair["messages"],
                    "text": text,
                    "token_ids": tokens,
                    "num_tokens": len(tokens),
                    "finish_reason": "given",
                }
            )
    for part, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        write_part(stage.path, part, pa.Table.from_pylist(rows[first : first + SHARD_ROWS], schema=RESPONSES))
    return stage.commit(info={"counts": {**read.counts, "held_out": num_held_out}, "set_aside": list(read.set_aside)})


def source_identity(source: DataSource) -> dict[str, Any]:
    """Return what decides a source's content: its files' digests, or the hub id with its revision."""
    path = Path(source.source).expanduser()
    if path.is_file():
        return {"file": file_digest(path)}
    if path.is_dir():
        return {"files": {p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()}, "split": source.split}
    if source.source.startswith((".", "/", "~")) or Path(source.source).suffix:
        raise DataError(f"{source.source}: no such file. Give a JSONL, Parquet or Arrow file, or a hub data set id.")
    if source.revision is None:
        raise ConfigError(
            f"data set {source.source!r} on the hub: give its revision (a commit), so the run can be repeated."
        )
    return {"hub": source.source, "split": source.split, "subset": source.subset, "revision": source.revision}
