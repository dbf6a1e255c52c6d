"""The trained weights → a Hugging Face directory of safetensors, without one rank holding a ZeRO-3 model whole."""

from __future__ import annotations

import copy
import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from can_dist.errors import DataError, EnvironmentProblem
from can_dist.modeling.quantized import num_bytes, whole_weight
from can_dist.tables.artifacts import write_json
from can_dist.training import ADAPTER, CHECKPOINTS, checkpoints, ranks

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
WRAPPED = re.compile(r"(\.base_layer)+\.")
"""What peft puts before the parameters of a layer that it gave adapters, once for each of its adapted parameters."""


def export_policy(engine: Any, tokenizer: Any, out: Path, max_shard_mb: int) -> None:
    """Write ``out`` on rank 0; all ranks take part in gathering. Adapters are merged into the base weights.

    A training of adapters also leaves them beside ``out`` as ``adapter``, the directory that peft reads.

    Raises:
        DataError: when the written tensors are not exactly those of the architecture.
        EnvironmentProblem: on all ranks, when it does not fit on the disk or cannot be written; what was written is
            removed.
    """
    module, writes = engine.module.lm, dist.get_rank() == 0
    saved = out.parent / CHECKPOINTS
    with ranks.agreed():
        if writes:
            shutil.rmtree(out, ignore_errors=True)  # of an attempt that ended here
            out.mkdir(parents=True)
            checkpoints.require_space("the policy takes", sum(_sizes(_weights(module)).values()), out, saved)
    files = _Files(writes, saved)
    _stream_weights(module, out, max_shard_mb * 10**6, files)
    if hasattr(module, "peft_config"):
        _write_adapter(module, out.parent / ADAPTER, files)
    try:
        with ranks.agreed():
            if files.failures:
                raise files.failures[0]
            if writes:
                with checkpoints.writing(out, saved):
                    _write_settings(module, tokenizer, out)
                check_shapes(out, module.config)
    except EnvironmentProblem:
        if writes:
            shutil.rmtree(out)
            shutil.rmtree(out.parent / ADAPTER, ignore_errors=True)
        raise


@dataclass
class _Files:
    """The files of the writing rank. Failures are noted: a rank that raised would leave the others gathering."""

    writes: bool
    checkpoints: Path
    failures: list[EnvironmentProblem] = field(default_factory=list)

    def save(self, path: Path, write: Callable[[], object]) -> None:
        """Have ``write`` write a file, unless one before it could not be written."""
        if self.writes and not self.failures:
            try:
                with checkpoints.writing(path, self.checkpoints):
                    write()
            except EnvironmentProblem as problem:
                self.failures.append(problem)


def _write_settings(module: Any, tokenizer: Any, out: Path) -> None:
    """Write what a policy's directory holds beside its weights."""
    module.config.use_cache = True
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config  # the policy is written in full precision
    module.config.save_pretrained(out)
    if getattr(module, "generation_config", None) is not None:
        # save_pretrained refuses what published models hold (a temperature without do_sample)
        module.generation_config.to_json_file(out / "generation_config.json")
    tokenizer.save_pretrained(out)


@dataclass(frozen=True)
class _Weight:
    """A parameter of the plain architecture, and the adapted layer whose low-rank product is added to it, if any."""

    parameter: torch.nn.Parameter
    layer: Any = None

    def gathered(self, adapter: str, writes: bool) -> torch.Tensor | None:
        """Return the whole, merged tensor on the writing rank. All ranks must call this in the same order."""
        import deepspeed

        parts = [self.parameter]
        if self.layer is not None:
            parts += [part for name, part in self.layer.named_parameters() if "lora_" in name]
        with deepspeed.zero.GatheredParameters(parts), torch.no_grad():
            if not writes:
                return None
            whole = whole_weight(self.parameter)
            if self.layer is not None:
                whole = whole + self.layer.get_delta_weight(adapter).to(whole)
            return whole.to("cpu", copy=True).contiguous()


