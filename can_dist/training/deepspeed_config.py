"""The DeepSpeed configuration: what the user's file says about ZeRO, completed by what ``train`` says."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import KeysView, Mapping
from pathlib import Path
from typing import Any

from can_dist.config.sections import Train
from can_dist.config.shipped import shipped_file, short_names
from can_dist.errors import ConfigError
from can_dist.modeling.precision import say_accelerator
from can_dist.training.extensions import without_mlflow

# keys that the run's own configuration decides; a second opinion in the file would win or lose silently
OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.tokens_per_pack",
    "gradient_accumulation_steps": "train.batch_size and train.tokens_per_pack",
    "managed_gradient_accumulation": "train.tokens_per_pack",
    "optimizer": "train.learning_rate, train.betas and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_steps",
    "gradient_clipping": "train.max_grad_norm",
    "bf16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "checkpoint": "train.checkpoint_every",
    "elasticity": "cluster.num_workers",
}

# what DeepSpeed can do and our loop cannot, for it would train something else without a word; and what to do instead
NOT_OFFERED = {
    "sequence_parallel_size": (
        "Ulysses would split a response over ranks, and the loss needs the sum over all its tokens",
        "For long contexts take train.activation_checkpointing, fewer train.tokens_per_pack and offload.",
    ),
    "tensor_parallel": ("weights are divided by ZeRO-3 alone", "Take more ranks."),
    "expert_parallel": ("experts are divided by ZeRO-3 as other weights are", "Take more ranks."),
    "pipeline": ("weights are divided by ZeRO-3 alone", "Take more ranks."),
    "compression_training": ("the policy is exported in the precision it was trained in", "Quantize it afterwards."),
}


PLAIN = {"zero_optimization": {"stage": 3}}
"""A run's DeepSpeed configuration where it gives none."""


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read the user's DeepSpeed JSON, given by its path or as the name of one in ``ds_configs``; without, plain ZeRO-3.

    Raises:
        ConfigError: When the file is missing, is not JSON, has a key twice, is not for ZeRO-3 or ZeRO-2, has 'auto'
            values, gives a key that the run's configuration owns, or one that is not offered.
    """
    if path is None:
        return copy.deepcopy(PLAIN)
    try:
        config = json.loads(_file_of(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except OSError:
        raise ConfigError(
            f"train.ds_config: {path}: no such file.",
            "Give the path of a DeepSpeed JSON, or the name of one that comes with can-dist: "
            f"{short_names('ds_configs', '.json')}.",
        ) from None
    except ValueError as error:
        raise ConfigError(f"train.ds_config: {path}: not valid JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ConfigError(f"train.ds_config: {path}: expected a JSON object, found {type(config).__name__}.")
    owned = [f"{key} (set {OWNED[key]} instead)" for key in OWNED if key in config]
    if owned:
        raise ConfigError(f"train.ds_config: {path}: these keys belong to the run's configuration: {'; '.join(owned)}.")
    for key in NOT_OFFERED.keys() & config.keys():
        reason, remedy = NOT_OFFERED[key]
        raise ConfigError(f"train.ds_config: {path}: {key} is not offered: {reason}.", remedy)
    automatic = _automatic(config)
    if automatic:
        raise ConfigError(
            f"train.ds_config: {path}: {', '.join(automatic)}: 'auto' means something to transformers' Trainer only.",
            "Give a value, or leave the key out for DeepSpeed's default.",
        )
    zero = config.setdefault("zero_optimization", {"stage": 3})
    if not isinstance(zero, dict) or zero.get("stage") not in (2, 3):
        raise ConfigError(
            f"train.ds_config: {path}: zero_optimization.stage must be 3, or 2 with train.lora, found {zero!r}."
        )
    return config


def _file_of(name: str) -> Path:
    """Return the file of a path, or else that of a shipped file's name."""
    path = Path(name).expanduser()
    return path if path.exists() else shipped_file(name, "ds_configs", ".json") or path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated JSON key (Python would silently keep the last)."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(twice)}: given twice")
    return dict(pairs)


def _automatic(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Name every key whose value is 'auto'."""
    names = []
    for key, value in config.items():
        if value == "auto":
            names.append(prefix + key)
        elif isinstance(value, dict):
            names += _automatic(value, f"{prefix}{key}.")
    return names


def build_ds_config(base: dict[str, Any], train: Train, precision: str) -> dict[str, Any]:
    """Complete a base configuration.

    An optimizer step has as many forward passes as its examples have packs, so DeepSpeed's fixed batch arithmetic is
    not used: the engine is told which pass is the last, and the loss is a mean over the global batch already.

    Args:
        base: What ``read_ds_config`` returned.
        train: The options of the training.
        precision: 'bf16' or 'fp32'.

    Raises:
        ConfigError: When DeepSpeed does not know a key, or not a value of ``zero_optimization``; or for ZeRO-2 without
            adapters.
    """
    say_accelerator()
    is_plain = base == PLAIN  # there is nothing of a user's in it, and DeepSpeed takes seconds to import
    if not is_plain:
        _check_zero(base["zero_optimization"], train.ds_config)
    if base["zero_optimization"]["stage"] == 2 and train.lora is None:
        raise ConfigError(
            f"train.ds_config: {train.ds_config}: zero_optimization.stage 2 keeps every weight on every rank, and is "
            "for adapters, whose optimizer is small.",
            "Set train.lora, or stage 3.",
        )
    whole = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        # bf16 keeps an fp32 master copy: an Adam step of 1e-6 rounds to nothing in bf16
        "bf16": {"enabled": precision == "bf16"},
        **accumulation(base, precision),
        "optimizer": {
            # torch's own AdamW: DeepSpeed's would be compiled at start
            "type": "AdamW",
            "params": {
                "lr": train.learning_rate,
                "betas": list(train.betas),
                "weight_decay": train.weight_decay,
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_allow_untested_optimizer": True,
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
        **base,
    }
    if not is_plain:
        _refuse_unknown(whole, train.ds_config)
    return whole


def _check_zero(zero: Mapping[str, Any], path: str | None) -> None:
    """Raise ``ConfigError`` for a key or a value that DeepSpeed's ZeRO does not take."""
    with without_mlflow():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"train.ds_config: {path}: zero_optimization: {'; '.join(problems)}.") from None


def accumulation(base: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Return in what the gradients of a step's passes add up, where DeepSpeed's own choice would be bf16.

    A sum in bf16 is off by a percent after some dozens of passes, so that the same batch in other packs would be
    another step. Costs 2 bytes more per trained weight.

    Args:
        base: The user's configuration; its ``data_types``, if there, are kept.
        precision: 'bf16' or 'fp32'.
    """
    if precision != "bf16" or "data_types" in base:
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32"}}


class _Recorder(dict[str, Any]):
    """A configuration that remembers which keys were looked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.looked_for: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.looked_for.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.looked_for.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looked_for.add(str(key))
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)


def _refuse_unknown(config: dict[str, Any], path: str | None) -> None:
    """Raise ``ConfigError`` for a key that DeepSpeed's own reader never looks for: it would be left out in silence."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = _Recorder(config)
    DeepSpeedConfig(read)
    for key in config.keys() - read.looked_for:
        nearest = difflib.get_close_matches(key, read.looked_for, n=1)
        remedy = f"Did you mean {nearest[0]!r}?" if nearest else ""
        raise ConfigError(f"train.ds_config: {path}: {key}: DeepSpeed knows no such key.", remedy)
