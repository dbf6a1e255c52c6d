"""TRL's side of the training benchmark: its DPOTrainer, given token ids, with its phases timed."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from meter import Meter
from train_job import BETA, LEARNING_RATE, SEED, Job, one_rank, precision_of, wait
from train_ours import train_options


def train_trl(job: Job, pairs: list[Any], meter: Meter, directory: Path) -> dict[str, Any]:
    """Train, and return what was measured."""
    with one_rank() if job.side == "trl_zero3" else contextlib.nullcontext():
        return _trl_trained(job, pairs, meter, directory)


def _trl_trained(job: Job, pairs: list[Any], meter: Meter, directory: Path) -> dict[str, Any]:
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
    place = {"device_map": {"": 0}} if job.device == "cuda" and job.side != "trl_zero3" else {}
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, **place)
    trainer = _trainer_class(job, meter)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
    )
    trainer.train()
    losses = torch.tensor([loss.item() for loss in trainer.seen_losses])
    per_step = losses.view(-1, job.batch_size // trainer.args.per_device_train_batch_size).mean(dim=1).tolist()
    return {
        "first_loss": losses[0].item(),
        "losses": per_step,
        "targets_seen": sum(t.item() for t in trainer.targets),
        "step_seconds": trainer.step_seconds,
        "distributed": trainer.accelerator.distributed_type.value,
    }


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
        best["deepspeed"] = _zero3(job)
    # its own batch of 8, live reference model, random order, activation checkpointing
    default = {"gradient_accumulation_steps": job.batch_size // 8}
    return DPOConfig(
        output_dir=str(directory),
        learning_rate=LEARNING_RATE[job.device],
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


def _trainer_class(job: Job, meter: Meter) -> type:
    from transformers import TrainerCallback
    from trl import DPOTrainer

    class TimeTraining(TrainerCallback):
        def __init__(self, step_seconds: list[float]) -> None:
            self.step_seconds, self.began = step_seconds, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            meter.begin("train")

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            wait(job)
            self.step_seconds.append(time.perf_counter() - self.began)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            meter.end("train")

    class TimedTrainer(DPOTrainer):
        """TRL's trainer, given token ids, with its phases timed and its losses kept."""

        def __init__(self, **options: Any) -> None:
            self.seen_losses: list[Any] = []
            self.targets: list[Any] = []
            self.step_seconds: list[float] = []
            super().__init__(callbacks=[TimeTraining(self.step_seconds)], **options)

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
