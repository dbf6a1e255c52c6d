"""Log-probabilities of responses: sums over the response's tokens, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids_BT int64, mask_BT int64) of sequences padded on the right."""
    length = max(len(sequence) for sequence in sequences)
    ids_BT = torch.full((len(sequences), length), value, dtype=torch.long)
    mask_BT = torch.zeros((len(sequences), length), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[row, : len(sequence)] = 1
    return ids_BT, mask_BT


def response_logp(
    model: Any, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], device: str | torch.device
) -> torch.Tensor:
    """Return ``logp_B``, float32: Σ_t ln π(y_t | x, y_<t) over each response's tokens.

    The batch is padded on the right, which a causal model cannot see; the softmax is taken in float32 and only at
    the positions that predict a response token.
    """
    rows = [[*prompt, *response] for prompt, response in zip(prompt_ids, response_ids, strict=True)]
    ids_BT, mask_BT = pad_right(rows, value=0)
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    is_response_BT = torch.zeros_like(mask_BT, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        is_response_BT[row, len(prompt) : len(prompt) + len(response)] = True
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    predicts_BT = is_response_BT[:, 1:]
    logits_NV = logits_BTV[:, :-1][predicts_BT].float()
    targets_N = ids_BT[:, 1:][predicts_BT]
    logp_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - logits_NV.logsumexp(dim=1)
    row_N = predicts_BT.nonzero()[:, 0]
    return torch.zeros(len(rows), device=logp_N.device).index_add(0, row_N, logp_N)
