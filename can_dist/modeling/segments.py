"""Attention over packed sequences that share a prefix: one table of segments, three kernels, no padding.

A group is a prompt and its N responses, laid out in one row as [P|A|B|…]; a pack is several groups one after another.
The queries of a segment are its own rows; its keys are the rows of its prefix, then its own. The mask is causal and
aligned to the bottom right: the last query sees every key. That is what each response would see in a sequence of its
own, so log-probabilities and gradients are the same, and the prompt is computed once.

Shapes: S segments, T rows of a pack, K key rows of all segments, H heads, G heads of the keys, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from can_dist.errors import EnvironmentProblem
from can_dist.modeling.attention import FLASH, SDPA, Attention, attention_for, grouped, torch_varlen

NAME = "can_segments"  # among transformers' attention implementations
# Arguments that change attention's result and that segment_attention does not support.
NOT_TAKEN = ("softcap", "s_aux", "position_bias", "head_mask")


@dataclass(frozen=True)
class Segments:
    """The table of a pack's segments; the tensors say the same for varlen kernels.

    Attributes:
        lengths: Rows of each segment, in row order.
        prefixes: Which segment is the prefix of each; −1 for none.
        query_offsets: First row of each segment, and the end; (S+1,) int32.
        key_offsets: First key of each segment, and the end; (S+1,) int32.
        key_rows: The row of every key; (K,) int64.
        longest_query: Rows of the longest segment.
        longest_key: Keys of the segment that has most.
        not_taken: Collects arguments that a model gave the attention in vain.
        windows: Collects the windows that the attention was told of.
        kernels: Collects the kernels that served.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    query_offsets: torch.Tensor
    key_offsets: torch.Tensor
    key_rows: torch.Tensor
    longest_query: int
    longest_key: int
    not_taken: set[str] = field(default_factory=set)
    windows: set[int] = field(default_factory=set)
    kernels: set[Attention] = field(default_factory=set)


def segment_table(shapes: Sequence[tuple[int, Sequence[int]]]) -> Segments:
    """Return the table of a pack. A prompt with one response is one plain causal segment.

    Args:
        shapes: Per group the tokens of the prompt and of each response.
    """
    lengths: list[int] = []
    prefixes: list[int] = []
    for prompt, responses in shapes:
        if len(responses) == 1 or prompt == 0:
            own, prefix = [prompt + response for response in responses], -1
        else:
            prefix = len(lengths)
            lengths.append(prompt)
            prefixes.append(-1)
            own = list(responses)
        own = [length for length in own if length]
        lengths += own
        prefixes += [prefix] * len(own)
    ends = np.cumsum([0, *lengths])
    keys = [
        np.concatenate([np.arange(ends[p], ends[p + 1]) if p >= 0 else ends[:0], np.arange(ends[s], ends[s + 1])])
        for s, p in enumerate(prefixes)
    ]
    key_lengths = [len(rows) for rows in keys]
    return Segments(
        tuple(lengths),
        tuple(prefixes),
        torch.from_numpy(ends.astype(np.int32)),
        torch.from_numpy(np.cumsum([0, *key_lengths]).astype(np.int32)),
        torch.from_numpy(np.concatenate(keys).astype(np.int64)),
        max(lengths),
        max(key_lengths),
    )


def map_tensors(instance: Any, function: Any) -> Any:
    """Return a copy of a dataclass with ``function`` applied to its tensors and to the dataclasses inside it."""
    changed = {}
    for name in (member.name for member in fields(instance)):
        value = getattr(instance, name)
        if isinstance(value, torch.Tensor):
            changed[name] = function(value)
        elif hasattr(value, "__dataclass_fields__"):
            changed[name] = map_tensors(value, function)
    return replace(instance, **changed)


