"""One side of ``train_vs_trl`` in a process of its own: trains on the pairs, writes times, memory and losses as JSON.

    python benchmarks/train_side.py '{"side": "ours", "work": "hh-like", ...}'    # fields of ``Job``

Ours is the product's own code: the ``log_prob`` scorer, then ``can_dist.training.engine`` on one rank of ZeRO-3. The
peer is TRL's ``DPOTrainer``, without DeepSpeed, which spares it the partitioning, or with the same configuration of
it; it is given token ids, so it need not tokenise. On both sides: full fine-tuning, AdamW (fused, no weight decay),
constant rate, clipping at 1, sigmoid loss.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meter import Meter, peak_mb, reset_peak, resident_mb

BETA, LEARNING_RATE, SEED = 0.1, 2e-5, 3


@dataclass(frozen=True)
class Job:
    """What a side is to do; ``micro_batch`` and ``strategy`` are TRL's, ``tokens_per_pack`` is ours."""

    side: str  # ours, trl (precomputed reference), trl_zero3 (the same under our ZeRO-3), or trl_default
    work: str
    model: str
    output: str
    num_pairs: int
    batch_size: int
    context: int
    device: str = "cpu"
    core: int | None = None
    tokens_per_pack: int = 2048
    micro_batch: int = 1
    strategy: str = "group_by_length"
    activation_checkpointing: bool = False


