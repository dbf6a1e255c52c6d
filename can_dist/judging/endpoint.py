"""An OpenAI-compatible chat endpoint: one request, its retries, and the messages of its failures.

Retries and keys are those of every endpoint (:mod:`can_dist.endpoints`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from can_dist.config.endpoints import Address, Endpoint
from can_dist.endpoints import REFUSED, open_async_client, refused, unreachable
from can_dist.errors import EnvironmentProblem
from can_dist.judging.prompts import Criterion

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletion

OURS = {"model", "messages", "stream", "n"}


class JudgeSpec(Endpoint):
    """A judge: its address, its criterion, and its retries."""

    base_url: Address = Field(description="Endpoint up to '/v1', such as http://localhost:8000/v1.")
    model: str = Field(description="Model name as the endpoint knows it; pin a dated version for anything you publish.")
    criterion: Criterion = Field(description="What is compared: 'helpfulness' or 'safety'.")
    attempts: int = Field(3, ge=1, description="Times a judge is asked for one verdict before it counts as none.")
    max_failed_share: float = Field(
        0.2, ge=0, le=1, description="Stop when more comparisons than this have no verdict."
    )
    request: dict[str, Any] = Field(
        default_factory=lambda: {"temperature": 0, "max_tokens": 512},
        description="Sent with every request as it is; some models want max_completion_tokens and no temperature.",
    )

    @field_validator("request")
    @classmethod
    def _without_ours(cls, request: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(OURS & request.keys()):
            raise ValueError(f"{', '.join(taken)}: set by the judge itself")
        return request


@dataclass(frozen=True)
class Answer:
    """The endpoint's answer to one request.

    Attributes:
        text: the assistant's message, or ''.
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
        EnvironmentProblem: the environment variable of the key is missing, empty or no possible key, or a proxy of the
            environment cannot be used.
    """
    return open_async_client(_where(spec), spec.base_url, spec)


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
        if error.status_code in REFUSED:
            return Answer("", None, None, rejected=True)
        raise refused(_where(spec), spec, error) from None
    except APIError as error:
        problem = unreachable(_where(spec), spec, error)
        raise problem or EnvironmentProblem(_no_completion(spec, type(error).__name__)) from None
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


def _where(spec: JudgeSpec) -> str:
    return f"judge {spec.model} at {spec.base_url}"


def _no_completion(spec: JudgeSpec, reason: str) -> str:
    return (
        f"{_where(spec)}: the answer is no chat completion ({reason}). Expected an "
        "OpenAI-compatible endpoint; base_url usually ends in /v1."
    )
