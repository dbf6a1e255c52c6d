"""A local Ray under a long TMPDIR, as batch systems set it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from can_dist.cluster import ray_directory
from can_dist.cluster.local_ray import listen_on_loopback, make_private
from can_dist.cluster.ray_directory import session_directory
from can_dist.config import Cluster
from can_dist.doctor import Severity
from can_dist.doctor.ray_cluster import check_ray
from can_dist.errors import EnvironmentProblem

ROOT = Path(__file__).parents[3]


@pytest.fixture
def long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A TMPDIR of a hundred characters; the system's own is a short one of this test."""
    directory = tmp_path / ("slurm_jobdir_1355700_of_a_user" * 3)
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    short = Path("/tmp") / f"t{os.getpid()}"
    short.mkdir(exist_ok=True)
    monkeypatch.setattr(ray_directory, "SYSTEM", short)
    yield directory
    shutil.rmtree(short)


def test_short_tmpdir_holds_a_private_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Path("/tmp") / f"t{os.getpid()}"
    short.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(short))
    directory = Path(session_directory())
    assert directory.parent.parent == short
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    shutil.rmtree(short)


def test_long_tmpdir_gets_a_private_directory_of_the_users_own(long: Path) -> None:
    directory = Path(str(session_directory()))
    assert len(os.fsencode(directory)) + ray_directory.UNDER_RAY <= ray_directory.LONGEST_SOCKET
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    assert session_directory() == str(directory)  # again, now that it is there
    [finding] = check_ray(Cluster())
    assert finding.severity is Severity.OK
    assert f"whose sessions lie in {directory}" in finding.state


def test_directory_that_others_can_enter_or_own_is_refused(long: Path) -> None:
    directory = Path(str(session_directory())).parent
    directory.chmod(0o777)
    with pytest.raises(
        EnvironmentProblem, match=r"not a directory of yours that nobody else can enter\. Set RAY_TMPDIR"
    ):
        session_directory()
    assert check_ray(Cluster())[0].severity is Severity.ERROR
    directory.rmdir()
    directory.symlink_to(long)
    with pytest.raises(EnvironmentProblem, match="not a directory of yours"):
        session_directory()
    directory.unlink()


def test_long_ray_tmpdir_is_refused_with_the_limit(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(EnvironmentProblem, match=rf"RAY_TMPDIR={long}: \d+ bytes, .* at most 10[37]\. Set RAY_TMPDIR"):
        session_directory()


LOCAL_RAY = """
import os, subprocess, sys
from can_dist.cluster.connection import connect
from can_dist.config import Cluster
connect(Cluster())
import ray

@ray.remote
class Worker:
    def shadowed(self):
        import random
        from can_dist.scoring.python_callable import import_callable
        return os.getpid(), random.__file__, import_callable("scorer_of_mine:score").__name__

pid, file, name = ray.get(Worker.remote().shadowed.remote())
session = ray._private.worker._global_node.get_session_dir_path()
servers = subprocess.run(["pgrep", "-f", session], capture_output=True, text=True).stdout.split()
shared = os.getpgrp() in {os.getpgid(int(server)) for server in servers}
print(session, file, name, shared, ray.get_runtime_context().gcs_address, sep="\\n")
processes = [pid, os.getpid(), *servers]
for line in subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True).stdout.splitlines():
    if any(f"pid={process}," in line for process in processes):
        print("listens", line.split()[3])
"""


def test_s1_local_ray_is_closed_to_other_users(tmp_path: Path) -> None:
    """A token that everybody can read, a TMPDIR too long for Ray's sockets, and a directory with a random.py.

    With the check of the length left out, Ray's own OSError about AF_UNIX paths comes, as a traceback.
    """
    temporary, here, script = (
        tmp_path / ("slurm_jobdir_1355700_of_a_user" * 3),
        tmp_path / "here",
        tmp_path / "s" / "s.py",
    )
    for folder in (temporary, here, script.parent):
        folder.mkdir()
    script.write_text(LOCAL_RAY)
    (here / "random.py").write_text("raise SystemExit('the random.py of the current directory was executed')")
    (here / "scorer_of_mine.py").write_text(
        "def score(conversations, responses):\n    return [0.0 for _ in responses]\n"
    )
    kept = tmp_path / "home" / ".ray" / "auth_token"
    kept.parent.mkdir(parents=True)
    kept.write_text("a" * 64)
    kept.chmod(0o644)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    session, random, scorer, in_our_group, head, *listening = done.stdout.splitlines()
    assert Path(random).parent != here
    assert scorer == "score"
    assert in_our_group == "False", "a signal to the driver's group must not end Ray under it"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(session).parents[1].stat().st_mode) == 0o700
    assert head.startswith("127.0.0.1:")
    assert len(listening) >= 4  # the head, the raylet's two, and the worker
    assert all(address.startswith(("listens 127.0.0.1:", "listens [::ffff:127.0.0.1]:")) for address in listening), (
        listening
    )


STOPPED = """
import os, signal, time
from can_dist.cluster.connection import connect
from can_dist.config import Cluster
from can_dist.console import interruptible
from can_dist.errors import Interrupted

connect(Cluster())
import ray

@ray.remote
def wait():
    time.sleep(600)

try:
    with interruptible(ASK):
        waiting = wait.remote()
        print("waits", flush=True)
        WAIT
except Interrupted as stopped:
    raise SystemExit(stopped.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["", "lambda: None, 1.0"], ids=["at_once", "after_grace"])
def test_signal_to_the_whole_process_group_is_the_drivers(ask: str) -> None:
    """As ``timeout``, systemd and Slurm send it; Ray's servers were in the group, and died under the driver.

    With grace it waits as Ray Train does for its ranks, in ``ray.get``, which lost what the handler raised.
    """
    wait = "ray.get(waiting)" if ask else "while not ray.wait([waiting], timeout=1)[0]: pass"  # as the ledger does
    code = STOPPED.replace("ASK", ask).replace("WAIT", wait)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert driver.stdout is not None
    assert driver.stdout.readline() == "waits\n"
    os.killpg(driver.pid, signal.SIGTERM)
    _, said = driver.communicate(timeout=60)
    assert driver.returncode == 75, said


EARLY = """
import signal, subprocess, sys, threading, time
from can_dist.cluster.connection import connect
from can_dist.config import Cluster
from can_dist.console import interruptible
from can_dist.errors import Interrupted
import psutil, os

def signal_me():
    while not psutil.Process().children():  # Ray's first server: its own handler is in place by now
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=signal_me, daemon=True).start()
try:
    with interruptible():
        connect(Cluster())
        print("connected", flush=True)
        time.sleep(5)
except Interrupted as stopped:
    raise SystemExit(stopped.exit_code)
"""


@pytest.mark.slow
def test_signal_while_ray_starts_is_the_drivers_too() -> None:
    """Ray's start sets a handler that exits with 15."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", EARLY], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (75, ""), done.stderr


def test_s1_token_is_made_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "kept" / "token"))
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "1")  # put back afterwards
    make_private()
    listen_on_loopback(False)
    assert len((tmp_path / "kept" / "token").read_text()) == 64
    assert stat.S_IMODE((tmp_path / "kept" / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700


def test_s1_local_ray_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(EnvironmentProblem, match="every user of this machine could then command a local Ray"):
        make_private()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_s1_token_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 64)
    os.chown(token, 12345, -1)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(EnvironmentProblem, match=r"belongs to another user \(id 12345\)"):
        make_private()
    assert "belongs to another user" in check_ray(Cluster())[0].state
