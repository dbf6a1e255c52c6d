"""Losses of the policy's log-ratios: plain functions, each with its own minimiser.

An example is a prompt with N responses; ``ratio_BN`` is ln π_θ(y_n|x) − ln π_ref(y_n|x), sums over response tokens, in
nats. With s the scores that labelled the example, the losses ``sigmoid``, ``pairwise``, ``regression`` and ``listwise``
all have the minimiser ln π_θ/π_ref = s/β + a constant of the prompt: π_θ ∝ π_ref exp(s/β). ``clipped`` has a gradient
alone: its value says nothing of the policy.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

CLIP = 0.2
"""How far π_θ/π of a response may go before it earns nothing more (PPO, arXiv 1707.06347, section 3)."""


def example_losses(
    name: str, ratio_BN: torch.Tensor, target_BN: torch.Tensor, is_real_BN: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return the loss ``name`` of each example, (B,).

    ``target_BN`` means what the loss says: ``sigmoid``: (p, 1 − p) with p = P(a ≻ b); ``pairwise`` and ``regression``:
    the scores s_n; ``listwise``: softmax_n(s_n/β); ``kto``: (1, 0) for a desirable response and (0, 1) for an
    undesirable one, with the baseline z_ref in the place of a second ratio; ``offset``: 1 + Δ for the preferred
    response of the two and 0 for the other; ``clipped``: the advantages, and the ratio is to the policy that responded.
    ``is_real_BN`` is False where a shorter list was padded; ``sigmoid``, ``kto`` and ``offset`` have N = 2.
    """
    if name == "clipped":
        return clipped_loss(ratio_BN, target_BN, is_real_BN)
    if name == "listwise":
        return listwise_loss(ratio_BN, target_BN, is_real_BN)
    if name in ("pairwise", "regression"):
        return over_pairs(name, beta * differences(ratio_BN), differences(target_BN), is_real_BN)
    margin_B = implicit_margin(ratio_BN, beta)
    if name == "sigmoid":
        return sigmoid_loss(margin_B, target_BN[:, 0])
    if name == "offset":
        return offset_loss(margin_B, target_BN[:, 0] - target_BN[:, 1])
    assert name == "kto", name
    return kto_loss(margin_B, target_BN[:, 0])


def differences(value_BN: torch.Tensor) -> torch.Tensor:
    """Return value_a − value_b of every two responses of each example, (B, N, N)."""
    return value_BN[:, :, None] - value_BN[:, None, :]


