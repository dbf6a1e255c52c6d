"""What lies in a model's directory, read from the headers of its safetensors; no weights are loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from can_dist.errors import DataError

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"


def not_loaded(model: str, problem: str, error: BaseException) -> DataError:
    """Return the error for a model that does not open: by what the library says, or that no hub was asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return DataError(
            f"model {model!r}: is in no cache of this machine, and the hub could not be asked.",
            f"`hf download {model}` fetches it on a machine that reaches the hub (HF_HOME names the cache); or name "
            "the directory of a copy.",
        )
    return DataError(f"model {model!r}: {problem}: {' '.join(str(error).split())}")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, as its file's header says."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor, by its shape and the width in the name of its dtype."""
        bits = 8 if self.dtype == "BOOL" else int("".join(filter(str.isdigit, self.dtype.partition("_")[0])))
        return math.prod(self.shape) * bits // 8

    def read(self, name: str) -> torch.Tensor:
        """Read it; the file is closed again, so that its mapped pages are given back with the tensor."""
        with safe_open(self.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a model's directory by name.

    Raises:
        DataError: The directory is no model, an adapter, holds no safetensors or a damaged one, names a tensor twice,
            or its index lists files or tensors that are not there.
    """
    refuse_adapter(directory)
    if not (directory / "config.json").is_file():
        raise DataError(f"{directory}: no config.json, so this is not a Hugging Face model directory.")
    index = read_json(directory / INDEX).get("weight_map", {}) if (directory / INDEX).is_file() else {}
    if missing := sorted({file for file in index.values() if not (directory / file).is_file()}):
        raise DataError(
            f"{directory}: {INDEX} lists {len(missing)} file(s) that are not there, the first is {missing[0]}.",
            "Copy the directory again.",
        )
    # transformers opens the single file where there is one, and only the files of the index where there is one
    single = directory / "model.safetensors"
    listed = [single] if single.is_file() else sorted({directory / file for file in index.values()})
    files = listed or sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        content = f"only pickled weights ({pickled[0]}), which are not loaded" if pickled else "no weights"
        raise DataError(
            f"{directory}: {content}.",
            "Expected *.safetensors; save it with save_pretrained of transformers.",
        )
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        for name, tensor in _header(path):
            if name in tensors:
                raise DataError(
                    f"{directory}: {name} is in {tensors[name].file.name} and in {path.name}.",
                    "Remove one.",
                )
            tensors[name] = tensor
    if not single.is_file() and (absent := sorted(set(index) - set(tensors))):
        raise DataError(
            f"{directory}: {len(absent)} tensors of the index are missing, the first is {absent[0]} in "
            f"{index[absent[0]]}.",
            "Copy the directory again.",
        )
    return tensors


def refuse_adapter(directory: Path) -> None:
    """Raise ``DataError`` when a directory holds a LoRA adapter: transformers would open its base, or nothing."""
    if not (directory / ADAPTER).is_file():
        return
    has_config = (directory / "config.json").is_file()
    otherwise = f"\n  Or remove {ADAPTER}, if the directory holds a whole model." if has_config else ""
    raise adapter_error(str(directory), read_json(directory / ADAPTER), otherwise)


def adapter_error(name: str, content: dict[str, Any], otherwise: str = "") -> DataError:
    """Return the error that a model is an adapter: of which base, and the two lines that merge it, or ``otherwise``."""
    base = content.get("base_model_name_or_path") or "not named"
    is_classifier = content.get("task_type") == "SEQ_CLS"
    kind = "AutoPeftModelForSequenceClassification" if is_classifier else "AutoPeftModelForCausalLM"
    options = ", num_labels=1" if is_classifier else ""
    saved = content.get("modules_to_save")
    head = f" with {', '.join(saved)} of its own" if saved else ""
    return DataError(
        f"model {name!r}: an adapter ({content.get('peft_type', 'peft')}{head}; base model {base}), not a model.",
        "It is an adapter: merge it into its base model first, and give the result:\n"
        f"    peft.{kind}.from_pretrained({name!r}{options}).merge_and_unload().save_pretrained('merged')\n"
        f"    transformers.AutoTokenizer.from_pretrained({name!r}).save_pretrained('merged'){otherwise}",
    )


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                yield name, StoredTensor(path, tuple(part.get_shape()), str(part.get_dtype()))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}).", "Copy it again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        DataError: The file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).", "Copy it again.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected an object.", "Copy it again.")
    return content
