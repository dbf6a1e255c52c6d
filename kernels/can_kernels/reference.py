"""The reference in torch: what the kernel must return, and what it is measured against.

Shapes: N rows (response tokens), V words.
"""

from __future__ import annotations

from typing import Any

import torch


def target_log_probs(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Return ln softmax(logits)[target] of each row.

    The backward pass returns g (1[target] − softmax) in the dtype of the logits, computed in float32.

    Args:
        logits_NV: (N, V), any floating dtype.
        targets_N: (N,) int64, in 0..V−1.

    Returns:
        (N,) float32, in nats.

    Raises:
        ValueError: When the shapes do not belong together.
    """
    check(logits_NV, targets_N)
    logp_N: torch.Tensor = TorchLogProbs.apply(logits_NV, targets_N)
    return logp_N


class TorchLogProbs(torch.autograd.Function):
    """The same arithmetic as ``can_dist.modeling.logprobs.TokenLogProbs``."""

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Compute in float32 whatever the dtype of the logits."""
        total_N = logits_NV.float().logsumexp(dim=1)
        ctx.save_for_backward(logits_NV, targets_N, total_N)
        return logits_NV.gather(1, targets_N[:, None])[:, 0].float() - total_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of the logits."""
        logits_NV, targets_N, total_N = ctx.saved_tensors
        (grad_N,) = grad_outputs
        grad_NV = (logits_NV - total_N[:, None]).exp_().mul_(-grad_N[:, None])
        return grad_NV.scatter_add_(1, targets_N[:, None], grad_N[:, None]).to(logits_NV.dtype), None


def check(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> None:
    """Raise ``ValueError`` unless there is one target per row of a matrix of logits."""
    if logits_NV.dim() != 2 or targets_N.shape != logits_NV.shape[:1]:
        raise ValueError(
            f"logits {tuple(logits_NV.shape)} and targets {tuple(targets_N.shape)}: expected (N, V) and (N,). "
            "Flatten batch and time first."
        )
