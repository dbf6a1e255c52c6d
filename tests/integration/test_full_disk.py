"""A disk that fills inside a stage: one message, exit code 6, nothing half-written, and the same command goes on.

What an actor would write is written in this process; that an actor's error is told alike is in ``test_ledger``.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sealed_run import without_ray
from small_run import small_run, write_config

from can_dist.config import Config, load_config
from can_dist.console import of_machine
from can_dist.run import Run
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.verify import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PAGE = 4096


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB; the test is skipped where none may be mounted."""
    directory = tmp_path / "disk"
    directory.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory], check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextmanager
def full_but_for(disk: Path, pages: int) -> Iterator[None]:
    """Leave so many pages of a disk."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(bytes(free - pages * PAGE))
    try:
        yield
    finally:
        filler.unlink()


def pages_of(directory: Path) -> int:
    return sum(-(-path.stat().st_size // PAGE) for path in directory.iterdir())


def unfinished(run: Path, stage: str) -> Path:
    """Return the one directory of a stage that is not committed, in which nothing is half-written."""
    (directory,) = (path for path in run.glob(f"{stage}-*") if not (path / MANIFEST).exists())
    assert not list(directory.glob(".tmp-*"))
    assert verify_run(run)[1] == []
    return directory


def parts(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("part-*.arrow")}


def stages(run: Path, config: Config, last: str) -> None:
    """Do what ``can-dist LAST`` does."""
    with Run(run, config) as bound:
        prompts = bound.prompts()
        responses = bound.generate(config.reference, prompts)
        if last == "generate":
            return
        scores = bound.score(responses, config.reward, config.constraints, config.reference)
        if last == "score":
            return
        bound.label(responses, scores, bound.solve(scores, config.constraints, config.beta), config.beta)


def digests(run: Path) -> dict[str, str]:
    return {path.parent.name: load_artifact(path.parent).digest for path in run.glob(f"*/{MANIFEST}")}


def test_disk_that_fills_in_generate_score_and_label(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    path = write_config(tmp_path / "small.yaml", small_run(tmp_path))
    config, run, calm = load_config(path), disk / "run", tmp_path / "calm"
    stages(calm, config, "label")
    with Run(run, config) as bound:
        bound.prompts()
    for stage in ("generate", "score"):
        pages = pages_of(next(calm.glob(f"{stage}-*"))) // 2
        with full_but_for(disk, pages), pytest.raises(OSError, match="No space left") as refused:
            stages(run, config, stage)
        directory = unfinished(run, stage)
        assert re.fullmatch(
            rf"{re.escape(str(directory))}/part-\d{{5}}\.\w+: {os.strerror(errno.ENOSPC)}\. Free space, or give a "
            r"place on another disk\. Finished work is kept; the same command goes on from it\.",
            of_machine(refused.value),
        ), refused.value
        kept = parts(directory)
        assert len(kept) >= 1, "the disk was full before anything was made"
        stages(run, config, stage)
        assert kept.items() <= parts(directory).items(), "what was finished is not made again"
    command = [sys.executable, "-m", "can_dist", "label", str(path), "--run", str(run)]
    with full_but_for(disk, 3):
        failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert (failed.returncode, "Traceback" in failed.stderr) == (6, False), failed.stderr
    (error,) = (line for line in failed.stderr.splitlines() if line.startswith("EnvironmentProblem: "))
    assert re.match(rf"EnvironmentProblem: {re.escape(str(run))}/\S+: No space left on device\. Free space", error)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert digests(run) == digests(calm)
    assert any(name.startswith("label-") for name in digests(run))
