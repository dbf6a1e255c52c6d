"""A loaded model made ready for training: no dropout of its own, adapters, recomputed activations."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from can_dist.config.sections import Train
from can_dist.errors import ConfigError


def adapt(model: Any, train: Train) -> Any:
    """Turn off a loaded model's own dropout; add adapters and activation checkpointing where configured."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # π_θ and π_ref of a log-ratio must be the same function at the start
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):  # of torch.nn.functional.dropout; whole layers (layerdrop)
                setattr(module, name, 0.0)
    if train.lora is not None:
        from peft import LoraConfig, get_peft_model

        lora = train.lora
        modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
        adapters = LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
        )
        try:
            with warnings.catch_warnings():  # peft asks by a name that transformers 5.24 has renamed
                warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
                # mixed fp32 adapters on a bf16 base fail in DeepSpeed's first step
                model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
        except ValueError as error:
            raise ConfigError(f"train.lora: {error}{_about_experts(error)}") from None
    if train.activation_checkpointing:
        _recompute(model, every=int(train.activation_checkpointing))
    return model


def _about_experts(error: ValueError) -> str:
    """Return the remedy for peft's refusal of dropout before a bare parameter, which a layer's experts are, or ''."""
    if "ParamWrapper" not in str(error):
        return ""
    return (
        " A layer's experts are one parameter here: set train.lora.target_modules to modules without them, such as "
        "[q_proj, k_proj, v_proj, o_proj], or train.lora.dropout to 0."
    )


def _recompute(model: Any, every: int) -> None:
    """Let the backward pass recompute the activations of every n-th layer; the other layers keep theirs.

    Raises:
        ConfigError: when the model's layers cannot be switched one by one and ``every`` is not 1.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    with warnings.catch_warnings():  # transformers 5.20 has a newer name, 5.3 has this one alone
        warnings.simplefilter("ignore", FutureWarning)
        # the non-reentrant kind breaks on frozen weights that ZeRO-3 partitioned
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if every > 1 and not layers:
        raise ConfigError(
            f"train.activation_checkpointing: {every}: {type(model).__name__} recomputes all its layers or none. "
            "Set true."
        )
    for number, layer in enumerate(layers):  # transformers' own every_n_layers is not in 5.0
        layer.gradient_checkpointing = number % every == 0
