"""How the driver's time and memory grow with the number of prompts: brought responses, K = 8, from files to labels.

    python benchmarks/growth.py                    # 10 000, 100 000 and 200 000 prompts; the table of docs/scaling.md
    python benchmarks/growth.py --prompts 10000

Each size is a process of its own, and its results take the place of those that the results file has of it. Models are
not what is measured: the reference is a tokenizer of words with a tiny model that never runs, and the scores, ln π_ref
among them, are those of Python functions on one Ray actor. Memory is the driver's largest resident memory less what is
shared (mapped files, Ray's object store), looked at ten times a second. What is asked of it: no more than 4 GB, and
seconds that grow as the rows do; 2 GB is aimed at, and 60 µs of the driver's CPU a response, all stages together.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from machine import machine

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers" / "worlds"))

from can_dist.config import Model, PythonCallable, validate_config
from can_dist.run import Run
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact

RESULTS = Path(__file__).parent / "results" / "growth.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- growth: written by benchmarks/growth.py -->", "<!-- end of growth -->"
K, SIZES = 8, (10_000, 100_000, 200_000)
ALLOWED_MB, AIMED_MB, AIMED_US = 4096, 2048, 60
WORDS = [f"w{n}" for n in range(100)]
PROMPT_WORDS, RESPONSE_WORDS = 12, 24


def num_words(_: list[Any], responses: list[str]) -> list[float]:
    """Score: the number of distinct words."""
    return [float(len(set(text.split()))) for text in responses]


def num_low(_: list[Any], responses: list[str]) -> list[float]:
    """Score: the share of words that end in 1, doubled."""
    return [text.count("1 ") / 12 for text in responses]


def write_world(folder: Path, num_prompts: int) -> dict[str, Any]:
    """Write prompts, responses and the reference; return the configuration."""
    from tiny import make_tiny_lm

    make_tiny_lm(folder / "lm", WORDS)
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as prompts, (folder / "responses.jsonl").open("w") as responses:
        for n in range(num_prompts + 2):  # two are held out
            number = [WORDS[n // 100**place % 100] for place in range(3)]  # no two prompts alike
            prompt = " ".join(number + draw.choices(WORDS, k=PROMPT_WORDS - 3))
            texts = [" ".join(draw.choices(WORDS, k=RESPONSE_WORDS)) for _ in range(K)]
            prompts.write(json.dumps({"prompt": prompt}) + "\n")
            responses.write(json.dumps({"prompt": prompt, "responses": texts}) + "\n")
    return {
        "prompts": {"source": str(folder / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(folder / "lm")},
        "beta": 1.0,
        "reward": {"kind": "callable", "function": "growth:num_words"},
        "constraints": {"low": {"scorer": {"kind": "callable", "function": "growth:num_low"}, "margin": 0.01}},
        "generate": {"num_responses": K, "responses": {"source": str(folder / "responses.jsonl")}},
        "label": {"pairs_per_prompt": 1},
        "cluster": {"num_actors": 1},
    }


class Meter(threading.Thread):
    """The largest private memory of this process since it was last asked, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0.0

    def run(self) -> None:
        """Look ten times a second."""
        me = psutil.Process()
        while True:
            memory = me.memory_info()
            self.largest = max(self.largest, (memory.rss - memory.shared) / 2**20)
            time.sleep(0.1)


def measure(num_prompts: int) -> dict[str, Any]:
    """Return rows, seconds (wall and this process's CPU) and the driver's largest memory, for each stage."""
    meter = Meter()
    meter.start()
    stages: dict[str, Any] = {}

    @contextmanager
    def stage(name: str, rows: int) -> Iterator[None]:
        meter.largest, began, cpu = 0.0, time.perf_counter(), time.process_time()
        yield
        seconds = time.perf_counter() - began
        stages[name] = {
            "rows": rows,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_mb": round(meter.largest),
        }

    with tempfile.TemporaryDirectory() as scratch:
        config = validate_config(write_world(Path(scratch), num_prompts))
        run_stages(Path(scratch) / "run", config, stage, num_prompts)
    return {"prompts": num_prompts, "stages": stages}


