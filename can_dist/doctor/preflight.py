"""What can be known to be wrong before anything is computed: missing data, models, functions, DeepSpeed files."""

from __future__ import annotations

from pathlib import Path

from can_dist.config import METHODS, Config, LogRatio, Model
from can_dist.config.walk import models, scorers, sources
from can_dist.doctor.conversations import check_conversations
from can_dist.endpoints import open_client
from can_dist.errors import ConfigError, DataError
from can_dist.modeling import quantized
from can_dist.modeling.adapters import check_adapters
from can_dist.modeling.liger import check_kernels
from can_dist.modeling.loading import check_causal_lm, check_trainable, check_vocabulary, model_digest
from can_dist.modeling.precision import run_precision
from can_dist.modeling.remote_code import COMMIT, refuse_floating_code
from can_dist.modeling.vllm_engine import check_installed
from can_dist.scoring.kinds import check_scorer_opens, scorer_identity
from can_dist.scoring.log_ratio import check_same_text
from can_dist.stages.ingest import source_identity
from can_dist.stages.train import refuse_requantizing
from can_dist.tables.artifacts import Artifact
from can_dist.tables.urls import is_remote
from can_dist.training.deepspeed_config import build_ds_config, read_ds_config
from can_dist.training.extensions import check_build_directories
from can_dist.training.trackers import check_trackers

MANY = 2
"""Times that a response is trained in an epoch before it is said."""


def preflight(config: Config, prompts: Artifact | None = None, *, trains: bool = True) -> list[str]:
    """Raise the error that a later stage would meet after hours, now. Data sources are ``check_sources``'s.

    Args:
        config: The configuration.
        prompts: The prompts, where they have been read already.
        trains: Whether this process starts the ranks of a training.

    Returns:
        What a user should know and is no error.

    Raises:
        DataError: Something in the data or the models is wrong:
            - a model does not exist, is incomplete or damaged, or is an adapter;
            - a tokenizer is not its model's, or a checkpoint is not its configuration's;
            - a scorer's model is not what its kind says, or holds tensors that nothing reads;
            - a template refuses a conversation, or leaves one of its messages out;
            - an aligned policy reads text unlike the reference.
        ConfigError: Something cannot be done as configured:
            - a Python scorer cannot be imported, or a guard's verdicts are no tokens;
            - a model has no chat template and no template, or several chat templates and no default;
            - adapters are asked for where they cannot be merged;
            - the DeepSpeed file is not usable, or the reference is stored quantized;
            - λ is to be moved by validation prompts, and none are held out;
            - the package of an engine, of 4-bit weights, of kernels or of a tracker is not installed;
            - code of a hub model that is not pinned is to be run.
        EnvironmentProblem: Something is missing around the run:
            - the key of an endpoint, GPUs for vLLM or for kernels, or a way to an endpoint that a proxy stands in;
            - a GPU by which ``precision: auto`` could be decided, or that computes in the precision given;
            - training would wait for the lock of a killed build, or load extensions that others can write.
    """
    if trains:
        check_build_directories(launched=False)
    precision = run_precision(config)
    if config.train.ds_config is not None:
        build_ds_config(read_ds_config(config.train.ds_config), config.train, precision)
    check_trackers(config.train.trackers)
    for key, model in models(config).items():
        refuse_floating_code(key, model)
    if config.train.lora is not None and config.train.lora.quantize is not None:
        _check_quantize(config)
    if config.train.kernels is not None:
        check_kernels(config.reference, on_gpu=config.cluster.gpus_per_worker > 0)
    model_digest(config.reference)
    check_vocabulary(config.reference)
    check_causal_lm(config.reference)
    check_trainable(config.reference)
    if config.train.lora is not None:
        check_adapters(config.reference, config.train.lora)
    if config.generate.engine == "vllm":
        check_installed(config.cluster.gpus_per_actor)
    if config.generate.endpoint is not None:
        endpoint = config.generate.endpoint
        open_client(f"generate.endpoint {endpoint.model}", endpoint.base_url, endpoint).close()
    for scorer in scorers(config).values():
        if isinstance(scorer, LogRatio):
            _check_log_ratio(scorer, config.reference)
            continue
        scorer_identity(scorer, precision)
        check_scorer_opens(scorer)
    if prompts is not None and not prompts.info["counts"].get("validation"):
        _check_without_validation(config, prompts)
    return [*check_conversations(config, prompts), *many_pairs(config, prompts)]


