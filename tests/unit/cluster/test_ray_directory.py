"""A local Ray under a long TMPDIR, as batch systems set it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from can_dist.cluster import ray_directory
from can_dist.cluster.ray_directory import session_directory
from can_dist.config import Cluster
from can_dist.doctor import Severity
from can_dist.doctor.ray_cluster import check_ray
from can_dist.errors import EnvironmentProblem


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


def test_short_directory_is_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    assert session_directory() is None


def test_long_tmpdir_gets_a_private_directory_of_the_users_own(long: Path) -> None:
    directory = Path(str(session_directory()))
    assert len(os.fsencode(directory)) + ray_directory.UNDER_RAY <= ray_directory.LONGEST_SOCKET
    assert stat.S_IMODE(directory.parent.stat().st_mode) == 0o700
    assert session_directory() == str(directory)  # again, now that it is there
    [finding] = check_ray(Cluster())
    assert finding.severity is Severity.OK
    assert f"its sessions lie in {directory}" in finding.state


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


def test_local_ray_starts_under_a_long_tmpdir(tmp_path: Path) -> None:
    """With the check left out Ray's own OSError about AF_UNIX paths comes, as a traceback."""
    directory = tmp_path / ("slurm_jobdir_1355700_of_a_user" * 3)
    directory.mkdir()
    code = (
        "from can_dist.cluster.connection import connect; from can_dist.config import Cluster; connect(Cluster());"
        "import ray; print(ray.get(ray.remote(lambda: 3).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, "TMPDIR": str(directory)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1:] == ["3"], done.stderr[-2000:]
