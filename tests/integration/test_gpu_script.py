"""The script for nine minutes of a GPU, on a CPU: in an environment with what the GPU machine holds and no more."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# of the GPU machine's image; torch is the CPU build of the version that constraints.txt pins
IMAGE = ["transformers==5.17.*", "accelerate==1.15.*", "peft==0.21.*", "numpy", "pyarrow", "numba", "scipy", "pytest"]
# what comes along with these here and is not in the image: the wheels must bring it
NOT_IN_THE_IMAGE = ["pydantic", "pydantic_core", "annotated-types", "typing-inspection"]
SECTIONS = [
    "machine",
    "ceilings",
    "attention",
    "kernels",
    "kernels-bench",
    "heads",
    "models",
    "train-large",
    "train-large-trl",
    "train-small",
    "scoring",
    "packs",
]


def bare_environment(**more: str) -> dict[str, str]:
    """The variables of this process without those that would lend the script this process's packages."""
    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CAN_DIST_DATA")} | more


def run(*command: str, **more: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=bare_environment(**more), capture_output=True, text=True, check=False, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with the packages of the GPU machine."""
    folder = tmp_path_factory.mktemp("image")
    run(sys.executable, "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    try:
        run(python, "-m", "pip", "install", "--quiet", *pins, *IMAGE)
    except AssertionError as error:
        if "Connection" in str(error):
            pytest.skip("no package index can be reached")
        raise
    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *NOT_IN_THE_IMAGE)
    absent = "import importlib.util as u; print([n for n in ('ray', 'deepspeed', 'trl', 'pydantic') if u.find_spec(n)])"
    assert run(python, "-c", absent).strip() == "[]"
    return python


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(5400)
def test_the_script_passes_on_a_cpu_with_nothing_but_the_image_and_the_wheels(
    image: str, shared_data: Path, tmp_path: Path
) -> None:
    wheels, version = tmp_path / "wheels", f"{sys.version_info.major}.{sys.version_info.minor}"
    told = run("benchmarks/gpu_wheels.sh", version, str(wheels), PYTHON=image, CAN_DIST_DATA=str(shared_data))
    assert "of 64 MiB" in told
    run("benchmarks/gpu.sh", "--device", "cpu", "--output", str(tmp_path), PYTHON=image, GPU_WHEELS=str(wheels))
    lines = [json.loads(line) for line in (tmp_path / "gpu_script_on_cpu.jsonl").read_text().splitlines()]
    assert [line["section"] for line in lines] == SECTIONS
    assert {line["section"]: line["status"] for line in lines} == dict.fromkeys(SECTIONS, "ok")
    results: dict[str, Any] = {line["section"]: line["result"] for line in lines}
    assert all(case["ok"] for case in results["attention"]["cases"].values())
    assert results["heads"]["rows"][0]["apart_nats"] < 1e-4
    (ours,) = results["train-large"]["runs"]
    assert ours["attention"].startswith("packs that share prompts, attention by sdpa")
    assert math.isclose(ours["first_loss_from_ln2"], 0, abs_tol=1e-3)
    work = results["train-small"]["works"]["pku-like"]
    assert work["rounds"] == 2
    assert work["agreement"]["same_tokens"]
    assert work["agreement"]["loss_of_a_step"] < 1e-3, "both sides do the same work"
    assert {run["distributed"] for run in results["train-large-trl"]["runs"]} == {"NO"}
    assert results["packs"]["runs"][0]["operations"]


def test_a_machine_without_a_gpu_is_told_of_the_check(tmp_path: Path) -> None:
    done = subprocess.run(
        ["benchmarks/gpu.sh", "--output", str(tmp_path)],
        cwd=ROOT,
        env=bare_environment(PYTHON=sys.executable, GPU_WHEELS=str(tmp_path), CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6
    assert "sees no GPU here" in done.stdout
    assert "nothing was measured. To check the script itself: benchmarks/gpu.sh --device cpu\n" in done.stdout
    assert list(tmp_path.iterdir()) == []
