"""Other people's data → our tables: prompts with a held-out split, and the response pairs of preference data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import DataSource, Model
from can_dist.config.sections import Prompts
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import model_digest
from can_dist.stages.held_out import HeldOut, refuse_sealed
from can_dist.tables.artifacts import Artifact, StageDirectory, file_digest, write_part
from can_dist.tables.foreign.formats import PreferencesRead, PromptsRead, read_preferences, read_prompts
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.remote import local_path
from can_dist.tables.schemas import GIVEN_RESPONSES, PROMPTS
from can_dist.workspace import Workspace

if TYPE_CHECKING:
    from can_dist.modeling.formatter import Formatter

NUM_VALIDATION = 128  # prompts that choose the strength; docs/methods.md says what fewer cost
SHARD_ROWS = 512
UNLABELLED = {"better": -1, "safer": -1, "safe": -1}


READING = 2
"""Rules of reading. Since 2 a system column and Alpaca's input are carried, and ids make no two prompts of one.

Data that the rules before read alike keep the identity they had; any other has ``reading`` in its identity.
"""

Read = TypeVar("Read", PromptsRead, PreferencesRead)


def ingest_prompts(work: Workspace, prompts: Prompts) -> Artifact:
    """Read the prompts and split them, by conversation, into ``train``, ``test``, ``validation`` and ``sealed``.

    A conversation is one prompt, whatever ids it has; the first one counts. Which prompts are held out follows from the
    seed and that id alone, so adding prompts moves none of the others' roles at random.

    Args:
        work: the run.
        prompts: the source, and how many prompts are held out and trained on.

    Returns:
        The ``prompts`` table (schema ``PROMPTS``).

    Raises:
        DataError: the source cannot be read, or holds too few prompts for those held out and one for training.
    """
    identity: dict[str, Any] = {
        "source": source_identity(prompts),
        "num_train": prompts.num_train,
        "num_test": prompts.num_test,
    }
    if prompts.num_validation != 0:  # a run without keeps the names it had before there were any
        identity["num_validation"] = "default" if prompts.num_validation is None else prompts.num_validation
    if prompts.num_sealed:
        identity["num_sealed"] = prompts.num_sealed
    stage, read = _open(
        work, ("prompts", "prompts"), {**identity, "seed": work.config.seed}, {}, lambda: _read(prompts, read_prompts)
    )
    if read is None:
        return _finished(stage)
    ids: list[str] = read.table.column("prompt_id").to_pylist()
    num_validation = held_out_validation(len(ids), prompts)
    split_of = _splits(ids, prompts, num_validation, work.config.seed)
    splits = [split_of.get(prompt_id) for prompt_id in ids]
    table = read.table.append_column("split", pa.array(splits, pa.string()))
    write_part(stage.path, 0, table.filter(pc.is_valid(table.column("split"))).cast(PROMPTS).combine_chunks())
    names = ("train", "test", *(["validation"] if num_validation else []), *(["sealed"] if prompts.num_sealed else []))
    counts = {**read.counts, **{name: splits.count(name) for name in names}}
    return stage.commit(info=_info(read) | {"counts": counts})


def held_out_validation(num_prompts: int, prompts: Prompts) -> int:
    """Return how many prompts choose the strength: as given, or the default where as many are left to train on.

    Raises:
        DataError: of ``num_prompts`` distinct prompts none would be left to train on.
    """
    num_validation = prompts.num_validation
    if num_validation is None:
        is_enough = num_prompts >= prompts.num_test + prompts.num_sealed + 2 * NUM_VALIDATION
        num_validation = NUM_VALIDATION if is_enough else 0
    if num_prompts <= prompts.num_test + num_validation + prompts.num_sealed:
        others = {"num_validation": num_validation, "num_sealed": prompts.num_sealed}
        also = "".join(f" and prompts.{name} = {number}" for name, number in others.items() if number)
        lower = "".join(f" or prompts.{name}" for name, number in others.items() if number)
        raise DataError(
            f"{prompts.source}: {num_prompts} distinct prompts, of which prompts.num_test = {prompts.num_test}{also} "
            "are to be held out; none would be left to train on.",
            f"Lower prompts.num_test{lower} or bring more prompts.",
        )
    return num_validation


def _splits(ids: list[str], prompts: Prompts, num_validation: int, seed: int) -> dict[str, str]:
    """Return the split of each prompt by its id; prompts that are not used are left out.

    Sealed prompts are the last ones, so that neither another ``num_test`` nor ``num_train`` unseals any.
    """
    order = sorted(ids, key=lambda prompt_id: hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest())
    num_open = len(order) - prompts.num_sealed
    order, sealed = order[:num_open], order[num_open:]
    num_held_out = prompts.num_test + num_validation
    last = None if prompts.num_train is None else num_held_out + prompts.num_train
    roles = {
        "sealed": sealed,
        "test": order[: prompts.num_test],
        "validation": order[prompts.num_test : num_held_out],
        "train": order[num_held_out:last],
    }
    return {key: split for split, keys in roles.items() for key in keys}


def ingest_benign(work: Workspace, source: DataSource, prompts: Artifact) -> Artifact:
    """Read prompts that deserve no refusal, all of them as ``test``.

    Args:
        work: the run.
        source: the benign prompts.
        prompts: the run's prompts; benign ones that say what a training prompt says are told of.

    Raises:
        DataError: the source cannot be read, or holds a sealed prompt, which no evaluation may read.
    """
    identity = {"source": source_identity(source)}
    stage, read = _open(work, ("prompts", "benign prompts"), identity, {}, lambda: _read(source, read_prompts))
    if read is None:
        artifact = _finished(stage)
    else:
        splits = pa.array(["test"] * read.table.num_rows, pa.string())
        write_part(stage.path, 0, read.table.append_column("split", splits).cast(PROMPTS).combine_chunks())
        artifact = stage.commit(info=_info(read))
    trained_on = {prompt_id(row["messages"]) for row in prompts.table.to_pylist() if row["split"] == "train"}
    contents = [prompt_id(messages) for messages in artifact.table.column("messages").to_pylist()]
    refuse_sealed(prompts, contents, source.source)
    if both := sum(content in trained_on for content in contents):
        work.say(f"{source.source}: {both} of {len(contents)} benign prompts are trained on too, so not held out")
    return artifact


def _read(source: DataSource, reader: Callable[..., Read]) -> Read:
    return reader(source.source, split=source.split, subset=source.subset, revision=source.revision)


def _open(
    work: Workspace,
    name: tuple[str, str],
    identity: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    read: Callable[[], Read],
) -> tuple[StageDirectory, Read | None]:
    """Open the stage of a data set.

    Args:
        work: the run.
        name: stage and label.
        identity: what decided the result under the first rules of reading.
        inputs: of the stage.
        read: reads the data set.

    Returns:
        The stage, and the data set as read, or None where the stage is finished.
    """
    under_rules = {**identity, "reading": READING}
    if work.finished(*name, under_rules, inputs):
        return work.open(*name, under_rules, inputs), None
    before = work.finished(*name, identity, inputs)
    if before and before.info.get("reading") == READING:
        return work.open(*name, identity, inputs), None
    data = read()
    stage = work.open(*name, under_rules if data.carried else identity, inputs)
    if stage.finished:
        return stage, None
    work.say(data.announcement)
    return stage, data


def _finished(stage: StageDirectory) -> Artifact:
    artifact = stage.finished
    assert artifact is not None
    return artifact


def ingest_pairs(
    work: Workspace, source: DataSource, reference: Model, prompts: Artifact, *, mismatched: bool = False
) -> Artifact:
    """Read a preference data set's own response pairs and labels, tokenised as the reference would.

    Responses ``<prompt_id>/<row>a`` and ``.../<row>b`` are a pair. With ``mismatched`` each of them is followed by a
    response to another prompt put in its place, ``.../<row>a-other``, which KTO needs: its baseline is the mean
    log-ratio of responses that do not belong to the prompt. Pairs of held-out prompts, which are known by what they
    say, whatever their ids, those with the id of a sealed prompt, and those longer than the reference's context, are
    left out and counted.

    Args:
        work: the run.
        source: the preference data set.
        reference: the model whose tokens the responses become.
        prompts: the run's prompts, of which some are held out.
        mismatched: whether responses to other prompts are wanted.

    Returns:
        The table ``pairs`` (schema ``GIVEN_RESPONSES``).

    Raises:
        DataError: the source cannot be read, ``mismatched`` is wanted of pairs of one prompt only, or every pair is too
            long.
    """
    from can_dist.modeling.formatter import TOKENISATION, convention, text_identity

    identity = {
        "source": source_identity(source),
        "reference": model_digest(reference),
        **text_identity(reference),
        "tokenisation": TOKENISATION,
        "mismatched": mismatched,
    }
    held_out = HeldOut.of(prompts)
    stage, read = _open(
        work,
        ("pairs", "given pairs"),
        identity,
        {"prompts": prompts},
        lambda: held_out.marked(_read(source, read_preferences)),
    )
    if read is None:
        return _finished(stage)
    pairs = [(n, pair) for n, pair in enumerate(read.table.to_pylist()) if not held_out.leaves_out(pair)]
    num_held_out = read.table.num_rows - len(pairs)
    held_out.tell_alike(work, source.source, [pair for _, pair in pairs])
    rows, left_out = _given_rows(reference, pairs, source.source, mismatched)
    other_text = f"with another text in the tokens of {reference.model}"
    _tell_left_out(work, source.source, left_out.too_long, len(pairs), f"longer than {left_out.context}")
    _tell_left_out(work, source.source, left_out.unread, len(pairs), other_text)
    for part, first in enumerate(range(0, len(rows), SHARD_ROWS)):
        write_part(stage.path, part, pa.Table.from_pylist(rows[first : first + SHARD_ROWS], schema=GIVEN_RESPONSES))
    info = _info(read) | {
        "counts": {**read.counts, "held_out": num_held_out, "too_long": len(left_out.too_long)}
        | ({"unread": len(left_out.unread)} if left_out.unread else {}),
        "mismatched": mismatched,
        "names_criteria": read.names_criteria,
        "text": convention(reference),
    }
    return stage.commit(info=info)


@dataclass(frozen=True)
class _LeftOut:
    """Numbers of the pairs that are left out: too long for the reference's context, or another text in its tokens."""

    too_long: list[str]
    unread: list[str]
    context: str


