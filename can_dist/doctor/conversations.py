"""Every kind of conversation, written by the reference's and every scorer's template before anything is sampled.

A template may refuse a role, or leave its messages out in silence: then prompts that differ are the same to a model.
Conversations of the same roles are written alike, so one of each kind is tried, with marks in place of its texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from can_dist.config import Config, DataSource, HttpScorer, LogRatio, Model
from can_dist.config.walk import scorers
from can_dist.errors import DataError
from can_dist.modeling.formatter import Message, open_formatter
from can_dist.scoring.kinds import Writer, kind_of
from can_dist.tables.artifacts import Artifact

Conversations = Mapping[tuple[Any, ...], tuple[str, list[Message]]]
"""One conversation of each kind, with the id of its prompt."""

MARK = "zqmark{}zq"
"""Stands for the text of a message, by its number; no template changes its letters."""
THOUGHT = "</think>"
"""Ends a block of thought, which templates leave out of turns that lie behind."""


def check_conversations(config: Config, prompts: Artifact | None = None) -> list[str]:
    """Write one prompt of each kind by every template that will read it.

    Args:
        config: The configuration.
        prompts: The table ``prompts``, where it has been made already.

    Returns:
        What a user should know: parts of earlier turns that a template leaves out, as its makers meant.

    Raises:
        ConfigError: A model has no chat template and no ``template``, or several chat templates and no default.
        DataError: A template refuses a conversation, or does not write one of its messages or the response.
    """
    kinds = kinds_of(_prompts_of(config.prompts) if prompts is None else prompts.table)
    notes = check_reference("reference", config.reference, kinds)
    for key, scorer in scorers(config).items():
        notes += check_scorer(key, scorer, kinds)
    if config.evaluate.benign_prompts is not None:
        notes += check_reference("reference", config.reference, kinds_of(_prompts_of(config.evaluate.benign_prompts)))
    for source in _pair_sources(config):
        pairs = kinds_of(_pairs_of(source))
        notes += check_reference("reference", config.reference, pairs, are_texts=True)
        if source == config.label.preferences and config.label.pairs == "preferences":
            for key, scorer in scorers(config).items():
                notes += check_scorer(key, scorer, pairs)
    if config.generate.responses is not None or config.generate.endpoint is not None:
        check_reference("reference", config.reference, kinds, are_texts=True)
    return list(dict.fromkeys(notes))


def kinds_of(table: pa.Table) -> Conversations:
    """Return the first conversation of each kind: of the same roles and keys, with thoughts in the same turns."""
    kinds: dict[tuple[Any, ...], tuple[str, list[Message]]] = {}
    for batch in table.select(["prompt_id", "messages"]).to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            kind = tuple(
                (turn["role"], THOUGHT in str(turn["content"]), *(key for key in turn if turn[key] is not None))
                for turn in row["messages"]
            )
            kinds.setdefault(kind, (row["prompt_id"], row["messages"]))
    return kinds


def _prompts_of(source: DataSource) -> pa.Table:
    from can_dist.tables.foreign.formats import read_prompts

    return read_prompts(source.source, split=source.split, subset=source.subset, revision=source.revision).table


def _pairs_of(source: DataSource) -> pa.Table:
    from can_dist.tables.foreign.formats import read_preferences

    return read_preferences(source.source, split=source.split, subset=source.subset, revision=source.revision).table


def _pair_sources(config: Config) -> list[DataSource]:
    """Return the data sets whose pairs are tokenised, each once."""
    ratios = [scorer for scorer in scorers(config).values() if isinstance(scorer, LogRatio)]
    sources = [config.label.preferences, config.sacpo.first.preferences, config.sacpo.second.preferences]
    sources += [ratio.preferences for ratio in ratios]
    return [source for number, source in enumerate(sources) if source is not None and source not in sources[:number]]


def check_reference(key: str, reference: Model, kinds: Conversations, *, are_texts: bool = False) -> list[str]:
    """Check what the reference is asked; with ``are_texts`` also that responses given as text can be tokenised."""
    formatter = open_formatter(reference)
    owner = f"{key} {reference.model!r}"
    notes = _check_written(lambda messages, _: formatter.prompt_text(messages), kinds, owner, answers=False)
    for prompt_id, messages in kinds.values():
        with _named(owner, prompt_id):
            if are_texts:
                formatter.response_ids(messages, "")
            elif messages[-1]["role"] != "assistant":
                formatter.check_asks(messages)
    return notes


def check_scorer(key: str, scorer: Any, kinds: Conversations) -> list[str]:
    """Check what a scorer reads of conversations and their responses; a Python function gets them as they are."""
    if isinstance(scorer, LogRatio):
        return check_reference(f"{key}.model", scorer.model, kinds) if scorer.model is not None else []
    kind = kind_of(scorer)
    if kind.writer is None:
        return []
    owner = f"{key} {kind.name(scorer)!r}"
    if isinstance(scorer, HttpScorer):  # the request is the user's: what it leaves out is meant
        for prompt_id, messages in kinds.values():
            with _named(owner, prompt_id):
                kind.writer(scorer)(messages, "")
        return []
    return _check_written(kind.writer(scorer), kinds, owner, answers=True)


def _check_written(write: Writer, kinds: Conversations, owner: str, *, answers: bool) -> list[str]:
    """Raise ``DataError`` where a message, or with ``answers`` the response, is not in what a template writes."""
    notes = []
    for prompt_id, messages in kinds.values():
        with _named(owner, prompt_id):
            text = write(messages, MARK.format("response"))
            marked = [{**turn, "content": MARK.format(number)} for number, turn in enumerate(messages)]
            written = write(marked, MARK.format("response")).lower()
        for number, turn in enumerate(messages):
            if MARK.format(number) not in written:
                raise DataError(
                    f"{owner}: its chat template does not write message {number} (role {turn['role']!r}) of a "
                    f"conversation of {', '.join(turn['role'] for turn in messages)}, as prompt {prompt_id!r} is: "
                    "prompts that differ there would be the same to it.",
                    "Remove these messages, or use a model or a chat template that reads them.",
                )
            if THOUGHT in str(turn["content"]) and str(turn["content"]).strip() not in text:
                notes.append(
                    f"{owner}: its chat template leaves the thoughts out of earlier turns, as of {prompt_id!r}"
                )
        if answers and MARK.format("response") not in written:
            raise DataError(
                f"{owner}: its chat template does not write the response after a conversation of "
                f"{', '.join(turn['role'] for turn in messages)}: all responses would have one score.",
                "Use a chat template that does.",
            )
    return notes


@contextmanager
def _named(owner: str, prompt_id: str) -> Iterator[None]:
    """Name the model by its key, and the prompt, in an error of a template."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{owner}, prompt {prompt_id!r}: {error.message}", error.remedy) from None
