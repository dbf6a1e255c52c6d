"""The loss of a pack: log-ratios by one forward pass, the loss that the labels belong to, and its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from can_dist.training.batches import Batch
from can_dist.training.losses import agreement, example_losses

# the policy's loss, and the reference's on the same examples, where training starts; what begins with fit is of the
# examples that are trained on, which a policy memorises, so it says nothing of what the policy does
METRIC_NAMES = ("loss", "reference_loss", "fit_accuracy", "fit_margin", "fit_kl")


def log_ratios(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (``ratio_BN``, ``is_real_BN``): ln π_θ(y_n|x) − ln π_ref(y_n|x), float32; shorter lists end in zeros.

    ``model`` takes a pack and returns the log-probabilities of its responses.
    """
    ratios = (model(batch.pack) - batch.ref_R).split(batch.num_responses)
    return (
        pad_sequence(list(ratios), batch_first=True),
        pad_sequence([torch.ones_like(ratio, dtype=torch.bool) for ratio in ratios], batch_first=True),
    )


@torch.no_grad()
def kto_baseline(model: Any, batches: Iterable[Batch], device: str | torch.device) -> torch.Tensor:
    """Return z_ref = max(0, mean of ln π_θ/π_ref over responses to other prompts), a float32 scalar.

    The mean is over the global batch: every rank passes its packs of those responses and gets the same number. It
    estimates KL(π_θ‖π_ref) (KTO, arXiv 2402.01306, section 4), and no gradient goes through it.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        ratio_B1, _ = log_ratios(model, batch)
        sums += torch.stack([ratio_B1[:, 0] * batch.share_B, batch.share_B]).sum(dim=1).double()
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).clamp(min=0).float()


def pack_losses(
    model: Any, batch: Batch, *, loss: str, beta: float, baseline: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (``loss_B``, ``metrics``): each example's share of the loss, and sums of METRIC_NAMES and of the shares.

    ``baseline`` is z_ref for the loss ``kto``, whose examples have one response here, else None.
    """
    ratio_BN, is_real_BN = log_ratios(model, batch)
    kl_BN = ratio_BN.detach().exp() - 1 - ratio_BN.detach()
    kl_B = kl_BN.sum(dim=1) / is_real_BN.sum(dim=1)
    if baseline is not None:  # the response is compared with z_ref
        ratio_BN = torch.cat([ratio_BN, baseline.expand(len(ratio_BN), 1)], dim=1)
        is_real_BN = is_real_BN.expand(-1, 2)
    target_BN, weight_B, share_B = batch.target_BN, batch.weight_B, batch.share_B
    loss_B = example_losses(loss, ratio_BN, target_BN, is_real_BN, beta) * weight_B * share_B
    with torch.no_grad():
        at_reference_B = example_losses(loss, torch.zeros_like(ratio_BN), target_BN, is_real_BN, beta) * weight_B
        accuracy_B, margin_B = agreement(ratio_BN, target_BN, is_real_BN, beta)
        rows = torch.stack([at_reference_B, accuracy_B, margin_B, kl_B, torch.ones_like(share_B)]) * share_B
        return loss_B, torch.cat([loss_B[None], rows]).sum(dim=1).double()
