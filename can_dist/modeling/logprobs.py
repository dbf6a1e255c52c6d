"""Log-probabilities of responses: sums over the response's tokens, in nats, by one forward pass of a pack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from can_dist.modeling.packs import Group, Pack, make_pack
from can_dist.modeling.probe import exact_layout, floating_weight, probe_groups, values_alone
from can_dist.modeling.segments import NAME, attend_by, register

# Most bytes of float32 logits held at once. Above it, logits are computed chunk by chunk and recomputed backward.
# (a GPU wants large products; on a CPU 32 MiB cost no time and took a third of the memory of 256)
HEAD_BYTES_ON = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
HEAD_BYTES = HEAD_BYTES_ON["cuda" if torch.cuda.is_available() else "cpu"]
# what caps logits in configurations of transformers: in bf16 a probe does not see a cap far above a model's logits
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap")
# of the probe's log-probabilities, relative to their norm; a layout that leaks is off by 1e-1
PROBE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class TokenLogProbs(torch.autograd.Function):
    """(logits_NV, targets_N) → ln softmax(logits)[target], (N,) float32, with one matrix for the backward pass.

    Autograd's own log-softmax, gather and subtraction hold three matrices of the size of the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Compute in float32 whatever the dtype of the logits."""
        total_N = logits_NV.float().logsumexp(dim=1)
        ctx.save_for_backward(logits_NV, targets_N, total_N)
        return logits_NV.gather(1, targets_N[:, None])[:, 0].float() - total_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return g (1[target] − softmax) in the dtype of the logits."""
        logits_NV, targets_N, total_N = ctx.saved_tensors
        (grad_N,) = grad_outputs
        return _logit_gradient(logits_NV, total_N, targets_N, grad_N), None


class HeadLogProbs(torch.autograd.Function):
    """(hidden_NH, weight_VH, bias_V or None, targets_N, rows of a chunk) → ln softmax(logits)[target], (N,) float32.

    The logits of one chunk exist at a time, in both passes, and the weight gets one gradient: ZeRO-3 keeps only the
    last of several, and gathers the weight once for all chunks, of which every rank may have another number.
    """

    @staticmethod
    def forward(ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *others: Any) -> torch.Tensor:
        """Go through the chunks; keep a normaliser per row."""
        bias_V, targets_N, size = others
        total_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
        logp_N = torch.empty_like(total_N)
        for rows in _slices(len(hidden_NH), size):
            logits_NV = linear(hidden_NH[rows], weight_VH, bias_V)
            total_N[rows] = logits_NV.float().logsumexp(dim=1)
            logp_N[rows] = logits_NV.gather(1, targets_N[rows, None])[:, 0].float() - total_N[rows]
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, total_N)
        ctx.size = size
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Make each chunk's logits anew and add up its gradients, those of the weights in float32."""
        hidden_NH, weight_VH, bias_V, targets_N, total_N = ctx.saved_tensors
        (grad_N,) = grad_outputs
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for rows in _slices(len(hidden_NH), ctx.size):
            logits_NV = linear(hidden_NH[rows], weight_VH, bias_V)
            grad_NV = _logit_gradient(logits_NV, total_N[rows], targets_N[rows], grad_N[rows])
            grad_hidden_NH[rows] = grad_NV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += grad_NV.T @ hidden_NH[rows]
            if grad_bias_V is not None:
                grad_bias_V += grad_NV.sum(dim=0)
        weight = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        bias = None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_NH, weight, bias, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logit_gradient(
    logits_NV: torch.Tensor, total_N: torch.Tensor, targets_N: torch.Tensor, grad_N: torch.Tensor
) -> torch.Tensor:
    """Return g (1[target] − softmax) in the dtype of the logits."""
    grad_NV = (logits_NV - total_N[:, None]).exp_().mul_(-grad_N[:, None])
    return grad_NV.scatter_add_(1, targets_N[:, None], grad_N[:, None]).to(logits_NV.dtype)


class Head(torch.nn.Linear):
    """A linear head that can also return log-probabilities of targets without all logits; it takes over the weights.

    As the model's own output embedding its weight is gathered by ZeRO-3 around its passes, and keeps its name.
    """

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight = head.weight
        self.bias = head.bias

    def forward(
        self, input: torch.Tensor, targets_N: torch.Tensor | None = None, rows_in_chunk: int = 0
    ) -> torch.Tensor:
        """Return the logits of ``input``, or with targets their log-probabilities, (N,) float32."""
        if targets_N is None:
            return super().forward(input)
        logp_N: torch.Tensor = HeadLogProbs.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, targets_N, rows_in_chunk
        )
        return logp_N


