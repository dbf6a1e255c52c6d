"""HTTP endpoints: the one client, and what goes wrong with an endpoint in words.

An answer that is not whole after ``timeout_s`` is a timeout, also where bytes drip in. A redirect is refused: a text is
sent to the address of the configuration, and nowhere else. Retries are the client library's: 408, 409, 429, 5xx,
timeouts and broken connections, with exponential backoff or as long as ``Retry-After`` says (at most two minutes). The
key is read from the environment when the client is opened and is in no configuration, file, log or message.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from can_dist.config.endpoints import Endpoint
from can_dist.errors import CanDistError, DataError, EnvironmentProblem

if TYPE_CHECKING:
    from openai import APIError, APIStatusError, AsyncOpenAI

Answer = TypeVar("Answer")


def read_key(owner: str, endpoint: Endpoint) -> str:
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
            f"{owner}: its key is expected in the environment variable {endpoint.api_key_env}, which {state}.",
            "Export the key there.",
        )
    return key


class Client:
    """A client for several threads, which each wait for their own request; closing it ends all requests at once."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def send(self, request: Callable[[AsyncOpenAI], Coroutine[Any, Any, Answer]]) -> Answer:
        """Wait for the answer to a request of the library's client; ``CancelledError`` once the client is closed."""
        with self._lock:
            if self._closed:
                raise CancelledError
            future = asyncio.run_coroutine_threadsafe(request(self._client), self._loop)
        return future.result()

    def close(self) -> None:
        """End the requests in flight and the connections."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        requests = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._client.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_client(owner: str, base_url: str, endpoint: Endpoint) -> Client:
    """Open a client for several threads; the caller closes it.

    Raises:
        EnvironmentProblem: The key is not in the environment, or a proxy of the environment cannot be used.
    """
    return Client(open_async_client(owner, base_url, endpoint))


def open_async_client(owner: str, base_url: str, endpoint: Endpoint) -> AsyncOpenAI:
    """Open a client for coroutines; the caller closes it. Errors are those of ``open_client``."""
    from openai import AsyncOpenAI

    connection = _connection(_whole_answers_within(endpoint.timeout_s), owner, base_url)
    return AsyncOpenAI(http_client=connection, **_options(owner, base_url, endpoint))


def _whole_answers_within(seconds: float) -> Any:
    """Return the class of an HTTP client that waits so long for the whole of an answer and follows no redirect.

    The library's own timeout is one of silence: an endpoint that drips a byte a minute is never silent.
    """
    import httpx2
    from openai import DefaultAsyncHttpxClient

    class Connection(DefaultAsyncHttpxClient):
        async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            try:
                return await asyncio.wait_for(super().send(request, **options), seconds)
            except asyncio.TimeoutError:
                raise httpx2.ReadTimeout(f"not whole after {seconds:g} s", request=request) from None

    return Connection


def _options(owner: str, base_url: str, endpoint: Endpoint) -> dict[str, Any]:
    return {
        "api_key": read_key(owner, endpoint),
        "base_url": base_url,
        "timeout": endpoint.timeout_s,
        "max_retries": endpoint.max_retries,
    }


def _connection(kind: Any, owner: str, url: str) -> Any:
    """Return the library's HTTP client: without proxies to this machine itself, whatever the environment says."""
    proxies = {name: proxy for name, proxy in getproxies_environment().items() if name in ("http", "https", "all")}
    if proxies and is_loopback(urlsplit(url).hostname or ""):
        return kind(trust_env=False, follow_redirects=False)
    try:
        for proxy in proxies.values():
            _ = urlsplit(proxy).port  # of a port that is no number the library raises an error of its own kind
        return kind(follow_redirects=False)
    except (ImportError, ValueError) as error:
        variables = ", ".join(_variable(name) for name in proxies)
        raise EnvironmentProblem(
            f"{owner}: the proxy that the environment names ({variables}) cannot be used: {str(error).rstrip('.')}.",
            "Unset the variable or give a proxy whose address begins with http:// (for socks5:// install the client's "
            "extra 'socks').",
        ) from None


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def about_proxy(error: APIError) -> str:
    """Say which variable sends a request through a proxy and how to go without; '' where none does."""
    address = urlsplit(str(error.request.url))
    host = address.hostname or ""
    proxies = getproxies_environment()
    name = next((name for name in (address.scheme, "all") if name in proxies), None)
    if name is None or is_loopback(host) or proxy_bypass(host):
        return ""
    return (
        f" The environment variable {_variable(name)} sends this request through a proxy: where the endpoint is to be "
        f"reached directly, add {host} to NO_PROXY."
    )


def _variable(scheme: str) -> str:
    """Return the name of the environment variable that sets the proxy of a scheme, as it is written there."""
    return next((name for name in os.environ if name.lower() == f"{scheme}_proxy"), f"{scheme.upper()}_PROXY")


REFUSED = (400, 413, 422)
"""What an endpoint answers to a request that it will not serve, however often it is sent."""


def refused(owner: str, endpoint: Endpoint, error: APIStatusError) -> CanDistError:
    """Return what an HTTP status means: a ``DataError`` where it refuses the request, else an ``EnvironmentProblem``.

    The body is not quoted: it may repeat the key or the prompt.
    """
    status = error.status_code
    if status in REFUSED:
        return DataError(
            f"{owner}: HTTP {status}, the endpoint refused this request.",
            "See its log: a text may be too long, or the request may have keys that it does not know.",
        )
    if status == 429:  # it was reached, so no proxy is in the way
        return EnvironmentProblem(
            f"{owner}: still rate-limited (HTTP 429) after {endpoint.max_retries} retries.",
            "Lower concurrency, raise max_retries, or wait until the quota allows more.",
        )
    state, remedy = _status(endpoint, status)
    return EnvironmentProblem(f"{owner}: HTTP {status}{state}.", f"{remedy}{about_proxy(error)}")


def _status(endpoint: Endpoint, status: int) -> tuple[str, str]:
    """Return what a status that may come from a proxy too says, and what to do."""
    if status in (401, 403):
        name = endpoint.api_key_env
        key = f"the key in the environment variable {name}" if name else "a request without key"
        return f", the endpoint refused {key}", "Set api_key_env to a variable with a valid key."
    if 300 <= status < 400:
        return ", the endpoint sends on to another address, where no text is sent", (
            "Set the address to where the endpoint really is."
        )
    if status == 404:
        return ", no such model or address", "Compare model and base_url with the endpoint's list."
    return f" after {endpoint.max_retries} retries", "See the endpoint's log; try again when it is well."


def unreachable(owner: str, endpoint: Endpoint, error: APIError) -> EnvironmentProblem | None:
    """Return why there is no answer; None where the library has another reason than time or connection."""
    from openai import APIConnectionError, APITimeoutError

    attempts = f"in {endpoint.max_retries + 1} attempts"
    if isinstance(error, APITimeoutError):
        return EnvironmentProblem(
            f"{owner}: no answer within {endpoint.timeout_s:g} s, {attempts}.",
            f"Lower concurrency or raise timeout_s.{about_proxy(error)}",
        )
    if isinstance(error, APIConnectionError):
        return EnvironmentProblem(
            f"{owner}: no connection {attempts}.", f"Is it running, and is base_url right?{about_proxy(error)}"
        )
    return None
