"""Our side of the training benchmark: the product's reference pass and training, in this process as the only rank."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meter import Meter, peak_mb, reset_peak
from train_job import BETA, LEARNING_RATE, SEED, Job, forget, one_rank, precision_of, wait

PROFILED_STEP = 1  # not the first, in which kernels are chosen
SHOWN_OPERATIONS = 20


def train_ours(job: Job, pairs: list[Any], meter: Meter, directory: Path) -> dict[str, Any]:
    """Score the reference, train, and return what was measured."""
    from can_dist.config import Model
    from can_dist.scoring.kinds import load_scorer
    from can_dist.scoring.protocol import LogProb, Response
    from can_dist.training.metrics import METRICS, read_metrics

    scorer = load_scorer(LogProb(model=Model(model=job.model)), precision_of(job))
    with meter.phase("reference"):
        responses = [
            Response(f"{number}/{side}", pair.messages, "", ids)
            for number, pair in enumerate(pairs)
            for side, ids in (("a", pair.chosen_ids), ("b", pair.rejected_ids))
        ]
        logp = scorer.score(responses).reshape(-1, 2)
    del scorer
    peak_of_reference = peak_mb()
    reset_peak()
    forget(job)
    preferences = write_preferences(pairs, logp.tolist(), directory)
    spec = train_spec(job, preferences, directory / "train")
    with one_rank(), _watched(job, meter) as seen:
        from can_dist.training import engine

        engine.train_worker(spec.model_dump_json())
    meter.seconds["train"] = [a - b for a, b in zip(meter.seconds["run"], meter.seconds["check"], strict=True)]
    lines = read_metrics(directory / "train" / METRICS)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    summary = json.loads((directory / "train" / "summary.json").read_text())
    return {
        "first_loss": losses[0],
        "losses": [losses[step] for step in sorted(losses) if step],
        "peak_mb": max(peak_of_reference, peak_mb()),
        "peak_of_training_mb": peak_mb(),
        "attention": summary["attention"],
        **seen,
    }


@contextlib.contextmanager
def _watched(job: Job, meter: Meter) -> Iterator[dict[str, Any]]:
    """Watch our loop: its phases, the seconds of its steps, the tokens learnt from, the memory that the plan counted.

    Yields the record of these, complete at the end; the product's own functions are put back then.
    """
    import torch

    from can_dist.modeling import logprobs
    from can_dist.training import engine, ranks, room

    loop = engine._Loop
    plain = (loop.run, loop.check_start, loop.step, logprobs.ResponseModel.forward, engine.export_policy)
    plain_peak, plain_leave = room.peak_bytes, ranks.leave
    seen: dict[str, Any] = {"targets_seen": 0, "step_seconds": [], "planned_mb": None, "operations": []}

    def forward(model: Any, pack: Any) -> torch.Tensor:
        if model.training:
            seen["targets_seen"] += len(pack.targets_N)
        logp: torch.Tensor = plain[3](model, pack)
        return logp

    def step(own: Any, number: int) -> bool:
        start = time.perf_counter()
        with _profiled(job, number, seen["operations"]):
            stops: bool = plain[2](own, number)
            wait(job)
        seen["step_seconds"].append(time.perf_counter() - start)
        return stops

    def planned(*arguments: Any) -> int:
        peak: int = plain_peak(*arguments)
        if seen["planned_mb"] is None:  # the first is of this training, others are ways out
            seen["planned_mb"] = peak / 2**20
        return peak

    meter.wrap(loop, "run", "run")
    meter.wrap(loop, "check_start", "check")
    loop.step, logprobs.ResponseModel.forward = step, forward
    engine.export_policy, room.peak_bytes = lambda *_: None, planned
    ranks.leave = torch.distributed.barrier  # DeepSpeed keeps its groups for the next job of this process
    try:
        yield seen
    finally:
        loop.run, loop.check_start, loop.step, logprobs.ResponseModel.forward, engine.export_policy = plain
        room.peak_bytes, ranks.leave = plain_peak, plain_leave


@contextlib.contextmanager
def _profiled(job: Job, step: int, operations: list[dict[str, Any]]) -> Iterator[None]:
    """Profile a step, if it is the one: adds the operations that took longest, with their milliseconds and calls."""
    if not job.profile or step != PROFILED_STEP:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    on_gpu = job.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        yield
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, name))[:SHOWN_OPERATIONS]
    operations += [{"name": row.key[:80], "ms": getattr(row, name) / 1e3, "calls": row.count} for row in rows]


def train_options(job: Job) -> Any:
    """Return the options of our training."""
    from can_dist.config.sections import Lora, Train

    return Train(
        learning_rate=LEARNING_RATE[job.device],
        lora=Lora() if job.lora else None,
        kernels=job.kernels,
        schedule="constant",
        batch_size=job.batch_size,
        tokens_per_pack=job.tokens_per_pack,
        activation_checkpointing=job.activation_checkpointing,
        log_every=1,
    )


def train_spec(job: Job, preferences: Path, directory: Path) -> Any:
    """Return what our ranks need."""
    from can_dist.config import Model
    from can_dist.training.engine import TrainSpec

    directory.mkdir()
    return TrainSpec(
        directory=directory,
        preferences=preferences,
        reference=Model(model=job.model),
        start=Model(model=job.model),
        train=train_options(job),
        beta=BETA,
        seed=SEED,
        precision=precision_of(job),
    )


def write_preferences(pairs: list[Any], logp_P2: list[list[float]], directory: Path) -> Path:
    """Write our table of pairs with their reference log-probabilities (P, 2); return the artifact's path."""
    import pyarrow as pa

    from can_dist.tables.artifacts import open_stage, write_part
    from can_dist.tables.schemas import PREFERENCES

    rows = [
        {
            "example_id": str(number),
            "prompt_id": str(number),
            "split": "train",
            "messages": pair.messages,
            "response_ids": [f"{number}/a", f"{number}/b"],
            "texts": ["", ""],
            "token_ids": [pair.chosen_ids, pair.rejected_ids],
            "logp_ref": logp_P2[number],
            "scores": [],
            "target": [1.0, 0.0],
            "weight": 1.0,
        }
        for number, pair in enumerate(pairs)
    ]
    stage = open_stage(directory, "label", "benchmark", {"loss": "sigmoid"}, {})
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PREFERENCES))
    splits = {"train": len(pairs), "validation": 0}
    return stage.commit([], info={"loss": "sigmoid", "splits": splits}).path
