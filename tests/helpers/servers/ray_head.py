"""A Ray head of its own, on loopback with token authentication: for jobs, metrics and clusters of others."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4


@dataclass
class Head:
    """A running head: how to reach it, and the environment of a client that may."""

    process: subprocess.Popen

    address: str
    dashboard: str
    metrics_port: int
    temporary: Path
    environment: dict[str, str]

    lost: bool = False

    def kill(self) -> None:
        """End it and its node as the loss of a machine does."""
        self.lost = True
        end(self.process)

    def ask(self, path: str, token: str | None = TOKEN) -> tuple[int, str]:
        """GET a path of the dashboard, with a token or without; returns status and text."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers)) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def free_ports(number: int) -> list[int]:
    """Ports below those that the kernel hands to outgoing connections: one of these could take a port meanwhile."""
    sockets: list[socket.socket] = []
    while len(sockets) < number:
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", random.randrange(20000, 32000)))
        except OSError:
            one.close()
        else:
            sockets.append(one)
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def ray_head(extra_environment: dict[str, str], *, num_cpus: int = 4) -> Iterator[Head]:
    """Start a head that demands a token, and kill every process of it in the end."""
    temporary = Path(tempfile.mkdtemp(prefix="cdray-", dir="/tmp"))  # a socket's path may have 107 characters
    token = temporary / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    gcs, dashboard, agent, agent_grpc, runtime_env, metrics, client = free_ports(7)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_metrics_report_interval_ms": "1000",
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        environment.pop(name, None)
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
        f"--dashboard-agent-grpc-port={agent_grpc}", f"--runtime-env-agent-port={runtime_env}",
        f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--num-cpus={num_cpus}",
        f"--object-store-memory={100 << 20}", f"--temp-dir={temporary / 'ray'}", "--disable-usage-stats",
    ]  # fmt: skip
    with (temporary / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env={**environment, **extra_environment}, stdout=log, stderr=subprocess.STDOUT
        )
    address = f"127.0.0.1:{gcs}"
    of_client = {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    head = Head(process, address, f"http://127.0.0.1:{dashboard}", metrics, temporary, of_client)
    try:
        wait_for(head, process, temporary / "head.log")
        yield head
        assert head.lost or process.poll() is None, f"the head died:\n{(temporary / 'head.log').read_text()}"
    finally:
        end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for(head: Head, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if head.ask("/api/jobs/")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the head did not start:\n{log.read_text()}")


def end(process: subprocess.Popen) -> None:
    """Kill a head and everything it started, by process id."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family[1:], timeout=10)
