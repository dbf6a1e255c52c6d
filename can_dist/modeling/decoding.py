"""Decoding of many responses at once: a prompt is read once for all of them, and those that end make room for others.

``generate`` of transformers reads a prompt once per response, and steps a batch until its last response has ended. Here
rows of keys and values, one per response, stand behind one another with their last columns aligned:

    prompt prompt token token            a row in its third step
           prompt token token token      one that began later: nothing is in its first column, and nothing looks there

A step adds a column. When rows have ended, the others are copied together with those that begin: their prompts are read
then, and a prompt's keys and values are copied to each of its responses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESERVE = 64
"""Columns that are reserved ahead of the steps that fill them."""

SPARE = 8
"""Rows leave when one in so many has ended: to leave is to copy the keys and values of all others."""


def serves(model: PreTrainedModel) -> bool:
    """Tell whether :func:`decode` takes a model; the others are left to ``generate``.

    It takes decoders whose only state is keys and values, one of each per token and layer, and whose inputs are the
    general ones. A sliding window is in the mask, so such layers keep all columns here. Not taken: encoder-decoders,
    recurrent and hybrid states, chunked and compressed keys, layers that share theirs, and code that came with a model.
    """
    if getattr(model.config, "is_encoder_decoder", False) or model.is_remote_code():
        return False
    general = type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    if not general or not model._supports_default_dynamic_cache():
        return False
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "num_kv_shared_layers", 0):
        return False
    kinds = {type(layer) for layer in DynamicCache(config=text).layers}
    return kinds <= {DynamicLayer, DynamicSlidingWindowLayer} and getattr(text, "attention_chunk_size", None) is None


@dataclass(frozen=True)
class Rows:
    """Keys and values of R rows, their last columns aligned, and how many of them are a row's own."""

    layers: Sequence[DynamicLayer]
    num_own_R: torch.Tensor


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer in memory reserved ahead: a step writes its column and copies no other."""

    def __init__(self, keys_RHTD: torch.Tensor, values_RHTD: torch.Tensor) -> None:
        """Take memory whose last ``RESERVE`` columns are not filled."""
        super().__init__()
        self.lazy_initialization(keys_RHTD, values_RHTD)
        self._memory = keys_RHTD, values_RHTD
        self._show(keys_RHTD.shape[2] - RESERVE)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new columns, (R, H, T, D); return the keys and values of all."""
        begin, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        if end > self._memory[0].shape[2]:
            every_R = torch.arange(len(keys), device=keys.device)
            self._memory = _gathered([(self.keys, every_R)], begin), _gathered([(self.values, every_R)], begin)
        for memory, new in zip(self._memory, (keys, values), strict=True):
            memory[:, :, begin:end] = new
        self._show(end)
        return self.keys, self.values

    def clear(self) -> None:
        """Give the memory back: one layer after the other is copied and cleared, so the cache is never there twice."""
        empty = self._memory[0].new_empty(0)
        self._memory = self.keys, self.values = empty, empty

    def _show(self, width: int) -> None:
        self.keys, self.values = (memory[:, :, :width] for memory in self._memory)


def _gathered(parts: Sequence[tuple[torch.Tensor, torch.Tensor]], width: int) -> torch.Tensor:
    """Return chosen rows of several (R, H, T, D), their last ``width`` columns aligned, and reserved columns behind."""
    like, num_rows = parts[0][0], sum(len(chosen) for _, chosen in parts)
    memory = like.new_zeros(num_rows, like.shape[1], width + RESERVE, like.shape[3])
    first = 0
    for part, chosen in parts:
        kept = min(width, part.shape[2])
        memory[first : first + len(chosen), :, width - kept : width] = part[chosen, :, part.shape[2] - kept :]
        first += len(chosen)
    return memory


def gather(parts: Sequence[tuple[Rows, Sequence[int]]]) -> Rows:
    """Return chosen rows of several, behind one another, without the columns that are none of theirs.

    Rows that were gathered before are cleared, rows of prompts are kept.
    """
    chosen = [torch.tensor(places, device=rows.num_own_R.device) for rows, places in parts]
    num_own_R = torch.cat([rows.num_own_R[places] for (rows, _), places in zip(parts, chosen, strict=True)])
    width = int(num_own_R.max())
    layers = []
    for same in zip(*(rows.layers for rows, _ in parts), strict=True):
        keys = _gathered([(layer.keys, places) for layer, places in zip(same, chosen, strict=True)], width)
        values = _gathered([(layer.values, places) for layer, places in zip(same, chosen, strict=True)], width)
        layers.append(ReservedLayer(keys, values))
        for layer in same:
            if isinstance(layer, ReservedLayer):
                layer.clear()
    return Rows(layers, num_own_R)


