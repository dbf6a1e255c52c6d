"""Ranks 1 → 2 and actors 1 → 2 on this machine; for larger ones the communication model of ZeRO-3.

    python benchmarks/scaling.py              # benchmarks/results/scaling.json and the tables of docs/scaling.md
    python benchmarks/scaling.py --model-only # the calculated table alone

Ranks: the product's training on the same pairs and batches by one and by two processes, optimizer steps only, in turn.
Actors: the product's scoring of the same shards by one and by two Ray actors whose models are loaded, in turn. Each
process has one thread; a machine that is busy with other work has no second core to give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from comm_model import Assumptions, model_table
from machine import machine
from models import SMALL
from pairs import SHAPES, make_pairs
from train_job import Job, free_port
from train_ours import train_spec, write_preferences

RESULTS = Path(__file__).parent / "results" / "scaling.json"
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PACKS, SIZES = (1024, 4096, 8192, 16384), (8, 64, 512)
NUM_SHARDS = 8


def rank(spec_path: Path, output: Path) -> None:
    """Be one rank: train, and on rank 0 write the wall and CPU seconds of the optimizer steps."""
    from meter import Meter

    from can_dist.training import engine

    meter = Meter()
    meter.wrap(engine._Loop, "step", "steps")
    engine.train_worker(spec_path.read_text())
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps(meter.seconds["steps"]))


def time_ranks(job: Job, preferences: Path, world_size: int) -> list[float]:
    """Return (wall, CPU) seconds of rank 0's optimizer steps."""
    with tempfile.TemporaryDirectory() as scratch:
        output, spec = Path(scratch) / "seconds.json", Path(scratch) / "spec.json"
        spec.write_text(train_spec(job, preferences, Path(scratch) / "train").model_dump_json())
        common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, __file__, "--rank", str(spec), "--output", str(output)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **common, "RANK": str(number), "LOCAL_RANK": str(number)},
            )
            for number in range(world_size)
        ]
        if any([process.wait() for process in ranks]):
            sys.exit("a rank failed")
        seconds: list[float] = json.loads(output.read_text())
        return seconds


def ranks_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the optimizer steps of one and two ranks on the same global batches."""
    from can_dist.config import Model
    from can_dist.modeling.formatter import Formatter
    from can_dist.modeling.loading import load_tokenizer
    from can_dist.scoring.kinds import load_scorer
    from can_dist.scoring.protocol import LogProb, Response

    model = Model(model=arguments.model)
    job = Job("ours", arguments.shape, arguments.model, "", arguments.num_pairs, arguments.num_pairs // 2, 512)
    pairs = make_pairs(job.work, job.num_pairs, Formatter(load_tokenizer(model)), job.context).pairs
    responses = [Response("", pair.messages, "", ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    logp = load_scorer(LogProb(model=model), "fp32").score(responses).reshape(-1, 2)
    times: dict[int, list[list[float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        preferences = write_preferences(pairs, logp.tolist(), Path(directory))
        for number in range(arguments.rounds):
            for size in (1, 2) if number % 2 == 0 else (2, 1):
                times[size].append(time_ranks(job, preferences, size))
    return _row(times, sum(pair.num_shared for pair in pairs))


def actors_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the scoring of shards by pools of one and of two actors that have loaded the model."""
    import pyarrow as pa
    import ray

    from can_dist.cluster.actors import ActorPool
    from can_dist.cluster.connection import connect
    from can_dist.cluster.ledger import run_shards
    from can_dist.config import Cluster, Model
    from can_dist.modeling.formatter import Formatter
    from can_dist.modeling.loading import load_tokenizer
    from can_dist.scoring.protocol import LogProb
    from can_dist.stages.score import ScoreJob
    from can_dist.tables.artifacts import open_stage, write_part
    from can_dist.tables.schemas import RESPONSES

    spec = LogProb(model=Model(model=arguments.model))
    made = make_pairs(arguments.shape, arguments.num_pairs, Formatter(load_tokenizer(spec.model)), 512).pairs
    connect(Cluster())
    times: dict[int, list[list[float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as directory:
        stage = open_stage(Path(directory), "responses", "benchmark", {}, {})
        for shard in range(NUM_SHARDS):
            rows = [
                dict(
                    zip(
                        RESPONSES.names,
                        (f"{shard}/{n}", f"{shard}/{n}/{k}", pair.messages, "", ids, len(ids), "stop"),
                        strict=True,
                    )
                )
                for n, pair in enumerate(made[shard::NUM_SHARDS])
                for k, ids in enumerate((pair.chosen_ids, pair.rejected_ids))
            ]
            write_part(stage.path, shard, pa.Table.from_pylist(rows, schema=RESPONSES))
        responses = stage.commit([], info={})
        job = ScoreJob("logp", spec, "{}", "fp32", responses.path, Path(directory), max_quarantine=0)
        for number in range(arguments.rounds):
            for size in (1, 2) if number % 2 == 0 else (2, 1):
                pool = ActorPool(Cluster(num_actors=size), print)
                ray.get([pool.actor(slot).open.remote(job) for slot in range(size)])
                start = time.perf_counter()
                run_shards(pool, job, {shard: 1 for shard in range(NUM_SHARDS)}, "score", dict)
                times[size].append([time.perf_counter() - start, 0.0])
                pool.close()
    return _row(times, sum(pair.num_shared for pair in made))


def _row(times: dict[int, list[list[float]]], tokens: int) -> dict[str, Any]:
    alone, two = (statistics.median(wall for wall, _ in times[size]) for size in (1, 2))
    cpu = [statistics.median(cpu for _, cpu in times[size]) for size in (1, 2)]
    return {"tokens": tokens, "one_seconds": alone, "two_seconds": two, "speed_up": alone / two, "cpu_seconds": cpu}


def write_page(record: dict[str, Any] | None) -> None:
    """Put the tables between the page's markers."""
    page = _between(PAGE.read_text(encoding="utf-8"), "model", model_table(PACKS, SIZES, Assumptions()))
    if record is not None:
        about = record["machine"]
        lines = [
            f"{about['date'][:10]}; {about['cpu']}, {about['cores']} cores, load average {about['load_average']:.0f}; "
            f"{record['shape']} pairs, medians of {record['rounds']} rounds in turn.",
            "",
            "| | one, s | two, s | speed-up |",
            "|---|---|---|---|",
            *(
                f"| {name} | {row['one_seconds']:.1f} | {row['two_seconds']:.1f} | {row['speed_up']:.2f}× |"
                for name, row in record["rows"].items()
            ),
        ]
        page = _between(page, "measured", "\n".join(lines))
    PAGE.write_text(page, encoding="utf-8")


def _between(page: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: written by benchmarks/scaling.py -->", f"<!-- end of {name} -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Measure, calculate, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(SMALL))
    parser.add_argument("--shape", choices=list(SHAPES), default="hh-like")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model-only", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank, arguments.output)
        return
    if arguments.model_only:
        write_page(None)
        return
    record = {
        "machine": machine("torch", "deepspeed", "ray"),
        "shape": arguments.shape,
        "num_pairs": arguments.num_pairs,
        "rounds": arguments.rounds,
        "rows": {"ranks (ZeRO-3, gloo)": ranks_row(arguments), "actors (Ray)": actors_row(arguments)},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    write_page(record)
    print(PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
