"""No test reads or writes the user's home and caches; CI runs on an empty home with a short list of variables."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serving_hub

ROOT = Path(__file__).resolve().parents[3]
# What libraries look for in a home when they are imported or first used
BAIT = (
    ".cache/can_dist/scores.sqlite",
    ".cache/can_dist/torch_extensions/lock",
    ".cache/huggingface/.agent_harnesses.json",
    ".cache/huggingface/token",
    ".cache/matplotlib/fontlist-v390.json",
    ".config/git/config",
    ".config/matplotlib/matplotlibrc",
    ".gitconfig",
    ".netrc",
    ".ray/auth_token",
    ".triton/cache/key",
)
CACHES = {
    "HF_DATASETS_CACHE": ".cache/huggingface/datasets",
    "HF_HOME": ".cache/huggingface",
    "HF_HUB_CACHE": ".cache/huggingface/hub",
    "MPLCONFIGDIR": ".config/matplotlib",
    "NUMBA_CACHE_DIR": ".cache/numba",
    "TORCHINDUCTOR_CACHE_DIR": ".cache/torchinductor",
    "TORCH_EXTENSIONS_DIR": ".cache/can_dist/torch_extensions",
    "TRITON_CACHE_DIR": ".triton/cache",
    "XDG_CACHE_HOME": ".cache",
    "XDG_CONFIG_HOME": ".config",
}
# What tests do that leads into a home: a figure, a data set, a question to the hub, our score cache and the dual, git
USE = """
import subprocess, sys
from pathlib import Path
import datasets, matplotlib.pyplot, torch
from huggingface_hub import HfApi
import can_dist.dual.kernel
from can_dist.stages.score_cache import open_cache
from can_dist.training.extensions import check_build_directories

matplotlib.pyplot.figure()
datasets.load_dataset("json", data_files=sys.argv[1])
HfApi().model_info("some/model")
with open_cache():
    check_build_directories(launched=False)
subprocess.run(["git", "config", "--list"], check=True, stdout=subprocess.DEVNULL)
print(*sorted(str(path.relative_to(Path.home())) for path in Path.home().rglob("*") if path.is_file()), sep="\\n")
"""
PROBE = "tests/unit/repo/test_home.py::test_what_libraries_keep_is_kept_in_the_home_of_the_session"
SESSIONS = {"one process": [PROBE], "workers": [PROBE, "-n", "2"]}
TOUCH = """
from pathlib import Path

def test_touch():
    (Path.home() / ".triton").mkdir()
"""


def test_what_libraries_keep_is_kept_in_the_home_of_the_session(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "w1"}\n', encoding="utf-8")
    with serving_hub() as hub:
        command = [sys.executable, "-c", USE, str(rows)]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = done.stdout.splitlines()
    assert ".cache/can_dist/scores.sqlite" in kept
    assert any(name.startswith(".cache/huggingface/datasets/json/") for name in kept)
    assert Path.home().name.startswith("can-dist-home-")
    assert "HF_TOKEN" not in os.environ


@pytest.fixture
def users_home(tmp_path: Path) -> Path:
    """A home with files that libraries look for, none of which was read since 1970."""
    home = tmp_path / "users-home"
    for name in BAIT:
        file = home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("", encoding="utf-8")
    return home


def keeps_access_times(directory: Path) -> bool:
    file = directory / "read"
    file.write_text("x", encoding="utf-8")
    os.utime(file, (0, file.stat().st_mtime))
    file.read_text(encoding="utf-8")
    return file.stat().st_atime > 0


def session_that_leaves_no_trace(users_home: Path, *arguments: str, folders: str = "") -> None:
    """Run pytest as a user whose variables all point into a home, and see that nothing of it was used."""
    before = [users_home, *users_home.rglob("*")]
    for path in before:
        os.utime(path, (0, path.stat().st_mtime))
    of_caller = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = of_caller | {name: str(users_home / place) for name, place in CACHES.items()}
    environment |= {"HOME": str(users_home), "HF_TOKEN": "of-the-user"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [folders, os.environ["PYTHONPATH"]]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    read = [str(path.relative_to(users_home)) for path in before if path.exists() and path.stat().st_atime > 0]
    assert {users_home, *users_home.rglob("*")} == set(before), "written or removed"
    assert done.returncode == 0, done.stdout + done.stderr
    if not keeps_access_times(users_home.parent):
        pytest.skip("this file system keeps no access times, so what was read is not known")
    assert read == []


@pytest.mark.parametrize("arguments", SESSIONS.values(), ids=SESSIONS.keys())
def test_session_reads_and_writes_nothing_of_the_user(users_home: Path, arguments: list[str]) -> None:
    session_that_leaves_no_trace(users_home, *arguments)


def test_session_of_the_kernels_reads_and_writes_nothing_of_the_user(users_home: Path, tmp_path: Path) -> None:
    probe = tmp_path / "test_touch.py"
    probe.write_text(TOUCH, encoding="utf-8")
    arguments = ["-c", "kernels/pyproject.toml", "-p", "conftest", str(probe)]
    session_that_leaves_no_trace(users_home, *arguments, folders=str(ROOT / "kernels" / "tests"))


MAKEFILE = """
setup:
	@env -0 > variables; ls -A "$$HOME" > home
lint docs:
test:
	@echo '1 failed in 0.01s'; exit 1
"""


def test_ci_runs_in_an_empty_home_with_the_variables_of_its_list_and_ends_as_the_tests_do(tmp_path: Path) -> None:
    checkout, home, programs = tmp_path / "checkout", tmp_path / "callers-home", tmp_path / "bin"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    (checkout / "Makefile").write_text(MAKEFILE, encoding="utf-8")
    (home / ".config" / "pip").mkdir(parents=True)
    settings = home / ".config" / "pip" / "pip.conf"
    settings.write_text("[global]\n", encoding="utf-8")
    programs.mkdir()
    (programs / "chromium").touch(mode=0o755)  # or the script installs it
    kept = {
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "CI": "true",
        "OPENBLAS_CORETYPE": "Haswell",
        "PIP_FIND_LINKS": "/opt/with blanks",
        "https_proxy": "http://localhost:1",
    }
    left = {"HOME": str(home), "HF_TOKEN": "of-the-user", "PYTHONPATH": "/elsewhere", "RAY_ADDRESS": "localhost:1"}
    command = ["bash", str(checkout / ".ci" / "run")]
    done = subprocess.run(command, env=kept | left, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, "make's own, for a target that failed"
    assert done.stdout.splitlines()[-1] == "1 failed in 0.01s"
    variables = dict(entry.split("=", 1) for entry in (checkout / "variables").read_text().split("\0") if entry)
    of_the_script = Path(variables.pop("HOME"))
    of_shell_and_make = {
        "_",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "MAKE_TERMOUT",
        "MAKE_TERMERR",
    }
    variables = {name: value for name, value in variables.items() if name not in of_shell_and_make}
    assert variables == kept | {"PIP_CONFIG_FILE": str(settings), "CAN_DIST_CI_HOME": str(of_the_script)}
    assert (checkout / "home").read_text() == ""
    assert not of_the_script.exists(), "removed at the end"