def many_pairs(config: Config, prompts: Artifact | None) -> list[str]:
    """Return how often each response will be trained, where every pair of a prompt's responses is an example."""
    label, num_responses = config.label, config.generate.num_responses
    from_scores = METHODS[config.method].learns_from == "scores" and config.generate.responses is None
    if prompts is None or not from_scores or label.lists or label.pairs != "responses":
        return []
    num_pairs = num_responses * (num_responses - 1) // 2
    if label.pairs_per_prompt != "all":
        num_pairs = min(num_pairs, label.pairs_per_prompt)
    num_prompts, times = prompts.info["counts"]["train"], 2 * num_pairs / num_responses
    if times <= MANY:
        return []
    return [
        f"label: {num_prompts:,} prompts × {num_responses} responses make {num_prompts * num_pairs:,} pairs, and each "
        f"response is trained {times:.3g} times per epoch. label.labels: soft learns all pairs from one pass of each."
    ]


def _check_without_validation(config: Config, prompts: Artifact) -> None:
    """Raise ``ConfigError`` where something is done by validation prompts, of which there are none."""
    keys = {
        "train.feedback": config.train.feedback == "validation",
        "train.stop: flat": config.train.stop == "flat",
        "caid.slack": config.caid.slack == "estimate",
    }
    for key in (key for key, is_given in keys.items() if is_given):
        raise ConfigError(
            f"{key}: no validation prompts are held out of the {prompts.num_rows} of {config.prompts.source}.",
            "Give prompts.num_validation (128 are advised), or bring more prompts.",
        )


def _check_quantize(config: Config) -> None:
    """Raise ``ConfigError`` where a base in 4 bits is asked for and cannot be had."""
    quantized.check_installed()
    if ratios := [key for key, scorer in scorers(config).items() if isinstance(scorer, LogRatio)]:
        raise ConfigError(
            f"train.lora.quantize: not offered with log-ratios ({', '.join(ratios)}), whose ln π_ref is that of the "
            "whole reference, not of the 4-bit base that would be trained.",
            "Leave quantize out.",
        )
    if METHODS[config.method].trains_from_trained:
        raise refuse_requantizing(f"method {config.method} trains on from a policy that it trained")


def check_sources(config: Config, *, by_commit: bool = True) -> None:
    """Refuse data sources that do not exist, all of them at once; run, doctor and plan give the same message.

    Args:
        config: the configuration.
        by_commit: whether a data set of the hub must have a revision; a plan without the hub does not need it.

    Raises:
        DataError: when a local file or directory is missing.
        ConfigError: when a data set of the hub has no revision.
    """
    problems: dict[str, ConfigError | DataError] = {}
    for key, source in sources(config).items():
        try:
            source_identity(source)
        except DataError as problem:
            problems[key] = problem
        except ConfigError as problem:
            if by_commit:
                problems[key] = problem
    if not problems:
        return
    key, first = next(iter(problems.items()))
    if len(problems) == 1:
        raise type(first)(f"{key}: {first.message}", first.remedy)
    lines = [f"{key}: {problem}" for key, problem in problems.items()]  # each with the remedy of its own
    raise type(first)(f"{len(lines)} data sources cannot be read.\n  " + "\n  ".join(lines))


def check_pinned(config: Config) -> None:
    """Raise ``ConfigError`` where ``pinned`` asks for commits and a model or data set of the hub has none."""
    if not config.pinned:
        return
    named = {key: (model.model, model.revision) for key, model in models(config).items()}
    named |= {key: (source.source, source.revision) for key, source in sources(config).items()}
    floating = [
        f"{key}: {name} at revision {revision or 'none'}"
        for key, (name, revision) in named.items()
        if not is_remote(name) and not Path(name).expanduser().exists() and not COMMIT.fullmatch(revision or "")
    ]
    if floating:
        listed = "\n".join(f"  {line}" for line in floating)
        raise ConfigError(
            f"pinned: {len(floating)} model(s) and data set(s) of the hub would be whatever they are "
            f"today:\n{listed}\n",
            "Give each its commit (40 hexadecimal digits) as revision: `python recipes/pin.py FILE` asks the hub and "
            "writes them into FILE (`can-dist files recipes` copies script and recipes). Or set pinned to false.",
        )


def _check_log_ratio(scorer: LogRatio, reference: Model) -> None:
    if scorer.model is not None:
        model_digest(scorer.model)
        check_same_text(scorer.model, reference)
