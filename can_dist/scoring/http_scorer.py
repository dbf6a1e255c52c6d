"""HTTP endpoints as scorers: vLLM and SGLang pooling, moderation services, anything that answers JSON to JSON.

A bounded number of threads each send one request at a time, so an endpoint is never given more than it was said to
take. Retries, waiting times and the key are the client's (:mod:`can_dist.endpoints`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from can_dist.config import HttpScorer
from can_dist.console import advance
from can_dist.endpoints import Client, open_client, refused, unreachable
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.modeling.formatter import Message
from can_dist.scoring.protocol import Response

SHOWN = 80
"""Characters of an answer that a message quotes."""


class HttpEndpointScorer:
    """Posts responses in batches and takes one number for each out of the answer."""

    def __init__(self, spec: HttpScorer) -> None:
        self.spec = spec
        self.client = open_client(_where(spec), spec.url, spec)

    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores, one per response, in order; the first request that fails ends it."""
        size = self.spec.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        with ThreadPoolExecutor(self.spec.concurrency) as pool:
            # what has not begun is cancelled when one fails
            scores: list[float] = []
            for batch in pool.map(lambda batch: score_batch(self.client, self.spec, batch), batches):
                scores += batch
                advance(len(batch))
        return np.asarray(scores, dtype=np.float64)


def score_batch(client: Client, spec: HttpScorer, batch: Sequence[Response]) -> list[float]:
    """Send one request and return a finite number for each response.

    Raises:
        EnvironmentProblem: The endpoint is down, slow, rate-limited beyond all retries, or refuses the key or the
            address.
        DataError: It refuses the request, or its answer is not JSON, lacks the field, or holds another count or no
            numbers.
    """
    from openai import APIError, APIStatusError

    owner = f"{_where(spec)}, {_rows(batch)}"
    body = fill(spec.request, spec, batch)
    try:
        text = client.send(lambda library: library.post(spec.url, cast_to=str, body=body))
    except APIStatusError as error:
        raise refused(owner, spec, error) from None
    except APIError as error:
        problem = unreachable(owner, spec, error)
        raise problem or EnvironmentProblem(f"{owner}: no usable answer ({type(error).__name__}).") from None
    try:
        answer = json.loads(text)
    except ValueError:
        raise DataError(f"{owner}: the answer is not JSON: {_short(text)}.", "Is url the right address?") from None
    values = values_at(answer, spec, len(batch), owner)
    return [_number(value, spec, response) for value, response in zip(values, batch, strict=True)]


# ------------------------------------------------------------------------------------------------------ the request


def fill(value: Any, spec: HttpScorer, batch: Sequence[Response]) -> Any:
    """Return the request with its placeholders replaced: by lists where the spec's ``value`` has a '*', else by one."""
    if isinstance(value, Mapping):
        return {key: fill(inner, spec, batch) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, spec, batch) for inner in value]
    of_one = {"{prompt}": _prompt, "{response}": _response, "{text}": _text, "{messages}": _messages}
    if not isinstance(value, str) or value not in of_one:
        return value
    filled = [of_one[value](spec, response) for response in batch]
    return filled if "*" in spec.value.split(".") else filled[0]


def request_text(spec: HttpScorer, messages: Sequence[Message], text: str) -> str:
    """Return the request for one response as JSON text.

    Raises:
        DataError: A conversation of several messages is to be sent as ``{prompt}`` or ``{text}``.
    """
    return json.dumps(fill(spec.request, spec, [Response("to be sampled", messages, text, [])]), ensure_ascii=False)


def _response(spec: HttpScorer, response: Response) -> str:  # noqa: ARG001
    return response.text


def _messages(spec: HttpScorer, response: Response) -> list[dict[str, str]]:  # noqa: ARG001
    return [*response.messages, {"role": "assistant", "content": response.text}]


def _prompt(spec: HttpScorer, response: Response) -> str:
    if len(response.messages) != 1:
        raise DataError(
            f"{_where(spec)}, {_rows([response])}: a conversation of {len(response.messages)} messages is no single "
            "{prompt}.",
            "Send '{messages}', or bring single-turn prompts.",
        )
    return response.messages[0]["content"]


def _text(spec: HttpScorer, response: Response) -> str:
    before, _, after = str(spec.template).partition("{response}")
    prompt = _prompt(spec, response)
    return f"{before.replace('{prompt}', prompt)}{response.text}{after.replace('{prompt}', prompt)}"


# ------------------------------------------------------------------------------------------------------- the answer


def values_at(answer: Any, spec: HttpScorer, count: int, owner: str) -> list[Any]:
    """Return what lies at the path ``spec.value`` of an answer, once for each of ``count`` responses.

    Raises:
        DataError: A step of the path is not there, or '*' stands for another number of places.
    """
    before, star, after = spec.value.partition("*")
    nodes = _walk(answer, before, spec, owner)
    if not star:
        return [nodes]
    if not isinstance(nodes, list) or len(nodes) != count:
        held = f"{len(nodes)} entries" if isinstance(nodes, list) else f"{_short(nodes)}, no list"
        raise DataError(f"{owner}: sent {count} response(s), the answer has {held} at {before or 'the top'!r}.")
    places = [item.get("index", place) if isinstance(item, Mapping) else place for place, item in enumerate(nodes)]
    if count > 1 and places != list(range(count)):
        raise DataError(
            f"{owner}: the entries at {before or 'the top'!r} are not in the order of the request: their index is "
            f"{_short(places)}.",
            "Use an endpoint that keeps the order (a reranker sorts by score), or batch_size 1.",
        )
    return [_walk(item, after, spec, owner) for item in nodes]


def _walk(node: Any, path: str, spec: HttpScorer, owner: str) -> Any:
    for step in filter(None, path.split(".")):
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.isdigit() and int(step) < len(node):
            node = node[int(step)]
        else:
            there = ", ".join(map(str, node)) if isinstance(node, Mapping) else _short(node)
            raise DataError(
                f"{owner}: the answer has no {step!r} of value {spec.value!r}; there is: {there}.",
                "Set value to where the score lies.",
            )
    return node


def _number(value: Any, spec: HttpScorer, response: Response) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{_where(spec)}, {_rows([response])}: found {_short(value)} at value {spec.value!r}, expected a finite "
            "number.",
            "Set value to where the score lies, or look at what the endpoint does with this text.",
        )
    return float(value)


def _where(spec: HttpScorer) -> str:
    return f"scorer {spec.model} at {spec.url}"


def _rows(batch: Sequence[Response]) -> str:
    first, last = batch[0].response_id, batch[-1].response_id
    return f"response {first!r}" if len(batch) == 1 else f"{len(batch)} responses {first!r} to {last!r}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
