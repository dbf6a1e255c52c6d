"""What a verb imports before it works: each of these packages costs 0.2 to 3 s of every start."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

# not pandas, which pyarrow imports with its first array
SLOW = {"torch", "ray", "transformers", "datasets", "matplotlib", "scipy.stats", "scipy.optimize", "scipy.interpolate"}
SOLVE = (
    "solve",
    "--scores",
    "s.parquet",
    "--reward",
    "reward",
    "--constraint",
    "safety:margin=0.2",
    "--beta",
    "1",
)
CODE = """
import sys
from can_dist.cli.main import main
try:
    main()
finally:
    print(sorted(sys.modules))
"""


@pytest.mark.parametrize("arguments", [SOLVE, ("status", "runs/none"), ("--help",)], ids=lambda given: given[0])
def test_short_verb_loads_no_slow_package(arguments: tuple[str, ...], tmp_path: Path) -> None:
    score = np.random.default_rng(0).normal(size=(2, 80))
    columns = {"prompt_id": np.repeat(np.arange(10), 8).astype(str), "reward": score[0], "safety": score[1]}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    command = [sys.executable, "-c", CODE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    loaded = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    assert "can_dist.errors" in loaded, done.stderr
    assert arguments != SOLVE or "can_dist.dual.solve" in loaded, done.stderr
    assert not SLOW & loaded
