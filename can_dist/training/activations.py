"""What a forward and a backward pass need beside the weights, counted on the model itself, without memory.

The model is made of fake tensors (a shape, no storage), so a model of any size and kind can run; every tensor an
operation makes is counted when it is made and when it is freed. No weights are read.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from can_dist.config import Model
from can_dist.config.sections import Train
from can_dist.errors import ConfigError
from can_dist.modeling.loading import empty_causal_lm
from can_dist.modeling.logprobs import ResponseModel
from can_dist.modeling.packs import Pack, make_pack
from can_dist.modeling.segments import NAME, Segments, map_tensors, noted, register
from can_dist.training.memory import Parameters
from can_dist.training.trainable import adapt

PROMPT_TOKENS = 32  # of the pairs of a counted pack: nearly all tokens are of responses, the most work for the head
# kernels that allocate as much again as their input (or output) while they run
WORKSPACE = (torch.ops.aten.logsumexp.default,)


@dataclass(frozen=True)
class Pass:
    """Bytes of a forward and backward pass of ``tokens`` tokens: kept for the backward pass, and at the highest."""

    tokens: int
    kept: int
    peak: int


class Shell:
    """A model without storage, made ready as training does, with a head of ``head_bytes`` of logits at a time.

    Args:
        spec: The model.
        train: The options of the training.
        precision: 'bf16' or 'fp32'.
        head_bytes: Bytes of float32 logits that exist at a time.
        num_layers: The first layers only; default: all.
    """

    def __init__(
        self, spec: Model, train: Train, precision: str, head_bytes: int, num_layers: int | None = None
    ) -> None:
        def first_layers(config: Any) -> Any:
            text = config.get_text_config()
            if num_layers is not None:
                text.num_hidden_layers = num_layers
                if getattr(text, "layer_types", None):
                    text.layer_types = text.layer_types[:num_layers]
            return config

        self.name = spec.model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.model = ResponseModel(adapt(empty_causal_lm(spec, precision, first_layers), train))
        with self.mode:
            _pretend_on_cpu(self.model)
        self.model.head_bytes = head_bytes
        self.model.train()
        self.config = self.model.lm.config.get_text_config()

    def parameters(self) -> Parameters:
        """Return the elements of every parameter, a tied one once."""
        weights = list(self.model.parameters())
        return Parameters(
            tuple(p.numel() for p in weights if p.requires_grad),
            tuple(p.numel() for p in weights if not p.requires_grad),
        )

    def alike_layers(self) -> int:
        """Return the number of layers if all are of one kind and shape, else 0."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        kinds = {_kind_of(layer) for layer in layers}
        return len(layers) if len(kinds) == 1 and len(layers) == self.config.num_hidden_layers else 0

    def count(self, tokens: int, response_tokens: int, *, varlen: bool) -> Pass:
        """Count a pass of a pack of pairs.

        Args:
            tokens: Tokens of the pack.
            response_tokens: Tokens of each response.
            varlen: Whether attention is the kernel of a GPU in half precision.

        Raises:
            ConfigError: When the model is one that training pads, which is not counted.
        """
        pack = make_pack(_pairs(tokens, response_tokens), "shared")
        attention = _counted_varlen() if varlen else contextlib.nullcontext()
        with self.mode, attention, _zero3_linear(), _counted_experts():
            pack = map_tensors(pack, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
            hooks = [
                p.register_post_accumulate_grad_hook(_drop_gradient) for p in self.model.parameters() if p.requires_grad
            ]
            known = [*self.model.parameters(), *self.model.buffers()]
            with _Count(known) as count:
                logp_R = self._forward(pack)
                kept = count.now
                logp_R.sum().backward()
            for hook in hooks:
                hook.remove()
        return Pass(tokens, kept, count.peak)

    def _forward(self, pack: Pack) -> torch.Tensor:
        why = ""
        try:
            logp_R: torch.Tensor = self.model(pack)
        except TypeError as refused:
            why = str(refused)
        assert pack.segments is not None
        why = why or ", ".join(sorted(pack.segments.not_taken))
        if why:
            raise ConfigError(
                f"plan: the attention of {self.name!r} takes no segments ({why}), so it is trained in padded batches, "
                "whose memory is not counted. Train a few steps with a small train.tokens_per_pack and look."
            )
        return logp_R


def _kind_of(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Return what decides the memory of a layer: its modules, their plain settings, and its parameters."""
    weights = tuple((name, tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters())
    settings = tuple(
        (name, type(module), key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if key not in ("layer_idx", "gradient_checkpointing") and isinstance(value, str | int | float | None)
    )
    return weights, settings


def _pretend_on_cpu(model: torch.nn.Module) -> None:
    """Put fake tensors in the place of meta ones; what is tied stays tied. (Adapters cannot be added to fake ones.)"""
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    if isinstance(old, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=old.requires_grad)
                    replaced[id(old)] = (old, new)
                if old is not None:
                    tensors[name] = replaced[id(old)][1]  # type: ignore[assignment]


def _pairs(tokens: int, response_tokens: int) -> list[tuple[Sequence[int], Sequence[Sequence[int]]]]:
    """Return pairs that fill a pack of ``tokens`` tokens to the last one."""
    groups: list[tuple[Sequence[int], Sequence[Sequence[int]]]] = []
    left = tokens
    while left > 0:
        size = min(left, PROMPT_TOKENS + 2 * response_tokens)
        prompt = min(PROMPT_TOKENS, size // 3)
        a = (size - prompt) // 2
        groups.append(([0] * prompt, [[0] * a, [0] * (size - prompt - a)]))
        left -= size
    return groups


class _Count(TorchDispatchMode):
    """Adds a storage's bytes when an operation first returns it, and takes them off when the storage goes."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in WORKSPACE:
            self.peak = max(self.peak, self.now + args[0].untyped_storage().nbytes())
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive[key] = weakref.ref(storage, lambda _: self._remove(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None  # ZeRO-3 moves it to its bucket at once


@contextlib.contextmanager
def _zero3_linear() -> Iterator[None]:
    """Use the linear layer that ZeRO-3 puts in place of torch's: it keeps the input of frozen layers too.

    One rank without a DeepSpeed file keeps torch's, and so needs no more than is counted.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    plain = torch.nn.functional.linear
    torch.nn.functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        torch.nn.functional.linear = plain


@contextlib.contextmanager
def _counted_experts() -> Iterator[None]:
    """Stand in for the product of every token with its experts, which fake tensors do not know, by one of its memory.

    Before torch 2.9, which has no such product, transformers computes one expert after the other: as many tokens.
    """
    from transformers.integrations import moe

    product, interface = moe._grouped_mm, moe.ExpertsInterface.get_interface
    moe._grouped_mm = lambda rows, weight, **_: _Grouped.apply(rows.to(weight.dtype), weight)  # type: ignore[no-untyped-call]
    moe.ExpertsInterface.get_interface = lambda *_: moe.grouped_mm_experts_forward
    try:
        yield
    finally:
        moe._grouped_mm, moe.ExpertsInterface.get_interface = product, interface


class _Grouped(torch.autograd.Function):
    """Keeps what a product of groups keeps: rows (S, in) and the weights of all experts (E, in, out)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(rows.shape[0], weight.shape[2])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


@contextlib.contextmanager
def _counted_varlen() -> Iterator[None]:
    """Stand in for the varlen kernels, which run on GPUs only, by something of the same memory."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _varlen_memory)
    try:
        yield
    finally:
        register()


class _Varlen(torch.autograd.Function):
    """Keeps what a flash kernel keeps: queries, keys, values, output, and a float32 normaliser per row and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:  # noqa: ARG004
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def _varlen_memory(
    module: torch.nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    table = noted(segments, query, key, attention_mask, sliding_window, others)
    k, v = (x[0].transpose(0, 1).index_select(0, table.key_rows) for x in (key, value))
    out: torch.Tensor = _Varlen.apply(query[0].transpose(0, 1), k, v)  # type: ignore[no-untyped-call]
    return out[None], None
