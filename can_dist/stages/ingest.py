"""Other people's data → our tables: prompts with a held-out split, and the response pairs of preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import DataSource, Model, Prompts
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import model_digest
from can_dist.tables.artifacts import Artifact, file_digest, write_part
from can_dist.tables.foreign.formats import PreferencesRead, PromptsRead, prompt_id, read_preferences, read_prompts
from can_dist.tables.schemas import GIVEN_RESPONSES, PROMPTS
from can_dist.workspace import Workspace

if TYPE_CHECKING:
    from can_dist.modeling.formatter import Formatter

SHARD_ROWS = 512
UNLABELLED = {"better": -1, "safer": -1, "safe": -1}


def ingest_prompts(work: Workspace, prompts: Prompts) -> Artifact:
    """Read the prompts and split them, by prompt, into ``train``, ``test`` and ``validation``.

    Which prompts are held out follows from the seed and the prompt's id alone, so adding prompts moves none of the
    others' roles at random. Prompts that say the same under several ids are one prompt to the validation: it takes
    none that is in the test, and what it takes is in no training.

    Raises
    ------
    DataError
        When the source cannot be read, or holds too few prompts for those held out and one for training.
    """
    what = {"source": source_identity(prompts), "num_train": prompts.num_train, "num_test": prompts.num_test}
    if prompts.num_validation:  # a run without keeps the names it had before there were any
        what["num_validation"] = prompts.num_validation
    stage = work.open("prompts", "prompts", {**what, "seed": work.config.seed}, {})
    if stage.finished:
        return stage.finished
    read = read_prompts(prompts.source, split=prompts.split, subset=prompts.subset, revision=prompts.revision)
    work.say(read.announcement)
    table = read.table
    split_of = _splits(table, prompts, work.config.seed)
    splits = [split_of.get(prompt_id) for prompt_id in table.column("prompt_id").to_pylist()]
    table = table.append_column("split", pa.array(splits, pa.string()))
    kept = table.filter(pc.is_valid(table.column("split"))).cast(PROMPTS)
    write_part(stage.path, 0, kept.combine_chunks())
    names = ("train", "test", *(["validation"] if prompts.num_validation else []))
    counts = {**read.counts, **{name: splits.count(name) for name in names}}
    return stage.commit(info=_found(read) | {"counts": counts})


def _splits(table: pa.Table, prompts: Prompts, seed: int) -> dict[str, str]:
    """Return the split of each prompt by its id; prompts that are not used are left out."""
    content = dict(
        zip(table.column("prompt_id").to_pylist(), map(prompt_id, table["messages"].to_pylist()), strict=True)
    )
    order = sorted(content, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    test, rest = order[: prompts.num_test], order[prompts.num_test :]
    tested = {content[key] for key in test}
    distinct = {content[key]: key for key in reversed(rest) if content[key] not in tested}  # the first id of each
    candidates = [key for key in rest if distinct.get(content[key]) == key]
    validation = candidates[: prompts.num_validation]
    held_out = {content[key] for key in validation}
    train = [key for key in rest if content[key] not in held_out]
    if len(validation) < prompts.num_validation or not train:
        also = f" and prompts.num_validation = {prompts.num_validation}" if prompts.num_validation else ""
        lower = " or prompts.num_validation" if prompts.num_validation else ""
        raise DataError(
            f"{prompts.source}: {len(set(content.values()))} distinct prompts, of which prompts.num_test = "
            f"{prompts.num_test}{also} are to be held out; none would be left to train on. "
            f"Lower prompts.num_test{lower}, or bring more prompts."
        )
    roles = {"test": test, "validation": validation, "train": train[: prompts.num_train]}
    return {key: split for split, keys in roles.items() for key in keys}


def ingest_benign(work: Workspace, source: DataSource) -> Artifact:
    """Read prompts that deserve no refusal; all of them are held out, none is trained on.

    Raises
    ------
    DataError
        When the source cannot be read.
    """
    stage = work.open("prompts", "benign prompts", {"source": source_identity(source)}, {})
    if stage.finished:
        return stage.finished
    read = read_prompts(source.source, split=source.split, subset=source.subset, revision=source.revision)
    work.say(read.announcement)
    splits = pa.array(["test"] * read.table.num_rows, pa.string())
    write_part(stage.path, 0, read.table.append_column("split", splits).cast(PROMPTS).combine_chunks())
    return stage.commit(info=_found(read))


def ingest_pairs(
    work: Workspace, source: DataSource, reference: Model, prompts: Artifact, *, mismatched: bool = False
) -> Artifact:
    """Read a preference data set's own response pairs and labels, tokenised as the reference would.

    The table has the schema ``GIVEN_RESPONSES``. Responses ``<prompt_id>/<row>a`` and ``.../<row>b`` are a pair. With
    ``mismatched`` each of them is followed by a response to another prompt put in its place, ``.../<row>a-other``,
    which KTO needs: its baseline is the mean log-ratio of responses that do not belong to the prompt. Pairs of
    held-out prompts, and those longer than the reference's context, are left out and counted.

    Raises
    ------
    DataError
        When the source cannot be read, ``mismatched`` is asked of pairs of one prompt only, or every pair is too long.
    """
    from can_dist.modeling.formatter import Formatter, convention
    from can_dist.modeling.loading import context_length, load_model_config, load_tokenizer

    what = {
        "source": source_identity(source),
        "reference": model_digest(reference),
        "template": reference.template,
        "mismatched": mismatched,
    }
    stage = work.open("pairs", "given pairs", what, {"prompts": prompts})
    if stage.finished:
        return stage.finished
    read = read_preferences(source.source, split=source.split, subset=source.subset, revision=source.revision)
    work.say(read.announcement)
    held_out = _held_out(prompts.table)
    pairs = [
        (number, pair)
        for number, pair in enumerate(read.table.to_pylist())
        if held_out.isdisjoint((pair["prompt_id"], prompt_id(pair["messages"])))
    ]
    others = _pairs_of_other_prompts([pair for _, pair in pairs], source.source) if mismatched else []
    formatter = Formatter(load_tokenizer(reference), reference.template)
    context = context_length(load_model_config(reference, "model"))
    rows: list[dict[str, Any]] = []
    too_long: list[str] = []
    for index, (number, pair) in enumerate(pairs):
        given: list[dict[str, Any]] = []
        for side in "ab":
            response_id = f"{pair['prompt_id']}/{number}{side}"
            given.append(_given_response(formatter, pair, response_id, pair[f"response_{side}"], _labels(pair, side)))
            if mismatched:
                text = others[index][f"response_{side}"]
                given.append(_given_response(formatter, pair, f"{response_id}-other", text, UNLABELLED))
        longest = len(formatter.prompt_ids(pair["messages"])) + max(row["num_tokens"] for row in given)
        if longest > context:
            too_long.append(f"row {number} ({longest} tokens)")
        else:
            rows += given
    _tell_too_long(work, source.source, too_long, len(pairs), f"{reference.model}'s context of {context}")
    for part, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        write_part(stage.path, part, pa.Table.from_pylist(rows[first : first + SHARD_ROWS], schema=GIVEN_RESPONSES))
    info = _found(read) | {
        "counts": {**read.counts, "held_out": read.table.num_rows - len(pairs), "too_long": len(too_long)},
        "mismatched": mismatched,
        "names_criteria": read.names_criteria,
        "text": convention(reference),
    }
    return stage.commit(info=info)


def _found(read: PromptsRead | PreferencesRead) -> dict[str, Any]:
    """What a manifest says about a data set: its format, its counts, and what was set aside for which reason."""
    return {
        "format": read.format,
        "counts": read.counts,
        "reasons": read.reasons,
        "set_aside": list(read.set_aside),
    }


def check_criteria(asked: Sequence[tuple[Artifact, str]], where: str, do: str) -> None:
    """Raise ``DataError`` when two criteria are to be learned from one data set that does not tell them apart.

    ``asked`` holds (pairs of ``ingest_pairs``, criterion). Chosen and rejected responses have one criterion without a
    name: learned as 'helpful' and as 'safe' it would be learned twice.
    """
    seen: dict[str, tuple[str, Artifact]] = {}
    for pairs, criterion in asked:
        source = json.dumps(pairs.manifest["identity"]["source"], sort_keys=True)
        before, _ = seen.setdefault(source, (criterion, pairs))
        if before != criterion and not pairs.info["names_criteria"]:
            raise DataError(
                f"{pairs.path}: the data set says which response was chosen, not by what criterion, and {where} would "
                f"learn the same labels as '{before}' and as '{criterion}'. {do}"
            )


def _held_out(prompts: pa.Table) -> set[str]:
    """Return the ids of the prompts that are not trained on, and the ids of what the validation prompts say."""
    rows = [row for row in prompts.to_pylist() if row["split"] != "train"]
    said = {prompt_id(row["messages"]) for row in rows if row["split"] == "validation"}
    return said | {row["prompt_id"] for row in rows}


def _tell_too_long(work: Workspace, source: str, too_long: Sequence[str], of: int, limit: str) -> None:
    """Say which pairs are left out: cutting them would change what people judged."""
    if not too_long:
        return
    what = f"{source}: {len(too_long)} of {of} pair(s) longer than {limit} tokens: {', '.join(too_long[:5])}"
    if len(too_long) == of:
        raise DataError(f"{what}. None is left; use a reference with a longer context.")
    work.say(f"{what}; left out")


def _labels(pair: dict[str, Any], side: str) -> dict[str, int]:
    """Return people's labels of one response of a pair: 1 yes, 0 no, -1 not labelled."""
    number, safe = "ab".index(side), pair[f"safe_{side}"]
    chosen = {name: -1 if pair[name] < 0 else int(pair[name] == number) for name in ("better", "safer")}
    return {**chosen, "safe": -1 if safe is None else int(safe)}


