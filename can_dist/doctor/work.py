"""The work of a run, counted from its configuration before anything is read: tokens, disk, actors, hours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from can_dist.config import METHODS, Caid, Cdpo, Config, Model, PrimalDual, Sacpo
from can_dist.config.scorers import LogRatio
from can_dist.config.sections import Generate
from can_dist.config.walk import scorers
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import load_model_config
from can_dist.modeling.stored import stored_tensors
from can_dist.stages.ingest import NUM_VALIDATION
from can_dist.training.checkpoints import BYTES_PER_WEIGHT, KEEP
from can_dist.training.plan import Plan

STAGES = ("generate", "score", "train")
"""What spends the time of actors and ranks."""

HOST_S = 105e-6
"""Seconds of the driver's CPU for a response from its prompt to its label: the most that docs/scaling.md measured."""

TRAINED_WEIGHTS_PER_S = (1.84e13, 3.68e13)
"""Weights × tokens that one H100 trains a second under eager ZeRO-3, from and to: 2.3 to 4.6 thousand tokens of an 8B
model, 15 to 30 % of its 989 TFLOP/s at 8 FLOPs a weight and token. A model, not a measurement (docs/scaling.md)."""

TOKEN_BYTES = 8
"""Of a response's token on the disk, about: its id, and its text."""


@dataclass(frozen=True)
class Work:
    """What a run computes: all steps, and every round of a loop.

    Attributes:
        responses: Responses sampled or scored, of the reference and of policies.
        response_tokens: Tokens of each; those of prompts are not counted.
        is_most: Whether they are the most that a response may have, not its mean.
        tokens: By stage of ``STAGES``; None where the configuration does not tell how many.
        unknown: What is not counted, in words.
        devices: Actors or ranks by stage.
        rates: Tokens a second of one of them, from and to, by stage; without those that are not known.
        stated: Stages whose rate was stated; that of others is a model's.
        hours: From and to, by stage with a rate.
        host_hours: Of the driver's CPU.
        disk_bytes: By what is kept.
        actor_bytes: Weights of each kind of actor; None where the model's files are not in reach.
        cache_bytes: Keys and values of the responses that are decoded at once, not of prompts; None where vLLM decides.
    """

    responses: int
    response_tokens: int
    is_most: bool
    tokens: dict[str, int | None]
    unknown: tuple[str, ...]
    devices: dict[str, int]
    rates: dict[str, tuple[float, float]]
    stated: tuple[str, ...]
    hours: dict[str, tuple[float, float]]
    host_hours: float
    disk_bytes: dict[str, int]
    actor_bytes: dict[str, int | None]
    cache_bytes: int | None


def parse_rates(texts: tuple[str, ...]) -> dict[str, float]:
    """Read ``STAGE=TOKENS`` of each text: tokens a second of one actor or rank.

    Raises:
        ConfigError: Another stage, a stage twice, or no number above 0.
    """
    rates: dict[str, float] = {}
    for text in texts:
        stage, _, number = text.partition("=")
        try:
            rate = float(number)
        except ValueError:
            rate = math.nan
        if stage not in STAGES or stage in rates or not 0 < rate < math.inf:
            raise ConfigError(
                f"--rate {text}: expected STAGE=TOKENS, each of {', '.join(STAGES)} at most once, tokens a second "
                "of one actor or rank, above 0; e.g. --rate train=3000."
            )
        rates[stage] = rate
    return rates


def reference_shape(settings: Config) -> Any:
    """Return the configuration of the reference's text model, as transformers has it."""
    return load_model_config(settings.reference, "causal language model").get_text_config()


def count_work(
    settings: Config, plan: Plan, text_config: Any, rates: Mapping[str, float], response_tokens: int | None
) -> Work:
    """Count the work of a run.

    Args:
        settings: The configuration.
        plan: Of its training.
        text_config: The reference's configuration, as transformers has it.
        rates: Tokens a second of one actor or rank, by stage.
        response_tokens: Mean tokens of a response; default: the most, ``generate.max_new_tokens``.
    """
    size = response_tokens or settings.generate.max_new_tokens
    responses, passes, unknown = _responses(settings)
    tokens: dict[str, int | None] = {
        "generate": size * responses["sampled"],
        "score": size * passes,
        "train": _trained(settings, unknown),
    }
    tokens["train"] = None if tokens["train"] is None else size * tokens["train"]
    cluster, vllm = settings.cluster, settings.generate.engine == "vllm"
    devices = {"generate": cluster.num_actors, "score": cluster.num_actors, "train": cluster.num_workers}
    known = {stage: (rate, rate) for stage, rate in rates.items()}
    if "train" not in known and plan.on_gpu:
        known["train"] = (TRAINED_WEIGHTS_PER_S[0] / plan.elements, TRAINED_WEIGHTS_PER_S[1] / plan.elements)
    hours = {}
    for stage, (low, high) in known.items():
        if (number := tokens[stage]) is not None:
            hours[stage] = (number / high / devices[stage] / 3600, number / low / devices[stage] / 3600)
    return Work(
        responses=responses["all"],
        response_tokens=size,
        is_most=response_tokens is None,
        tokens=tokens,
        unknown=tuple(unknown),
        devices=devices,
        rates=known,
        stated=tuple(rates),
        hours=hours,
        host_hours=HOST_S * responses["all"] / 3600,
        disk_bytes=_disk(settings, plan, size * responses["all"]),
        actor_bytes=_actors(settings, plan),
        cache_bytes=None if vllm else cache_bytes(settings.generate, text_config, _weight_bytes(plan)),
    )


