"""Two policies → θ = q·θ_a + (1 − q)·θ_b, one tensor at a time: their weighted mean for q in [0, 1].

P-SACPO, arXiv 2404.11049, 4.2; with the reference as θ_b it is a strength of θ_a (:mod:`can_dist.training.stretch`).

Neither model is ever whole in memory: at most one shard of the result and one tensor of each input are. The result
appears under its name when it is complete, or not at all.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from can_dist.errors import ConfigError, DataError
from can_dist.modeling.stored import StoredTensor, read_json, stored_tensors
from can_dist.tables.artifacts import MANIFEST, atomic_directory, dotted, file_digest, load_artifact
from can_dist.training.export import check_shapes, write_shards

COPIED = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "special_tokens_map.json",
          "added_tokens.json", "vocab.*", "merges.txt", "*.model")  # fmt: skip
"""The other files of a policy; they are copied from the first policy."""

CONFIG_MAY_DIFFER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
TOKENIZER_MAY_DIFFER = {"padding", "truncation", "version"}  # written by using it; no text's tokens depend on them
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja")
TOKENIZER_SETTINGS = ("chat_template", "bos_token", "eos_token", "add_bos_token", "add_eos_token")
SHOWN = 5


def merge_policies(policy_a: Path, policy_b: Path, out: Path, q: float, max_shard_size_mb: int = 4000) -> Path:
    """Write θ = q·θ_a + (1 − q)·θ_b as a Hugging Face directory ``out``; return it.

    In P-SACPO, θ_a was aligned to r + λg and θ_b to r alone, q ∈ {0.25, 0.5, 0.75}.

    The arithmetic is fp32 (fp64 for fp64 weights), the result has the stored dtype. q = 1 gives θ_a and q = 0 gives
    θ_b to the bit. A tied weight that is stored twice is written once. Integer buffers must be equal.

    Args:
        policy_a: directory with config.json and safetensors, sharded or not; its configuration and tokenizer are kept.
        policy_b: the same of the other policy.
        out: directory to make; it must not exist, its parent must.
        q: weight of ``policy_a``; below 0 or above 1 it lies beyond an end.
        max_shard_size_mb: largest file of the result, in MB; the memory this needs is two to three times as much.

    Raises:
        ConfigError: q is not finite, ``out`` exists, or its parent does not.
        DataError: the policies differ in architecture, tensors, dtypes or tokenizer; or a policy is damaged, an
            adapter, or pickled.
    """
    check_request(q, out)
    tensors_a, tensors_b = alike_tensors(policy_a, policy_b)
    return write_policy(
        policy_a, tensors_a, out, max_shard_size_mb, lambda name: merge_one(name, tensors_a[name], tensors_b[name], q)
    )


def alike_tensors(policy_a: Path, policy_b: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the tensors of two policies of one architecture, tokenizer and precision, each tied weight once.

    Raises:
        DataError: they differ in one of these, or a policy is damaged.
    """
    tensors_a, tensors_b = stored_tensors(policy_a), stored_tensors(policy_b)
    config = _same_config(policy_a, policy_b)
    refuse_differences(policy_a, policy_b, "tokenizer", _tokenizer(policy_a), _tokenizer(policy_b))
    tied = tied_copies(config)
    for policy, tensors in ((policy_a, tensors_a), (policy_b, tensors_b)):
        drop_tied_copies(policy, tensors, tied)
    kinds_a, kinds_b = (
        {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}
        for tensors in (tensors_a, tensors_b)
    )
    refuse_differences(policy_a, policy_b, "tensors", kinds_a, kinds_b)
    check_shapes(policy_a, config)
    return tensors_a, tensors_b


def check_request(q: float, out: Path) -> None:
    """Raise ``ConfigError`` unless q is finite and ``out`` can be made."""
    if not math.isfinite(q):
        raise ConfigError(f"q = {q}: expected a finite number, the weight of the first policy.")
    check_out(out)


def check_out(out: Path) -> None:
    """Raise ``ConfigError`` unless the directory ``out`` can be made."""
    if out.exists() or not out.parent.is_dir():
        state = "already exists" if out.exists() else "has no parent directory"
        raise ConfigError(f"out = {out}: {state}. Give a new directory inside an existing one.")


def write_policy(
    policy: Path,
    tensors: Mapping[str, StoredTensor],
    out: Path,
    max_shard_size_mb: int,
    made: Callable[[str], torch.Tensor],
) -> Path:
    """Write the tensors that ``made`` returns by name, like those of ``policy``, with its other files, or nothing.

    Of a policy that a run made, only files that its manifest lists are copied.
    """
    manifest = policy.parent / MANIFEST
    listed = load_artifact(manifest.parent).files_in(policy.name) if manifest.is_file() else None
    sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
    max_bytes = max_shard_size_mb * 10**6
    with atomic_directory(out) as built:
        write_shards(built, sizes, max_bytes, made)
        for pattern in COPIED:
            for path in filter(Path.is_file, policy.glob(pattern)):
                if listed is None or path.name in listed:
                    shutil.copyfile(path, built / path.name)
    return out


def merged_tensor(a: torch.Tensor, b: torch.Tensor, q: float) -> torch.Tensor:
    """Return q·a + (1 − q)·b, computed in at least fp32, in the dtype of the inputs.

    The ends are the inputs themselves: 1·a + 0·b would turn −0 into 0.
    """
    if q in (0.0, 1.0):
        return a if q == 1.0 else b
    wide = torch.promote_types(a.dtype, torch.float32)
    return (q * a.to(wide) + (1.0 - q) * b.to(wide)).to(a.dtype)