def _weights(module: Any) -> dict[str, _Weight]:
    """Return the parameters of the plain architecture by their names there (a tied weight appears once)."""
    if not hasattr(module, "peft_config"):
        return {name: _Weight(parameter) for name, parameter in module.named_parameters()}
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = {id(_wrapped(layer)): layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)}
    # what is trained are the adapters, which are merged into what they wrap
    kept = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {_plain(name): _Weight(parameter, adapted.get(id(parameter))) for name, parameter in kept}


def _wrapped(layer: Any) -> torch.nn.Parameter:
    """Return the parameter that an adapted layer adds to: a weight, or the fused experts that peft knows by name."""
    parameter: torch.nn.Parameter = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return parameter


def _plain(name: str) -> str:
    """Return the name that a tensor has without peft's wrapping."""
    return WRAPPED.sub(".", name.removeprefix("base_model.model."))


def _sizes(weights: dict[str, _Weight]) -> dict[str, int]:
    """Return the bytes of every weight, whole."""
    return {name: num_bytes(weight.parameter) for name, weight in weights.items()}


def _stream_weights(module: Any, out: Path, max_shard_bytes: int, files: _Files) -> None:
    """Gather one parameter at a time; the writing rank saves a file whenever a shard is full."""
    weights = _weights(module)
    adapter = getattr(module, "active_adapter", "")
    sizes = _sizes(weights)
    buffers = _persistent_buffers(module)
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        whole = {name: weights[name].gathered(adapter, files.writes) for name in names}
        tensors = {name: tensor for name, tensor in whole.items() if tensor is not None}
        if number == len(shards):
            tensors |= buffers
        files.save(out / file, functools.partial(save_file, tensors, out / file, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total_size = sum(sizes.values()) + sum(buffer.nbytes for buffer in buffers.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        files.save(out / INDEX, functools.partial(write_json, out / INDEX, index))


def shard_name(number: int, count: int) -> str:
    """Return the file name of a shard, counted from 1, as transformers writes it."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def copy_in_shards(policy: Path, out: Path, max_shard_bytes: int) -> None:
    """Write the weights of the directory ``policy`` into ``out`` in files of another size, one file in memory."""
    where: dict[str, Path] = {}
    for file in sorted(policy.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            where |= {name: file for name in tensors.keys()}  # noqa: SIM118
    sizes = {name: _read(file, name).nbytes for name, file in where.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = out / shard_name(number, len(shards))
        save_file({name: _read(where[name], name) for name in names}, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def plan_shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names of each file, in order, none larger than ``max_bytes`` unless one tensor alone is."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _persistent_buffers(module: Any) -> dict[str, torch.Tensor]:
    kept = set(module.state_dict().keys())
    return {_plain(name): buffer.detach().cpu().clone() for name, buffer in module.named_buffers() if name in kept}


def _write_adapter(module: Any, out: Path, files: _Files) -> None:
    """Write the adapters as peft reads them: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    import deepspeed
    from peft import get_peft_model_state_dict

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    # ungathered, a tensor of ZeRO-3 would be saved empty
    with deepspeed.zero.GatheredParameters(list(trainable.values())):
        if not files.writes:
            return
        adapters = {name: p.detach().to("cpu", copy=True).contiguous() for name, p in trainable.items()}
    config = copy.copy(module.peft_config[module.active_adapter])
    config.inference_mode = True

    def write() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        tensors = get_peft_model_state_dict(module, state_dict=adapters)
        save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
        config.save_pretrained(out)

    files.save(out, write)


def check_shapes(directory: Path, config: Any) -> None:
    """Compare every written tensor's name and shape with the architecture, built without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    wrong = [f"{n}: {found.get(n, 'missing')}, expected {s}" for n, s in expected.items() if found.get(n) != s]
    wrong += [f"{name}: not part of the model" for name in sorted(found.keys() - module.state_dict().keys())]
    if wrong:
        raise DataError(f"{directory}: the exported policy is not whole: {'; '.join(wrong[:5])}.")
