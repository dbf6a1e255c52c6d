"""Beaver score models (PKU-Alignment, Safe RLHF, arXiv 2310.12773) without the safe-rlhf package.

The checkpoint is a Llama body under ``model.*`` and ``score_head``, a linear map of the hidden state to one number; its
architecture is called ``LlamaForScore``, or ``LlamaModelForScore`` in the older ones, which transformers does not know.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaModel, LlamaPreTrainedModel

from can_dist.config import Beaver
from can_dist.errors import DataError

ARCHITECTURES = ("LlamaForScore", "LlamaModelForScore")


class LlamaForScore(LlamaPreTrainedModel):  # type: ignore[misc]
    """The layout of the checkpoint; the caller applies ``score_head`` to the hidden state it wants."""

    # the head as it was saved, whatever the precision of the body: a bf16 score near 10 comes in steps of 0.06
    _keep_in_fp32_modules_strict = ["score_head"]  # noqa: RUF012
    # statistics of the training; without do_normalize they are no part of the score
    _keys_to_ignore_on_load_unexpected = [r"^normalizer\.(mean|var|count)$"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        bias = getattr(config, "score_bias", getattr(config, "bias", True))
        self.score_head = torch.nn.Linear(config.hidden_size, 1, bias=bias)
        self.post_init()


def check_beaver(spec: Beaver, config: Any) -> None:
    """Raise ``DataError`` unless a configuration is that of a Beaver score model whose sign is the one declared.

    ``score_type`` says what a higher score means: of a reward model better, of a cost model more harmful.
    """
    owner = f"scorer model {spec.model!r}"
    architectures = config.architectures or ["model without head"]
    if not set(architectures) & set(ARCHITECTURES):
        raise DataError(
            f"{owner}: its checkpoint is a {', '.join(architectures)}, expected {' or '.join(ARCHITECTURES)}.",
            "For another classifier leave out 'kind: beaver'.",
        )
    for name, expected in (("score_dim", 1), ("do_normalize", False)):
        if (value := getattr(config, name, expected)) != expected:
            raise DataError(f"{owner}: config.json has {name} {value}, only {expected} is supported.")
    score_type = getattr(config, "score_type", None)
    expected_sign = {"reward": 1, "cost": -1}.get(str(score_type), spec.sign)
    if spec.sign != expected_sign:
        raise DataError(
            f"{owner}: config.json says it is a {score_type} model, the configuration gives sign {spec.sign}.",
            f"Set sign to {expected_sign}, so that higher is better.",
        )
