"""A server that speaks chat completions, well and badly as told: for judges and endpoints."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]
Judge = Callable[[dict[str, Any], int], Reply | str]


class Endpoint(ThreadingHTTPServer):
    """Answers as ``judge(body, number of the request)`` says: a text, or (status, headers, body)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, judge: Judge) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.bodies, self.keys = judge, [], []  # type: ignore[var-annotated]
        self.lock, self.running, self.most = threading.Lock(), 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            reply = self.server.judge(body, number)
        finally:
            with self.server.lock:
                self.server.running -= 1
        status, headers, content = (200, {}, completion(reply)) if isinstance(reply, str) else reply
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def completion(text: str) -> dict[str, Any]:
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }  # fmt: skip


@contextmanager
def serving(judge: Judge) -> Iterator[Endpoint]:
    with Endpoint(judge) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def responses(body: dict[str, Any]) -> tuple[str, str]:
    """What the judge is shown as A and as B."""
    text = body["messages"][1]["content"]
    first, second = (re.search(rf"\[response {x} (\w+)\]\n(.*?)\n\[end of response {x} \1\]", text, re.S) for x in "AB")
    assert first
    assert second
    return first[2], second[2]


def fair_to_longer(body: dict[str, Any], number: int) -> str:
    """Prefer the longer response, whichever is shown first."""
    first, second = responses(body)
    return f"Verdict: {'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}"
