"""preferences → policy: one preference optimisation, by Ray inside a run or by a launcher's ranks."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from can_dist import errors
from can_dist.cluster.connection import connect
from can_dist.cluster.places import check_room_for_workers
from can_dist.config import Config, Model
from can_dist.config.base import identity
from can_dist.console import interruptible, progress
from can_dist.dual.flat import flat_sentence
from can_dist.errors import ConfigError, Interrupted
from can_dist.modeling.formatter import require_convention, text_identity
from can_dist.modeling.loading import model_digest
from can_dist.modeling.policy_probe import PROBE
from can_dist.modeling.precision import require_known_gpus, run_precision
from can_dist.stages.train_on_ray import FAILURE, run_ranks
from can_dist.stages.watch import Ascent, Watched, steering_inputs, watch_spec
from can_dist.tables.artifacts import Artifact, StageDirectory, write_json
from can_dist.training import ADAPTER, CHECKPOINTS, CURVE, POLICY, STOP, SUMMARY
from can_dist.training.batches import num_steps
from can_dist.training.checkpoints import writing
from can_dist.training.deepspeed_config import accumulation, read_ds_config
from can_dist.training.heartbeat import HANG, RANKS, read_hang
from can_dist.training.metrics import ESTIMATE, METRICS, RESUMED, loss_above_start, read_metrics, training_curve
from can_dist.training.spec import TrainSpec, WatchSpec
from can_dist.workspace import Workspace

Policy = Model | Artifact
"""A language model: a configured one, or a trained policy."""


def train(
    work: Workspace,
    reference: Policy,
    preferences: Artifact,
    *,
    beta: float,
    start: Policy | None = None,
    epochs: int | None = None,
    watched: Watched | None = None,
    name: str = "policy",
) -> Artifact:
    """Return the ``policy`` artifact: ``policy/`` is a Hugging Face directory of safetensors.

    Unfinished training continues from its newest checkpoint. Inside a launched process group (``deepspeed``,
    ``torchrun``) this process is one of the ranks; otherwise Ray starts them.

    Args:
        work: The run.
        reference: The log-ratios are relative to it; the preferences hold its log-probabilities.
        preferences: The examples, and the name of their loss.
        beta: KL weight β.
        start: The initial weights, by default the reference's.
        epochs: Replaces ``train.num_epochs``.
        watched: What each evaluation estimates the policy by, ``train.feedback`` steers λ by, and ``train.stop`` ends
            the training by; None: nothing.
        name: What messages call the policy.

    Raises:
        ConfigError: The initial weights are those of a trained policy, and ``train.lora.quantize`` is set; or λ would
            never move; or ``train.stop`` is flat and nothing tells when it is.
        DataError: The preferences' reference log-probabilities were computed with another template than the
            reference's.
        NumericalError: A loss or gradient is not finite (step, rank, example ids), or the loss of the reference's own
            weights is not that of log-ratios of zero.
    """
    config = _with_epochs(work.config, epochs)
    policies = {"reference": reference} if start is None else {"reference": reference, "start": start}
    trained = {name: policy for name, policy in policies.items() if isinstance(policy, Artifact)}
    _check_start(config, start or reference)
    if work.rank is not None:
        require_known_gpus(config)
    models = {name: policy_model(policy, config.reference) for name, policy in policies.items()}
    inputs = {"preferences": preferences, **trained, **steering_inputs(config.train, watched)}
    stage = _open(work, config, models, inputs, beta, watched.ascent if watched else None, name)
    if stage.finished:
        return stage.finished
    require_convention(models["reference"], preferences.info.get("text"), str(preferences.path))
    for left in (FAILURE, STOP, f"{RANKS}/{HANG}"):  # by an earlier attempt
        (stage.path / left).unlink(missing_ok=True)
    steps = _total_steps(config, preferences)
    watch = watch_spec(watched, preferences, config.train, steps)
    spec = _spec(config, stage.path, models, preferences, beta, watch)
    if work.rank is not None:
        from can_dist.training.engine import train_worker

        with work.timed("train", name, ranks=int(os.environ["WORLD_SIZE"]), steps=steps):
            train_worker(spec)
            if work.rank != 0:
                raise SystemExit(0)  # rank 0 commits for all
            return _commit(work, stage)
    return _train_on_ray(work, stage, spec, steps, name)


def _train_on_ray(work: Workspace, stage: StageDirectory, spec: str, steps: int, name: str) -> Artifact:
    """Run the ranks on Ray, raise the error that they left, or commit the policy."""
    cluster, lent = work.config.cluster, work.lend_actor()
    connect(cluster)
    if lent is None:
        with interruptible():
            check_room_for_workers(cluster, work.say)
    with work.timed("train", name, ranks=cluster.num_workers, steps=steps):
        with _watch(stage.path, steps):
            run_ranks(work, stage.path, spec, lent)
        _raise_failure(stage.path)
        artifact = _commit(work, stage)
    if (stage.path / STOP).exists():  # requested after the last step
        (stage.path / STOP).unlink()
        raise Interrupted("stopped by a signal; the policy is committed, run again to continue.")
    return artifact


def _with_epochs(config: Config, epochs: int | None) -> Config:
    if epochs is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"num_epochs": epochs})})


def _check_start(config: Config, start: Policy) -> None:
    lora = config.train.lora
    if lora is not None and lora.quantize is not None and isinstance(start, Artifact):
        raise refuse_requantizing("this training starts from a trained policy")


def refuse_requantizing(why: str) -> ConfigError:
    """Return the error for a trained policy that would be quantized again; ``why`` begins its message."""
    return ConfigError(
        f"train.lora.quantize: {why}. Rounded to 4 bits again it would lose part of what it learnt.",
        "Leave quantize out.",
    )


def policy_model(policy: Policy, reference: Model) -> Model:
    """Return a policy as a model; a trained one gets the text convention of ``reference``."""
    if isinstance(policy, Model):
        return policy
    policy.check()
    return Model(
        model=str(policy.path / POLICY), template=reference.template, template_options=reference.template_options
    )


def _open(
    work: Workspace,
    config: Config,
    models: Mapping[str, Model],
    inputs: Mapping[str, Artifact],
    beta: float,
    ascent: Ascent | None,
    name: str,
) -> StageDirectory:
    ds_config, precision = read_ds_config(config.train.ds_config), run_precision(config)
    identity_keys = {
        **{name: model_digest(model) for name, model in models.items()},
        **text_identity(models["reference"]),
        "train": identity(config.train, exclude=["ds_config", "feedback"]),
        "ds_config": ds_config,
        **accumulation(ds_config, precision),
        "beta": beta,
        "seed": config.seed,
        "precision": precision,
        "record": 3,  # the files beside the weights; 2: the curve, and the adapter; 3: the probe
    }
    if ascent is not None:
        identity_keys["ascent"] = asdict(ascent)
    elif config.train.feedback is not None and "validation" in inputs:
        identity_keys |= {"feedback": config.train.feedback, "eval_every": config.train.eval_every}
    return work.open("train", name, identity_keys, inputs)


def _spec(
    config: Config,
    directory: Path,
    models: Mapping[str, Model],
    preferences: Artifact,
    beta: float,
    watch: WatchSpec | None,
) -> str:
    # Ray's workers start in a directory of their own
    absolute = {name: m.model_copy(update={"model": _absolute(m.model)}) for name, m in models.items()}
    return TrainSpec(
        directory=directory.resolve(),
        preferences=preferences.path.resolve(),
        reference=absolute["reference"],
        start=absolute.get("start", absolute["reference"]),
        train=config.train.model_copy(update={"ds_config": _absolute(config.train.ds_config)}),
        beta=beta,
        seed=config.seed,
        precision=run_precision(config),
        watch=watch,
        hang_timeout_s=config.cluster.hang_timeout_s,
    ).model_dump_json()


def _absolute(path: str | None) -> str | None:
    return str(Path(path).resolve()) if path is not None and Path(path).exists() else path


def _total_steps(config: Config, preferences: Artifact) -> int:
    options = config.train
    num_examples = preferences.info["splits"]["train"]
    return num_steps(num_examples, options.batch_size, options.num_epochs, options.max_steps)


@contextmanager
def _watch(directory: Path, total: int) -> Iterator[None]:
    """Show the progress that the ranks write to metrics.jsonl."""
    stop = threading.Event()

    def follow() -> None:
        with progress("train", total=total, unit="step") as bar:
            finished = False
            shown: list[float] = []
            said = {line["step"] for line in read_metrics(directory / METRICS) if ESTIMATE in line}  # by an earlier run
            hang = ""
            while not finished:
                finished = stop.wait(1.0)
                if (message := read_hang(directory)) != hang:
                    hang = message
                    bar.write(f"can-dist: train: {hang}", file=sys.stderr)
                metrics = read_metrics(directory / METRICS)
                resumed = [line[RESUMED] for line in metrics if RESUMED in line]
                if resumed and resumed != shown:
                    shown = resumed
                    bar.write(f"can-dist: train: going on from checkpoint step-{int(shown[-1]):06d}", file=sys.stderr)
                estimates = {line["step"]: line[ESTIMATE] for line in metrics if ESTIMATE in line}
                for step in sorted(estimates.keys() - said):
                    bar.write(f"can-dist: train: step {step}: {estimates[step]}", file=sys.stderr)
                said = set(estimates)  # what comes after the checkpoint is estimated, and said, again
                lines = [line for line in metrics if "loss" in line]
                if lines:
                    bar.set_postfix(loss=f"{lines[-1]['loss']:.4f}", refresh=False)
                    bar.update(int(lines[-1]["step"]) - bar.n)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _raise_failure(directory: Path) -> None:
    path = directory / FAILURE
    if path.is_file():
        failure = json.loads(path.read_text(encoding="utf-8"))
        raise getattr(errors, failure["type"])(failure["message"])


def drift_warning(curve: Mapping[str, Sequence[Sequence[float]]], loss_name: str) -> str:
    """Return the sentence on a training whose last loss is above the reference's on the same examples, or ''.

    Args:
        curve: ``curve.json`` of a ``train`` artifact: [step, value] of each loss, in units of the training's loss.
        loss_name: Of the training; the value of ``clipped`` says nothing of the policy.
    """
    loss = loss_above_start(curve)
    if loss is None or loss_name == "clipped":
        return ""
    return (
        f"the last training loss is {loss:.4f}, above the reference's {curve['reference_loss'][-1][1]:.4f} on the same "
        "examples: the policy drifted. Lower train.learning_rate, add train.warmup_steps, or train longer before "
        "trusting it."
    )


def _commit(work: Workspace, stage: StageDirectory) -> Artifact:
    curve = training_curve(stage.path)
    if warning := drift_warning(curve, stage.inputs["preferences"].info["loss"]):
        work.say(f"train: warning: {warning}")
    written = [p for folder in (POLICY, ADAPTER) for p in (stage.path / folder).rglob("*") if p.is_file()]
    files = [CURVE, PROBE, *(str(p.relative_to(stage.path)) for p in written)]
    summary = json.loads((stage.path / SUMMARY).read_text(encoding="utf-8"))
    if flat := summary.get("stopped"):
        work.say(f"train: {flat_sentence(summary['num_steps'], **flat)}")
    with writing(stage.path, stage.path / CHECKPOINTS):
        write_json(stage.path / CURVE, curve)
        artifact = stage.commit(files, info={"summary": summary})
    for leftover in (CHECKPOINTS, "ray", RANKS):
        shutil.rmtree(stage.path / leftover, ignore_errors=True)
    return artifact
