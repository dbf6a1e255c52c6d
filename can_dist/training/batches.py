"""Examples → packs: an order that follows from (seed, epoch) alone, whatever the number of ranks."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from can_dist.errors import DataError
from can_dist.modeling.packs import Pack, balanced, balanced_within, make_pack
from can_dist.modeling.packs import num_tokens as tokens_of_group
from can_dist.modeling.segments import map_tensors
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
        """Tokens of the prompt, once, and of the responses."""
        return tokens_of_group((self.prompt_ids, self.responses))

    def only(self, index: int) -> Example:
        """Return the example with one of its responses."""
        return replace(self, responses=[self.responses[index]], logp_ref=[self.logp_ref[index]])


@dataclass(frozen=True)
class Slot:
    """An example and its share in the loss of the global batch: 1, or 0 for a filler that keeps the ranks in step."""

    example: Example
    share: float


@dataclass(frozen=True)
class Batch:
    """The tensors of one pack, float32 except for the pack: B examples, R responses in all, N of the longest."""

    pack: Pack
    num_responses: list[int]
    ref_R: torch.Tensor
    target_BN: torch.Tensor
    weight_B: torch.Tensor
    share_B: torch.Tensor
    example_ids: list[str]
    num_tokens: int

    def to(self, device: str | torch.device) -> Batch:
        """Return the batch on a device."""
        moved: Batch = map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return moved

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory (called by a DataLoader)."""
        pinned: Batch = map_tensors(self, lambda tensor: tensor.pin_memory())
        return pinned


def load_examples(preferences: Artifact, formatter: Formatter, context: int) -> tuple[list[Example], list[Example]]:
    """Return (training examples, validation examples) of a preferences artifact, in table order.

    Raises:
        DataError: when an example does not fit the model's context (example ids listed).
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


def about_long(examples: Sequence[Example], budget: int) -> str:
    """Return a message counting the examples longer than ``budget`` (each gets its own pass), or ''."""
    sizes = [example.num_tokens for example in examples]
    if not sizes or max(sizes) <= budget:
        return ""
    longer = sum(size > budget for size in sizes)
    return (
        f"{longer} of {len(sizes)} examples have more than train.tokens_per_pack={budget} tokens, at most "
        f"{max(sizes)}. Nothing is cut: each has a pass of its own, which needs the memory for it."
    )


def num_steps(num_examples: int, batch_size: int, num_epochs: int, max_steps: int | None) -> int:
    """Optimizer steps of a whole training; the last batch of an epoch may be smaller."""
    steps = num_epochs * -(-num_examples // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


def is_evaluated(done: int, total: int, every: int) -> bool:
    """Return whether a training of ``total`` steps is evaluated after ``done``: at its end, and every ``every`` steps.

    Within the last half of ``every`` it is not: the end would say the same again, for another pass over the responses.
    """
    return done == total or (done % every == 0 and 2 * (total - done) >= every)


def global_batch(num_examples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the example numbers of optimizer step ``step`` (0-based): a slice of the epoch's permutation."""
    per_epoch = -(-num_examples // batch_size)
    epoch, position = divmod(step, per_epoch)
    return _order(num_examples, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@functools.lru_cache(maxsize=2)
def _order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def rank_packs(examples: Sequence[Example], budget: int, rank: int, world_size: int) -> list[list[Slot]]:
    """Return this rank's packs of a global batch; every example lands in exactly one pack of one rank.

    Ranks, and packs within a rank, are balanced by tokens; a pack holds at most ``budget`` tokens, or one longer
    example. All ranks get the same number of packs, since under ZeRO-3 every rank must take part in every pass: a
    rank without work left gets a filler of share 0.
    """
    sizes = [example.num_tokens for example in examples]
    of_ranks = [[(item, sizes[item]) for item in items] for items in balanced(sizes, world_size)]
    num_packs = max(len(balanced_within([size for _, size in mine], budget)) for mine in of_ranks)
    mine = of_ranks[rank]
    packs = balanced_within([size for _, size in mine], budget, at_least=num_packs)
    filler = Slot(min(examples, key=lambda example: example.num_tokens), 0.0)
    return [[Slot(examples[mine[position][0]], 1.0) for position in pack] or [filler] for pack in packs]


def collate(slots: Sequence[Slot], layout: str) -> Batch:
    """Make the tensors of a pack; runs in the workers of a DataLoader."""
    examples = [slot.example for slot in slots]
    return Batch(
        pack=make_pack([(example.prompt_ids, example.responses) for example in examples], layout),
        num_responses=[len(example.responses) for example in examples],
        ref_R=_float32([ref for example in examples for ref in example.logp_ref]),
        target_BN=pad_sequence([_float32(example.target) for example in examples], batch_first=True),
        weight_B=_float32([example.weight for example in examples]),
        share_B=_float32([slot.share for slot in slots]),
        example_ids=[example.example_id for example in examples],
        num_tokens=sum(int(slot.share) * slot.example.num_tokens for slot in slots),
    )


def stream(packs: Iterable[list[Slot]], layout: str, num_workers: int, *, pin: bool) -> Iterator[Batch]:
    """Yield the tensors of packs in order, made ahead by ``num_workers`` processes (0: by this process, on demand)."""
    loader: DataLoader[Slot] = DataLoader(
        _Same(),
        batch_sampler=packs,  # any iterable of lists of whatever the data set takes
        collate_fn=functools.partial(collate, layout=layout),
        num_workers=num_workers,
        pin_memory=pin,
        generator=torch.Generator(),  # of its own: dropout's random stream is not touched
    )
    return iter(loader)


class _Same(Dataset[Slot]):
    """The data set of slots: the packs hold their examples already."""

    def __getitem__(self, slot: Slot) -> Slot:
        return slot


def _float32(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)
