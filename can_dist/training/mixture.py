"""Policies of one reference → θ_ref + Σ_i a_i (θ_i − θ_ref), one tensor at a time; their adapters by their factors.

The coefficients are those of :mod:`can_dist.dual.basis`. One policy alone is a strength of it
(:mod:`can_dist.training.stretch`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from can_dist.errors import ConfigError, DataError
from can_dist.modeling.stored import StoredTensor
from can_dist.tables.artifacts import atomic_directory, write_json
from can_dist.training.merge import alike_tensors, check_out, refuse_differences, write_policy
from can_dist.training.stretch import SETTINGS, WEIGHTS, comparable_tensors, lora_config

FACTOR = re.compile(r"(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
WRAPPED = "base_model.model."
"""What peft writes before the name of a module."""

NOT_BY_FACTORS = ("bias", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices",
                  "layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens")  # fmt: skip
"""Settings of peft with which an adapter is more, or other, than one product of two factors per module."""

SHARED = ("base_model_name_or_path", "revision", "fan_in_fan_out", "task_type")
"""Settings that the adapters of one mixture must share; ranks and scales may differ."""


def mix_policies(
    reference: Path,
    policies: Mapping[str, Path],
    coefficient: Mapping[str, float],
    out: Path,
    max_shard_size_mb: int = 4000,
) -> Path:
    """Write θ_ref + Σ_i a_i (θ_i − θ_ref) as a Hugging Face directory ``out``; return it.

    The arithmetic is fp32 (fp64 for fp64 weights). Dtypes, configuration and tokenizer are the first policy's; weights
    of the reference in another precision are rounded to the policies' first, as training read them.

    Args:
        reference: directory with the safetensors that every training started from.
        policies: directory of each policy by its name.
        coefficient: a by name of the policy.
        out: directory to make; it must not exist, its parent must.
        max_shard_size_mb: largest file of the result, in MB; the memory this needs is two to three times as much.

    Raises:
        ConfigError: coefficients of other policies or that are not finite; ``out`` exists, or its parent does not.
        DataError: two policies, or one and the reference, have not the same tensors or tokenizer; one is damaged, an
            adapter, quantised or pickled; or a weight leaves the range of its dtype.
    """
    _check_coefficients(policies, coefficient)
    check_out(out)
    tensors_ref: dict[str, StoredTensor] = {}
    stored: dict[str, dict[str, StoredTensor]] = {}
    for name, policy in policies.items():
        stored[name], tensors_ref = comparable_tensors(reference, policy)
    first, *others = policies.values()
    for other in others:
        alike_tensors(first, other)

    def mixed(tensor: str) -> torch.Tensor:
        return _mix_one(tensor, tensors_ref[tensor], {name: s[tensor] for name, s in stored.items()}, coefficient)

    return write_policy(first, next(iter(stored.values())), out, max_shard_size_mb, mixed)


def mix_adapters(adapters: Mapping[str, Path], coefficient: Mapping[str, float], out: Path) -> Path:
    """Write low-rank adapters whose product is Σ_i a_i times that of each adapter into the new directory ``out``.

    The factors A are stacked, the factors B stand side by side with a_i and the adapter's scale in them. Ranks add up,
    and each module's lora_alpha is its rank, so that the scale of the result is 1.

    Args:
        adapters: directory of each adapter by its name, as peft writes it.
        coefficient: a by name of the adapter.
        out: directory to make; it must not exist, its parent must.

    Raises:
        ConfigError: coefficients of other adapters or that are not finite; ``out`` exists, or its parent does not.
        DataError: an adapter is no plain LoRA, or two adapt other modules, shapes or base models.
    """
    _check_coefficients(adapters, coefficient)
    check_out(out)
    read = {name: _Adapter(path) for name, path in adapters.items()}
    first, *others = read.values()
    for other in others:
        refuse_differences(
            first.path, other.path, "adapters", first.outline(), other.outline(),
            so="their products cannot be added up",
            do="Mix adapters of one base model and the same modules.",
        )  # fmt: skip
    tensors, ranks = {}, {}
    for name, match in first.factors.items():
        module, dim = match["module"], 0 if match["side"] == "A" else 1
        parts = [
            adapter.tensors[name] if dim == 0 else adapter.scaled(name, module, coefficient[key])
            for key, adapter in read.items()
        ]
        tensors[name] = torch.cat(parts, dim=dim).contiguous()
        ranks[module.removeprefix(WRAPPED)] = tensors[name].shape[dim]
    rank = max(ranks.values())  # what servers of adapters make room for
    pattern = {module: own for module, own in ranks.items() if own != rank}
    settings = {**first.config, "r": rank, "lora_alpha": rank, "use_rslora": False}
    with atomic_directory(out) as built:
        save_file(tensors, built / WEIGHTS, metadata={"format": "pt"})
        write_json(built / SETTINGS, {**settings, "rank_pattern": pattern, "alpha_pattern": dict(pattern)})
    return out


class _Adapter:
    """An adapter in memory, which is a small part of its base model."""

    def __init__(self, path: Path) -> None:
        self.path, self.config = path, lora_config(path)
        for key in NOT_BY_FACTORS:
            if self.config.get(key) not in (None, False, "none", [], {}):
                raise DataError(
                    f"{path / SETTINGS}: {key} is {self.config[key]!r}, so the adapter is not a product of two factors "
                    "in every module. Mix the merged policies (mix_policies)."
                )
        self.tensors: dict[str, torch.Tensor] = load_file(path / WEIGHTS)
        matches = {name: FACTOR.fullmatch(name) for name in self.tensors}
        if strange := next((name for name, match in matches.items() if match is None), None):
            raise DataError(
                f"{path / WEIGHTS}: {strange} is no factor of a low-rank product. Mix the merged policies "
                "(mix_policies)."
            )
        self.factors: dict[str, re.Match[str]] = {name: match for name, match in matches.items() if match is not None}

    def outline(self) -> dict[str, str]:
        """Return what must be alike in the adapters of a mixture: settings, and the shapes of factors less the rank."""
        shapes = {
            name: f"{list(self.tensors[name].shape[1:] if match['side'] == 'A' else _without_rank(self.tensors[name]))}"
            for name, match in self.factors.items()
        }
        return {key: repr(self.config.get(key)) for key in SHARED} | shapes

    def scaled(self, name: str, module: str, weight: float) -> torch.Tensor:
        """Return the factor B times a weight and the scale that peft gives the module's product."""
        factor = self.tensors[name]
        alpha = _of_module(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        rank = factor.shape[1]
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        wide = torch.promote_types(factor.dtype, torch.float32)
        return (weight * scale * factor.to(wide)).to(factor.dtype)


def _of_module(pattern: Mapping[str, Any], module: str, default: float) -> float:
    """Return the value of the first regular expression that the end of a module's name matches, as peft looks it up."""
    name = module.removeprefix(WRAPPED)
    return float(next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default))


