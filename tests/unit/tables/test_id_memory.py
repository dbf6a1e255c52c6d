"""Ids are texts of any length: what ``solve`` needs of memory follows the file's columns, not its longest id."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NUM_RESPONSES = 8

SOLVE = """
import sys
from pathlib import Path
from click.testing import CliRunner
from can_dist.cli import cli

def bytes_of(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

def solve(path):
    options = ["--reward", "reward", "--constraint", "safety:margin=0.3", "--beta", "1", "--engine", "memory"]
    done = CliRunner().invoke(cli, ["solve", "--scores", path, *options], standalone_mode=False)
    if done.exception:
        raise done.exception

solve(sys.argv[1])  # loads every module
before = bytes_of("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
solve(sys.argv[2])
print(bytes_of("VmHWM") - before)
"""


def write(path: Path, prompts: list[str]) -> int:
    """Write a table with the prompts' texts as ids; returns the bytes of its columns."""
    num_rows = len(prompts) * NUM_RESPONSES
    scores = np.random.default_rng(0).normal(size=(2, num_rows))
    ids = [prompt for prompt in prompts for _ in range(NUM_RESPONSES)]
    columns = {"prompt_id": ids, "response_id": list(range(num_rows)), "reward": scores[0], "safety": scores[1]}
    table = pa.table(columns)
    if path.suffix == ".jsonl":
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
    else:
        pq.write_table(table, path)
    return table.nbytes


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("num_prompts", "length", "longest"),
    [(2000, 100, 100_000), (4000, 300, 300), (4000, 3000, 3000)],
    ids=["one of 100,000 characters", "32,000 ordinary rows", "100 MB"],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_memory_follows_the_columns(tmp_path: Path, num_prompts: int, length: int, longest: int, suffix: str) -> None:
    """At most 1.5 × the columns, and 40 MB for reader and solver. With ids of one width: 6.5, 1.3 and 1.6 GB."""
    prompts = [f"{number:06d}".ljust(length, "x") for number in range(num_prompts)]
    prompts[0] = "0" * longest
    small, large = tmp_path / f"small{suffix}", tmp_path / f"large{suffix}"
    write(small, prompts[-300:])
    size = write(large, prompts)
    done = subprocess.run([sys.executable, "-c", SOLVE, str(small), str(large)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    limit = 1.5 * size + 40e6
    assert int(done.stdout) < limit, f"{int(done.stdout) / 1e6:.0f} MB for {size / 1e6:.0f} MB of columns"