class Decoder:
    """A model's passes: over prompts, and over a new column of rows."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._takes = model, frozenset(signature(model.forward).parameters)
        self._cache = "cache" if "cache" in self._takes else "past_key_values"  # before transformers 5.24

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Rows, torch.Tensor]:
        """Return a row for each prompt and the logits of their next tokens, (P, V)."""
        length, device = max(len(ids) for ids in prompts), self._model.device
        ids_PT = torch.tensor([[0] * (length - len(ids)) + list(ids) for ids in prompts], device=device)
        num_own_P = torch.tensor([len(ids) for ids in prompts], device=device)
        cache = DynamicCache()
        logits_PV = self._forward(ids_PT, num_own_P, cache)
        return Rows(cache.layers, num_own_P), logits_PV

    def step(self, rows: Rows, tokens: Sequence[int], going: Sequence[bool]) -> tuple[Rows, torch.Tensor]:
        """Add a column, in place; return the rows and their next logits, (R, V), of no meaning where not ``going``.

        A row that has ended does not grow, so its position stays within the model's context.
        """
        device = rows.num_own_R.device
        num_own_R = rows.num_own_R + torch.tensor(going, device=device)
        logits_RV = self._forward(torch.tensor(tokens, device=device)[:, None], num_own_R, Cache(layers=rows.layers))
        return Rows(rows.layers, num_own_R), logits_RV

    def _forward(self, ids_RT: torch.Tensor, num_own_R: torch.Tensor, cache: Cache) -> torch.Tensor:
        before = cache.get_seq_length()
        num_columns = before + ids_RT.shape[1]
        position_RC = torch.arange(num_columns, device=ids_RT.device) + (num_own_R - num_columns)[:, None]
        inputs = {"position_ids": position_RC[:, before:].clamp(min=0), "logits_to_keep": 1, self._cache: cache}
        output = self._model(
            input_ids=ids_RT,
            attention_mask=(position_RC >= 0).long(),
            use_cache=True,
            **{name: value for name, value in inputs.items() if name in self._takes},
        )
        logits_RV: torch.Tensor = output.logits[:, -1]
        return logits_RV


class Prompts:
    """The prompts of responses that enter one after the other; each is read once, when its first response enters."""

    def __init__(self, decoder: Decoder, prompt_ids: Sequence[Sequence[int]]) -> None:
        self._decoder, self._ids = decoder, prompt_ids
        self._number = [number for number, (_, same) in enumerate(groupby(prompt_ids)) for _ in same]
        self._read: dict[int, tuple[Rows, int, torch.Tensor]] = {}

    def enter(self, responses: Sequence[int]) -> tuple[list[tuple[Rows, list[int]]], torch.Tensor]:
        """Return what to gather for some responses, in their order, and the logits of their first tokens, (B, V)."""
        new = {self._number[r]: self._ids[r] for r in responses if self._number[r] not in self._read}
        if new:
            rows, logits_PV = self._decoder.read(list(new.values()))
            self._read |= {number: (rows, place, logits_PV[place]) for place, number in enumerate(new)}
        parts, logits = [], []
        for number, same in groupby(responses, key=self._number.__getitem__):
            rows, place, logits_V = self._read[number]
            count = len(list(same))
            parts.append((rows, [place] * count))
            logits += [logits_V] * count
        last = self._number[responses[-1]]
        self._read = {last: self._read[last]}  # more of its responses may follow
        return parts, torch.stack(logits)


def decode(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    max_rows: int,
    choose: Callable[[Sequence[int], torch.Tensor], Sequence[int]],
    ended: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """Decode a response to each prompt; neighbours with the same prompt share its reading.

    Which rows stand together follows from the arguments alone, so the same call has the same logits to the last bit.

    Args:
        model: one that ``serves``, in eval mode.
        prompt_ids: the prompt of each response, in tokens.
        max_rows: responses that are decoded at once.
        choose: the next tokens of some responses, by their numbers, from their logits, (B, V).
        ended: whether tokens are a whole response.

    Returns:
        The tokens of each response.
    """
    decoder = Decoder(model)
    prompts = Prompts(decoder, prompt_ids)
    tokens: list[list[int]] = [[] for _ in prompt_ids]
    done = [False] * len(prompt_ids)
    waiting, batch = deque(range(len(prompt_ids))), list[int]()
    rows = nothing = Rows((), torch.empty(0))

    def extend(responses: Sequence[int], logits_BV: torch.Tensor) -> None:
        for response, token in zip(responses, choose(responses, logits_BV), strict=True):
            tokens[response].append(token)
            done[response] = ended(tokens[response])

    while waiting or batch:
        going = [place for place, response in enumerate(batch) if not done[response]]
        if (len(batch) - len(going)) * SPARE < len(batch):
            rows, logits_RV = decoder.step(rows, [tokens[r][-1] for r in batch], [not done[r] for r in batch])
            extend([batch[place] for place in going], logits_RV if len(going) == len(batch) else logits_RV[going])
            continue
        entering = [waiting.popleft() for _ in range(min(len(waiting), max_rows - len(going)))]
        batch = [batch[place] for place in going] + entering
        parts = [(rows, going)] if going else []
        rows = nothing  # only parts keep them now
        if entering:
            more, logits_BV = prompts.enter(entering)
            extend(entering, logits_BV)
            parts += more
        if batch:
            rows = gather(parts)
    return tokens