def _given_rows(
    reference: Model, pairs: Sequence[tuple[int, dict[str, Any]]], source: str, mismatched: bool
) -> tuple[list[dict[str, Any]], _LeftOut]:
    """Return the rows of numbered pairs, tokenised, and the pairs that are left out."""
    from can_dist.modeling.formatter import open_formatter
    from can_dist.modeling.loading import context_length, load_model_config

    others = _pairs_of_other_prompts([pair for _, pair in pairs], source) if mismatched else []
    formatter = open_formatter(reference)
    context = context_length(load_model_config(reference, "model"))
    rows: list[dict[str, Any]] = []
    too_long: list[str] = []
    unread: list[str] = []
    for index, (number, pair) in enumerate(pairs):
        given: list[dict[str, Any]] = []
        for side in "ab":
            response_id = f"{pair['prompt_id']}/{number}{side}"
            given.append(_given_response(formatter, pair, response_id, pair[f"response_{side}"], _labels(pair, side)))
            if mismatched:
                text = others[index][f"response_{side}"]
                given.append(_given_response(formatter, pair, f"{response_id}-other", text, UNLABELLED))
        longest = len(formatter.prompt_ids(pair["messages"])) + max(row["num_tokens"] for row in given)
        others_read = [formatter.read_back(row["token_ids"], row["text"]) for row in given]
        if wrong := [text for text in others_read if text is not None]:
            unread.append(f"row {number} (reads back as {wrong[0][:40]!r})")
        elif longest > context:
            too_long.append(f"row {number} ({longest} tokens)")
        else:
            rows += given
    return rows, _LeftOut(too_long, unread, f"{reference.model}'s context of {context} tokens")