def segment_attention(
    module: torch.nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the table; the signature is that of transformers' AttentionInterface.

    Dropout of attention weights is left out on purpose: a log-ratio needs π_θ and π_ref to be the same function at the
    start.

    Args:
        module: The layer that calls; not used.
        query: (1, H, T, D).
        key: (1, G, T, D), H a multiple of G.
        value: (1, G, T, D).
        attention_mask: A mask of the model's own, which is noted as not taken.
        segments: The table.
        scaling: What the scores are multiplied by; 1/√D when None.
        sliding_window: Keys, its own included, that a query sees.
        **others: Further arguments of the model; those of ``NOT_TAKEN`` are noted.

    Returns:
        The output, (1, T, H, D), and None in the place of the weights.

    Raises:
        TypeError: When the model does not hand on the table, or has more or fewer keys than queries: the probe takes
            it for a model that cannot be packed.
        EnvironmentProblem: When the kernel does not take our arguments, which no model is to blame for.
    """
    table = noted(segments, query, key, attention_mask, sliding_window, others)
    # a window that holds the longest key range hides nothing
    window = sliding_window if sliding_window and sliding_window < table.longest_key else None
    attention = attention_for(query.device.type, query.dtype, (query.shape[-1], value.shape[-1]))
    table.kernels.add(attention)
    try:
        if attention.kind == SDPA:
            return _by_segment(query, key, value, table, scaling, window), None
        return _varlen(attention.kind, query, key, value, table, scaling, window), None
    except TypeError as error:
        raise EnvironmentProblem(
            f"{attention} does not take the arguments of this version of can-dist: {error}.",
            "Install versions of torch and flash-attn that pyproject.toml allows.",
        ) from error


def noted(
    segments: Segments | None,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None,
    others: Mapping[str, Any],
) -> Segments:
    """Return the table of a call, with notes of what else the call asked for; raises as ``segment_attention`` does."""
    if segments is None:
        raise TypeError("its layers do not hand on the table of segments")
    if key.shape[2] != query.shape[2]:
        raise TypeError(f"its attention has {key.shape[2]} keys for {query.shape[2]} queries")
    segments.not_taken.update(name for name in NOT_TAKEN if others.get(name) is not None)
    if attention_mask is not None:  # transformers makes none: the model's own
        segments.not_taken.add("attention_mask")
    if sliding_window:
        segments.windows.add(sliding_window)
    return segments


def _by_segment(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    # heads that share a key are a batch: the keys are expanded by stride 0, never copied
    share = query.shape[1] // key.shape[1]
    queries = query[0].unflatten(0, (key.shape[1], share)).split(segments.lengths, dim=2)
    keys, values = (x[0][:, None].split(segments.lengths, dim=2) for x in (key, value))
    outputs = []
    for s, prefix in enumerate(segments.prefixes):
        q, k, v = queries[s], keys[s], values[s]
        if prefix >= 0:
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        mask = _lower_right(q.shape[2], k.shape[2], window, q.device)
        k, v = (x.expand(-1, share, -1, -1) for x in (k, v))
        outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling))
    return torch.cat(outputs, dim=2).flatten(0, 1).transpose(0, 1)[None].contiguous()


def _lower_right(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the mask (Q, K) of queries that are the last keys, or None where SDPA's own causal mask is that."""
    shift = num_keys - num_queries
    window = window if window and window < num_keys else None
    if shift == 0 and window is None:
        return None
    # SDPA's is_causal is aligned to the top left, which is another mask when there are more keys than queries
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(shift)
    return mask if window is None else mask.triu(shift - window + 1)


def _varlen(
    kind: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    # both kernels align the causal mask to the bottom right
    q = query[0].transpose(0, 1)
    k, v = (x[0].transpose(0, 1).index_select(0, segments.key_rows) for x in (key, value))
    offsets = (segments.query_offsets, segments.key_offsets, segments.longest_query, segments.longest_key)
    left = -1 if window is None else window - 1
    if kind == FLASH:
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(q, k, v, *offsets, softmax_scale=scaling, causal=True, window_size=(left, 0))
    else:
        varlen = torch_varlen()
        assert varlen is not None
        out = grouped(varlen)(q, k, v, *offsets, scale=scaling, window_size=(left, 0))
    rows: torch.Tensor = out[None]
    return rows


def register() -> None:
    """Make the attention known to transformers under ``NAME``.

    No mask function goes with it: then transformers makes no mask. With one, even one that returns None, it first looks
    for packed sequences in the position ids, which makes Python wait for the device once per pass.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


@contextlib.contextmanager
def noting_windows() -> Iterator[set[int]]:
    """Record each window or chunk size for which the model requests a mask from transformers (none is built meanwhile).

    A window that reaches the mask but not our attention would be ignored on texts longer than it. For the probe only:
    see ``register``.
    """
    from transformers import AttentionMaskInterface

    sizes: set[int] = set()

    def note(*_: Any, local_size: int | None = None, **__: Any) -> None:
        if local_size:  # 0 where the configuration turns its window off
            sizes.add(local_size)

    AttentionMaskInterface.register(NAME, note)
    try:
        yield sizes
    finally:
        del AttentionMaskInterface._global_mapping[NAME]


def attend_by(model: Any, implementation: str) -> None:
    """Set the attention of a transformers model, where it is another.

    Raises:
        TypeError: When the model's attention cannot be set, being code of its own.
    """
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
        if model.config._attn_implementation != implementation:
            raise TypeError("its attention is its own and cannot be set")
