"""prompts → responses, sampled by an OpenAI-compatible server of the reference (vLLM, SGLang, transformers serve).

One request per response, each with its own seed, so a server that shares the prompt's computation does so and one that
knows no ``n`` works too. A reference with a plain template is asked for completions of that text, any other for chat
completions, whose template is the server's: it must be the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from can_dist.config import Model
from can_dist.config.base import identity
from can_dist.config.endpoints import GenerateEndpoint
from can_dist.config.sections import Generate
from can_dist.console import interruptible, progress
from can_dist.endpoints import Client, open_client, refused, unreachable
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.modeling.formatter import open_formatter, response_identity
from can_dist.modeling.loading import model_digest
from can_dist.stages.brought_responses import context_of, response_row, tokenise
from can_dist.stages.generate import check_prompts_fit, commit_responses, prompts_of_split
from can_dist.tables.artifacts import Artifact, write_part
from can_dist.tables.schemas import RESPONSES
from can_dist.workspace import Workspace

if TYPE_CHECKING:
    from can_dist.modeling.formatter import Formatter

ENOUGH = 4
"""Prompts that tell whether a server samples."""


def ask_for_responses(
    work: Workspace, reference: Model, prompts: Artifact, endpoint: GenerateEndpoint, *, split: str = "train"
) -> Artifact:
    """Return the ``responses`` to the prompts of one split as an endpoint samples them, K for each prompt.

    Texts are tokenised again by the reference's tokenizer (:func:`can_dist.stages.brought_responses.tokenise`). A
    finished shard is kept: the same command continues after the last one.

    Raises:
        ConfigError: The endpoint is to fill the chat template with other options than the reference's.
        EnvironmentProblem: The endpoint is down, slow, rate-limited beyond all retries, or refuses the key or the
            model, or a proxy stands between.
        DataError: It refuses a prompt, answers something else than a completion, ends one for a reason of its own, or
            takes parts of it out of the text.
    """
    options = work.config.generate
    identity_of_stage = {
        "model": model_digest(reference),
        **response_identity(reference),
        "seed": work.config.seed,
        "options": identity(options),
    }
    if split != "train":
        identity_of_stage["split"] = split
    stage = work.open("generate", f"reference on {split}", identity_of_stage, {"prompts": prompts})
    if stage.finished:
        return stage.finished
    table = prompts_of_split(prompts.path, split)
    check_prompts_fit(reference, table, options.max_new_tokens)
    formatter, longest = open_formatter(reference), context_of(reference)
    request_of(endpoint, formatter)
    starts = range(0, table.num_rows, options.shard_prompts)
    finished = stage.finished_parts()
    todo = [(shard, start) for shard, start in enumerate(starts) if shard not in finished]
    label, total = f"reference on {split}, by an endpoint", table.num_rows * options.num_responses
    with (
        work.timed("generate", f"reference on {split}", prompts=table.num_rows, endpoint=endpoint.model),
        interruptible(),
        ThreadPoolExecutor(endpoint.concurrency) as pool,
        # closed first, which ends the requests that the threads of the pool wait for
        open_client(_where(endpoint), endpoint.base_url, endpoint) as client,
        progress(f"generate ({label})", total=total, unit="row") as bar,
    ):
        sampler = Sampler(client, endpoint, formatter, options, work.config.seed)
        for shard, start in todo:
            slots = [
                (prompt, k)
                for prompt in table.slice(start, options.shard_prompts).to_pylist()
                for k in range(options.num_responses)
            ]
            rows = []
            for row in pool.map(lambda slot: sampler.sample(*slot), slots):
                rows.append(row)
                bar.update(1)
            _check_sampled(rows, options, endpoint)
            tokenise(formatter, longest, rows).check(reference, _where(endpoint), longest, len(rows))
            write_part(stage.path, shard, pa.Table.from_pylist(rows, schema=RESPONSES))
    return commit_responses(stage, reference, table.num_rows, range(len(starts)))


def _check_sampled(rows: Sequence[Mapping[str, Any]], options: Generate, endpoint: GenerateEndpoint) -> None:
    """Raise ``DataError`` when a shard's prompts each have K times the same response, so that none can be preferred.

    transformers serve, for one, decodes greedily at any temperature unless the model's own generation_config samples.
    """
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(row["prompt_id"], set()).add(row["text"])
    # a prompt or two may have one answer only
    if options.num_responses > 1 and len(texts) >= ENOUGH and all(len(distinct) == 1 for distinct in texts.values()):
        raise DataError(
            f"{_where(endpoint)}: all {options.num_responses} responses to each of {len(texts)} prompts are the same "
            f"({rows[0]['response_id']}: {rows[0]['text'][:40]!r}). The server decodes greedily or ignores the seed: "
            "give its option for sampling in generate.endpoint.request, or raise generate.temperature."
        )


def request_of(endpoint: GenerateEndpoint, formatter: Formatter) -> dict[str, Any]:
    """Return what is sent beside the messages: the user's keys, and the options of the reference's chat template.

    Raises:
        ConfigError: The request sets other options than the reference's.
    """
    if not formatter.options:
        return dict(endpoint.request)
    given = endpoint.request.get("chat_template_kwargs", formatter.options)
    if given != formatter.options:
        raise ConfigError(
            f"generate.endpoint.request: chat_template_kwargs is {given}, reference.template_options are "
            f"{formatter.options}. They are sent by themselves: leave chat_template_kwargs out."
        )
    return {**endpoint.request, "chat_template_kwargs": formatter.options}


@dataclass(frozen=True)
class Sampler:
    """Asks an endpoint for one response at a time; used by several threads."""

    client: Client
    endpoint: GenerateEndpoint
    formatter: Formatter
    options: Generate
    seed: int

    def sample(self, prompt: Mapping[str, Any], k: int) -> dict[str, Any]:
        """Return response ``k`` of a prompt as a row without tokens."""
        from openai import APIError, APIStatusError, OpenAIError

        response_id = f"{prompt['prompt_id']}/{k}"
        owner = f"{_where(self.endpoint)}, response {response_id!r}"
        try:
            completion = self._ask(prompt, k)
        except APIStatusError as error:
            raise refused(owner, self.endpoint, error) from None
        except APIError as error:
            problem = unreachable(owner, self.endpoint, error)
            raise problem or EnvironmentProblem(_no_completion(owner, type(error).__name__)) from None
        except (OpenAIError, ValueError) as error:  # a body that is not the JSON its header promises
            raise DataError(_no_completion(owner, type(error).__name__)) from None
        text, finish_reason, apart = _first_choice(completion)
        if apart:
            raise DataError(
                f"{owner}: the server takes {', '.join(apart)} out of the response, so its text is not what the "
                "reference wrote. Start it without a parser of reasoning and tool calls."
            )
        if not isinstance(text, str):
            raise DataError(_no_completion(owner, "no text in it"))
        if finish_reason not in ("stop", "length"):
            raise DataError(
                f"{owner}: ended with finish_reason {finish_reason!r}, expected 'stop' or 'length'. A filtered "
                "response is no sample of the reference; use a server without filters and tools, or remove this prompt."
            )
        return response_row(prompt, k, text, finish_reason)

    def _ask(self, prompt: Mapping[str, Any], k: int) -> Any:
        from can_dist.modeling.sampling import row_seed

        options = self.options
        common: dict[str, Any] = {
            "model": self.endpoint.model,
            "seed": row_seed(self.seed, prompt["prompt_id"], k) % 2**31,  # servers differ in how large one may be
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new_tokens,
            "extra_body": request_of(self.endpoint, self.formatter),
        }
        if options.stop:
            common["stop"] = list(options.stop)
        if self.formatter.template is None:
            messages = prompt["messages"]
            return self.client.send(lambda library: library.chat.completions.create(messages=messages, **common))
        text = self.formatter.plain_prompt(prompt["messages"])
        return self.client.send(lambda library: library.completions.create(prompt=text, **common))


APART = ("reasoning_content", "reasoning", "tool_calls")
"""Where servers put the parts of a response that they take out of its text."""


def _first_choice(completion: Any) -> tuple[Any, Any, list[str]]:
    """Return text, finish reason and what was taken out of the text, as it came: the client checks nothing."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if choices else None
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if message is None else getattr(message, "content", None)
    apart = [name for name in APART if message is not None and getattr(message, name, None)]
    return text, getattr(choice, "finish_reason", None), apart


def _where(endpoint: GenerateEndpoint) -> str:
    return f"generate.endpoint {endpoint.model} at {endpoint.base_url}"


def _no_completion(owner: str, fault: str) -> str:
    return (
        f"{owner}: the answer is no completion ({fault}). Expected an OpenAI-compatible endpoint; base_url usually "
        "ends in /v1."
    )
