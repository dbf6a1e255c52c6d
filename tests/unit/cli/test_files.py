"""``can-dist files``: lists what travels with the package and copies it, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.config.shipped import FOLDERS, shipped_names
from can_dist.errors import ConfigError

ROOT = Path(__file__).parents[3]


def run(*arguments: str) -> list[str]:
    done = CliRunner().invoke(cli, ["files", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output.splitlines()


def test_without_a_name_all_are_listed() -> None:
    assert run() == [name for folder in FOLDERS for name in shipped_names(folder)]


def test_a_folder_and_a_file_are_copied_to_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = run("ray_jobs/", "ds_configs/zero3_cpu.json", "ray_jobs/run.py")
    assert written == [*shipped_names("ray_jobs"), "ds_configs/zero3_cpu.json"]
    assert {str(path) for path in Path().rglob("*") if path.is_file()} == set(written)
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in written)
    assert run("ray_jobs") == shipped_names("ray_jobs"), "again is the same"
    assert run("ds_configs/README.md", "--to", "there") == ["there/ds_configs/README.md"]


def test_another_file_in_the_way_is_kept_and_nothing_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ray_jobs").mkdir()
    (tmp_path / "ray_jobs" / "run.py").write_text("mine")
    with pytest.raises(ConfigError, match=r"^ray_jobs/run.py: is there already and is another. Nothing was copied"):
        run("ds_configs", "ray_jobs")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "ray_jobs" / "run.py"]
    assert (tmp_path / "ray_jobs" / "run.py").read_text() == "mine"


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ray_jobs").touch()
    with pytest.raises(ConfigError, match=r"cannot be written to .*ray_jobs.* Give --to a directory"):
        run("ds_configs", "ray_jobs", "--to", str(tmp_path))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ray_jobs"]


@pytest.mark.parametrize("name", ["ray_job", "ray_jobs/run", "../ray_jobs", "/etc/passwd", "", "can_dist"])
def test_an_unknown_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no file or folder of this name comes with can-dist"):
        run("ds_configs", name)
    assert list(tmp_path.iterdir()) == []
