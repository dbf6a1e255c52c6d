"""Whether training fits a GPU's memory, said before the model is loaded: by the counts of ``can-dist plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from can_dist.config import Model
from can_dist.config.sections import Lora, Train
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling.logprobs import HEAD_BYTES_ON
from can_dist.training import memory as m
from can_dist.training.activations import Shell
from can_dist.training.batches import Example
from can_dist.training.spec import TrainSpec

GB = 10**9
MOST_RANKS = 4096


@dataclass(frozen=True)
class Demand:
    """What decides the memory of a rank on a GPU.

    Attributes:
        model: The model that is trained.
        train: The options of the training.
        precision: 'bf16' or 'fp32'.
        ds_config: The complete DeepSpeed configuration.
        num_ranks: Ranks that divide the weights.
        tokens: Tokens of the largest pack.
        response_tokens: Tokens of a response.
    """

    model: Model
    train: Train
    precision: str
    ds_config: dict[str, Any]
    num_ranks: int
    tokens: int
    response_tokens: int


def largest_pack(examples: Sequence[Example], train: Train, num_ranks: int) -> int:
    """Return a bound on the tokens of a pack: the budget, or what a rank's part of the largest batch can have."""
    sizes = sorted((example.num_tokens for example in examples), reverse=True)
    part = sum(sizes[: train.batch_size]) // num_ranks + sizes[0]
    return min(max(train.tokens_per_pack, sizes[0]), part)


def mean_response(examples: Sequence[Example]) -> int:
    """Return the mean number of tokens of a response, at least one."""
    lengths = [len(response) for example in examples for response in example.responses]
    return max(1, sum(lengths) // len(lengths))


def count(demand: Demand) -> tuple[m.Parameters, int]:
    """Return the parameters of a model, and the bytes of a pass at its highest.

    Raises:
        ConfigError: When it is not counted: a base in 4 bits, or a model that is trained in padded batches.
    """
    lora = demand.train.lora
    if lora is not None and lora.quantize is not None:
        raise ConfigError("train.lora.quantize: a base in 4 bits is not counted.")
    with torch.random.fork_rng(devices=[]):  # adapters are drawn after this, the same on all ranks
        shell = Shell(demand.model, demand.train, demand.precision, HEAD_BYTES_ON["cuda"])
        needs = shell.count(demand.tokens, demand.response_tokens, varlen=demand.precision == "bf16")
    return shell.parameters(), needs.peak


def peak_bytes(demand: Demand, counted: tuple[m.Parameters, int]) -> int:
    """Return the bytes at the highest of one rank: in a pass, or in the update of the weights.

    Args:
        demand: What is to be trained.
        counted: What ``count`` returned, which does not depend on the number of ranks.

    Raises:
        ConfigError: For ZeRO-2, which is not counted.
    """
    sizes, pass_bytes = counted
    zero = m.Zero.of(demand.ds_config, num_ranks=demand.num_ranks, on_gpu=True, precision=demand.precision)
    resting = m.states(sizes, zero)
    return max(m.peak_of_a_pass(resting, pass_bytes), m.peak_of_the_step(resting, sizes, zero))


def require_room(demand: Demand, memory_bytes: int, say: Callable[[str], None]) -> None:
    """Refuse a training that a GPU cannot hold, and warn of one that it may not hold.

    Args:
        demand: What is to be trained.
        memory_bytes: Bytes of the GPU.
        say: Is told of doubts.

    Raises:
        EnvironmentProblem: When even a plan that counted too much by ``memory.AGREEMENT`` would not fit.
    """
    try:
        counted = count(demand)
        peak = peak_bytes(demand, counted)
    except (ValueError, RuntimeError, TypeError) as error:  # of models that tensors without storage do not go through
        say(f"what this training needs of the GPU's memory is not counted beforehand: {str(error).splitlines()[0]}")
        return
    needed = f"about {peak / GB:,.1f} GB of this GPU's {memory_bytes / GB:,.1f} GB (can-dist plan counts them)"
    if peak > memory_bytes * (1 + m.AGREEMENT):
        raise EnvironmentProblem(f"training needs {needed}. {_ways_out(demand, counted, memory_bytes)}")
    if peak > memory_bytes * (1 - m.SPARE):
        ways = _ways_out(demand, counted, memory_bytes)
        say(f"warning: training needs {needed}: it may run out of memory. {ways}")


def require_room_here(
    spec: TrainSpec, ds_config: dict[str, Any], examples: Sequence[Example], num_ranks: int, say: Callable[[str], None]
) -> None:
    """Refuse a training on examples that the GPU of this rank cannot hold, as ``require_room`` does."""
    tokens, response = largest_pack(examples, spec.train, num_ranks), mean_response(examples)
    demand = Demand(spec.start, spec.train, spec.precision, ds_config, num_ranks, tokens, response)
    require_room(demand, torch.cuda.get_device_properties(0).total_memory, say)


def _ways_out(demand: Demand, counted: tuple[m.Parameters, int], memory_bytes: int) -> str:
    """Say what the three cheapest changes would need, each alone."""
    room = memory_bytes * (1 - m.SPARE)
    peaks = {}
    if not demand.train.activation_checkpointing:
        train = demand.train.model_copy(update={"activation_checkpointing": True})
        changed = replace(demand, train=train)
        peaks["train.activation_checkpointing=true"] = peak_bytes(changed, count(changed))
    if demand.train.lora is None:
        changed = replace(demand, train=demand.train.model_copy(update={"lora": Lora()}))
        peaks[f"train.lora.r={Lora().r}"] = peak_bytes(changed, count(changed))
    ranks = replace(demand, num_ranks=2 * demand.num_ranks)
    while peak_bytes(ranks, counted) > room and ranks.num_ranks < MOST_RANKS:
        ranks = replace(ranks, num_ranks=2 * ranks.num_ranks)
    peaks[f"cluster.num_workers={ranks.num_ranks}"] = peak_bytes(ranks, counted)
    ways = [f"{way} needs {peak / GB:,.1f} GB{'' if peak <= room else ', not enough'}" for way, peak in peaks.items()]
    return f"Ways out, each alone: {'; '.join(ways)}."