def _without_rank(factor: torch.Tensor) -> Iterable[int]:
    return [*factor.shape[:1], *factor.shape[2:]]


def _check_coefficients(policies: Mapping[str, Path], coefficient: Mapping[str, float]) -> None:
    if not policies or policies.keys() != coefficient.keys():
        raise ConfigError(
            f"coefficients of {', '.join(coefficient) or 'nothing'} for policies {', '.join(policies) or 'none'}: "
            "expected a number for each policy, and at least one policy."
        )
    for name, value in coefficient.items():
        if not math.isfinite(value):
            raise ConfigError(f"coefficient of {name} = {value}: expected a finite number.")


def _mix_one(
    name: str, stored_ref: StoredTensor, stored: Mapping[str, StoredTensor], coefficient: Mapping[str, float]
) -> torch.Tensor:
    """Return one tensor of the mixture; of the policies one tensor is in memory at a time."""
    start, wide = stored_ref.read(name), torch.float32
    total: torch.Tensor | None = None
    for policy, tensor in stored.items():
        end = tensor.read(name)
        if not (start.dtype.is_floating_point and end.dtype.is_floating_point):
            if not torch.equal(start, end):
                raise DataError(
                    f"{stored_ref.file} and {tensor.file}: {name} is {tensor.dtype} and differs; only floating-point "
                    "tensors can be mixed. Give unquantised policies of one architecture."
                )
            continue
        if not end.isfinite().all():
            raise DataError(f"{tensor.file}: {name} holds numbers that are not finite. The policy is broken.")
        start, wide = start.to(end.dtype), torch.promote_types(end.dtype, torch.float32)
        total = start.to(wide, copy=True) if total is None else total
        total += coefficient[policy] * (end.to(wide) - start.to(wide))
    if total is None:
        return start.clone()  # the pages belong to its file
    mixed = total.to(start.dtype)
    if not mixed.isfinite().all():
        weights = ", ".join(f"{policy} {weight:+.3g}" for policy, weight in coefficient.items())
        dtype = next(iter(stored.values())).dtype
        raise DataError(f"{stored_ref.file}: {name} leaves the range of {dtype} in the mixture {weights}.")
    return mixed
