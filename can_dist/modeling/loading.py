"""The one place that opens models and tokenizers: safetensors only, no remote code unless asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from can_dist.config import Beaver, Model, MultiHead, SequenceClassifier
from can_dist.errors import ConfigError, DataError
from can_dist.modeling import quantized
from can_dist.tables.artifacts import digest_of, file_digest

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# what decides a model's output: weights, architecture, tokenizer, template, and code shipped with it
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")


def model_digest(spec: Model) -> str:
    """Return a digest of a model's files (local), or of its pinned hub commit.

    Raises
    ------
    DataError
        When a path that looks local does not exist, or has no configuration or safetensors.
    """
    path = Path(spec.model).expanduser()
    if not path.is_dir():
        if looks_local(spec.model):
            raise DataError(
                f"model {spec.model!r}: no such directory. Give a model directory or a hub id 'owner/name'."
            )
        return digest_of({"hub": spec.model, "commit": _hub_commit(spec)})
    if not (path / "config.json").is_file():
        raise DataError(f"model {spec.model!r}: no config.json in the directory. Expected a Hugging Face model.")
    if not list(path.glob("*.safetensors")):
        raise DataError(f"model {spec.model!r}: no *.safetensors in the directory. Pickled weights are not loaded.")
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern)})
    return digest_of({file.name: _cached_digest(str(file), file.stat().st_mtime_ns) for file in files})


def looks_local(name: str) -> bool:
    """Tell a path from a hub id: ids are 'name' or 'owner/name' without dots at the start."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()


@functools.lru_cache(maxsize=256)
def _cached_digest(path: str, _modified_ns: int) -> str:
    return file_digest(Path(path))


def _hub_commit(spec: Model) -> str:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        config = cached_file(spec.model, "config.json", revision=spec.revision)
    except OSError as error:
        raise DataError(f"model {spec.model!r}: not a local directory, and the hub answered: {error}") from None
    return str(extract_commit_hash(config, None) or spec.revision)


def model_directory(spec: Model) -> Path:
    """Return the directory that a model's files lie in: its own, or that of the hub's cache.

    Raises
    ------
    DataError
        When it is neither a directory nor on the hub.
    """
    local = Path(spec.model).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    _hub_commit(spec)  # tells when there is no such model
    return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=["*.safetensors*", "*.json"]))


def resolve_precision(precision: str) -> str:
    """Return 'bf16' or 'fp32': auto is bf16 on a GPU and fp32 on CPU, where bf16 is 30-170 times slower."""
    import torch

    if precision != "auto":
        return precision
    return "bf16" if torch.cuda.is_available() else "fp32"


def torch_dtype(precision: str) -> torch.dtype:
    """Return the torch dtype of a precision name."""
    import torch

    return torch.bfloat16 if resolve_precision(precision) == "bf16" else torch.float32


