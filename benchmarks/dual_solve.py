"""λ*, frontier and bootstrap for 1,000 prompts × 128 scores, beside the CAN authors' projected gradient descent.

    python benchmarks/dual_solve.py            # table on the screen, benchmarks/results/dual_solve.json

Both run in this one process, in turn, on the same float64 scores; times are medians. The peer is
``published_dual.py``, by the rules of the authors' code without its recording of trajectories. Its
frontier is measured on a few of the 50 points and scaled, because the whole would take an hour; ours is measured whole.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from machine import machine
from paper_pgd import bisect_threshold
from published_dual import published_pgd

from can_dist import frontier
from can_dist.dual import Frontier, Margin, ScoreTable, bootstrap, predict, solve_dual

NUM_PROMPTS, NUM_RESPONSES = 1000, 128
RESULTS = Path(__file__).parent / "results" / "dual_solve.json"
SETTINGS: dict[str, dict[str, Any]] = {
    "as the paper": {"sd": (4.0, 5.0), "correlation": -0.3, "beta": 0.1, "margin": 3.0, "lr": 2.0},
    "sd = beta, the authors' step": {"sd": (1.0, 1.0), "correlation": -0.5, "beta": 1.0, "margin": 0.5, "lr": 2.0},
    "sd = beta, default step": {"sd": (1.0, 1.0), "correlation": -0.5, "beta": 1.0, "margin": 0.5, "lr": None},
}


def scores(setting: dict[str, Any], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return Gaussian reward and utility, (P, K) each, with prompt means that vary as much as within."""
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=(2, NUM_PROMPTS, NUM_RESPONSES))
    sd_r, sd_g = setting["sd"]
    rho = setting["correlation"]
    reward = sd_r * (rho * first + np.sqrt(1 - rho**2) * second) + sd_r * generator.normal(size=(NUM_PROMPTS, 1))
    return reward, sd_g * (first + generator.normal(size=(NUM_PROMPTS, 1)))


def alternate(first: Callable[[], Any], second: Callable[[], Any], repeats: int) -> np.ndarray:
    """Return medians of two functions run in turn, after one unmeasured call of each: (function, wall and CPU time)."""
    first(), second()
    taken = np.empty((repeats, 2, 2))
    for repeat in range(repeats):
        for index, function in enumerate((first, second)):
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            taken[repeat, index] = time.perf_counter() - wall, time.process_time() - cpu
    return np.asarray(np.median(taken, axis=0))


