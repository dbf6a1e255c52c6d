"""HTTP endpoints: the one client, and what goes wrong with an endpoint in words.

Retries are the client library's: 408, 409, 429, 5xx, timeouts and broken connections, with exponential backoff or as
long as ``Retry-After`` says (at most two minutes). The key is read from the environment when the client is opened and
is in no configuration, file, log or message.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from can_dist.config.endpoints import Endpoint
from can_dist.errors import EnvironmentProblem

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, OpenAI


def read_key(where: str, endpoint: Endpoint) -> str:
    """Return the key of an endpoint, 'no-key' for one without.

    Raises:
        EnvironmentProblem: its environment variable is missing, empty or no possible key.
    """
    if endpoint.api_key_env is None:
        return "no-key"  # servers without keys ignore it, the library wants one
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        state = "holds characters that no key has" if key else "is not set or empty"
        raise EnvironmentProblem(
            f"{where}: its key is expected in the environment variable {endpoint.api_key_env}, which {state}. "
            "Export the key there."
        )
    return key


def open_client(where: str, base_url: str, endpoint: Endpoint) -> OpenAI:
    """Open a blocking client, for use by several threads; the caller closes it. Errors are those of ``read_key``."""
    from openai import OpenAI

    key = read_key(where, endpoint)
    return OpenAI(api_key=key, base_url=base_url, timeout=endpoint.timeout_s, max_retries=endpoint.max_retries)


def refused(where: str, endpoint: Endpoint, error: APIStatusError) -> str:
    """Say what an HTTP status means. The body is not quoted: it may repeat the key or the prompt."""
    status = error.status_code
    if status in (401, 403):
        name = endpoint.api_key_env
        key = f"the key in the environment variable {name}" if name else "a request without key"
        return f"{where}: HTTP {status}, the endpoint refused {key}. Set api_key_env to a variable with a valid key."
    if status == 404:
        return f"{where}: HTTP 404, no such model or address. Compare model and base_url with the endpoint's list."
    if status == 429:
        return (
            f"{where}: still rate-limited (HTTP 429) after {endpoint.max_retries} retries. Lower concurrency, raise "
            "max_retries, or wait until the quota allows more."
        )
    if status in (400, 413, 422):
        return (
            f"{where}: HTTP {status}, the endpoint refused this request. See its log: a text may be too long, or the "
            "request may have keys that it does not know."
        )
    return (
        f"{where}: HTTP {status} after {endpoint.max_retries} retries. See the endpoint's log; try again when it is "
        "well."
    )


def unreachable(where: str, endpoint: Endpoint, error: APIError) -> str:
    """Say why there is no answer; empty where the library has another reason than time or connection."""
    from openai import APIConnectionError, APITimeoutError

    if isinstance(error, APITimeoutError):
        return (
            f"{where}: no answer within {endpoint.timeout_s:g} s, in {endpoint.max_retries + 1} attempts. Lower "
            "concurrency or raise timeout_s."
        )
    if isinstance(error, APIConnectionError):
        return f"{where}: no connection in {endpoint.max_retries + 1} attempts. Is it running, and is base_url right?"
    return ""