def over_pairs(name: str, margin_BNN: torch.Tensor, gap_BNN: torch.Tensor, is_real_BN: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of all N(N−1)/2 pairs of each example, (B,), for N forward passes.

    ``margin_BNN`` are z of the pairs and ``gap_BNN`` their s_a − s_b: :func:`sigmoid_loss` with p = σ(s_a − s_b) for
    ``pairwise``, :func:`regression_loss` for ``regression``. Neither changes when a pair is turned round.
    """
    loss_BNN = (
        sigmoid_loss(margin_BNN, torch.sigmoid(gap_BNN)) if name == "pairwise" else regression_loss(margin_BNN, gap_BNN)
    )
    is_pair_BNN = pairs_of(is_real_BN)
    return loss_BNN.masked_fill(~is_pair_BNN, 0.0).sum(dim=(1, 2)) / is_pair_BNN.sum(dim=(1, 2))


def pairs_of(is_real_BN: torch.Tensor) -> torch.Tensor:
    """Return which two responses of each example are a pair, in either order, (B, N, N) bool."""
    same_NN = torch.eye(is_real_BN.shape[1], dtype=torch.bool, device=is_real_BN.device)
    return is_real_BN[:, :, None] & is_real_BN[:, None, :] & ~same_NN


def implicit_margin(ratio_B2: torch.Tensor, beta: float) -> torch.Tensor:
    """Return ``z_B = β[ln π_θ/π_ref(y_a) − ln π_θ/π_ref(y_b)]`` of pairs (DPO, arXiv 2305.18290, eq. 7)."""
    return beta * (ratio_B2[:, 0] - ratio_B2[:, 1])


def sigmoid_loss(margin_B: torch.Tensor, target_B: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy ``−p ln σ(z) − (1−p) ln σ(−z)`` of each pair, (B,).

    ``target_B`` is p = P(a ≻ b): σ(s_a − s_b) for soft labels, 0 or 1 for sampled ones (CAN, arXiv 2405.19544,
    section 4), 1 − ε or ε for people's labels of which a share ε is wrong (cDPO, Mitchell 2023). The minimiser is
    z = logit(E p); at z = 0 the loss is ln 2 whatever p is.
    """
    return -(target_B * logsigmoid(margin_B) + (1 - target_B) * logsigmoid(-margin_B))


def offset_loss(margin_B: torch.Tensor, lead_B: torch.Tensor) -> torch.Tensor:
    """Return ``−ln σ(±z − Δ)`` of each pair, (B,): + where the first is preferred (SafeDPO, arXiv 2505.20065, eq. 12).

    ``lead_B`` is ±(1 + Δ); Δ = 0 is DPO's loss. At z = 0 the loss is ln(1 + e^Δ).
    """
    return -logsigmoid(torch.sign(lead_B) * margin_B - (lead_B.abs() - 1))


def regression_loss(margin_B: torch.Tensor, gap_B: torch.Tensor) -> torch.Tensor:
    """Return ``(z − (s_a − s_b))²`` of each pair, (B,): it does not saturate where the gap is large.

    Minimiser z = s_a − s_b (the relative-reward regression of REBEL, arXiv 2404.16767).
    """
    return (margin_B - gap_B).square()


def listwise_loss(ratio_BN: torch.Tensor, target_BN: torch.Tensor, is_real_BN: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy ``−Σ_n t_n ln softmax_n(ln π_θ/π_ref)`` of each list, (B,).

    ``target_BN`` is t = softmax_n(s_n/β): all N(N−1)/2 comparisons of a prompt for N forward passes. Minimiser
    softmax_n(ln π_θ/π_ref) = t; with all ratios equal the loss is ln N whatever t is.
    """
    logp_BN = ratio_BN.masked_fill(~is_real_BN, -torch.inf).log_softmax(dim=1)
    return -(target_BN * logp_BN.masked_fill(~is_real_BN, 0.0)).sum(dim=1)


def clipped_loss(ratio_BN: torch.Tensor, advantage_BN: torch.Tensor, is_real_BN: torch.Tensor) -> torch.Tensor:
    """Return ``−mean_n min(ρ_n A_n, clip(ρ_n, 1 ± CLIP) A_n)`` of each list, (B,), with ρ = π_θ/π of a whole response.

    π is the policy that responded. Where π_θ = π the gradient is −mean_n A_n ∇ln π_θ(y_n) (PPO, arXiv 1707.06347,
    eq. 7, with a response as one action, as in RLOO, arXiv 2402.14740).
    """
    rho_BN = ratio_BN.exp()
    gain_BN = torch.minimum(rho_BN * advantage_BN, rho_BN.clamp(1 - CLIP, 1 + CLIP) * advantage_BN)
    return -(gain_BN.masked_fill(~is_real_BN, 0.0)).sum(dim=1) / is_real_BN.sum(dim=1)


def kto_loss(margin_B: torch.Tensor, desirable_B: torch.Tensor) -> torch.Tensor:
    """Return ``1 − σ(±z)`` of each response, (B,): + for a desirable one, − for an undesirable one.

    z = β(ln π_θ/π_ref(y) − z_ref) (KTO, arXiv 2402.01306, section 4); λ_D and λ_U are the examples' weights.
    """
    return torch.sigmoid(torch.where(desirable_B > 0.5, -margin_B, margin_B))


def agreement(
    ratio_BN: torch.Tensor, target_BN: torch.Tensor, is_real_BN: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (accuracy, margin) of each example, both (B,), averaged over its pairs of responses.

    A pair is right when the response with the larger target has the larger ratio, ties count half; its margin is
    β times the difference of the ratios in the direction of the target.
    """
    is_pair_BNN = pairs_of(is_real_BN)
    margin_BNN = beta * differences(ratio_BN)
    direction_BNN = torch.sign(differences(target_BN))
    right_BNN = 0.5 + 0.5 * torch.sign(margin_BNN) * direction_BNN
    num_pairs_B = is_pair_BNN.sum(dim=(1, 2))
    accuracy_B = (right_BNN * is_pair_BNN).sum(dim=(1, 2)) / num_pairs_B
    return accuracy_B, (margin_BNN * direction_BNN * is_pair_BNN).sum(dim=(1, 2)) / num_pairs_B