def merge_one(name: str, stored_a: StoredTensor, stored_b: StoredTensor, q: float) -> torch.Tensor:
    """Return the tensor ``name`` of the merged policy.

    Raises:
        DataError: it is no floating-point tensor and differs, holds NaN, or leaves the range of its dtype.
    """
    a, b = stored_a.read(name), stored_b.read(name)
    if a.dtype.is_floating_point and b.dtype.is_floating_point:
        b = b.to(a.dtype)
    else:
        if not torch.equal(a, b):
            raise DataError(
                f"{stored_a.file} and {stored_b.file}: {name} is {stored_a.dtype} and differs; only floating-point "
                "tensors have a mean. Give unquantised policies of one architecture."
            )
        return a.clone()
    merged = merged_tensor(a, b, q)
    if merged.isnan().any():
        raise DataError(f"{stored_a.file} or {stored_b.file}: {name} holds NaN. One of the policies is broken.")
    if not 0.0 <= q <= 1.0 and (merged.isinf() & a.isfinite() & b.isfinite()).any():
        raise DataError(f"{stored_a.file}: {name} leaves the range of {stored_a.dtype} at strength {q:g}. Lower it.")
    return merged.clone() if merged is a or merged is b else merged  # the inputs' pages belong to their file


def _same_config(policy_a: Path, policy_b: Path) -> Any:
    """Return the configuration of both, which must describe one architecture."""
    config_a, config_b = (_flat(read_json(p / "config.json"), CONFIG_MAY_DIFFER) for p in (policy_a, policy_b))
    refuse_differences(policy_a, policy_b, "config.json", config_a, config_b)
    refuse_quantised(policy_a)
    return architecture(policy_a)


def refuse_quantised(policy: Path) -> None:
    """Raise ``DataError`` for a policy whose configuration says that its weights are quantised."""
    if "quantization_config" in read_json(policy / "config.json"):
        raise DataError(
            f"{policy}: quantised weights can be neither added nor scaled. Give policies in bf16, fp16 or fp32."
        )


def architecture(policy: Path) -> Any:
    """Return the configuration of a policy as transformers reads it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(policy, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{policy / 'config.json'}: not a known architecture ({error}).") from None


def _tokenizer(policy: Path) -> dict[str, str]:
    """Return the settings that decide the tokens of a text, by their place."""
    parts: dict[str, str] = {}
    for name in TOKENIZER_FILES:
        path = policy / name
        if path.suffix == ".json" and path.is_file():
            parts |= {f"{name}: {k}": v for k, v in _flat(read_json(path), TOKENIZER_MAY_DIFFER).items()}
        elif path.is_file():
            parts[name] = f"sha256 {file_digest(path)}"
    settings = policy / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(settings)
        parts |= {f"tokenizer_config.json: {key}": json.dumps(content.get(key)) for key in TOKENIZER_SETTINGS}
    return parts


def tied_copies(config: Any) -> dict[str, str]:
    """Return {name: name of the parameter it is tied to} of the architecture, built without memory."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise DataError(f"{config.name_or_path}: not a causal language model ({error}).") from None
    names = {parameter: name for name, parameter in module.named_parameters()}  # a tied weight appears once
    every = module.named_parameters(remove_duplicate=False)
    return {name: names[parameter] for name, parameter in every if names[parameter] != name}


def drop_tied_copies(policy: Path, tensors: dict[str, StoredTensor], tied: Mapping[str, str]) -> None:
    """Leave out the second copy of a tied weight; raise ``DataError`` where it is the only one, or another."""
    for copy, name in tied.items():
        if copy not in tensors:
            continue
        if name not in tensors:
            raise DataError(
                f"{policy}: stores {copy} but not {name}, which it is tied to. Save it with save_pretrained."
            )
        if not torch.equal(tensors[copy].read(copy), tensors[name].read(name)):
            raise DataError(f"{policy}: {copy} and {name} are tied by config.json and stored with different values.")
        del tensors[copy]


def refuse_differences(
    policy_a: Path,
    policy_b: Path,
    part: str,
    a: Mapping[str, str],
    b: Mapping[str, str],
    *,
    so: str = "the policies have no weighted mean",
    do: str = "Merge two policies that were trained from one reference, stored in one precision.",
) -> None:
    """Raise ``DataError`` with both sides of the first few differences."""
    differ = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    if not differ:
        return
    lines = [f"  {name}: {_short(a.get(name))} | {_short(b.get(name))}" for name in differ[:SHOWN]]
    lines += [f"  and {len(differ) - SHOWN} more"] * (len(differ) > SHOWN)
    raise DataError(f"{policy_a} | {policy_b}: {part} differ, so {so}:\n" + "\n".join(lines) + f"\n  {do}")


def _short(text: str | None) -> str:
    return "absent" if text is None else text if len(text) <= 60 else f"{text[:40]}… ({len(text)} characters)"


def _flat(content: Mapping[str, Any], without: set[str]) -> dict[str, str]:
    """Return dotted keys with their values as JSON, less some of the first level."""
    kept = dotted({key: value for key, value in content.items() if key not in without})
    return {key: json.dumps(value, sort_keys=True, ensure_ascii=False) for key, value in kept.items()}
