"""The built wheel, installed: it works in an empty directory outside the repository, with all that its pages name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from reader import reader_folder

from can_dist.config.shipped import FOLDERS, shipped_names

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
# the smallest demo that still goes through every stage
SMALL = {
    "prompts.num_train": 40,
    "prompts.num_test": 16,
    "prompts.num_validation": 32,
    "generate.num_responses": 4,
    "evaluate.num_responses": 2,
    "train.num_epochs": 1,
    "constraints.safety.margin": 0.1,
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the demo on cores that others use too


def run(*command: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that would lend it the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in isolation as a user's pip builds it; or that of a release (``make release``)."""
    if "CAN_DIST_WHEEL" in os.environ:
        return Path(os.environ["CAN_DIST_WHEEL"])
    folder = tmp_path_factory.mktemp("wheel")
    try:
        run(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(folder),
            str(ROOT),
            cwd=folder,
        )
    except AssertionError as error:
        if "Connection" in str(error):
            pytest.skip("no package index can be reached for the build back-end")
        raise
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def program(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The installed ``can-dist``, or with ``name`` another program beside it: in an environment of its own."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    # the dependencies are those of this environment; its own .pth files, and so the repository, are not read
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")

    def command(
        *arguments: str, cwd: Path, name: str = "can-dist", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        return run(str(folder / "bin" / name), *arguments, cwd=cwd, check=check)

    where = command("-c", "import can_dist; print(can_dist.__file__)", cwd=folder, name="python").stdout
    assert Path(where.strip()).is_relative_to(site)
    return command


def test_every_file_that_pages_and_messages_name_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"can_dist/shipped/{name}" for folder in FOLDERS for name in shipped_names(folder)} <= names
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "can_dist").rglob("*") if path.is_file()}
    assert {name for name in code if "__pycache__" not in name} <= names
    assert {name.split("/")[0] for name in names} == {
        "can_dist",
        f"{wheel.name.removesuffix('-py3-none-any.whl')}.dist-info",
    }
    assert wheel.stat().st_size < 2 << 20


def test_names_mean_the_same_files_as_in_the_repository(program: Command, tmp_path: Path) -> None:
    listed = program("files", cwd=tmp_path).stdout.splitlines()
    assert listed == [name for folder in FOLDERS for name in shipped_names(folder)]
    assert "ds_config: zero3_bf16\n" in program("config", "instruct_8b/mocan", cwd=tmp_path).stdout
    program("files", "ray_jobs", "recipes/smoke.py", cwd=tmp_path)
    assert (tmp_path / "ray_jobs" / "slurm.sbatch").read_bytes() == (ROOT / "ray_jobs" / "slurm.sbatch").read_bytes()
    job = program("ray_jobs/run.py", "pku_7b/lora", "--run", "here", cwd=tmp_path, name="python", check=False)
    assert (job.returncode, job.stderr[:37]) == (2, "ConfigError: --run here: a relative p")


def test_version_is_that_of_the_project_file(program: Command, tmp_path: Path) -> None:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert program("--version", cwd=tmp_path).stdout.strip().endswith(f" {version}")


def test_demo_runs_from_an_empty_directory(program: Command, tmp_path: Path) -> None:
    changes = [text for key, value in SMALL.items() for text in ("--set", f"{key}={value}")]
    printed = program("demo", *changes, cwd=tmp_path).stdout
    [page] = re.findall(r"report: (\S+)$", printed, re.MULTILINE)
    assert "<html" in (tmp_path / page).read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_own_data_of_the_readme_runs_and_is_reused_from_another_directory(program: Command, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    reader_folder(folder)
    text = (folder / "my.yaml").read_text().replace("train:\n", "train:\n  ds_config: zero3_cpu\n")
    (folder / "my.yaml").write_text(text)
    page = program("run", "my.yaml", "--run", "runs/mine", cwd=folder).stdout.strip()
    assert "<html" in (folder / page / "report.html").read_text(encoding="utf-8")
    log = folder / "runs" / "mine" / "log.jsonl"
    before = len(log.read_text().splitlines())
    # its paths are relative: found beside the file, and the same content has the same identity
    again = program("run", "reader/my.yaml", "--run", "reader/runs/mine", cwd=tmp_path).stdout.strip()
    assert again == f"reader/{page}"
    events = [json.loads(line).get("event") for line in log.read_text().splitlines()[before:]]
    assert "reused" in events
    assert "started" not in events
