"""The Triton kernel: one program per row streams over blocks of the vocabulary, in both passes.

Forward: a running maximum and a running sum of exponentials, float32. Both are kept, not the one normaliser they make,
which at logits of 1e4 would round a log-probability by 5e-4.
Backward: g (1[target] − softmax), written over the logits, so no second matrix exists.

Shapes: N rows (response tokens), V words.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from can_kernels.reference import check

BLOCK = 4096  # words of one load; a power of two
DTYPES = (torch.float32, torch.bfloat16)


@triton.jit
def _forward(logits, targets, logp, highest_out, log_sum_out, row_stride, num_words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    highest = float("-inf")
    summed = 0.0
    for first in range(0, num_words, BLOCK):
        words = first + tl.arange(0, BLOCK)
        x = tl.load(start + words, mask=words < num_words, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, axis=0))
        # a block of nothing but -inf leaves the sum as it is: exp(-inf - -inf) would be nan
        safe = tl.where(new == float("-inf"), 0.0, new)
        summed = summed * tl.exp(highest - safe) + tl.sum(tl.exp(x - safe), axis=0)
        highest = new
    log_sum = tl.log(summed)
    target = tl.load(targets + row)
    tl.store(highest_out + row, highest)
    tl.store(log_sum_out + row, log_sum)
    tl.store(logp + row, (tl.load(start + target).to(tl.float32) - highest) - log_sum)


@triton.jit
def _backward(logits, targets, highest_in, log_sum_in, grad, row_stride, num_words, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    target = tl.load(targets + row)
    highest = tl.load(highest_in + row)
    log_sum = tl.load(log_sum_in + row)
    g = tl.load(grad + row)
    for first in range(0, num_words, BLOCK):
        words = first + tl.arange(0, BLOCK)
        inside = words < num_words
        x = tl.load(start + words, mask=inside, other=float("-inf")).to(tl.float32)
        d = g * (tl.where(words == target, 1.0, 0.0) - tl.exp((x - highest) - log_sum))
        tl.store(start + words, d.to(logits.dtype.element_ty), mask=inside)


class FusedLogProbs(torch.autograd.Function):
    """(logits_NV, targets_N) → ln softmax(logits)[target], (N,) float32. The backward pass consumes the logits."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Keep the logits themselves, and two numbers per row that normalise them."""
        logp_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        highest_N, log_sum_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        if len(logits_NV):
            _forward[(len(logits_NV),)](
                logits_NV,
                targets_N,
                logp_N,
                highest_N,
                log_sum_N,
                logits_NV.stride(0),
                logits_NV.shape[1],
                BLOCK=BLOCK,
            )
        ctx.save_for_backward(logits_NV, targets_N, highest_N, log_sum_N)
        ctx.consumed = False
        return logp_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Write the gradient of the logits in their place and return it."""
        if ctx.consumed:
            raise RuntimeError(
                "the first backward pass wrote its gradient over the logits; a second one needs them anew."
            )
        ctx.consumed = True
        logits_NV, targets_N, highest_N, log_sum_N = ctx.saved_tensors
        (grad_N,) = grad_outputs
        if len(logits_NV):
            _backward[(len(logits_NV),)](
                logits_NV,
                targets_N,
                highest_N,
                log_sum_N,
                grad_N.float().contiguous(),
                logits_NV.stride(0),
                logits_NV.shape[1],
                BLOCK=BLOCK,
            )
        return logits_NV, None


def fused_target_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return ln softmax(logits)[target] of each row; the logits are used up.

    Args:
        logits_NV: (N, V) float32 or bfloat16, words next to each other, any row stride.
        targets_N: (N,) int64, contiguous, in 0..V−1: not checked, which would make Python wait for the device.

    Returns:
        (N,) float32, in nats.

    Raises:
        ValueError: When the shapes do not belong together, or the dtype or layout is not one that the kernel takes.
    """
    check(logits_NV, targets_N)
    if logits_NV.dtype not in DTYPES or logits_NV.stride(1) != 1 or not targets_N.is_contiguous():
        raise ValueError(
            f"logits of {logits_NV.dtype} with strides {logits_NV.stride()}: expected float32 or bfloat16 with words "
            "next to each other, and contiguous targets. Convert them, or use can_kernels.target_log_probs."
        )
    logp_N: torch.Tensor = FusedLogProbs.apply(logits_NV, targets_N)
    return logp_N