def device() -> str:
    """Return the device that models live on in this process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; its padding token defaults to its end of sequence."""
    from transformers import AutoTokenizer

    with _named(spec.model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    for where_from in ("is_local", "local_files_only"):  # would make a saved policy's bytes depend on the machine
        tokenizer.init_kwargs.pop(where_from, None)
    if tokenizer.eos_token_id is None:
        raise DataError(f"model {spec.model!r}: its tokenizer has no end-of-sequence token, so no response can end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_vocabulary(spec: Model) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return a model's tokenizer and configuration, checked to be made for each other; loads no weights.

    Raises
    ------
    DataError
        When the tokenizer knows more tokens than the model has embeddings, or a special token is beyond them: on a
        CPU such a token is an index error in the middle of a stage, on a GPU the end of the process.
    """
    tokenizer, config = load_tokenizer(spec), load_model_config(spec, "model")
    rows = int(config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        raise DataError(
            f"model {spec.model!r}: its tokenizer has {len(tokenizer)} tokens, the model has embeddings for {rows}. "
            "Give the tokenizer that the model was trained with."
        )
    ids = {
        f"token {token!r}": index
        for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        for index in value if isinstance(value, list) else [value]:
            ids[f"{name} of config.json"] = index
    outside = [f"{name} is {index}" for name, index in ids.items() if index is not None and not 0 <= index < rows]
    if outside:
        raise DataError(
            f"model {spec.model!r}: special tokens without an embedding (there are {rows}): {', '.join(outside)}. "
            "Correct config.json, or give the tokenizer that the model was trained with."
        )
    return tokenizer, config


def load_causal_lm(spec: Model, precision: str, quantize: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inference or training; every weight must come from the checkpoint.

    ``quantize`` 'nf4' rounds the weights of its linear layers to 4 bits.
    """
    from transformers import AutoModelForCausalLM

    role = "causal language model"
    if quantize is None:
        model = _from_checkpoint(AutoModelForCausalLM, spec, precision, role)
    else:
        model = _from_checkpoint(
            AutoModelForCausalLM, spec, precision, role, quantized.loading_options(torch_dtype(precision))
        )
        quantized.make_trainable(model, spec.model)
    model.config.use_cache = False
    return model


def empty_causal_lm(spec: Model, precision: str) -> PreTrainedModel:
    """Make a causal language model from its configuration alone, for counting: its weights are not read."""
    from transformers import AutoModelForCausalLM

    config = load_model_config(spec, "causal language model")
    with _named(spec.model, "causal language model"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(precision), trust_remote_code=spec.trust_remote_code
        )
    model.config.use_cache = False
    return model


def load_sequence_classifier(spec: SequenceClassifier, precision: str) -> PreTrainedModel:
    """Load a sequence classifier or Beaver model; refuse one whose head was not in the checkpoint.

    transformers initialises a missing head at random with only a warning, so a causal language model given as a
    reward model would yield noise.
    """
    from transformers import AutoModelForSequenceClassification

    check_sequence_classifier(spec)
    kind: Any = AutoModelForSequenceClassification
    if isinstance(spec, Beaver):
        from can_dist.modeling.beaver import LlamaForScore

        kind = LlamaForScore
    return _from_checkpoint(kind, spec, precision, "sequence classifier").eval()


def _from_checkpoint(
    kind: Any, spec: Model, precision: str, role: str, options: Mapping[str, Any] = MappingProxyType({})
) -> Any:
    with _named(spec.model, role):
        model, info = kind.from_pretrained(
            spec.model,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            use_safetensors=True,
            dtype=torch_dtype(precision),
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:
        raise DataError(
            f"model {spec.model!r}: weights missing from the checkpoint: {_some(info['missing_keys'])}; they would be "
            f"random. Give a complete, trained {role}."
        )
    # weights that nothing reads: of another layout than the configuration's
    if isinstance(spec, Beaver) and info["unexpected_keys"]:
        raise DataError(
            f"model {spec.model!r}: the checkpoint holds weights of another layout: {_some(info['unexpected_keys'])}. "
            "Give a Beaver score model as it was published."
        )
    return model


def check_sequence_classifier(spec: SequenceClassifier) -> None:
    """Raise ``DataError`` unless a model's configuration has the head and outputs its spec says; loads no weights."""
    config = load_model_config(spec, "sequence classifier")
    if isinstance(spec, Beaver):
        from can_dist.modeling.beaver import check_beaver

        check_beaver(spec, config)
        return
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise DataError(
            f"scorer model {spec.model!r}: its checkpoint is a {', '.join(architectures) or 'model without head'}, "
            "not a sequence classifier; its score head would be random. Give a trained reward or cost model."
        )
    if isinstance(spec, MultiHead):
        output_weights(spec, config)
    elif config.num_labels != 1:
        raise DataError(
            f"scorer model {spec.model!r}: has {config.num_labels} outputs, expected 1 score per response. "
            "Choose one with 'kind: multi_head'."
        )


def load_model_config(spec: Model, role: str) -> Any:
    """Return a model's configuration; ``role`` says in messages what it is loaded as."""
    from transformers import AutoConfig

    with _named(spec.model, role):
        return AutoConfig.from_pretrained(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)


def generation_config(spec: Model) -> GenerationConfig:
    """Return what a model without its weights says of generation: generation_config.json, else its configuration."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(spec.model, revision=spec.revision)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(spec, "causal language model"))


def check_trainable(spec: Model) -> None:
    """Raise ``ConfigError`` when a model's weights are quantized; reads its configuration only."""
    quantization = getattr(load_model_config(spec, "causal language model"), "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"reference: model {spec.model!r} is stored quantized ({method}). Give the model as it was before: "
            "train.lora.quantize: nf4 loads its base in 4 bits under adapters (QLoRA), and writes a policy in full "
            "precision."
        )


def output_weights(spec: MultiHead, config: Any) -> list[float]:
    """Return the weight of each output of a classifier in its score, (L,), in the order of the outputs.

    Raises
    ------
    DataError
        When a chosen output does not exist, listing those that do.
    """
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    if isinstance(spec.output, int):
        chosen: dict[str, float] = {names[spec.output]: 1.0} if 0 <= spec.output < len(names) else {}
    else:
        chosen = spec.weights or {str(spec.output): 1.0}
    if not chosen or not set(chosen) <= set(names) or len(set(names)) < len(names):
        asked = ", ".join(sorted(set(chosen) - set(names))) or spec.output
        raise DataError(
            f"scorer model {spec.model!r}: no single output {asked}. Its outputs are "
            f"{', '.join(f'{number}: {name}' for number, name in enumerate(names))}."
        )
    return [chosen.get(name, 0.0) for name in names]


def callable_identity(function: str) -> dict[str, str]:
    """Return what identifies a Python scorer: its name and the digest of its module's file."""
    import_callable(function)
    source = getattr(sys.modules[function.partition(":")[0]], "__file__", None)
    return {"function": function, "source": file_digest(Path(source)) if source else "builtin"}


def import_callable(function: str) -> Any:
    """Import ``module:function``."""
    import importlib

    module_name, _, name = function.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"scorer {function!r}: cannot import {module_name!r} ({error}). Start the command where it can be imported."
        ) from None
    if not callable(getattr(module, name, None)):
        raise ConfigError(f"scorer {function!r}: module {module_name!r} has no function {name!r}.")
    return getattr(module, name)


def context_length(model_or_config: Any) -> int:
    """Return the longest sequence a model takes beside others, in tokens.

    Of 'longrope' (Phi-3, Phi-4) that is the original context: one longer sequence changes the rotary frequencies of all
    that share its pass, and a text would have other numbers in other company.
    """
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 10**9)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        if one.get("rope_type") == "longrope":
            longest = min(longest, int(one["original_max_position_embeddings"]))
    modules = model_or_config.named_modules() if hasattr(model_or_config, "named_modules") else ()
    # RoBERTa and its kin count positions from behind the padding token's
    padding = [getattr(module, "padding_idx", None) for name, module in modules if name.endswith("position_embeddings")]
    return longest - max((index + 1 for index in padding if index is not None), default=0)


@contextlib.contextmanager
def _named(model: str, role: str) -> Iterator[None]:
    """Name the model in whatever transformers has to say about it, and keep its advice off the screen."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"model {model!r}: cannot be loaded as a {role}: {error}") from None
    finally:
        logger.setLevel(level)


def _some(names: Any, limit: int = 4) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
