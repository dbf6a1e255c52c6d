"""Endpoints that drip, hang or send on: every request ends, and no text goes to another address."""

from __future__ import annotations

import os
import signal
import socketserver
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

import pytest
from judge_server import Endpoint, serving
from openai import APIStatusError, APITimeoutError

from can_dist.config import HttpScorer
from can_dist.config.endpoints import Endpoint as Settings
from can_dist.console import interruptible
from can_dist.endpoints import Client, open_client
from can_dist.errors import EnvironmentProblem, Interrupted
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Response

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"


@contextmanager
def dripping(first: bytes) -> Iterator[str]:
    """A server that sends ``first`` and then a byte every tenth of a second, without end."""
    ended = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            try:
                self.request.sendall(first)
                while not ended.wait(0.1):
                    self.request.sendall(b" ")
            except OSError:
                return  # the client went away, as it should

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        ended.set()
        server.shutdown()


def opened(url: str, timeout_s: float = 1.0) -> Client:
    return open_client("endpoint m", url, Settings(max_retries=0, timeout_s=timeout_s))


def post(client: Client, url: str) -> Any:
    return client.send(lambda library: library.post(url, cast_to=str, body={"text": "private"}))


@pytest.mark.parametrize("first", [HEAD + b"\r\n{", HEAD + b"X-Slow:"], ids=["body", "header"])
def test_answer_that_drips_is_a_timeout(first: bytes) -> None:
    with dripping(first) as url, opened(url) as client:
        started = time.monotonic()
        with pytest.raises(APITimeoutError):
            post(client, url)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirect_is_refused_and_the_text_stays(status: int) -> None:
    with serving(lambda *_: "got it") as elsewhere:

        def send_on(*_: Any) -> tuple[int, dict[str, str], Any]:
            return status, {"Location": f"{elsewhere.url}/score"}, {}

        with serving(send_on) as server:
            spec = HttpScorer(
                url=server.url, model="rm", request={"response": "{response}"}, value="score", max_retries=0
            )
            with pytest.raises(EnvironmentProblem, match=rf"HTTP {status}, the endpoint sends on to another address"):
                load_scorer(spec, "fp32").score([Response("r1", [], "private", [])])
        assert elsewhere.bodies == []
    with serving(send_on) as server, opened(server.url) as client, pytest.raises(APIStatusError):
        post(client, server.url)


def silent(*_: Any) -> str:
    time.sleep(4)
    return "late"


def waiting(client: Client, server: Endpoint) -> list[BaseException]:
    """Start a request in a thread; return the list that its error will be in, once it has reached the server."""
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            post(client, server.url)
        except (CancelledError, APITimeoutError) as error:
            errors.append(error)

    threading.Thread(target=wait, daemon=True).start()
    while not server.bodies:
        time.sleep(0.01)
    return errors


def test_closed_client_ends_what_is_in_flight_and_sends_no_more() -> None:
    with serving(silent) as server:
        client = opened(server.url, 60)
        errors = waiting(client, server)
        started = time.monotonic()
        client.close()
        while not errors:
            time.sleep(0.01)
        assert time.monotonic() - started < 1
        assert isinstance(errors[0], CancelledError)
        with pytest.raises(CancelledError):
            post(client, server.url)
        client.close()  # again


def test_signal_ends_the_wait_for_a_silent_endpoint() -> None:
    with serving(silent) as server:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        started = time.monotonic()
        with pytest.raises(Interrupted), interruptible(), opened(server.url, 60) as client:
            post(client, server.url)
        assert time.monotonic() - started < 2
