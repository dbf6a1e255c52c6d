"""What a run will sample, score, train and write, counted from its configuration: upper bounds, nothing measured.

Every response is counted at ``generate.max_new_tokens``. A method of rounds samples or trains so much in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from can_dist.errors import ConfigError

if TYPE_CHECKING:
    from can_dist.config import Config
    from can_dist.training.plan import Plan
ASSUMED_PROMPTS = 1000  # where the configuration takes all that there are
ASSUMED_PROMPT_TOKENS = 128  # of a prompt, in the memory of a batch
BYTES_PER_TOKEN = 10  # of a response on disk: its id (4), about four letters, and its share of the rest
BYTES_PER_TRAINED_WEIGHT = 16  # of a checkpoint, of which two are kept
STEPS = ("generate", "score", "train")


@dataclass(frozen=True)
class Workload:
    """Prompts by split, responses, tokens at most, sequences at once, and bytes."""

    prompts: dict[str, int]
    is_assumed: bool
    responses: int
    columns: int
    tokens: dict[str, int]
    sequences: int
    cache_bytes_per_token: int
    cache_bytes: int
    weight_bytes: int
    disk_bytes: dict[str, int]
    fits: bool


def count_work(settings: Config, plan: Plan) -> Workload:
    """Count what a configuration asks for, beside the memory plan of its training.

    An evaluation samples and scores responses of both models, and needs two log-probabilities of the policy's; so every
    response is scored by the reward, by each constraint, and once by a language model.
    """
    from can_dist.modeling.loading import load_model_config

    prompts, options = settings.prompts, settings.generate
    validation = 128 if prompts.num_validation is None else prompts.num_validation
    splits = {"train": prompts.num_train or ASSUMED_PROMPTS, "validation": validation, "test": prompts.num_test}
    trained = splits["train"] * options.num_responses
    responses = trained + validation * options.num_responses + 2 * splits["test"] * settings.evaluate.num_responses
    columns = 2 + len(settings.constraints)
    is_sampled = options.responses is None and options.endpoint is None
    counts = {"generate": responses - (0 if is_sampled else trained), "score": responses * columns}
    counts["train"] = trained * settings.train.num_epochs
    tokens = {step: count * options.max_new_tokens for step, count in counts.items()}
    weight = 2 if plan.precision == "bf16" else 4
    config = load_model_config(settings.reference, "causal language model").get_text_config()
    per_token = cache_bytes(config, weight)
    sequences = options.batch_prompts * options.num_responses
    cache = sequences * (ASSUMED_PROMPT_TOKENS + options.max_new_tokens) * per_token
    weights = plan.elements * weight
    return Workload(
        prompts=splits,
        is_assumed=prompts.num_train is None,
        responses=responses,
        columns=columns,
        tokens=tokens,
        sequences=sequences,
        cache_bytes_per_token=per_token,
        cache_bytes=cache,
        weight_bytes=weights,
        disk_bytes={
            "responses": responses * options.max_new_tokens * BYTES_PER_TOKEN,
            "checkpoints": 2 * BYTES_PER_TRAINED_WEIGHT * plan.trained_elements,
            "policies": 2 * weights,  # as trained, and at the strength that the margins ask for
        },
        fits=options.engine == "vllm" or cache + weights <= plan.memory_bytes - plan.spare_bytes,
    )


def cache_bytes(config: Any, weight: int) -> int:
    """Return the bytes of keys and values that generation keeps per token, where every layer keeps all of them."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * weight)


def hours(work: Workload, settings: Config, rates: Mapping[str, float]) -> dict[str, float]:
    """Return the hours of each step whose tokens per second, of one actor or rank, are stated."""
    cluster = settings.cluster
    workers = {"generate": cluster.num_actors, "score": cluster.num_actors, "train": cluster.num_workers}
    return {step: work.tokens[step] / (rate * workers[step]) / 3600 for step, rate in rates.items()}


def read_rates(text: str) -> dict[str, float]:
    """Return tokens per second by step, of text such as ``generate=2000,train=5000``.

    Raises:
        ConfigError: A step that there is not, or no positive number.
    """
    rates: dict[str, float] = {}
    for part in text.split(","):
        step, _, number = part.partition("=")
        try:
            rates[step.strip()] = float(number)
        except ValueError:
            rates[step.strip()] = 0.0
        if step.strip() not in STEPS or not 0 < rates[step.strip()] < float("inf"):
            raise ConfigError(
                f"--tokens-per-second {text}: {part.strip()!r} is not {', '.join(STEPS)} with a positive number.",
                "Write, for example, generate=2000,score=20000,train=5000: tokens per second of one actor or rank.",
            )
    return rates
