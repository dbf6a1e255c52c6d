"""Servers of other projects, each a process of its own until it answers: for scorers and models over HTTP."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, environment: Mapping[str, str], *, seconds: int) -> Iterator[str]:
    """Run ``python COMMAND --port PORT``; yield the server's address once ``/health`` answers within ``seconds``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, *command, "--port", port], stdout=output, stderr=output, env=dict(environment)
        )
        try:
            _wait(f"{address}/health", server, log, seconds)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait(address: str, server: subprocess.Popen[bytes], log: Path, seconds: int) -> None:
    for _ in range(2 * seconds):
        assert server.poll() is None, log.read_text()
        try:
            urlopen(address, timeout=2).close()
        except (URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer from {address}: {log.read_text()}")
