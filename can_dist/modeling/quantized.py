"""The frozen base of adapters in 4 bits (QLoRA, arXiv 2305.14314) by bitsandbytes: NF4 in blocks of 64, as bytes."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from can_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Weights that share a scale."""


def check_installed() -> None:
    """Raise ``ConfigError`` when bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.lora.quantize: nf4 needs the package 'bitsandbytes', which is not installed.",
            "pip install 'can-dist[qlora]' on every machine of the run, or leave quantize out.",
        )


def loading_options(compute: torch.dtype) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told to quantize the linear layers, not the head, as they are read."""
    check_installed()
    from transformers import BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    return {"quantization_config": four_bit}


def make_trainable(model: torch.nn.Module, name: str) -> None:
    """Keep bitsandbytes from repacking the weights in evaluation, as it does on CPUs with AVX512-BF16.

    The kernel of the repacked weights has no gradient, and training goes on with it without an error, on gradients
    that miss what lies below.

    Raises:
        ConfigError: A layer's width is no multiple of a block: bitsandbytes 0.50 reads such weights wrongly on a CPU.
    """
    from bitsandbytes.nn import Linear4bit

    for place, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if module.in_features % BLOCK:
                raise ConfigError(
                    f"train.lora.quantize: {place} of model {name!r} has rows of {module.in_features} weights, which "
                    f"blocks of {BLOCK} do not divide; bitsandbytes reads them wrongly on a CPU.",
                    "Leave quantize out.",
                )
            module.support_avx512bf16_for_cpu = False


def whole_weight(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a gathered parameter in full precision: one in 4 bits as the numbers that it computes with."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = dequantize_4bit(parameter.data, state)
    return weight


def num_bytes(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of a parameter's ``whole_weight``, also while ZeRO-3 has it partitioned."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
    return int(math.prod(state.shape) * state.dtype.itemsize)
