"""No test reads or writes the user's home and caches; CI runs on an empty home with a short list of variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serving_hub

ROOT = Path(__file__).resolve().parents[2]
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
from can_dist.dual.kernel import *
from can_dist.stages.score_cache import open_cache
from can_dist.training.extensions import check_build_directories

matplotlib.pyplot.figure()
datasets.load_dataset("json", data_files=sys.argv[1])
HfApi().model_info("some/model")
with open_cache():
    check_build_directories()
subprocess.run(["git", "config", "--list"], check=True, stdout=subprocess.DEVNULL)
print(*sorted(str(path.relative_to(Path.home())) for path in Path.home().rglob("*") if path.is_file()), sep="\\n")
"""
PROBE = "tests/unit/test_home.py::test_what_libraries_keep_is_kept_in_the_home_of_the_session"
SESSIONS = {"one process": [PROBE], "workers": [PROBE, "-n", "2"], "kernels": ["kernels/tests", "-k", "refused"]}


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


@pytest.mark.parametrize("arguments", SESSIONS.values(), ids=SESSIONS.keys())
def test_session_reads_and_writes_nothing_of_the_user(users_home: Path, arguments: list[str]) -> None:
    before = [users_home, *users_home.rglob("*")]
    for path in before:
        os.utime(path, (0, path.stat().st_mtime))
    of_caller = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = of_caller | {name: str(users_home / place) for name, place in CACHES.items()}
    environment |= {"HOME": str(users_home), "HF_TOKEN": "of-the-user"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    read = [str(path.relative_to(users_home)) for path in before if path.exists() and path.stat().st_atime > 0]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {users_home, *users_home.rglob("*")} == set(before), "written or removed"
    if not keeps_access_times(users_home.parent):
        pytest.skip("this file system keeps no access times, so what was read is not known")
    assert read == []