def _responses(settings: Config) -> tuple[dict[str, int], int, list[str]]:
    """Return the responses, sampled here and in all; the passes of models over responses; and what is not counted."""
    prompts, options, method = settings.prompts, settings.generate, METHODS[settings.method]
    unknown = [] if prompts.num_train is not None else ["the training prompts (give prompts.num_train)"]
    validation = NUM_VALIDATION if prompts.num_validation is None else prompts.num_validation
    judges = sum(isinstance(scorer, Model | LogRatio) for scorer in scorers(settings).values())
    reference = ((prompts.num_train or 0) + validation) * options.num_responses if "generate" in method.stages else 0
    rounds = _rounds(settings) * (prompts.num_train or 0) * options.num_responses
    held_out = prompts.num_test * settings.evaluate.num_responses
    is_brought = options.responses is not None or options.endpoint is not None
    if "generate" not in method.stages or settings.label.pairs == "preferences":
        unknown.append("the data set's own pairs, which are scored and trained on")
    if any(isinstance(scorer, LogRatio) and scorer.learns for scorer in scorers(settings).values()):
        unknown.append("the trainings of log-ratios on people's labels")
    if settings.evaluate.benign_prompts is not None or settings.evaluate.profile is not None:
        unknown.append("the other sets of the evaluation")
    # ln π_ref beside the judges; of the policy's held-out responses ln π_ref and ln π
    passes = (reference + rounds) * (judges + 1) + held_out * (2 * judges + 2)
    sampled = (0 if is_brought else reference) + rounds + 2 * held_out
    return {"sampled": sampled, "all": reference + rounds + 2 * held_out}, passes, unknown


def _own(settings: Config) -> list[Any]:
    """Return the sections of the method's own."""
    return [getattr(settings, name) for name in METHODS[settings.method].sections]


def _rounds(settings: Config) -> int:
    """Return how often a policy is sampled on the training prompts."""
    for section in _own(settings):
        if isinstance(section, Caid):
            return section.rounds + 1 if section.slack == "generations" else 0
        if isinstance(section, Cdpo | PrimalDual):
            return section.rounds
    return 0


def _epochs(settings: Config) -> list[int]:
    """Return the epochs of each training."""
    plain = settings.train.num_epochs
    epochs = [plain] * (1 + len(settings.constraints) if settings.basis else 1)
    for section in _own(settings):
        if isinstance(section, Cdpo):
            epochs = [plain] * section.rounds
        elif isinstance(section, Caid):
            epochs = [plain, *[section.epochs] * section.rounds]
        elif isinstance(section, PrimalDual):
            epochs = [section.epochs] * section.rounds
        elif isinstance(section, Sacpo):
            epochs = [plain] * 2
    return epochs


def _trained(settings: Config, unknown: list[str]) -> int | None:
    """Return how many responses are trained on in all epochs and trainings, each as often as it is."""
    method, label, train = METHODS[settings.method], settings.label, settings.train
    if "generate" not in method.stages or label.pairs == "preferences" or settings.prompts.num_train is None:
        return None
    num_responses = settings.generate.num_responses
    num_pairs = num_responses * (num_responses - 1) // 2
    if label.pairs_per_prompt != "all":
        num_pairs = min(num_pairs, label.pairs_per_prompt)
    is_list = label.lists or any(isinstance(section, PrimalDual) for section in _own(settings))
    per_example, per_prompt = (num_responses, 1) if is_list else (2, num_pairs)
    examples = round(settings.prompts.num_train * (1 - label.validation_fraction)) * per_prompt
    most = math.inf if train.max_steps is None else train.max_steps * train.batch_size
    if train.stop == "flat":
        unknown.append("how much sooner a training ends that is flat (train.stop)")
    return round(sum(min(examples * number, most) for number in _epochs(settings)) * per_example)


def _weight_bytes(plan: Plan) -> int:
    return 2 if plan.precision == "bf16" else 4


def _disk(settings: Config, plan: Plan, tokens: int) -> dict[str, int]:
    """Return bytes by what is kept: policies, the checkpoints of a training that goes on, tables."""
    policies = len(_epochs(settings)) + settings.basis
    policies += len(settings.p_sacpo.q) if METHODS[settings.method].mixes else 0
    policies += 1 if "strength" in METHODS[settings.method].stages and settings.strength != 1.0 else 0
    return {
        f"{policies} polic{'ies' if policies > 1 else 'y'}": policies * plan.elements * _weight_bytes(plan),
        f"{KEEP + 1} checkpoints while it trains": (KEEP + 1) * BYTES_PER_WEIGHT * plan.trained_elements,
        "responses": TOKEN_BYTES * tokens,
    }


def _actors(settings: Config, plan: Plan) -> dict[str, int | None]:
    """Return the bytes of the weights that each kind of actor holds."""
    weight = _weight_bytes(plan)
    held: dict[str, int | None] = {"generate, ln π": plan.elements * weight}
    for key, scorer in scorers(settings).items():
        model = scorer.model if isinstance(scorer, LogRatio) else scorer
        if isinstance(model, Model):
            held[key] = _stored_bytes(model, weight)
    return held


def _stored_bytes(model: Model, weight_bytes: int) -> int | None:
    try:
        tensors = stored_tensors(Path(model.model).expanduser()).values()
    except DataError:  # doctor reports it
        return None
    return weight_bytes * sum(math.prod(tensor.shape) for tensor in tensors)


def cache_bytes(options: Generate, text_config: Any, weight_bytes: int) -> int:
    """Return the bytes of keys and values of the responses of ``batch_prompts``, within ``tokens_at_once``."""
    heads = text_config.num_attention_heads
    width = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    kept = 2 * text_config.num_hidden_layers * (getattr(text_config, "num_key_value_heads", None) or heads) * width
    tokens = min(options.batch_prompts * options.num_responses * options.max_new_tokens, options.tokens_at_once)
    return int(tokens * kept * weight_bytes)