def _given_response(
    formatter: Formatter, pair: dict[str, Any], response_id: str, text: str, labels: dict[str, int]
) -> dict[str, Any]:
    tokens = formatter.response_ids(pair["messages"], text)
    return {
        "prompt_id": pair["prompt_id"],
        "response_id": response_id,
        "messages": pair["messages"],
        "text": text,
        "token_ids": tokens,
        "num_tokens": len(tokens),
        "finish_reason": "given",
        **labels,
    }


def _pairs_of_other_prompts(pairs: list[dict[str, Any]], source: str) -> list[dict[str, Any]]:
    """Return for each pair the next one, in a circle, that has another prompt."""
    if len({pair["prompt_id"] for pair in pairs}) < 2:
        raise DataError(
            f"{source}: label.human.loss 'kto' compares with responses to other prompts, and all pairs that are not "
            "held out share one prompt. Bring pairs of several prompts, or set label.human.loss to 'dpo'."
        )
    others: list[dict[str, Any]] = []
    following = next(pair for pair in pairs if pair["prompt_id"] != pairs[-1]["prompt_id"])
    for pair, after in zip(reversed(pairs), [pairs[0], *reversed(pairs[1:])], strict=True):
        following = after if after["prompt_id"] != pair["prompt_id"] else following
        others.append(following)
    return others[::-1]


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
