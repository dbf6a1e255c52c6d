"""prompts → responses: K samples of a model for each prompt, on Ray actors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import Config, Model
from can_dist.config.base import identity
from can_dist.config.sections import Generate
from can_dist.console import advance
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.formatter import Formatter, convention, ending_identity, open_formatter, text_identity
from can_dist.modeling.loading import model_digest
from can_dist.modeling.precision import run_precision
from can_dist.tables.artifacts import Artifact, StageDirectory, load_artifact, write_part
from can_dist.tables.schemas import PROMPTS, RESPONSES, check_schema
from can_dist.workspace import Workspace

MANY_TRUNCATED = 0.05
"""A larger share of responses cut at their longest length is told."""

MEASURED = ("test", "sealed")
"""Splits whose responses measure a policy: ``evaluate.num_responses`` of each."""

ELSEWHERE = ("responses", "endpoint")
"""Options of responses that are not sampled here."""


def generate(
    work: Workspace, model: Model, prompts: Artifact, *, split: str, role: str, seed: int | None = None
) -> Artifact:
    """Return the ``responses`` of ``model`` to the prompts of one split.

    A response's randomness is its own (seed, prompt_id, k), and which responses are decoded together follows from its
    shard alone, so the number of actors does not change a response. The shard size, which is part of the identity,
    changes the last bits of logits: no token in float32 but by a rare chance, some in bfloat16. ``seed`` replaces that
    of the configuration, for samples that are independent of those of an earlier policy.

    Raises:
        DataError: A prompt and ``max_new_tokens`` do not fit the model's context (prompt ids listed).
        ConfigError: One response alone has more tokens than ``tokens_at_once``.
    """
    config = work.config
    options = sampling(config, split)
    num_responses = options.num_responses
    precision = run_precision(config)
    seed = config.seed if seed is None else seed
    identity_of_stage = {
        "model": model_digest(model),
        **text_identity(model),
        **ending_identity(model),
        "split": split,
        "seed": seed,
        "precision": precision,
        "options": identity(options, exclude=ELSEWHERE),
    }
    if options.stop and options.engine == "transformers" and _pads_with_an_end(model):
        identity_of_stage["after_stop"] = "nothing"  # it was one token of padding, kept as an end token
    label = f"{role} on {split}"
    stage = work.open("generate", label, identity_of_stage, {"prompts": prompts})
    if stage.finished:
        return stage.finished
    if options.engine == "vllm":
        work.release_actors()  # an engine takes all of a GPU's memory
    weights = identity_of_stage["model"]
    job = GenerateJob(model, options, seed, precision, split, prompts.path, stage.path, weights)
    table = prompts_of_split(prompts.path, split)
    num_prompts = table.num_rows
    longest = check_prompts_fit(model, table, options.max_new_tokens)
    if options.engine == "transformers":
        check_fits_at_once(options, longest)
    sizes = {
        shard: min(options.shard_prompts, num_prompts - first)
        for shard, first in enumerate(range(0, num_prompts, options.shard_prompts))
    }
    done = stage.finished_parts()
    with work.timed("generate", label, prompts=num_prompts, responses_per_prompt=num_responses):
        rows = {shard: size * num_responses for shard, size in sizes.items() if shard not in done}
        work.run_shards(job, rows, f"generate ({label})")
        if options.engine == "vllm":
            work.release_actors()  # and gives it back with its process only
        return commit_responses(stage, model, num_prompts, sizes)


def sampling(config: Config, split: str) -> Generate:
    """Return how responses to the prompts of a split are sampled: those that measure have a number of their own."""
    own = config.evaluate if split in MEASURED else config.generate
    return config.generate.model_copy(update={"num_responses": own.num_responses})


def commit_responses(stage: StageDirectory, model: Model, num_prompts: int, parts: Collection[int]) -> Artifact:
    """Commit a table of responses in the tokens of ``model``, which must have these parts, with its counts."""
    table = stage.parts_table()
    reasons = pc.value_counts(table.column("finish_reason").combine_chunks()).to_pylist()
    info = {
        "num_prompts": num_prompts,
        "num_responses": table.num_rows,
        "num_tokens": pc.sum(table.column("num_tokens")).as_py(),
        "finish_reason": {entry["values"]: entry["counts"] for entry in reasons},
        "text": convention(model),
    }
    return stage.commit(info=info, parts=parts)


def check_truncated(work: Workspace, responses: Artifact) -> Artifact:
    """Return responses of which no more than ``generate.max_truncated`` were cut at ``max_new_tokens``; tell of many.

    Raises:
        DataError: More were cut: a score of a cut response may not hold for the whole one.
    """
    options = work.config.generate
    num_cut, num_all = responses.info["finish_reason"].get("length", 0), responses.info["num_responses"]
    counted = (
        f"{responses.path.name}: {num_cut} of {num_all} responses ({num_cut / num_all:.0%}) were cut at "
        f"generate.max_new_tokens = {options.max_new_tokens}"
    )
    if num_cut > options.max_truncated * num_all:
        raise DataError(
            f"{counted}; generate.max_truncated allows {options.max_truncated:.0%}. Raise generate.max_new_tokens, or "
            "generate.max_truncated if a text's beginning is enough for your scorers."
        )
    if num_cut > MANY_TRUNCATED * num_all:
        work.say(f"{counted}; their scores may depend on what is missing (generate.max_truncated makes it an error)")
    return responses


def check_prompts_fit(model: Model, prompts: pa.Table, max_new_tokens: int) -> int:
    """Return the tokens of the longest prompt.

    Raises:
        DataError: Prompts leave no room for a response in the model's context; they are listed.
    """
    from can_dist.modeling.loading import check_vocabulary, context_length

    _, config = check_vocabulary(model)
    formatter = open_formatter(model)
    room = context_length(config) - max_new_tokens
    lengths = {row["prompt_id"]: len(formatter.prompt_ids(row["messages"])) for row in prompts.to_pylist()}
    too_long = [f"{prompt_id} ({length} tokens)" for prompt_id, length in lengths.items() if length > room]
    if too_long:
        raise DataError(
            f"model {model.model!r}: {len(too_long)} prompt(s) longer than its context allows: "
            f"{', '.join(too_long[:5])}. At most {max(room, 0)} tokens leave room for generate.max_new_tokens = "
            f"{max_new_tokens} in a context of {context_length(config)}. Shorten or remove these prompts."
        )
    return max(lengths.values(), default=0)


def check_fits_at_once(options: Generate, longest_prompt: int) -> None:
    """Raise ``ConfigError`` when the longest prompt and one response are more tokens than may be decoded at once."""
    needed = longest_prompt + options.max_new_tokens
    if needed > options.tokens_at_once:
        raise ConfigError(
            f"generate.tokens_at_once is {options.tokens_at_once}, and one response needs {needed}: the longest prompt "
            f"has {longest_prompt} tokens, generate.max_new_tokens is {options.max_new_tokens}.",
            f"Set generate.tokens_at_once to {needed} or more, or lower generate.max_new_tokens. More of a prompt's "
            "responses than fit take turns.",
        )


def _pads_with_an_end(model: Model) -> bool:
    formatter = open_formatter(model)
    return formatter.tokenizer.pad_token_id in formatter.end_ids


def prompts_of_split(path: Path, split: str) -> pa.Table:
    """The prompts of one split, in table order."""
    table = check_schema(load_artifact(path).table, PROMPTS, str(path))
    return table.filter(pc.equal(table.column("split"), split))


@dataclass(frozen=True)
class GenerateJob:
    """The work of one actor: open the model, sample the responses of a shard of prompts."""

    model: Model
    options: Generate
    seed: int
    precision: str
    split: str
    prompts_path: Path
    out: Path
    weights: str

    @property
    def models(self) -> str:
        """The model, with the digest of its weights; an engine is made for the prompts of its job."""
        engine = f"{self.options!r} {self.prompts_path} {self.split}" if self.options.engine == "vllm" else ""
        return f"generate {self.model!r} {self.precision} {self.weights} {engine}"

    def load(self) -> Any:
        """Open model, tokenizer and formatter."""
        from can_dist.modeling.loading import load_causal_lm
        from can_dist.modeling.policy_probe import check_probe, probe_length
        from can_dist.modeling.precision import device
        from can_dist.modeling.vllm_engine import logp, open_engine

        formatter = open_formatter(self.model)
        model: Any
        if self.options.engine == "vllm":
            prompts = prompts_of_split(self.prompts_path, self.split)
            longest = max(len(formatter.prompt_ids(messages)) for messages in prompts["messages"].to_pylist())
            longest = max(longest + self.options.max_new_tokens, probe_length(self.model.model))
            model = open_engine(self.model, self.precision, longest)
            check_probe(model, self.model.model, self.precision, logp)
            return model, formatter
        model = load_causal_lm(self.model, self.precision).eval().to(device())
        check_probe(model, self.model.model, self.precision)
        return model, formatter

    def process(self, loaded: Any, shard: int) -> None:
        """Sample and commit one shard."""
        out = self._sample(loaded, self._rows(shard))
        write_part(self.out, shard, pa.Table.from_pylist(out, schema=RESPONSES))

    def halved(self) -> None:
        """Return None: a smaller batch would change the last bits of the logits, and so the samples."""

    def row_names(self, shard: int) -> list[str]:
        """Return what the prompts of a shard are called."""
        return [f"prompt {row['prompt_id']!r}" for row in self._rows(shard)]

    def set_aside(self, shard: int, row: int, why: str) -> bool:  # noqa: ARG002
        """Refuse: a prompt without responses is a prompt that the user must take out."""
        return False

    def try_rows(self, loaded: Any, shard: int, rows: range) -> None:
        """Sample the responses to some prompts of a shard and keep nothing."""
        self._sample(loaded, self._rows(shard)[rows.start : rows.stop])

    def _rows(self, shard: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]]
        prompts = _read_once(self.prompts_path, self.split)
        rows = prompts.slice(shard * self.options.shard_prompts, self.options.shard_prompts).to_pylist()
        return rows

    def _sample(self, loaded: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from can_dist.modeling import sampling, vllm_engine

        model, formatter = loaded
        tokenizer, end_ids = formatter.tokenizer, formatter.end_ids
        options, num_responses = self.options, self.options.num_responses
        prompt_ids = [formatter.prompt_ids(row["messages"]) for row in rows]
        pairs = [(row, ids, k) for row, ids in zip(rows, prompt_ids, strict=True) for k in range(num_responses)]
        seeds = [sampling.row_seed(self.seed, row["prompt_id"], k) for row, _, k in pairs]
        ids_R = [ids for _, ids, _ in pairs]
        if options.engine == "vllm":
            samples = vllm_engine.sample(model, ids_R, seeds, options, end_ids)
            advance(len(samples))
        else:
            samples = sampling.sample(model, tokenizer, ids_R, seeds, options, end_ids, told=advance)
        return [
            {
                "prompt_id": row["prompt_id"],
                "response_id": f"{row['prompt_id']}/{k}",
                "messages": row["messages"],
                "text": response_text(formatter, tokens, options),
                "token_ids": tokens,
                "num_tokens": len(tokens),
                "finish_reason": reason,
            }
            for (row, _, k), (tokens, reason) in zip(pairs, samples, strict=True)
        ]


@lru_cache(maxsize=1)
def _read_once(path: Path, split: str) -> pa.Table:
    """Read the prompts of a split, of which an actor makes many shards."""
    return prompts_of_split(path, split)


def response_text(formatter: Formatter, tokens: list[int], options: Generate) -> str:
    """Return the text of a response, cut at the first stop string."""
    text = formatter.text_of(tokens)
    for stop in options.stop:
        text = text.split(stop, 1)[0]
    return text.strip()
