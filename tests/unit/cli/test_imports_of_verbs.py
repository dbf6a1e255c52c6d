"""What a verb loads: seconds of a start are noise on a busy machine, modules are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HEAVY = (
    "torch",
    "ray",
    "transformers",
    "datasets",
    "deepspeed",
    "matplotlib",
    "numba",
    "scipy.stats",
    "scipy.optimize",
)
LOOK = """
import json, sys
from can_dist.cli.main import cli
cli.main(sys.argv[2:], standalone_mode=False)
open(sys.argv[1], "w").write(json.dumps(sorted(sys.modules)))
"""


def modules_of(out: Path, *arguments: str) -> set[str]:
    """The modules that a process has after a verb."""
    subprocess.run([sys.executable, "-c", LOOK, str(out), *arguments], check=True, capture_output=True, timeout=120)
    return set(json.loads(out.read_text()))


def solved(folder: Path) -> list[str]:
    random = np.random.default_rng(0)
    columns = {"prompt_id": [f"p{n // 8}" for n in range(320)], "reward": random.normal(size=320)}
    pq.write_table(pa.table(columns | {"safety": random.normal(size=320)}), folder / "scores.parquet")
    return ["--scores", str(folder / "scores.parquet"), "--reward", "reward", "--constraint", "safety:margin=0.1"]


@pytest.mark.parametrize(
    ("verb", "also"), [("--help", ("pandas", "pyarrow", "numpy")), ("status", ("pandas", "pyarrow.compute"))]
)
def test_a_look_loads_no_library_of_models(verb: str, also: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"time": 1.0, "event": "began"}\n')
    loaded = modules_of(tmp_path / "modules", verb, *([str(tmp_path)] if verb == "status" else []))
    assert loaded & {*HEAVY, *also} == set()


def test_a_pipeline_loads_what_most_runs_need() -> None:
    """With torch, which every run needs; scipy.optimize comes with transformers."""
    code = "import json, sys, can_dist.pipeline; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert set(json.loads(done.stdout)) & {"ray", "datasets", "deepspeed", "matplotlib", "scipy.stats"} == set()


def test_a_solution_of_one_constraint_loads_the_solver_alone(tmp_path: Path) -> None:
    """With pandas: pyarrow loads it where it is installed, when it first makes a scalar."""
    loaded = modules_of(tmp_path / "modules", "solve", *solved(tmp_path), "--beta", "1")
    assert loaded & set(HEAVY) == set()
    assert "scipy.special" in loaded