def _info(read: PromptsRead | PreferencesRead) -> dict[str, Any]:
    """What a manifest says about a data set: its format, its counts, and what was set aside for which reason."""
    carried = {"carried": read.carried} if read.carried else {}
    return {
        "format": read.format,
        "counts": read.counts,
        "reasons": read.reasons,
        "set_aside": list(read.set_aside),
        "reading": READING,
        **carried,
    }


def check_criteria(lessons: Sequence[tuple[Artifact, str]], method: str, remedy: str) -> None:
    """Refuse to learn two criteria from one data set that does not tell them apart.

    Chosen and rejected responses have one criterion without a name: learned as 'helpful' and as 'safe' it would be
    learned twice.

    Args:
        lessons: pairs of ``ingest_pairs``, and the criterion to be learned from them.
        method: that learns them, for the message.
        remedy: what the user can do.

    Raises:
        DataError: two criteria are learned from chosen and rejected responses of one data set.
    """
    seen: dict[str, tuple[str, Artifact]] = {}
    for pairs, criterion in lessons:
        source = json.dumps(pairs.manifest["identity"]["source"], sort_keys=True)
        before, _ = seen.setdefault(source, (criterion, pairs))
        if before != criterion and not pairs.info["names_criteria"]:
            raise DataError(
                f"{pairs.path}: the data set says which response was chosen, not by what criterion, and {method} would "
                f"learn the same labels as '{before}' and as '{criterion}'. {remedy}"
            )


def _tell_left_out(work: Workspace, source: str, pairs: Sequence[str], total: int, reason: str) -> None:
    """Say which pairs are left out, and why: cutting or rewriting them would change what people judged."""
    if not pairs:
        return
    counted = f"{source}: {len(pairs)} of {total} pair(s) {reason}: {', '.join(pairs[:5])}"
    if len(pairs) == total:
        raise DataError(f"{counted}. None is left; use a reference with a longer context, or that reads these texts.")
    work.say(f"{counted}; left out")


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
        "text": text.strip(),
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
    path = local_path(source.source)
    if path.is_file():
        return {"file": file_digest(path)}
    if path.is_dir():
        return {"files": {p.name: file_digest(p) for p in sorted(path.iterdir()) if p.is_file()}, "split": source.split}
    if source.source.startswith((".", "/", "~")) or Path(source.source).suffix:
        raise DataError(f"{source.source}: no such file.", "Give a JSONL, Parquet or Arrow file, or a hub data set id.")
    if source.revision is None:
        raise ConfigError(
            f"data set {source.source!r} on the hub:",
            "give its revision (a commit), so the run can be repeated; `python recipes/pin.py FILE` asks the hub.",
        )
    return {"hub": source.source, "split": source.split, "subset": source.subset, "revision": source.revision}