def main() -> None:
    """Run one job."""
    job = Job(**json.loads(sys.argv[1]))
    if job.core is not None:
        os.sched_setaffinity(0, {job.core})
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if job.device == "cuda" else "cpu")
    import torch

    torch.set_num_threads(1 if job.core is not None else torch.get_num_threads())
    _import_all(job.side)
    from pairs import make_pairs

    from can_dist.config import Model
    from can_dist.modeling.formatter import Formatter
    from can_dist.modeling.loading import load_tokenizer

    made = make_pairs(job.work, job.num_pairs, Formatter(load_tokenizer(Model(model=job.model))), job.context)
    baseline = _loaded_model_mb(job)
    reset_peak()
    meter = Meter()
    with tempfile.TemporaryDirectory() as directory, meter.phase("whole"):
        losses = (_ours if job.side == "ours" else _trl)(job, made.pairs, meter, Path(directory))
    record = {
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
    Path(job.output).write_text(json.dumps(record))


def _import_all(side: str) -> None:
    """Import what the side needs, so that it is neither timed nor counted as memory of the work."""
    import transformers

    transformers.logging.set_verbosity_error()
    if side in ("ours", "trl_zero3"):
        import deepspeed  # noqa: F401
    if side == "ours":
        import can_dist.training.engine  # noqa: F401
    else:
        import trl  # noqa: F401
        from trl import DPOConfig, DPOTrainer  # noqa: F401


def _loaded_model_mb(job: Job) -> float:
    """Resident memory with the imports done and the model loaded once."""
    from can_dist.config import Model
    from can_dist.modeling.loading import load_causal_lm

    model = load_causal_lm(Model(model=job.model), precision_of(job))
    sum(float(parameter.detach().sum()) for parameter in model.parameters())  # a mapped file is resident once read
    return resident_mb()


# --------------------------------------------------------------------------------------------------------------- ours


def _ours(job: Job, pairs: list[Any], meter: Meter, directory: Path) -> dict[str, Any]:
    import torch

    from can_dist.config import Model
    from can_dist.modeling import logprobs
    from can_dist.scoring.protocol import LogProb, Response, load_scorer
    from can_dist.training import engine
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
    torch.cuda.empty_cache()
    preferences = write_preferences(pairs, logp.tolist(), directory)
    meter.wrap(engine._Loop, "run", "run")
    meter.wrap(engine._Loop, "check_start", "check")
    targets = _count_targets(logprobs, pairs)
    spec = train_spec(job, preferences, directory / "train")
    _be_one_rank()
    engine.train_worker(spec.model_dump_json())
    meter.seconds["train"] = [a - b for a, b in zip(meter.seconds["run"], meter.seconds["check"], strict=True)]
    lines = read_metrics(directory / "train" / METRICS)
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return {
        "first_loss": losses[0],
        "losses": [losses[step] for step in sorted(losses) if step],
        "targets_seen": targets[0],
        "peak_mb": max(peak_of_reference, peak_mb()),
        "peak_of_training_mb": peak_mb(),
    }


def _count_targets(logprobs: Any, pairs: list[Any]) -> list[int]:
    """Return a counter of response tokens that pass through the model with a gradient."""
    import torch

    seen, plain = [0], logprobs.ResponseModel.forward

    def forward(model: Any, pack: Any) -> torch.Tensor:
        if model.training:
            seen[0] += len(pack.targets_N)
        logp: torch.Tensor = plain(model, pack)
        return logp

    logprobs.ResponseModel.forward = forward
    return seen


def precision_of(job: Job) -> str:
    """Return what our precision 'auto' is on the job's device."""
    return "bf16" if job.device == "cuda" else "fp32"


def train_options(job: Job) -> Any:
    """Return the options of our training."""
    from can_dist.config.sections import Train

    return Train(
        learning_rate=LEARNING_RATE,
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


def _be_one_rank() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---------------------------------------------------------------------------------------------------------------- TRL


def _trl(job: Job, pairs: list[Any], meter: Meter, directory: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from can_dist.training.batches import global_batch

    # in our order, so that a sequential run takes the same steps
    steps = range(-(-len(pairs) // job.batch_size))
    order = [int(i) for step in steps for i in global_batch(len(pairs), job.batch_size, SEED, step)]
    rows = [
        {
            "prompt_ids": pairs[i].prompt_ids,
            "chosen_ids": pairs[i].chosen_ids,
            "rejected_ids": pairs[i].rejected_ids,
            "length": len(pairs[i].prompt_ids) + max(len(pairs[i].chosen_ids), len(pairs[i].rejected_ids)),
        }
        for i in order
    ]
    arguments = _trl_config(job, directory)  # before the model, which DeepSpeed partitions as it is loaded
    # float32 weights on a GPU too: what TRL does by default, as a master copy for its bf16 passes
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    trainer = _trainer_class(meter)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    trainer.train()
    losses = torch.tensor([loss.item() for loss in trainer.seen_losses])
    per_step = losses.view(-1, job.batch_size // trainer.args.per_device_train_batch_size).mean(dim=1).tolist()
    return {"first_loss": losses[0].item(), "losses": per_step, "targets_seen": sum(t.item() for t in trainer.targets)}


def _zero3(job: Job) -> dict[str, Any]:
    """Return the DeepSpeed configuration of our engine, with the Trainer's counting of micro-batches."""
    from can_dist.training.deepspeed_config import build_ds_config, read_ds_config

    train = train_options(job)
    return {
        **build_ds_config(read_ds_config(train.ds_config), train, precision_of(job)),
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.batch_size // job.micro_batch,
    }


def _trl_config(job: Job, directory: Path) -> Any:
    from trl import DPOConfig

    best = {
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.batch_size // job.micro_batch,
        "precompute_ref_log_probs": True,
        "train_sampling_strategy": job.strategy,
        "gradient_checkpointing": job.activation_checkpointing,
    }
    if job.side == "trl_zero3":
        _be_one_rank()
        best["deepspeed"] = _zero3(job)
    # its own batch of 8, live reference model, random order, activation checkpointing
    default = {"gradient_accumulation_steps": job.batch_size // 8}
    return DPOConfig(
        output_dir=str(directory),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        num_train_epochs=1,
        beta=BETA,
        max_length=None,
        bf16=job.device == "cuda",
        use_cpu=job.device == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,  # else the lengths to group by are removed first, and it stops
        disable_tqdm=True,
        seed=SEED,
        **(default if job.side == "trl_default" else best),
    )


def _trainer_class(meter: Meter) -> type:
    from transformers import TrainerCallback
    from trl import DPOTrainer

    class TimeTraining(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin("train")

        def on_train_end(self, *_: Any, **__: Any) -> None:
            meter.end("train")

    class TimedTrainer(DPOTrainer):
        """TRL's trainer, given token ids, with its phases timed and its losses kept."""

        def __init__(self, **options: Any) -> None:
            self.seen_losses: list[Any] = []
            self.targets: list[Any] = []
            super().__init__(callbacks=[TimeTraining()], **options)

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any, **options: Any) -> Any:
            with meter.phase("reference"):
                return super()._precompute_ref_logps(*arguments, **options)

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
            loss = super()._compute_loss(model, inputs, return_outputs)
            self.seen_losses.append(loss.detach())
            self.targets.append(inputs["completion_mask"].sum())
            return loss

    return TimedTrainer


if __name__ == "__main__":
    main()
