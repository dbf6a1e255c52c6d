"""The training loop of one rank: the same function under Ray Train and under the ``deepspeed`` launcher.

What is to be learned, from scores or from people, is already in the preferences, and so are the reference's
log-probabilities; what is left is one preference optimisation under ZeRO-3.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from can_dist.config.sections import Train
from can_dist.console import progress
from can_dist.errors import CanDistError, Interrupted, NumericalError
from can_dist.modeling.formatter import open_formatter
from can_dist.modeling.liger import check_kernels, use_kernels
from can_dist.modeling.loading import context_length, load_causal_lm, load_model_config, load_tokenizer
from can_dist.modeling.logprobs import ResponseModel, choose_layout
from can_dist.modeling.policy_probe import write_probe
from can_dist.tables.artifacts import load_artifact, write_json
from can_dist.training import CHECKPOINTS, POLICY, STOP, SUMMARY, batches, checkpoints, ranks, room
from can_dist.training.batches import Batch, Example, Slot
from can_dist.training.deepspeed_config import build_ds_config, read_ds_config
from can_dist.training.export import export_policy
from can_dist.training.heartbeat import Heartbeat, heartbeat
from can_dist.training.metrics import MetricsLog
from can_dist.training.objective import METRIC_NAMES, kto_baseline, pack_losses
from can_dist.training.reference import check_reference, probe
from can_dist.training.spec import TrainSpec
from can_dist.training.trackers import Tracker, open_trackers
from can_dist.training.trainable import adapt
from can_dist.training.watch import Watch

# Allowed |loss − expected| before step 1 (relative when expected > 1): bf16 log-probabilities vary with the batch.
STEP0_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}


def train_worker(spec_json: str) -> None:
    """Train on this rank of an initialised or launched process group, export the policy, leave the group.

    Args:
        spec_json: A ``TrainSpec`` as JSON, the same on all ranks.

    Raises:
        CanDistError: On all ranks alike.
        Interrupted: On all ranks, when one was told to stop and a checkpoint is committed. Any other exception leaves
            at once: the launcher or Ray Train sees the dead rank and stops the others, which a rank waiting in a
            barrier would delay.
    """
    spec = TrainSpec.model_validate_json(spec_json)
    ranks.join(spec.hang_timeout_s)
    with heartbeat(spec.directory, spec.hang_timeout_s) as beats:
        try:
            ranks.require_same(spec.model_dump_json(), "configuration")
            _train(spec, beats)
        except (CanDistError, Interrupted):
            ranks.leave()
            raise
        ranks.leave()


def _train(spec: TrainSpec, beats: Heartbeat) -> None:
    train, rank = spec.train, dist.get_rank()
    torch.manual_seed(spec.seed)
    with ranks.agreed():
        ds_config = build_ds_config(read_ds_config(train.ds_config), train, spec.precision)
        if dist.get_world_size() == 1 and train.ds_config is None:
            # its linear layer lets go of gathered copies of weights; one rank makes none, unless a file offloads them
            ds_config["zero_optimization"]["memory_efficient_linear"] = False
        if train.kernels is not None:
            check_kernels(spec.start, on_gpu=torch.cuda.is_available())
        tokenizer = load_tokenizer(spec.reference)
        preferences = load_artifact(spec.preferences)
        formatter = open_formatter(spec.reference)
        context = context_length(load_model_config(spec.start, "causal language model"))
        examples, validation = batches.load_examples(preferences, formatter, context)
        watch = Watch.of(spec, preferences, formatter)
    ranks.require_same(preferences.digest, f"content of {spec.preferences}")
    if long := batches.about_long([*examples, *validation], train.tokens_per_pack):
        ranks.say(long)
    total = batches.num_steps(len(examples), train.batch_size, train.num_epochs, train.max_steps)
    checkpoint = checkpoints.newest(spec.directory / CHECKPOINTS)
    first = checkpoint.step if checkpoint else 0
    ds_config |= checkpoint.ds_config if checkpoint else {}
    beats.at("counting memory")
    with ranks.agreed():
        if rank == 0 and torch.cuda.is_available():
            room.require_room_here(spec, ds_config, [*examples, *validation], dist.get_world_size(), ranks.say)
    beats.at("loading the model")
    model, partitioned = _build_model(spec, ds_config)
    engine = _initialize(ResponseModel(model), ds_config, train, total)
    if checkpoint:
        checkpoints.load(engine, checkpoint, adapters_only=train.lora is not None)
        if watch is not None:
            watch.lam, watch.best = {**watch.lam, **checkpoint.lam}, checkpoint.best
    layout, sentence = _layout(engine)
    log = None
    if rank == 0:
        log = MetricsLog(spec.directory, first, _trackers(spec, first))
    loop = _Loop(spec, engine, preferences.info["loss"], examples, validation, watch, layout, log, beats)
    done = loop.run(first, total)
    beats.at("export of the policy")
    groups, probe_logp_R = probe(engine, examples, layout)
    del partitioned  # kept until here: it makes transformers load partitioned weights
    export_policy(engine, tokenizer, spec.directory / POLICY, train.max_shard_size_mb)
    with ranks.agreed(), checkpoints.writing(spec.directory, spec.directory / CHECKPOINTS):
        if log is not None:
            log.close()
            write_probe(spec.directory, groups, probe_logp_R, spec.precision)
            summary = _summary(spec, examples, done, sentence) | (watch.course(total) if watch is not None else {})
            write_json(spec.directory / SUMMARY, summary)


def _summary(spec: TrainSpec, examples: Sequence[Example], done: int, sentence: str) -> dict[str, Any]:
    size = spec.train.batch_size
    chosen = (batches.global_batch(len(examples), size, spec.seed, step) for step in range(done))
    tokens = sum(examples[index].num_tokens for batch in chosen for index in batch.tolist())
    return {"num_steps": done, "num_examples": len(examples), "num_tokens": tokens, "attention": sentence}


def _trackers(spec: TrainSpec, first: int) -> list[Tracker]:
    settings = spec.model_dump(mode="json", exclude={"directory", "preferences", "watch"})
    return open_trackers(spec.train.trackers, spec.directory, first, spec.train.tracker_project, settings)


def _build_model(spec: TrainSpec, ds_config: dict[str, Any]) -> tuple[Any, Any]:
    """Load the policy, partitioned over the ranks from the start; returns it and the object that keeps it so."""
    from transformers.integrations import HfDeepSpeedConfig

    partitioned = HfDeepSpeedConfig(ds_config)
    quantize = spec.train.lora.quantize if spec.train.lora is not None else None
    model = load_causal_lm(spec.start, spec.precision, quantize)
    if spec.train.kernels is not None:
        ranks.say(use_kernels(model))
    return adapt(model, spec.train), partitioned


def _initialize(model: Any, ds_config: dict[str, Any], train: Train, total: int) -> Any:
    import deepspeed
    from transformers import get_scheduler

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(train.schedule, optimizer, train.warmup_steps, total)

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trainable, config=ds_config, lr_scheduler=schedule, dist_init_required=False
    )
    return engine


def _layout(engine: Any) -> tuple[str, str]:
    """Choose the layout of the packs, the same on all ranks: every rank computes the same passes of the probe.

    Returns:
        The layout, and what was said of it: what a pass computes, by which attention, and why.
    """
    engine.eval()
    sentences: list[str] = []
    layout = choose_layout(engine.module, engine, sentences.append)
    for sentence in sentences:
        ranks.say(sentence)
    ranks.require_same(layout, "layout of its packs")
    return layout, "; ".join(sentences)


class _Loop:
    """One optimizer step, its checks and its metrics. Nothing in a pass waits for the device."""

    def __init__(
        self,
        spec: TrainSpec,
        engine: Any,
        loss: str,
        examples: Sequence[Example],
        validation: Sequence[Example],
        watch: Watch | None,
        layout: str,
        log: MetricsLog | None,
        beats: Heartbeat,
    ) -> None:
        self.spec, self.engine, self.loss, self.examples, self.validation = spec, engine, loss, examples, validation
        self.watch, self.layout, self.log, self.beats = watch, layout, log, beats
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = engine.device
        self.sums = torch.zeros(len(METRIC_NAMES) + 1, dtype=torch.float64, device=self.device)
        self.tokens, self.seconds, self.learning_rate = 0, 0.0, 0.0
        self.batches: Iterator[Batch] = iter(())  # of the training steps, made ahead

    def run(self, first: int, total: int) -> int:
        """Train from step ``first`` to ``total``, with the checks, evaluations and checkpoints that are due.

        Returns the steps done: fewer than ``total`` where the training was flat before.
        """
        train = self.spec.train
        if first == 0:
            self.check_start()
        self.batches = self._stream(
            pack for step in range(first, total) for packs in self._packs(step) for pack in packs
        )
        shown = self.rank == 0 and "RAY_TRAIN_RUN" not in os.environ  # in a Ray run the driver shows the bar
        with progress("train", total=total, unit="step") if shown else contextlib.nullcontext() as bar:
            if bar is not None:
                bar.update(first)
            for done in range(first + 1, total + 1):
                stops = self.step(done - 1) and done < total
                saves = stops or (done % train.checkpoint_every == 0 and done < total)
                moves = self.watch is not None and self.watch.moves_after(done)
                compares = self.watch is not None and self.watch.compares_after(done)
                # a checkpoint ends an interval, else a resumed run would miss the losses before it
                if done % train.log_every == 0 or done == total or saves or compares:
                    self.write_metrics(done)
                if batches.is_evaluated(done, total, train.eval_every) or moves or compares:
                    self.evaluate(done)
                if self.watch is not None and self.watch.is_flat:
                    return done
                if saves:
                    self.save(done)
                if stops:
                    raise Interrupted(f"stopped by a signal; step {done} is committed, run again to continue.")
                if bar is not None:
                    bar.update(1)
        return total

    def save(self, done: int) -> None:
        """Commit a checkpoint after ``done`` steps."""
        directory = self.spec.directory / CHECKPOINTS
        self.beats.at(f"checkpoint of step {done}")
        lam, best = (self.watch.lam, self.watch.best) if self.watch is not None else ({}, None)
        adapters_only = self.spec.train.lora is not None
        checkpoints.save(self.engine, directory, done, lam, best, adapters_only=adapters_only)

    def step(self, step: int) -> bool:
        """Accumulate the global batch and update; a non-finite loss on any rank stops all before the update.

        Returns whether any rank was asked to stop.
        """
        start = time.monotonic()
        self.learning_rate = self.engine.get_lr()[0]
        others, packs = self._packs(step)
        baseline = self._baseline(itertools.islice(self.batches, len(others)))
        num_examples = len(self._chosen(step))
        self.engine.train()
        # dropout follows the step, also after a resume
        torch.manual_seed(self.spec.seed + 1_000_003 * step + self.rank)
        finite = []
        for number, batch in enumerate(itertools.islice(self.batches, len(packs)), start=1):
            self.beats.at(f"step {step + 1}, pass {number} of {len(packs)}")
            loss_B = self._losses(batch, baseline)
            finite.append(torch.isfinite(loss_B.detach()))
            self.engine.set_gradient_accumulation_boundary(number == len(packs))
            # DeepSpeed divides by the ranks; what is left is the mean over the global batch
            self.engine.backward(loss_B.sum() * (self.world_size / num_examples))
        stops = self._agree(finite, packs, step)
        self.beats.at(f"step {step + 1}, update")
        self.engine.step()
        if self.engine.skipped_steps:
            raise NumericalError(
                f"step {step + 1}: the gradient was not finite and DeepSpeed skipped the update. "
                "Lower train.learning_rate, or use precision fp32 to find the cause."
            )
        self.seconds += time.monotonic() - start
        return stops

    def check_start(self) -> None:
        """Measure the loss before the first step, and the validation loss.

        A policy that is still the reference has log-ratios of zero, so its loss is known: ln 2 for pairs with
        probabilities, the mean squared gap for regression, ln K for lists, half the weight for KTO.
        """
        values = self._measure([self.examples[index] for index in self._chosen(0)], require_finite=True)
        expected = values["reference_loss"]
        tolerance = STEP0_TOLERANCE[self.spec.precision] * max(1.0, expected)
        if self.spec.start == self.spec.reference and not abs(values["loss"] - expected) <= tolerance:
            raise NumericalError(
                f"{self.spec.preferences}: the loss before the first step is {values['loss']:.6f}, not "
                f"{expected:.6f}: the stored reference log-probabilities are not those of this model on these tokens."
            )
        if self.spec.start == self.spec.reference:
            check_reference(self.engine, self.examples, self.layout, self.spec.precision, self.spec.preferences)
        if self.log is not None:
            self.log.write(0, values)
        self.evaluate(0)

    def evaluate(self, step: int) -> None:
        """Write the loss on the validation examples, and what the policy does on the validation prompts."""
        values, line = {}, ""
        if self.validation:
            values = {f"eval_{name}": value for name, value in self._measure(self.validation).items()}
        if self.watch is not None and (step > 0 or self.spec.start != self.spec.reference):  # else it does nothing yet
            observation = self.watch.observe(self._log_probs(self.watch), step)
            values, line = values | observation.values, observation.line
        if line and "RAY_TRAIN_RUN" not in os.environ:  # in a Ray run the driver shows it
            ranks.say(f"step {step}: {line}")
        if self.log is not None and values:
            self.log.write(step, values, line)

    def _log_probs(self, watch: Watch) -> np.ndarray:
        self.engine.eval()
        packs = watch.packs(self.rank, self.world_size)
        return watch.log_probs(self.engine, self._shown("estimate", packs), self.device)

    def write_metrics(self, step: int) -> None:
        """Reduce the interval's sums over the ranks and write a line."""
        values, tokens = self._reduce()
        norm = self.engine.get_global_grad_norm()
        if self.log is not None:
            values |= {"grad_norm": float(norm or 0.0), "learning_rate": self.learning_rate}
            self.log.write(step, values | {"tokens_per_second": tokens / self.seconds})
        self.seconds = 0.0

    def _chosen(self, step: int) -> list[int]:
        train = self.spec.train
        numbers: list[int] = batches.global_batch(len(self.examples), train.batch_size, self.spec.seed, step).tolist()
        return numbers

    def _packs(self, step: int) -> tuple[list[list[Slot]], list[list[Slot]]]:
        """Return this rank's packs of a step: those of KTO's baseline, and those that are learnt from."""
        return self._packs_of([self.examples[index] for index in self._chosen(step)])

    def _packs_of(self, examples: Sequence[Example]) -> tuple[list[list[Slot]], list[list[Slot]]]:
        share = (self.spec.train.tokens_per_pack, self.rank, self.world_size)
        if self.loss != "kto":
            return [], batches.rank_packs(examples, *share)
        others, own = ([example.only(index) for example in examples] for index in (1, 0))
        return batches.rank_packs(others, *share), batches.rank_packs(own, *share)

    def _stream(self, packs: Iterable[list[Slot]]) -> Iterator[Batch]:
        pin, workers = self.device.type == "cuda", self.spec.train.collate_workers
        for batch in batches.stream(packs, self.layout, workers, pin=pin):
            yield batch.to(self.device)

    def _shown(self, work: str, packs: Sequence[list[Slot]]) -> Iterator[Batch]:
        for number, batch in enumerate(self._stream(packs), start=1):
            self.beats.at(f"{work}, pass {number} of {len(packs)}")
            yield batch

    @torch.no_grad()
    def _measure(self, examples: Sequence[Example], *, require_finite: bool = False) -> dict[str, float]:
        kept, kept_tokens = self.sums.clone(), self.tokens
        self.sums.zero_()
        others, packs = self._packs_of(examples)
        baseline = self._baseline(self._stream(others))
        self.engine.eval()
        finite = [torch.isfinite(self._losses(batch, baseline)) for batch in self._shown("evaluation", packs)]
        if require_finite:
            self._agree(finite, packs, 0)
        values, _ = self._reduce()
        self.sums, self.tokens = kept, kept_tokens
        return values

    def _baseline(self, others: Iterable[Batch]) -> torch.Tensor | None:
        """Return KTO's z_ref of a global batch, measured without dropout before its first update; else None."""
        if self.loss != "kto":
            return None
        self.engine.eval()
        return kto_baseline(self.engine, others, self.device)

    def _losses(self, batch: Batch, baseline: torch.Tensor | None) -> torch.Tensor:
        batch = batch if self.watch is None else self.watch.labelled(batch)
        loss_B, sums = pack_losses(self.engine, batch, loss=self.loss, beta=self.spec.beta, baseline=baseline)
        self.sums += sums
        self.tokens += batch.num_tokens
        return loss_B

    def _reduce(self) -> tuple[dict[str, float], float]:
        """Average the running sums over all ranks, add up their tokens, and start both anew."""
        sums = torch.cat([self.sums, self.sums.new_tensor([self.tokens])])
        self.sums.zero_()
        self.tokens = 0
        dist.all_reduce(sums)
        *totals, count, tokens = sums.tolist()
        return {name: total / count for name, total in zip(METRIC_NAMES, totals, strict=True)}, tokens

    def _agree(self, finite: Sequence[torch.Tensor], packs: Sequence[Sequence[Slot]], step: int) -> bool:
        """Return whether any rank was asked to stop; raise on all when a loss on any of them is no finite number."""
        finite_B = torch.cat(list(finite))
        stops = ranks.stop_wanted() or (self.rank == 0 and (self.spec.directory / STOP).exists())
        flags = torch.stack([finite_B.all(), torch.tensor(not stops, device=self.device)]).to(torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        all_finite, goes_on = flags.tolist()
        if all_finite:
            return not goes_on
        slots = itertools.chain.from_iterable(packs)
        bad = [slot.example.example_id for slot, ok in zip(slots, finite_B.tolist(), strict=True) if not ok]
        reports = enumerate(ranks.gathered(bad))
        places = "; ".join(f"rank {rank}: examples {', '.join(ids)}" for rank, ids in reports if ids)
        raise NumericalError(
            f"step {step + 1}: the loss is not finite; no update was made. {places}. "
            "Look at these examples; lower train.learning_rate if the loss grew before."
        )
