"""Examples → batches: an order that follows from (seed, epoch) alone, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from can_dist.errors import DataError
from can_dist.tables.artifacts import Artifact
from can_dist.tables.schemas import PREFERENCES, check_schema

if TYPE_CHECKING:
    from can_dist.modeling.formatter import Formatter


@dataclass(frozen=True)
class Example:
    """One training example: tokens of a prompt and of its responses; per response, ln π_ref (nats) and a target.

    Pair losses have two responses, listwise all of a prompt. KTO has two: the labelled one, and one of another prompt
    that only enters the baseline.
    """

    example_id: str
    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]
    logp_ref: Sequence[float]
    target: Sequence[float]
    weight: float

    @property
    def num_tokens(self) -> int:
        """Tokens that the forward passes see."""
        return len(self.responses) * len(self.prompt_ids) + sum(map(len, self.responses))


@dataclass(frozen=True)
class Slot:
    """An example and its share in the loss of the global batch: 1, or 0 for a filler that keeps the ranks in step."""

    example: Example
    share: float


def load_examples(preferences: Artifact, formatter: Formatter, context: int) -> tuple[list[Example], list[Example]]:
    """Return (training examples, validation examples) of a preferences artifact, in table order.

    Raises
    ------
    DataError
        When an example does not fit the model's context (example ids listed).
    """
    table = check_schema(preferences.table, PREFERENCES, str(preferences.path))
    splits: dict[str, list[Example]] = {"train": [], "validation": []}
    prompts: dict[str, list[int]] = {}
    too_long = []
    for row in table.drop_columns(["response_ids", "texts", "scores"]).to_pylist():
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = formatter.prompt_ids(row["messages"])
        prompt_ids, responses = prompts[row["prompt_id"]], row["token_ids"]
        example = Example(row["example_id"], prompt_ids, responses, row["logp_ref"], row["target"], row["weight"])
        longest = len(prompt_ids) + max(map(len, responses))
        if longest > context:
            too_long.append(f"{example.example_id} ({longest} tokens)")
        splits[row["split"]].append(example)
    if too_long:
        raise DataError(
            f"{preferences.path}: {len(too_long)} example(s) longer than the model's context of {context} tokens: "
            f"{', '.join(too_long[:5])}. Lower generate.max_new_tokens or shorten the prompts."
        )
    return splits["train"], splits["validation"]


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole training; the last batch of an epoch may be smaller."""
    steps = num_epochs * -(-num_examples // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def global_batch(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the example numbers of optimizer step ``step`` (0-based): a slice of the epoch's permutation."""
    per_epoch = -(-num_examples // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_examples)
    return order[position * batch_size : (position + 1) * batch_size]


def micro_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes of every rank per optimizer step, the same for all steps."""
    return -(-batch_size // (micro_batch_size * world_size))


def micro_batches(
    examples: Sequence[Example],
    chosen: Sequence[int],
    micro_batch_size: int,
    num_micro: int,
    rank: int,
    world_size: int,
) -> Iterator[list[Slot]]:
    """Yield this rank's micro-batches of a global batch; every chosen example lands on exactly one rank once.

    A rank without work left gets a filler of share 0: under ZeRO-3 every rank must take part in every pass.
    """
    mine = [Slot(examples[index], 1.0) for index in chosen[rank::world_size]]
    for number in range(num_micro):
        yield mine[number * micro_batch_size : (number + 1) * micro_batch_size] or [Slot(examples[chosen[0]], 0.0)]