class ResponseModel(torch.nn.Module):
    """A causal language model whose forward takes a pack and returns log-probabilities, the head's work included.

    Being a module of its own, it can be wrapped by DeepSpeed: ZeRO-3 gathers the head's weights inside its forward.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        register()
        self.lm = lm
        self.plain_attention = lm.config._attn_implementation
        self.head_bytes = HEAD_BYTES
        causal = self._causal()
        head = causal.get_output_embeddings()
        # whether logits are a linear map of the last hidden states and nothing else; the probe finds out
        is_capped = any(getattr(lm.config.get_text_config(), name, None) for name in SOFT_CAPS)
        has_body = causal.get_decoder() not in (causal, head)
        self.chunked_head = type(head) in (torch.nn.Linear, Head) and has_body and not is_capped
        if type(head) is torch.nn.Linear:
            causal.set_output_embeddings(Head(head))

    def forward(self, pack: Pack) -> torch.Tensor:
        """Return ``logp_R``, float32: Σ_t ln π(y_t | x, y_<t) of each response of the pack."""
        rows_in_chunk = max(1, self.head_bytes // (4 * int(self.lm.config.get_text_config().vocab_size)))
        if pack.segments is None:
            attend_by(self._causal(), self.plain_attention)
            logp_N = _token_logp(self.lm(**pack.inputs()).logits.flatten(0, 1)[pack.rows_N], pack.targets_N)
        else:
            attend_by(self._causal(), NAME)
            if self.chunked_head and len(pack.rows_N) > rows_in_chunk:
                logp_N = self._by_chunks(pack, rows_in_chunk)
            else:
                logits_NV = self.lm(**pack.inputs(), logits_to_keep=pack.rows_N).logits[0]
                # a model that knows no logits_to_keep returns them all
                logits_NV = logits_NV if len(logits_NV) == len(pack.rows_N) else logits_NV[pack.rows_N]
                logp_N = _token_logp(logits_NV, pack.targets_N)
        return torch.segment_reduce(logp_N, "sum", lengths=pack.num_targets_R, unsafe=True, initial=0.0)

    def _by_chunks(self, pack: Pack, size: int) -> torch.Tensor:
        causal = self._causal()
        hidden_NH = causal.get_decoder()(**pack.inputs()).last_hidden_state[0].index_select(0, pack.rows_N)
        logp_N: torch.Tensor = causal.get_output_embeddings()(hidden_NH, pack.targets_N, size)
        return logp_N

    def _causal(self) -> Any:
        """Return the model itself, without the shell that adapters put around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm


def _token_logp(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    logp_N: torch.Tensor = TokenLogProbs.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
    return logp_N


@torch.no_grad()
def choose_layout(model: ResponseModel, forward: Callable[[Pack], torch.Tensor], say: Callable[[str], None]) -> str:
    """Return, and announce, the fastest layout whose outputs equal those of each sequence alone.

    ``forward`` is the model in eval mode, or the engine that wraps it: all ranks of ZeRO-3 come here together. Where
    the head is more than its output embeddings (a soft cap, a scale), it is not taken in chunks.
    """
    weight = floating_weight(model)
    groups = probe_groups(int(model.lm.config.get_text_config().vocab_size))
    alone_R = values_alone(forward, make_pack, groups, weight)
    tolerance = PROBE_TOLERANCE[weight.dtype] * float(alone_R.norm())
    layout, sentence = exact_layout(forward, make_pack, groups, weight, alone_R, tolerance, "log-probabilities", say)
    if layout == "padded":
        say(sentence)
        return layout
    if model.chunked_head:
        model.head_bytes = 1  # one row in a chunk
        error = float((forward(make_pack(groups, layout).to(weight.device)) - alone_R).norm())
        model.chunked_head = error <= tolerance
        model.head_bytes = HEAD_BYTES
    head = "" if model.chunked_head else "; all logits of a pack at once, since the head is not plainly linear"
    say(f"{sentence}{head}")
    return layout


def response_logp(
    model: ResponseModel, groups: Sequence[Group], layout: str, device: str | torch.device
) -> torch.Tensor:
    """Return ``logp_R``, float32: the log-probability of each response of the groups, in order."""
    logp_R: torch.Tensor = model(make_pack(groups, layout).to(device))
    return logp_R
