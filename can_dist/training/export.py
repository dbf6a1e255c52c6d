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
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from can_dist.errors import DataError, EnvironmentProblem
from can_dist.modeling.quantized import num_bytes, whole_weight
from can_dist.modeling.stored import INDEX, stored_tensors
from can_dist.tables.artifacts import give_new_rights, write_json
from can_dist.training import ADAPTER, CHECKPOINTS, checkpoints, ranks

WRAPPED = re.compile(r"(\.base_layer)+\.")  # by peft, before the name of each adapted parameter of a layer


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
                    give_new_rights(out)
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
        """Let ``write`` write a file, unless an earlier file failed."""
        if self.writes and not self.failures:
            try:
                with checkpoints.writing(path, self.checkpoints):
                    write()
            except EnvironmentProblem as problem:
                self.failures.append(problem)


def _write_settings(module: Any, tokenizer: Any, out: Path) -> None:
    """Write the configuration and the tokenizer beside the weights."""
    module.config.use_cache = True
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config  # the policy is written in full precision
    module.config.save_pretrained(out)
    if getattr(module, "generation_config", None) is not None:
        # save_pretrained refuses settings of published models (a temperature without do_sample)
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
    # the adapters are trained, and are merged into the layers that they wrap
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
    weights, adapter = _weights(module), getattr(module, "active_adapter", "")
    persistent = module.state_dict().keys()
    buffers = {_plain(name): buffer.cpu().clone() for name, buffer in module.named_buffers() if name in persistent}

    def read(name: str) -> torch.Tensor | None:
        return buffers[name] if name in buffers else weights[name].gathered(adapter, files.writes)

    sizes = _sizes(weights) | {name: buffer.nbytes for name, buffer in buffers.items()}
    write_shards(out, sizes, max_shard_bytes, read, files.save)


def copy_in_shards(policy: Path, out: Path, max_shard_bytes: int) -> None:
    """Write the weights of the directory ``policy`` into ``out`` in files of another size, one file in memory."""
    tensors = stored_tensors(policy)
    sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
    write_shards(out, sizes, max_shard_bytes, lambda name: tensors[name].read(name))


def write_shards(
    out: Path,
    sizes: dict[str, int],
    max_bytes: int,
    read: Callable[[str], torch.Tensor | None],
    save: Callable[[Path, Callable[[], object]], object] = lambda _, write: write(),
) -> None:
    """Write tensors as transformers does, in files of at most ``max_bytes`` or one tensor, and an index of several.

    Args:
        out: the directory.
        sizes: bytes of each tensor by name.
        max_bytes: of a file.
        read: returns a tensor by name, or None on a rank that only takes part in gathering it.
        save: calls its second argument, which writes the file that is its first.
    """
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: tensor for name in names if (tensor := read(name)) is not None}
        save(out / file, functools.partial(save_file, tensors, out / file, metadata={"format": "pt"}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        save(out / INDEX, functools.partial(write_json, out / INDEX, index))


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
        give_new_rights(out)

    files.save(out, write)


def check_shapes(directory: Path, config: Any) -> None:
    """Compare every written tensor's name and shape with the architecture, built without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(p.shape) for name, p in module.named_parameters()}
    written = {name: tensor.shape for name, tensor in stored_tensors(directory).items()}
    wrong = [f"{n}: {written.get(n, 'missing')}, expected {s}" for n, s in expected.items() if written.get(n) != s]
    wrong += [f"{name}: not part of the model" for name in sorted(written.keys() - module.state_dict().keys())]
    if wrong:
        raise DataError(f"{directory}: the exported policy is not whole: {'; '.join(wrong[:5])}.")
