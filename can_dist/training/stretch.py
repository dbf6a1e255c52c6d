"""A reference and a trained policy → the policy of strength α, θ_ref + α(θ − θ_ref), one tensor at a time."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from can_dist.errors import DataError
from can_dist.modeling.stored import StoredTensor, read_json, stored_tensors
from can_dist.tables.artifacts import write_json
from can_dist.training.export import check_shapes
from can_dist.training.merge import (
    architecture,
    check_request,
    drop_tied_copies,
    merge_one,
    refuse_differences,
    refuse_quantised,
    tied_copies,
    write_policy,
)

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
"""The files of an adapter, as peft writes them."""


def stretch_policy(reference: Path, policy: Path, out: Path, alpha: float, max_shard_size_mb: int = 4000) -> Path:
    """Write θ_ref + α(θ − θ_ref) as a Hugging Face directory ``out``; return it.

    The arithmetic is fp32 (fp64 for fp64 weights). Dtypes, configuration and tokenizer are the policy's; weights of the
    reference in another precision are rounded to the policy's first, as training read them.

    Args:
        reference: directory with the safetensors that the training started from.
        policy: directory of the trained policy.
        out: directory to make; it must not exist, its parent must.
        alpha: strength; 1 gives the policy and 0 the reference.
        max_shard_size_mb: largest file of the result, in MB; the memory this needs is two to three times as much.

    Raises:
        ConfigError: alpha is not finite, ``out`` exists, or its parent does not.
        DataError: the two have not the same tensors, one is damaged, an adapter, quantised or pickled, or a weight
            leaves the range of its dtype.
    """
    check_request(alpha, out)
    tensors, tensors_ref = comparable_tensors(reference, policy)
    return write_policy(
        policy, tensors, out, max_shard_size_mb, lambda name: merge_one(name, tensors[name], tensors_ref[name], alpha)
    )


def comparable_tensors(reference: Path, policy: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the tensors of a policy and of its reference, which must have the same names and shapes.

    Raises:
        DataError: they have not, or the policy is no whole model in safetensors.
    """
    tensors, tensors_ref = stored_tensors(policy), stored_tensors(reference)
    config = architecture(policy)
    tied = tied_copies(config)
    for directory, stored in ((policy, tensors), (reference, tensors_ref)):
        refuse_quantised(directory)
        drop_tied_copies(directory, stored, tied)
    # what a checkpoint holds beside the architecture, such as the buffers of old ones, is not the policy's
    tensors_ref = {name: stored for name, stored in tensors_ref.items() if name in tensors}
    refuse_differences(
        policy, reference, "tensors",
        {name: f"{list(tensor.shape)}" for name, tensor in tensors.items()},
        {name: f"{list(tensor.shape)}" for name, tensor in tensors_ref.items()},
        so="this policy is not the reference plus a difference",
        do="Give a policy that was trained from this reference.",
    )  # fmt: skip
    check_shapes(policy, config)
    return tensors, tensors_ref


def scale_adapter(adapter: Path, out: Path, alpha: float) -> Path:
    """Write low-rank adapters whose product is ``alpha`` times that of ``adapter`` into the new directory ``out``.

    Their scale is lora_alpha over the rank, so lora_alpha alone changes.

    Raises:
        ConfigError: alpha is not finite, ``out`` exists, or its parent does not.
        DataError: the adapter is no plain LoRA, whose product is linear in its scale.
    """
    check_request(alpha, out)
    config = lora_config(adapter)
    pattern = {name: alpha * value for name, value in (config.get("alpha_pattern") or {}).items()}
    with tempfile.TemporaryDirectory(prefix=".tmp-scale-", dir=out.parent) as scratch:
        built = Path(scratch) / out.name
        built.mkdir()
        shutil.copyfile(adapter / WEIGHTS, built / WEIGHTS)
        scaled = {**config, "lora_alpha": alpha * config["lora_alpha"], "alpha_pattern": pattern}
        write_json(built / SETTINGS, scaled)
        built.rename(out)
    return out


def lora_config(adapter: Path) -> dict[str, Any]:
    """Return the configuration of low-rank adapters.

    Raises:
        DataError: the adapter is no plain LoRA.
    """
    config = read_json(adapter / SETTINGS)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise DataError(f"{adapter}: an adapter of the kind {kind}, expected LORA, which a scale makes stronger.")
    return config