def run_stages(directory: Path, config: Any, stage: Callable[[str, int], Any], num_prompts: int) -> None:
    """Take the data from files to preferences, each stage under ``stage``."""
    rows = num_prompts * K
    callables = {"reward": "num_words", "low": "num_low", "logp.reference": "num_words"}
    scorers = {name: PythonCallable(function=f"growth:{function}") for name, function in callables.items()}
    reference: Model = config.reference
    with Run(directory, config) as run:
        with stage("prompts", num_prompts):
            prompts = run.prompts()
        with stage("responses", rows):
            responses = run.generate(reference, prompts)
        with stage("score", rows * len(scorers)):
            scores: Artifact = score(run._work, responses, scorers, role="reference on train")
        with stage("solve", rows):
            solution = run.solve(scores, config.constraints, config.beta)
        with stage("label", rows):
            run.label(responses, scores, solution, config.beta)


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| prompts × K | stage | rows | rows/s | driver's CPU, µs a row | driver's peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        rows, peak_mb, cpu_us, seconds = whole(result)
        named = {**result["stages"], "all": {"rows": rows, "cpu_seconds": cpu_us * rows / 1e6, "peak_mb": peak_mb}}
        lines += [
            f"| {result['prompts']:,} × {K} | {name} | {row['rows']:,} | "
            f"{row['rows'] / row.get('seconds', seconds):,.0f} | {1e6 * row['cpu_seconds'] / row['rows']:.0f} | "
            f"{row['peak_mb']:,} |"
            for name, row in named.items()
        ]
    return "\n".join(lines)


def whole(result: dict[str, Any]) -> tuple[int, int, float, float]:
    """Return of one size: responses, the driver's largest memory in MB, its CPU in µs a response, and seconds."""
    stages, rows = result["stages"].values(), result["prompts"] * K
    cpu_us = 1e6 * sum(stage["cpu_seconds"] for stage in stages) / rows
    return rows, max(stage["peak_mb"] for stage in stages), cpu_us, sum(stage["seconds"] for stage in stages)


def verdict(results: list[dict[str, Any]]) -> str:
    """Return what the largest size needed, beside what is asked and aimed at, and how the cost of a row grew."""
    rows, peak_mb, cpu_us, seconds = whole(results[-1])
    _, _, first_us, _ = whole(results[0])
    return (
        f"{rows:,} responses: {peak_mb / 1024:.2f} GB in the driver (allowed {ALLOWED_MB / 1024:.0f}, aimed at "
        f"{AIMED_MB / 1024:.0f}) and {cpu_us:.0f} µs of its CPU a response, all stages together (aimed at {AIMED_US}), "
        f"in {seconds / 60:.1f} minutes. A response costs {cpu_us / first_us:.2f} times what it costs at "
        f"{results[0]['prompts'] * K:,}."
    )


def main() -> None:
    """Measure each size in a process of its own; write the results and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    known = json.loads(RESULTS.read_text())["results"] if RESULTS.is_file() else []
    by_size = {result["prompts"]: result for result in known}
    for size in arguments.prompts:
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(size)], check=True, stdout=subprocess.PIPE, text=True
        )
        about = machine("pyarrow", "ray")
        by_size[size] = {**json.loads(done.stdout.splitlines()[-1]), "machine": about}
        results = [by_size[n] for n in sorted(by_size)]
        RESULTS.write_text(json.dumps({"results": results}, indent=1) + "\n")
    loads = ", ".join(f"{result['machine']['load_average']:.0f} ({result['prompts']:,})" for result in results)
    head = f"{about['date'][:10]}; {about['cpu']}, {about['cores']} cores; load average after each size: {loads}."
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    written = f"{BEGIN}\n\n{head}\n\n{table(results)}\n\n{verdict(results)}\n\n{END}"
    PAGE.write_text(f"{before}{written}{rest.partition(END)[2]}", encoding="utf-8")
    print(verdict(results))


if __name__ == "__main__":
    main()
