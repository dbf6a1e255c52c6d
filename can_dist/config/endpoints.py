"""HTTP endpoints: their address, their key, and their retries."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator

from can_dist.config.base import Strict, runtime


def _plain_address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("expected no user, password or query in the address; a key belongs into api_key_env")
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_plain_address)]
"""An http(s) address that holds no secret."""


class Endpoint(Strict):
    """The settings of requests to any endpoint; its address and speed do not change its answers."""

    api_key_env: str | None = runtime(None, "Name of the environment variable with the key; none: no key.")
    timeout_s: float = runtime(60.0, "Longest wait for one whole answer, seconds; then it is asked again.", gt=0)
    max_retries: int = runtime(8, "Retries of one request after 429, 5xx, timeout or lost connection.", ge=0)
    concurrency: int = runtime(8, "Requests in flight at once, of each process that sends them.", ge=1, le=256)


SAMPLING = {"model", "messages", "prompt", "n", "seed", "temperature", "top_p", "max_tokens", "stop", "stream"}


class GenerateEndpoint(Endpoint):
    """An OpenAI-compatible server of the reference, which samples its training responses."""

    base_url: Address = runtime(..., "Endpoint up to '/v1', such as http://localhost:8000/v1.")
    model: str = Field(description="Model name as the endpoint knows it: the reference, as you declare.")
    revision: str | None = Field(None, description="Its revision, declared likewise: another one samples again.")
    request: dict[str, Any] = Field(default_factory=dict, description="Sent with every request as it is.")

    @field_validator("request")
    @classmethod
    def _without_ours(cls, request: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(SAMPLING & request.keys()):
            raise ValueError(f"{', '.join(taken)}: set by the keys of generate")
        return request
