"""prompts → responses without sampling: texts that the user brings, tokenised as the reference would have written them.

Training needs token ids, and a text has several tokenisations of which its author sampled one. Ours is the
tokenizer's own, read back and compared, so scores and log-probabilities are of one text; ln π_ref is that of these
tokens. For the dual's mean under π_ref to hold, the texts must be samples of the reference.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from can_dist.config import DataSource, Model
from can_dist.errors import DataError
from can_dist.modeling.formatter import open_formatter, response_identity
from can_dist.modeling.loading import context_length, load_model_config, model_digest
from can_dist.stages.generate import commit_responses, prompts_of_split
from can_dist.stages.ingest import SHARD_ROWS, source_identity
from can_dist.tables.artifacts import Artifact, StageDirectory, write_part
from can_dist.tables.foreign.formats import read_responses
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.schemas import RESPONSES
from can_dist.workspace import Workspace

if TYPE_CHECKING:
    from can_dist.modeling.formatter import Formatter

SHOWN_SPLIT = {"train": "training", "validation": "validation"}


def bring_responses(
    work: Workspace, reference: Model, prompts: Artifact, source: DataSource, *, split: str = "train"
) -> Artifact:
    """Return the ``responses`` of the prompts of one split as a data set has them, K for each prompt.

    A row has a ``prompt`` (text, or a list of messages) and ``responses`` (a list of texts); several rows of one
    prompt add up. Rows are joined to the prompts by what the prompt says. Rows of other prompts are left out.

    Raises:
        DataError: A prompt has another number of responses than ``generate.num_responses``, or a response
            does not fit the reference's context or vocabulary; ids are listed.
    """
    num_responses = work.config.generate.num_responses
    identity = {
        "source": source_identity(source),
        "model": model_digest(reference),
        **response_identity(reference),
        "num_responses": num_responses,
    }
    if split != "train":
        identity["split"] = split
    stage = work.open("generate", f"reference on {split}", identity, {"prompts": prompts})
    if stage.finished:
        return stage.finished
    read = read_responses(source.source, split=source.split, subset=source.subset, revision=source.revision)
    texts = read.texts
    table = prompts_of_split(prompts.path, split)
    rows = table.to_pylist()
    used = {prompt_id(row["messages"]) for row in rows} & texts.keys()
    shown = SHOWN_SPLIT[split]
    work.say(f"{read.announcement}; {len(used)} of these prompts are among the {len(rows)} {shown} prompts")
    _check_complete(rows, texts, num_responses, source.source, split)
    parts = _write_parts(work, stage, reference, rows, texts, source.source)
    return commit_responses(stage, reference, len(rows), parts)


def _write_parts(
    work: Workspace,
    stage: StageDirectory,
    reference: Model,
    prompts: Sequence[Mapping[str, Any]],
    texts: Mapping[str, Sequence[str]],
    source: str,
) -> range:
    """Tokenise and write the responses part by part, so that memory holds one; return the numbers of the parts."""
    formatter, longest = open_formatter(reference), context_of(reference)
    rows = (
        response_row(prompt, k, text, "given")
        for prompt in prompts
        for k, text in enumerate(texts[prompt_id(prompt["messages"])])
    )
    num_rows = len(prompts) * work.config.generate.num_responses
    parts, misfits = range(math.ceil(num_rows / SHARD_ROWS)), Misfits()
    finished = stage.finished_parts()
    for part in parts:
        token_rows = list(itertools.islice(rows, SHARD_ROWS))
        if part in finished:
            continue
        misfits += tokenise(formatter, longest, token_rows)
        if not misfits:
            write_part(stage.path, part, pa.Table.from_pylist(token_rows, schema=RESPONSES))
    misfits.check(reference, source, longest, num_rows)
    return parts


def _check_complete(
    rows: Sequence[Mapping[str, Any]], texts: Mapping[str, Sequence[str]], num_responses: int, source: str, split: str
) -> None:
    counts = {row["prompt_id"]: len(texts.get(prompt_id(row["messages"]), ())) for row in rows}
    wrong = {key: count for key, count in counts.items() if count != num_responses}
    if not wrong:
        return
    tally = ", ".join(f"{number} prompts with {count}" for count, number in sorted(Counter(counts.values()).items()))
    raise DataError(
        f"{source}: {len(wrong)} of {len(rows)} {SHOWN_SPLIT[split]} prompts have not generate.num_responses = "
        f"{num_responses} responses: {', '.join(f'{key} ({count})' for key, count in list(wrong.items())[:5])}. "
        f"Found: {tally}. Complete them or set generate.num_responses; a row belongs to the prompt whose text is the "
        "same, letter by letter."
    )


def response_row(prompt: Mapping[str, Any], k: int, text: str, finish_reason: str) -> dict[str, Any]:
    """Return the row of response ``k`` of a prompt, without tokens yet."""
    return {
        "prompt_id": prompt["prompt_id"],
        "response_id": f"{prompt['prompt_id']}/{k}",
        "messages": prompt["messages"],
        "text": text.strip(),
        "finish_reason": finish_reason,
    }


def context_of(reference: Model) -> int:
    """Return the context of the reference, in tokens."""
    return context_length(load_model_config(reference, "causal language model"))


@dataclass(frozen=True)
class Misfits:
    """Responses, named with a sample, that are another text in a model's tokens, or too long for its context."""

    unread: tuple[str, ...] = ()
    too_long: tuple[str, ...] = ()

    def __add__(self, other: Misfits) -> Misfits:
        return Misfits(self.unread + other.unread, self.too_long + other.too_long)

    def __bool__(self) -> bool:
        return bool(self.unread or self.too_long)

    def check(self, reference: Model, source: str, longest: int, num_rows: int) -> None:
        """Raise ``DataError`` where there are some, among ``num_rows`` responses of ``source``."""
        if self.unread:
            raise DataError(
                f"{source}: {len(self.unread)} of {num_rows} responses are another text in the tokens of "
                f"{reference.model!r}: {'; '.join(self.unread[:3])}. Remove these prompts, or give the reference that "
                "wrote the responses."
            )
        if self.too_long:
            raise DataError(
                f"{source}: {len(self.too_long)} of {num_rows} responses do not fit the context of "
                f"{reference.model!r} with their prompts ({longest} tokens): {', '.join(self.too_long[:5])}. Shorten "
                "or remove them."
            )


def tokenise(formatter: Formatter, longest: int, rows: Sequence[dict[str, Any]]) -> Misfits:
    """Add ``token_ids`` and ``num_tokens`` to rows of responses; one that ended by itself has its end token.

    Returns:
        The responses whose tokens read back as another text, and those that with their prompt are longer than
        ``longest``, the reference's context in tokens.
    """
    conversations = {row["prompt_id"]: row["messages"] for row in rows}
    frames = dict(zip(conversations, formatter.frames(list(conversations.values())), strict=True))
    responses = [(frames[row["prompt_id"]], row["text"], row["finish_reason"] != "length") for row in rows]
    unread, too_long = [], []
    for row, (frame, text, _), token_ids in zip(rows, responses, formatter.framed_ids(responses), strict=True):
        row["token_ids"], row["num_tokens"] = token_ids, len(token_ids)
        if (other := formatter.read_back(token_ids, text)) is not None:
            unread.append(f"{row['response_id']} ({text[:40]!r} reads back as {other[:40]!r})")
        if (length := frame.num_tokens + len(token_ids)) > longest:
            too_long.append(f"{row['response_id']} ({length} tokens)")
    return Misfits(tuple(unread), tuple(too_long))
