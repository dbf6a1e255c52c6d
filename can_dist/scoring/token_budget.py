"""Forward passes by a budget of tokens, which halves when the memory does not suffice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from can_dist.console import advance
from can_dist.errors import EnvironmentProblem
from can_dist.modeling.packs import Pack, computed_tokens, in_layout

Division = list[list[list[int]]]
"""Response numbers per group per pack."""


class Passes:
    """The token budget of one scorer, which it remembers as long as it lives: what did not fit is not tried again."""

    def __init__(self, owner: str, layout: str, tokens: int) -> None:
        self.where, self.layout, self.tokens = owner, layout, tokens

    def run(
        self,
        prompts: Sequence[Any],
        sizes: Sequence[tuple[int, int]],
        forward: Callable[[Sequence[Sequence[int]]], torch.Tensor],
    ) -> torch.Tensor:
        """Return the outputs of every response, (R, …) on the CPU, in order.

        ``prompts`` and ``sizes`` are those of ``groups_in_order``; ``forward`` takes the response numbers per group of
        a pack and returns their outputs, in order. Nothing here waits for the device before the last pass is on its
        way, so that the next pack is laid out while this one is computed.

        Raises:
            EnvironmentProblem: A single response does not fit into the memory of the device.
        """
        order: list[int] = []
        outputs: list[torch.Tensor] = []
        packs = self._divide(range(len(sizes)), prompts, sizes)
        while packs:
            output, reason = _unless_out_of_memory(forward, packs[0])
            if output is None:
                self._halve(packs[0], sizes, reason)
                packs = self._divide(sorted(_numbers(packs)), prompts, sizes)
            else:
                outputs.append(output)
                numbers = _numbers(packs[:1])
                order += numbers
                advance(len(numbers))  # on their way
                packs = packs[1:]
        gathered = torch.cat(outputs).cpu()
        result = torch.empty_like(gathered)
        result[order] = gathered
        return result

    def _divide(self, numbers: Sequence[int], prompts: Sequence[Any], sizes: Sequence[tuple[int, int]]) -> Division:
        packs = in_layout([prompts[n] for n in numbers], [sizes[n] for n in numbers], self.layout, self.tokens)
        return [[[numbers[place] for place in group] for group in pack] for pack in packs]

    def _halve(self, pack: list[list[int]], sizes: Sequence[tuple[int, int]], reason: str) -> None:
        tokens = computed_tokens(pack, sizes, self.layout)
        if len(_numbers([pack])) == 1:
            raise EnvironmentProblem(
                f"{self.where}: a text of {tokens} tokens does not fit into the memory of the device ({reason}).",
                "Give each actor a device of its own (cluster.gpus_per_actor: 1), or shorten the texts.",
            )
        self.tokens = min(self.tokens, tokens) // 2
        say(self.where, f"out of memory at {tokens} tokens in one pass; from now on at most {self.tokens}")


def say(owner: str, message: str) -> None:
    """Tell what a scorer found out, on the standard error of its process (an actor's log)."""
    print(f"can-dist: {owner}: {message}", file=sys.stderr, flush=True)


def to_device(pack: Pack, device: torch.device) -> Pack:
    """Return a pack on the device; to a GPU from pinned memory, so that the copy does not wait for what is computed."""
    return pack.pin_memory().to(device) if device.type == "cuda" else pack.to(device)


def _unless_out_of_memory(
    forward: Callable[[Sequence[Sequence[int]]], torch.Tensor], pack: Sequence[Sequence[int]]
) -> tuple[torch.Tensor | None, str]:
    """Return the outputs of a pack, or None and what the device said."""
    try:
        return forward(pack), ""
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
    # the activations are gone with the exception; what the allocator keeps of them may be in pieces
    torch.cuda.empty_cache()
    return None, reason


def _numbers(packs: Division) -> list[int]:
    return [number for pack in packs for group in pack for number in group]
