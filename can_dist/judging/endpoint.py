"""An OpenAI-compatible chat endpoint: one request, its retries, and what goes wrong with it in words.

Retries are the client library's: 408, 409, 429, 5xx, timeouts and broken connections, with exponential backoff or as
long as ``Retry-After`` says (at most two minutes). The key is read from the environment when the client is opened and
is in no configuration, file, log or message.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from can_dist.config import Strict
from can_dist.errors import EnvironmentProblem
from can_dist.judging.prompts import Criterion

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion

OURS = {"model", "messages", "stream", "n"}


class JudgeSpec(Strict):
    """A judge: where it is reached, what it is asked, and how hard to try."""

    base_url: str = Field(description="Endpoint up to '/v1', such as http://localhost:8000/v1.")
    model: str = Field(description="Model name as the endpoint knows it; pin a dated version for anything you publish.")
    criterion: Criterion = Field(description="What is compared: 'helpfulness' or 'safety'.")
    api_key_env: str | None = Field(None, description="Name of the environment variable with the key; none: no key.")
    timeout_s: float = Field(60.0, gt=0, description="Longest wait for the endpoint's next bytes, seconds.")
    max_retries: int = Field(8, ge=0, description="Retries of one request after 429, 5xx, timeout or lost connection.")
    attempts: int = Field(3, ge=1, description="Times a judge is asked for one verdict before it counts as none.")
    concurrency: int = Field(8, ge=1, le=256, description="Requests in flight at once.")
    max_failed_share: float = Field(
        0.2, ge=0, le=1, description="Stop when more comparisons than this have no verdict."
    )
    request: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 512},
        description="Sent with every request as it is; some models want max_completion_tokens and no temperature.",
    )

    @field_validator("base_url")
    @classmethod
    def _without_secrets(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected an address such as http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("expected no user, password or query in the address; a key belongs into api_key_env")
        return url.rstrip("/")

    @field_validator("request")
    @classmethod
    def _without_ours(cls, request: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OURS & request.keys()):
            raise ValueError(f"{', '.join(taken)}: set by the judge itself")
        return request


@dataclass(frozen=True)
class Answer:
    """What the endpoint answered to one request.

    Attributes:
        text: the assistant's message, '' where there is none.
        prompt_tokens: of ``usage``; None where the endpoint does not say.
        completion_tokens: of ``usage``; None where the endpoint does not say.
        rejected: the endpoint refused this request for its content (HTTP 400, 413 or 422).
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    rejected: bool = False


def open_client(spec: JudgeSpec) -> AsyncOpenAI:
    """Open the client of an endpoint; the caller closes it.

    Raises:
        EnvironmentProblem: the environment variable of the key is missing, empty or no possible key.
    """
    from openai import AsyncOpenAI

    key = "no-key"  # servers without keys ignore it, the library wants one
    if spec.api_key_env is not None:
        key = os.environ.get(spec.api_key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            state = "holds characters that no key has" if key else "is not set or empty"
            raise EnvironmentProblem(
                f"judge {spec.model} at {spec.base_url}: its key is expected in the environment variable "
                f"{spec.api_key_env}, which {state}. Export the key there."
            )
    return AsyncOpenAI(api_key=key, base_url=spec.base_url, timeout=spec.timeout_s, max_retries=spec.max_retries)


async def ask(client: AsyncOpenAI, spec: JudgeSpec, messages: list[dict[str, str]]) -> Answer:
    """Send one request and return the answer.

    Raises:
        EnvironmentProblem: the endpoint is down, slow, rate-limited beyond all retries, refuses the key, does not know
            the model, or does not speak chat completions.
    """
    from openai import APIError, APIStatusError, OpenAIError
    from openai.types.chat import ChatCompletion

    try:
        completion = await client.chat.completions.create(
            model=spec.model,
            messages=messages,  # type: ignore[arg-type]
            extra_body=spec.request,
        )
    except APIStatusError as error:
        if error.status_code in (400, 413, 422):
            return Answer("", None, None, rejected=True)
        raise EnvironmentProblem(_refused(spec, error)) from None
    except APIError as error:
        raise EnvironmentProblem(_unreachable(spec, error)) from None
    except (OpenAIError, ValueError) as error:  # a body that is not the JSON its header promises
        raise EnvironmentProblem(_no_completion(spec, type(error).__name__)) from None
    choices = completion.choices if isinstance(completion, ChatCompletion) else None
    message = getattr(choices[0], "message", None) if choices else None  # the library does not check what it was sent
    text = getattr(message, "content", "")
    if message is None or not isinstance(text, str | None):
        raise EnvironmentProblem(_no_completion(spec, "no message in it"))
    return Answer(text or "", _count(completion, "prompt_tokens"), _count(completion, "completion_tokens"))


def _count(completion: ChatCompletion, name: str) -> int | None:
    count = getattr(completion.usage, name, None)
    return count if isinstance(count, int) else None


def _refused(spec: JudgeSpec, error: APIStatusError) -> str:
    """Say what an HTTP status means. The body is not quoted: it may repeat the key or the prompt."""
    status, where = error.status_code, f"judge {spec.model} at {spec.base_url}"
    if status in (401, 403):
        key = f"the key in the environment variable {spec.api_key_env}" if spec.api_key_env else "a request without key"
        return f"{where}: HTTP {status}, the endpoint refused {key}. Set api_key_env to a variable with a valid key."
    if status == 404:
        return f"{where}: HTTP 404, no such model or address. Compare model and base_url with the endpoint's list."
    if status == 429:
        return (
            f"{where}: still rate-limited (HTTP 429) after {spec.max_retries} retries. Lower concurrency, raise "
            "max_retries, or wait until the quota allows more."
        )
    return (
        f"{where}: HTTP {status} after {spec.max_retries} retries. See the endpoint's log; try again when it is well."
    )


def _unreachable(spec: JudgeSpec, error: APIError) -> str:
    from openai import APIConnectionError, APITimeoutError

    where = f"judge {spec.model} at {spec.base_url}"
    if isinstance(error, APITimeoutError):
        return (
            f"{where}: no answer within {spec.timeout_s:g} s, in {spec.max_retries + 1} attempts. Lower concurrency or "
            "raise timeout_s."
        )
    if isinstance(error, APIConnectionError):
        return f"{where}: no connection in {spec.max_retries + 1} attempts. Is it running, and is base_url right?"
    return _no_completion(spec, type(error).__name__)


def _no_completion(spec: JudgeSpec, what: str) -> str:
    return (
        f"judge {spec.model} at {spec.base_url}: the answer is no chat completion ({what}). Expected an "
        "OpenAI-compatible endpoint; base_url usually ends in /v1."
    )