def solve_row(name: str, setting: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Compare one solve: whole calls from raw arrays, ours with feasibility, standard errors and diagnostics."""
    reward, utility = scores(setting)
    prompt = np.repeat(np.arange(NUM_PROMPTS), NUM_RESPONSES)
    beta, margin = setting["beta"], setting["margin"]
    threshold = margin + float(utility.mean())

    def ours() -> Any:
        return solve_dual(
            reward.ravel(), utility.ravel(), prompt, beta=beta, constraints=[Margin("g", margin)], estimator="empirical"
        )

    def peer() -> Any:
        return published_pgd(reward, utility, threshold, beta, lr=setting["lr"])

    (time_ours, cpu_ours), (time_peer, cpu_peer) = alternate(ours, peer, repeats).tolist()
    solution, peer_result = ours(), peer()
    table = ScoreTable.build(reward.ravel(), utility.ravel(), prompt)
    residual = float("nan")
    if peer_result.lam is not None:
        residual = float(abs(predict(table, [peer_result.lam], beta, [margin]).slack_J[0]) / setting["sd"][1])
    return {
        "setting": name,
        "ours_seconds": time_ours,
        "peer_seconds": time_peer,
        "ratio": time_peer / time_ours,
        "ratio_of_cpu_time": cpu_peer / cpu_ours,
        "ours_lambda": solution.lam["g"],
        "peer_lambda": peer_result.lam,
        "ours_residual": solution.kkt_residual,
        "peer_residual": residual,
        "residual_ratio": residual / max(solution.kkt_residual, 1e-17),
        "ours_steps": solution.num_steps,
        "peer_steps": peer_result.num_steps,
        "peer_rounds": peer_result.num_rounds,
    }


def frontier_row(setting: dict[str, Any], num_points: int, measured: int, repeats: int) -> dict[str, Any]:
    """Compare a curve of ``num_points``: one pass each of ours, a bisection of whole descents each of the peer."""
    reward, utility = scores(setting)
    prompt = np.repeat(np.arange(NUM_PROMPTS), NUM_RESPONSES)
    beta = setting["beta"]

    def ours() -> Frontier:
        return frontier(reward.ravel(), utility.ravel(), prompt, beta=beta, names=["g"], num_points=num_points)

    ours()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        curve = ours()
        times.append(time.perf_counter() - start)
    centre = float(utility.mean())
    bracket = (curve.rows()[0]["margin.g"] + centre, curve.attainable["g"] + centre)
    chosen = np.linspace(0, num_points - 1, measured + 2).round().astype(int)[1:-1]
    peer_times, solves, gaps = [], [], []
    for index in chosen:
        start = time.perf_counter()
        bisected = bisect_threshold(
            reward, utility, float(curve.points[index].lam_J[0]), beta, bracket=bracket, lr=setting["lr"]
        )
        peer_times.append(time.perf_counter() - start)
        solves.append(bisected.num_solves)
        gaps.append(abs(bisected.threshold - centre - float(curve.points[index].margin_J[0])))
    peer = float(np.mean(peer_times)) * num_points
    return {
        "num_points": num_points,
        "ours_seconds": float(np.median(times)),
        "peer_seconds_extrapolated": peer,
        "peer_points_measured": measured,
        "peer_solves_per_point": solves,
        "largest_margin_gap": float(np.max(gaps)),
        "ratio": peer / float(np.median(times)),
    }


def bootstrap_row(setting: dict[str, Any], num_replicates: int, repeats: int) -> dict[str, Any]:
    """Measure one-step bootstrap replicates in units of one whole solve."""
    reward, utility = (values.ravel() for values in scores(setting))
    prompt = np.repeat(np.arange(NUM_PROMPTS), NUM_RESPONSES)
    constraints = [Margin("g", setting["margin"])]
    table = ScoreTable.build(reward, utility, prompt)
    options: dict[str, Any] = {"beta": setting["beta"], "constraints": constraints, "estimator": "empirical"}
    solution = solve_dual(reward, utility, prompt, **options)
    (single, cpu_one), (many, cpu_many) = alternate(
        lambda: solve_dual(reward, utility, prompt, **options),
        lambda: bootstrap(table, solution, num_replicates=num_replicates),
        repeats,
    ).tolist()
    replicates = bootstrap(table, solution, num_replicates=num_replicates)
    return {
        "num_replicates": num_replicates,
        "seconds": many,
        "solves": many / single,
        "solves_of_cpu_time": cpu_many / cpu_one,
        "bootstrap_se": replicates.lam_se["g"],
        "sandwich_se": solution.lam_se["g"],
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peer-points", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    solves = [solve_row(name, setting, arguments.repeats) for name, setting in SETTINGS.items()]
    paper = SETTINGS["as the paper"]
    curve = frontier_row(paper, 50, arguments.peer_points, arguments.repeats)
    replicates = bootstrap_row(paper, 1000, arguments.repeats)
    print(f"{'lambda*, 1,000 x 128 scores':30} {'ours':>9} {'peer':>9} {'ratio':>7}  residuals ours, peer")
    for row in solves:
        print(
            f"{row['setting']:30} {1e3 * row['ours_seconds']:6.1f} ms {1e3 * row['peer_seconds']:6.0f} ms "
            f"{row['ratio']:6.1f}x (CPU {row['ratio_of_cpu_time']:.1f}x)  "
            f"{row['ours_residual']:.1e}, {row['peer_residual']:.1e} "
            f"({row['peer_steps']} steps in {row['peer_rounds']} rounds)"
        )
    print(
        f"frontier, {curve['num_points']} points: ours {curve['ours_seconds']:.2f} s, peer "
        f"{curve['peer_seconds_extrapolated']:.0f} s (extrapolated from {curve['peer_points_measured']}), "
        f"{curve['ratio']:.0f}x"
    )
    print(
        f"bootstrap, {replicates['num_replicates']} replicates: {1e3 * replicates['seconds']:.0f} ms = "
        f"{replicates['solves']:.1f} solves; SE {replicates['bootstrap_se']:.4g}, sandwich "
        f"{replicates['sandwich_se']:.4g}"
    )
    record = {
        "machine": {**machine("numpy", "scipy"), "threads": os.environ["OMP_NUM_THREADS"]},
        "solve": solves,
        "frontier": curve,
        "bootstrap": replicates,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
