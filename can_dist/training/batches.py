"""Pairs → batches: an order that follows from (seed, epoch) alone, whatever the number of ranks."""

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
class Pair:
    """One preference: tokens of the prompt and of both responses, target, and reference log-probabilities (nats)."""

    pair_id: str
    prompt_ids: Sequence[int]
    response_a: Sequence[int]
    response_b: Sequence[int]
    target: float
    logp_ref_a: float
    logp_ref_b: float

    @property
    def num_tokens(self) -> int:
        """Tokens that the two forward passes see."""
        return 2 * len(self.prompt_ids) + len(self.response_a) + len(self.response_b)


@dataclass(frozen=True)
class Slot:
    """A pair and its share in the loss of the global batch: 1, or 0 for a filler that keeps the ranks in step."""

    pair: Pair
    weight: float


def load_pairs(preferences: Artifact, formatter: Formatter, context: int) -> tuple[list[Pair], list[Pair]]:
    """Return (training pairs, validation pairs) of a preferences artifact, in table order.

    Raises
    ------
    DataError
        When a pair does not fit the model's context (pair ids listed).
    """
    table = check_schema(preferences.table, PREFERENCES, str(preferences.path))
    splits: dict[str, list[Pair]] = {"train": [], "validation": []}
    prompts: dict[str, list[int]] = {}
    too_long = []
    for row in table.drop_columns(["text_a", "text_b"]).to_pylist():
        if row["prompt_id"] not in prompts:
            prompts[row["prompt_id"]] = formatter.prompt_ids(row["messages"])
        pair = Pair(
            row["pair_id"],
            prompts[row["prompt_id"]],
            row["token_ids_a"],
            row["token_ids_b"],
            row["target"],
            row["logp_ref_a"],
            row["logp_ref_b"],
        )
        longest = len(pair.prompt_ids) + max(len(pair.response_a), len(pair.response_b))
        if longest > context:
            too_long.append(f"{pair.pair_id} ({longest} tokens)")
        splits[row["split"]].append(pair)
    if too_long:
        raise DataError(
            f"{preferences.path}: {len(too_long)} pair(s) longer than the model's context of {context} tokens: "
            f"{', '.join(too_long[:5])}. Lower generate.max_new_tokens or shorten the prompts."
        )
    return splits["train"], splits["validation"]


def num_steps(num_pairs: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole training; the last batch of an epoch may be smaller."""
    steps = num_epochs * -(-num_pairs // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def global_batch(num_pairs: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the pair numbers of optimizer step ``step`` (0-based): a slice of the epoch's permutation."""
    per_epoch = -(-num_pairs // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return order[position * batch_size : (position + 1) * batch_size]


def micro_steps(batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Forward passes of every rank per optimizer step, the same for all steps."""
    return -(-batch_size // (micro_batch_size * world_size))


def micro_batches(
    pairs: Sequence[Pair], chosen: Sequence[int], micro_batch_size: int, num_micro: int, rank: int, world_size: int
) -> Iterator[list[Slot]]:
    """Yield this rank's micro-batches of a global batch; every chosen pair lands on exactly one rank once.

    A rank without work left gets a filler of weight 0: under ZeRO-3 every rank must take part in every pass.
    """
    mine = [Slot(pairs[index], 1.0) for index in chosen[rank::world_size]]
    for number in range(num_micro):
        yield mine[number * micro_batch_size : (number + 1) * micro_batch_size] or [Slot(pairs[chosen[0]], 0.0)]
