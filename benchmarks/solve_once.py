"""One whole solve in a process of its own, for :mod:`dual_scale`: prints λ*, seconds and memory as JSON.

python benchmarks/solve_once.py memory DIR      # DIR/reward.npy and DIR/safety.npy, 128 scores per prompt
python benchmarks/solve_once.py streamed DIR    # Parquet shards with prompt_id, reward, safety
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from can_dist.cluster.big_scores import big_scores
from can_dist.dual import ColumnScores, DualSolution, Margin, solve_table

NUM_RESPONSES = 128


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since the last reset) of this process, bytes. Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def solve(scores: ColumnScores) -> DualSolution:
    """Solve for a margin of 0.5 at β = 1."""
    return solve_table(scores, beta=1.0, constraints=[Margin("safety", margin=0.5)], throw=False)


def main() -> None:
    """Compile, then solve and measure."""
    kind, directory = sys.argv[1], Path(sys.argv[2])
    dtype = np.float64 if kind == "memory" else np.float32
    tiny = np.random.default_rng(0).standard_normal((2, NUM_RESPONSES)).astype(dtype)
    solve(ColumnScores.from_arrays(tiny[0], [tiny[1]], [NUM_RESPONSES]))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak of the compiler
    if kind == "memory":
        reward, safety = (np.load(directory / f"{name}.npy") for name in ("reward", "safety"))
        size, start = reward.nbytes + safety.nbytes, time.perf_counter()
        counts = np.full(reward.size // NUM_RESPONSES, NUM_RESPONSES)
        table = ColumnScores.from_arrays(reward, [safety], counts)
        solution = solve(table)
    else:
        start = time.perf_counter()
        with big_scores(directory, ("reward", "safety")) as table:
            solution = solve(table)
        size = 2 * table.num_rows * np.dtype(dtype).itemsize
    result = {
        "kind": kind,
        "num_scores": table.num_rows,
        "lam": solution.lam["safety"],
        "num_steps": solution.num_steps,
        "seconds": time.perf_counter() - start,
        "column_bytes": size,
        "before_bytes": before,
        "peak_bytes": resident("VmHWM"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
