"""Preference losses: plain functions of sequence log-probabilities."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


def implicit_margin(
    logp_a_B: torch.Tensor, logp_b_B: torch.Tensor, ref_a_B: torch.Tensor, ref_b_B: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return ``z_B = β[(ln π_θ(y_a) − ln π_ref(y_a)) − (ln π_θ(y_b) − ln π_ref(y_b))]``.

    All arguments are (B,) sums over response tokens, in nats (DPO, arXiv 2305.18290, eq. 7).
    """
    return beta * ((logp_a_B - ref_a_B) - (logp_b_B - ref_b_B))


def preference_loss(margin_B: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy ``−p ln σ(z) − (1−p) ln σ(−z)`` of each pair, (B,).

    ``target_B`` is p = P(a ≻ b): σ(s_a − s_b) for soft labels, 0 or 1 for sampled ones (CAN, arXiv 2405.19544,
    section 4). Both have the minimiser z = s_a − s_b; at z = 0 the loss is ln 2 whatever p is.
    """
    return -(target_B * logsigmoid(margin_B) + (1 - target_B) * logsigmoid(-margin_B))
