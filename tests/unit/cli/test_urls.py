"""URLs where only a path of this machine can stand: refused as they were typed, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.errors import ConfigError
from can_dist.tables.urls import check_run_directory

URL = "s3://bucket/name"
COMMANDS = [
    ("run", "my.yaml", "--run", URL),
    ("sweep", "my.yaml", "--run", URL, "--margin", "safety=1"),
    ("demo", "--run", URL),
    ("status", URL),
    ("verify", URL),
    ("chat", URL),
    ("compare", URL),
    ("compare", ".", "--out", URL),
    ("certify", URL),
    ("estimate", URL),
    ("export", "policy", URL, "--out", "mine"),
    ("export", "preferences", ".", "--out", f"{URL}.parquet"),
    ("doctor", "--run", URL),
    ("init", URL, "--data", "prompts.jsonl"),
    ("files", "--to", URL),
    ("fit-scorer", "model", "--data", "pairs.jsonl", "--criterion", "safe", "--out", URL),
    ("solve", "--scores", URL, "--reward", "reward", "--beta", "1", "--constraint", "safety:margin=1"),
    ("frontier", "--scores", "scores.parquet", "--reward", "r", "--beta", "1", "--constraint", "s", "--plot", URL),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_url_is_refused_as_it_was_typed(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"s3://bucket/name"):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_is_told_why() -> None:
    with pytest.raises(ConfigError, match=rf"run directory {URL}: needs a file system with atomic rename"):
        check_run_directory(URL)
    check_run_directory("runs/mine")
