"""One Newton pass over 10^7 and 10^8 scores beside ``torch.logsumexp``, and a whole solve in memory and streamed.

    python benchmarks/dual_scale.py            # table on the screen, benchmarks/results/dual_scale.{json,md}

A *score* is a number of the reward column; our pass reads as many of the utility column too, and returns D, D' and D''
where the peer returns the log-sum-exp of the rewards alone. Times are medians of calls made in turn in one process
with the same number of threads. Memory is the peak resident size of a process of its own (solve_once.py): in memory
less what it had before the columns were loaded, streamed as it is, with interpreter and libraries. Other ways to make
the pass (NumPy in cache-sized blocks, torch in blocks) are measured beside it: they are why the kernel is numba.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import machine

from can_dist.dual import Block, Pass, ScoreTable, partial_sums, run_pass

NUM_RESPONSES, SHARD_PROMPTS = 128, 50_000
RESULTS = Path(__file__).parent / "results"
LAM, BETA = 0.7, 1.0
GIB = 2**30


def columns(num_scores: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return reward and utility, (N,) each, Gaussian; generated in one go so that both kinds hold the same numbers."""
    generator = np.random.default_rng(0)
    reward, noise = (generator.standard_normal(num_scores, dtype=np.float32) for _ in range(2))
    return reward.astype(dtype), (noise - np.float32(0.3) * reward).astype(dtype)


def in_turn(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of functions called in turn, after one unmeasured call of each."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def torch_blocks(reward: torch.Tensor, utility: torch.Tensor, prompts: int = 256) -> torch.Tensor:
    """The same sums in torch, in blocks that stay in the cache."""
    total = torch.zeros(3, dtype=torch.float64)
    for begin in range(0, reward.shape[0], prompts):
        utility_PK = utility[begin : begin + prompts].double()
        score_PK = (reward[begin : begin + prompts].double() + LAM * utility_PK) / BETA
        log_norm_P = torch.logsumexp(score_PK, 1)
        weight_PK = torch.exp(score_PK - log_norm_P[:, None])
        mean_P = (weight_PK * utility_PK).sum(1)
        variance_P = (weight_PK * (utility_PK - mean_P[:, None]) ** 2).sum(1)
        total += torch.stack([log_norm_P.sum(), mean_P.sum(), variance_P.sum()])
    return total


def pass_row(num_scores: int, dtype: Any, repeats: int, threads: int) -> dict[str, Any]:
    """Time one pass, the peer, and at 10^7 the other ways to make the pass."""
    reward, utility = columns(num_scores, dtype)
    counts = np.full(num_scores // NUM_RESPONSES, NUM_RESPONSES)
    blocks, request = [Block(counts, (reward, utility))], Pass("sums", (0, 1), (1.0, 1.0), (LAM,), BETA)
    reward_PK, utility_PK = (torch.from_numpy(column).view(-1, NUM_RESPONSES) for column in (reward, utility))
    functions: dict[str, Callable[[], Any]] = {
        "ours": lambda: run_pass(blocks, request),
        "logsumexp": lambda: torch.logsumexp(reward_PK, 1),
    }
    if num_scores <= 10**7 and dtype is np.float64:
        table = ScoreTable.build(reward, utility, np.repeat(np.arange(counts.size), counts))
        functions["numpy"] = lambda: partial_sums(table, np.array([LAM]), BETA)
        functions["torch"] = lambda: torch_blocks(reward_PK, utility_PK)
    seconds = in_turn(functions, repeats)
    return {
        "num_scores": num_scores,
        "dtype": np.dtype(dtype).name,
        "threads": threads,
        "seconds": seconds,
        "ratio": seconds["ours"] / seconds["logsumexp"],
    }


def write_shards(directory: Path, num_scores: int) -> None:
    """Write float32 Parquet shards, ids included."""
    reward, utility = columns(num_scores, np.float32)
    for number, begin in enumerate(range(0, num_scores, SHARD_PROMPTS * NUM_RESPONSES)):
        rows = slice(begin, min(begin + SHARD_PROMPTS * NUM_RESPONSES, num_scores))
        prompt = pa.array(np.arange(rows.start, rows.stop) // NUM_RESPONSES)
        table = pa.table({"prompt_id": prompt, "reward": reward[rows], "safety": utility[rows]})
        pq.write_table(table, directory / f"part-{number:05d}.parquet")


def solve_rows(num_scores: int, folder: Path) -> list[dict[str, Any]]:
    """Solve in memory and streamed, each in a new process."""
    directory = folder / f"{num_scores:.0e}"
    (directory / "shards").mkdir(parents=True)
    for name, column in zip(("reward", "safety"), columns(num_scores, np.float64), strict=True):
        np.save(directory / f"{name}.npy", column)
    write_shards(directory / "shards", num_scores)
    rows = []
    for kind, place in (("memory", directory), ("streamed", directory / "shards")):
        command = [sys.executable, str(Path(__file__).with_name("solve_once.py")), kind, str(place)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return rows


def report(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    about = record["machine"]
    lines = [
        "# One Newton pass over 10^7 and 10^8 scores",
        "",
        f"Measured {about['date']} on {about['cores']} cores of {about['cpu']} (load {about['load_average']:.1f}), "
        f"Python {about['python']}, NumPy {about['numpy']}, torch {about['torch']}, numba {about['numba']}.",
        "`python benchmarks/dual_scale.py` writes this file; what is compared is said at its top.",
        "",
        "| scores | type | our pass | torch.logsumexp | ratio | NumPy blocks | torch blocks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["passes"]:
        seconds = {name: f"{1e3 * value:.1f} ms" for name, value in row["seconds"].items()}
        lines.append(
            f"| {row['num_scores']:.0e} | {row['dtype']} | {seconds['ours']} | {seconds['logsumexp']} | "
            f"{row['ratio']:.2f} | {seconds.get('numpy', '')} | {seconds.get('torch', '')} |"
        )
    lines += [
        "",
        "| whole solve | scores | seconds | steps | columns | peak memory | peak / columns |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["solves"]:
        streamed = row["kind"] == "streamed"
        peak = row["peak_bytes"] - (0 if streamed else row["before_bytes"])
        lines.append(
            f"| {row['kind']} | {row['num_scores']:.0e} | {row['seconds']:.2f} | {row['num_steps']} | "
            f"{row['column_bytes'] / GIB:.2f} GiB | {peak / GIB:.2f} GiB | "
            f"{'' if streamed else format(peak / row['column_bytes'], '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e7, 1e8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    import numba

    threads = numba.get_num_threads()
    torch.set_num_threads(threads)
    sizes = [int(size) // NUM_RESPONSES * NUM_RESPONSES for size in arguments.sizes]
    passes = [pass_row(n, dtype, arguments.repeats, threads) for n in sizes for dtype in (np.float64, np.float32)]
    with tempfile.TemporaryDirectory() as folder:
        solves = [row for n in sizes for row in solve_rows(n, Path(folder))]
    record = {"machine": machine("numpy", "numba", "torch", "pyarrow"), "passes": passes, "solves": solves}
    text = report(record)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "dual_scale.json").write_text(json.dumps(record, indent=2) + "\n")
    (arguments.output / "dual_scale.md").write_text(text)


if __name__ == "__main__":
    main()
