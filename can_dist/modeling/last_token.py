"""Whole texts → what a model says of each at its last token, by packs: classifiers with a linear head, and guards."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from can_dist.modeling.packs import Pack, make_text_pack
from can_dist.modeling.probe import exact_layout, floating_weight, probe_groups, values_alone
from can_dist.modeling.segments import NAME, attend_by, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# of the probe's outputs, relative to their norm: a leak is off by 1e-1, the rounding of bf16 by 1e-2
TEXT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class LastToken:
    """Calls a model with a pack from ``make_text_pack`` and keeps the row of each text's last token, (R, X).

    Whatever token it is: an end token may equal the padding token. ``field`` names the output that is kept,
    'last_hidden_state' (B, T, H) or 'logits' (B, T, V).
    """

    def __init__(self, model: PreTrainedModel, field: str) -> None:
        register()
        self.model, self.field = model, field
        self.plain_attention = model.config._attn_implementation

    def __call__(self, pack: Pack) -> torch.Tensor:
        """Return the rows in the dtype of the model, one per text, in order."""
        attend_by(self.model, self.plain_attention if pack.segments is None else NAME)
        output_BTX: torch.Tensor = self.model(**pack.inputs())[self.field]
        return output_BTX.flatten(0, 1).index_select(0, pack.rows_N)


def pooled(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """Return the logits (R, L) of a classifier that pools by itself, from a padded pack."""
    logits_RL: torch.Tensor = model(input_ids=pack.input_ids_BT, attention_mask=pack.attention_mask_BT).logits
    return logits_RL


def float32_head(head: torch.nn.Linear, hidden_RH: torch.Tensor) -> torch.Tensor:
    """Apply a head in float32, (R, L): a bf16 score near 10 comes in steps of 0.06."""
    bias = None if head.bias is None else head.bias.float()
    return torch.nn.functional.linear(hidden_RH.float(), head.weight.float(), bias)


@torch.no_grad()
def reads_last_token(model: PreTrainedModel, body: PreTrainedModel, head: torch.nn.Linear, pad_id: int) -> bool:
    """Tell whether the logits of a classifier are its head at the last hidden state, by numbers."""
    weight = floating_weight(body)
    groups = probe_groups(int(body.config.get_text_config().vocab_size), avoid=pad_id)
    read = LastToken(body, "last_hidden_state")
    logits_RL = values_alone(lambda pack: pooled(model, pack), make_text_pack, groups, weight)
    hidden_RH = values_alone(read, make_text_pack, groups, weight)
    error = float((float32_head(head, hidden_RH) - logits_RL).norm())
    return error <= TEXT_TOLERANCE[weight.dtype] * float(logits_RL.norm())


@torch.no_grad()
def choose_text_layout(read: LastToken, say: Callable[[str], None]) -> str:
    """Return, and announce, the fastest layout whose outputs equal those of each text alone."""
    weight = floating_weight(read.model)
    groups = probe_groups(int(read.model.config.get_text_config().vocab_size))
    alone_RX = values_alone(read, make_text_pack, groups, weight)
    tolerance = TEXT_TOLERANCE[weight.dtype] * float(alone_RX.norm())
    layout, sentence = exact_layout(read, make_text_pack, groups, weight, alone_RX, tolerance, "outputs", say)
    say(sentence)
    return layout
