"""Both sides of ``train_vs_trl``: trains on the pairs, writes times, memory and losses, a JSON line per job at once.

    python benchmarks/train_side.py '[{"side": "ours", "work": "hh-like", ...}, ...]'    # fields of ``Job``

Jobs of one process run one after the other. On a CPU every job has a process of its own, whose memory is measured; on
a GPU starting a process takes longer than training, and torch counts the memory of each job.

Ours is the product's own code: the ``log_prob`` scorer, then ``can_dist.training.engine`` on one rank of ZeRO-3. The
peer is TRL's ``DPOTrainer``, without DeepSpeed, which spares it the partitioning, or with the same configuration of
it; it is given token ids, so it need not tokenise. On both sides: full fine-tuning (or adapters), AdamW (fused, no
weight decay), constant rate, clipping at 1, sigmoid loss. Our policy is not exported: nobody reads it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meter import Meter, peak_mb, reset_peak, resident_mb
from train_job import Job, forget, precision_of
from train_ours import train_ours
from train_trl import train_trl


def main() -> None:
    """Run the jobs."""
    jobs = [Job(**fields) for fields in json.loads(sys.argv[1])]
    if jobs[0].core is not None:
        os.sched_setaffinity(0, {jobs[0].core})
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if jobs[0].device == "cuda" else "cpu")
    import torch

    torch.set_num_threads(1 if jobs[0].device == "cpu" else torch.get_num_threads())
    _import_all({job.side for job in jobs})
    for job in jobs:
        record = run(job)
        with Path(job.output).open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(job: Job) -> dict[str, Any]:
    """Train as a job says; return what was measured."""
    import torch
    from pairs import make_pairs

    from can_dist.config import Model
    from can_dist.modeling.formatter import Formatter
    from can_dist.modeling.loading import load_tokenizer

    made = make_pairs(job.work, job.num_pairs, Formatter(load_tokenizer(Model(model=job.model))), job.context)
    baseline = _loaded_model_mb(job) if job.device == "cpu" else None
    reset_peak()
    forget(job)
    meter = Meter()
    with tempfile.TemporaryDirectory() as directory, meter.phase("whole"):
        losses = (train_ours if job.side == "ours" else train_trl)(job, made.pairs, meter, Path(directory))
    return {
        "job": asdict(job),
        "pairs": len(made.pairs),
        "scaled_to_fit": made.scaled,
        "left_out": made.left_out,
        "shared_tokens": sum(pair.num_shared for pair in made.pairs),
        "unshared_tokens": sum(pair.num_shared + len(pair.prompt_ids) for pair in made.pairs),
        "target_tokens": sum(pair.num_targets for pair in made.pairs),
        "seconds": meter.seconds,
        "peak_mb": peak_mb(),
        "loaded_model_mb": baseline,
        "peak_device_mb": torch.cuda.max_memory_allocated() / 2**20 if job.device == "cuda" else None,
        **losses,
    }


def _import_all(sides: set[str]) -> None:
    """Import what the sides need, so that it is neither timed nor counted as memory of the work."""
    import transformers

    transformers.logging.set_verbosity_error()
    if sides & {"ours", "trl_zero3"}:
        import deepspeed  # noqa: F401
    if "ours" in sides:
        import can_dist.training.engine  # noqa: F401
    if sides != {"ours"}:
        import trl  # noqa: F401
        from trl import DPOConfig, DPOTrainer  # noqa: F401


def _loaded_model_mb(job: Job) -> float:
    """Resident memory with the imports done and the model loaded once."""
    from can_dist.config import Model
    from can_dist.modeling.loading import load_causal_lm

    model = load_causal_lm(Model(model=job.model), precision_of(job))
    sum(float(parameter.detach().sum()) for parameter in model.parameters())  # a mapped file is resident once read
    return resident_mb()


if __name__ == "__main__":
    main()
