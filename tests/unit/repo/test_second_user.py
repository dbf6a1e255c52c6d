"""What another user of the machine, or a member of one's group, gets when he tries: run under a second user id."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from second_user import NOBODY, OUR_GROUP, attack, needs_root, place_that_all_enter

from can_dist.errors import EnvironmentProblem
from can_dist.tables.artifacts import digest_of, file_digest
from can_dist.training import checkpoints, extensions

ROOT = Path(__file__).parents[3]
CANARY = "sk-canary-8c1f5e"

pytestmark = needs_root


@pytest.fixture
def shared() -> Iterator[Path]:
    with place_that_all_enter() as directory:
        yield directory


# ------------------------------------------------------------------------------------------------------ a local Ray

VICTIM = """
import json, os, sys
from can_dist.cluster.connection import connect
from can_dist.config import Cluster
connect(Cluster())
import ray
session = ray._private.worker._global_node.get_session_dir_path()
address = ray.get_runtime_context().gcs_address
print(json.dumps({"pid": os.getpid(), "session": session, "address": address}), flush=True)
sys.stdin.read()
"""

READ = """
answer = {
    "token": tried(lambda: Path(token).read_text()),
    "session": tried(lambda: os.listdir(session)),
    "environment": tried(lambda: Path(f"/proc/{pid}/environ").read_bytes()),
}
"""

CONNECT = "answer = tried(lambda: GcsClient(address=address))"


def connects(victim: dict[str, Any], user: int, **authentication: str) -> str:
    """Return what comes of a connection to the head under a user id, with what he has as a token."""
    return str(
        attack(
            CONNECT,
            victim,
            first="from ray._raylet import GcsClient",
            environment=authentication,
            user=user,
            group=user,
        )
    )


@pytest.mark.slow
def test_s1_another_user_reaches_nothing_of_a_local_ray(shared: Path) -> None:
    """The same attempts by its owner show that each of them would have got through."""
    token = shared / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, mode=0o755)
    token.write_text("a" * 64)
    token.chmod(0o644)  # as Ray writes it
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(shared / "home"), "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": CANARY}
    process = subprocess.Popen(
        [sys.executable, "-c", VICTIM], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    try:
        victim = {**json.loads(process.stdout.readline()), "token": str(token)}
        assert set(attack(READ, victim, user=os.getuid(), group=os.getgid()).values()) == {"done"}
        assert set(attack(READ, victim).values()) == {"PermissionError"}
        assert set(attack(READ, victim, group=os.getgid()).values()) == {"PermissionError"}, "a member of our group"
        assert connects(victim, os.getuid(), **with_token) == "done"
        assert connects(victim, NOBODY, **with_token) == "died", "Ray ends a process that may not read its token"
        assert connects(victim, NOBODY, RAY_AUTH_MODE="disabled") == "AuthenticationError"
        assert connects(victim, NOBODY, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64) == "AuthenticationError"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=60)


# ------------------------------------------------------------------------------------- pickles and compiled extensions


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def committed(step: Path, content: bytes) -> str:
    """Write the file of a checkpoint of one rank; return its commit."""
    (step / "state").mkdir(parents=True, exist_ok=True)
    file = step / "state" / "rank_0.pt"
    file.write_bytes(content)
    commit = {"step": 4, "world_size": 1, "files": {"state/rank_0.pt": file_digest(file)}}
    return json.dumps({**commit, "digest": digest_of(commit)})


def shared_with_group(directory: Path, rights: int) -> None:
    """Give everything below a directory to our group, with these rights of hers, as a shared project's umask does."""
    for path in [directory, *directory.rglob("*")]:
        os.chown(path, -1, OUR_GROUP)
        path.chmod(0o700 | rights << 3 | 0o005 if path.is_dir() else 0o600 | rights << 3)


REPLACE = """
def replace():
    for name, content in contents.items():
        path = Path(name)
        path.with_suffix(".new").write_bytes(bytes.fromhex(content))
        os.replace(path.with_suffix(".new"), path)

answer = tried(replace)
"""


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(("rights", "outcome"), [(0o7, "done"), (0o5, "PermissionError")])
def test_s4_a_group_member_replaces_pickle_and_commit(shared: Path, tmp_path: Path, rights: int, outcome: str) -> None:
    """Where the group's rights let him, nothing is unpickled; where they do not, the checkpoint is what it was."""
    marker, directory = shared / "executed", shared / "checkpoints"
    forged = committed(tmp_path / "forged", pickle.dumps(Bomb(marker)))
    step = directory / "step-000004"
    commit = committed(step, pickle.dumps("what was committed"))
    (step / "COMMIT.json").write_text(commit)
    shared_with_group(directory, rights)
    bomb = (tmp_path / "forged" / "state" / "rank_0.pt").read_bytes()
    contents = {str(step / "state" / "rank_0.pt"): bomb.hex(), str(step / "COMMIT.json"): forged.encode().hex()}
    assert attack(REPLACE, {"contents": contents}, group=OUR_GROUP) == outcome
    if outcome == "done":
        with pytest.raises(EnvironmentProblem, match=r"is writable by its group|belongs to another user"):
            checkpoints.newest(directory)
        for path in (directory, step, step / "state"):  # closed afterwards: his files are there all the same
            path.chmod(0o700)
        with pytest.raises(EnvironmentProblem, match=f"belongs to another user \\(id {NOBODY}\\)"):
            checkpoints.newest(directory)
    else:
        assert checkpoints.newest(directory) == checkpoints.Checkpoint(step, 4, universal=False)
        assert (step / "COMMIT.json").read_text() == commit
    assert not marker.exists()


@pytest.mark.parametrize(("rights", "outcome"), [(0o7, "done"), (0o5, "PermissionError")])
def test_s11_a_group_member_replaces_a_compiled_extension(
    shared: Path, monkeypatch: pytest.MonkeyPatch, rights: int, outcome: str
) -> None:
    builds = shared / "extensions"
    compiled = builds / "deepspeed_shm_comm" / "op.so"
    compiled.parent.mkdir(parents=True)
    compiled.write_bytes(b"ours")
    shared_with_group(builds, rights)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(builds))
    assert attack(REPLACE, {"contents": {str(compiled): b"theirs".hex()}}, group=OUR_GROUP) == outcome
    if outcome == "done":
        with pytest.raises(EnvironmentProblem, match="so compiled code of somebody else could be loaded here"):
            extensions.check_build_directories(launched=False)
        builds.chmod(0o700)
        compiled.parent.chmod(0o700)
        with pytest.raises(EnvironmentProblem, match=f"belongs to another user \\(id {NOBODY}\\)"):
            extensions.check_build_directories(launched=False)
    else:
        extensions.check_build_directories(launched=False)
        assert compiled.read_bytes() == b"ours"
