"""The loss of pairs, one sequence at a time, and the shapes of models to try it on: the oracle of trainings."""

from __future__ import annotations

import torch
import train_world as tw
from torch.nn.functional import logsigmoid

LORA = {"r": 2, "alpha": 8, "dropout": 0.1}
SMALL = {"vocab_size": 32, "eos_token_id": tw.END, "pad_token_id": 0, "bos_token_id": None}
HEADS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def log_ratios(model: torch.nn.Module, row: dict) -> list[torch.Tensor]:
    """ln π_θ/π_ref of each response of a row, one sequence at a time."""
    return [
        tw.logp_one(model, tw.prompt_tokens(row), tokens) - ref
        for tokens, ref in zip(row["token_ids"], row["logp_ref"], strict=True)
    ]


def pair_losses(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """−p ln σ(z) − (1−p) ln σ(−z) of each row, one sequence at a time."""
    losses = []
    for row in rows:
        ratio_a, ratio_b = log_ratios(model, row)
        z = tw.BETA * (ratio_a - ratio_b)
        losses.append(-row["target"][0] * logsigmoid(z) - row["target"][1] * logsigmoid(-z))
    return torch.stack(losses)
