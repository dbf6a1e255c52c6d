"""The one place that opens models and tokenizers: safetensors only, no remote code unless asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from can_dist.config import Beaver, Model, SequenceClassifier
from can_dist.errors import CanDistError, ConfigError, DataError
from can_dist.modeling import quantized, stored
from can_dist.modeling.remote_code import code_digests, refuse_floating_code, source_options
from can_dist.tables.artifacts import digest_of, file_digest

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from can_dist.modeling.precision import torch_dtype

# what decides a model's output: weights, architecture, tokenizer, template, and code shipped with it
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")


def model_digest(spec: Model) -> str:
    """Return a digest of a model's files (local), or of its pinned hub commit.

    Raises:
        DataError: A path that looks local does not exist, is an adapter, or has no configuration or safetensors.
    """
    path = Path(spec.model).expanduser()
    if not path.is_dir():
        _refuse_absent(spec.model)
        refuse_floating_code(f"model {spec.model!r}", spec)
        commit = {"hub": spec.model, "commit": _hub_commit(spec)}
        return digest_of(commit | ({"runs_code": True} if spec.trust_remote_code else {}))
    stored.refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise DataError(f"model {spec.model!r}: no config.json in the directory.", "Expected a Hugging Face model.")
    if not list(path.glob("*.safetensors")):
        raise DataError(f"model {spec.model!r}: no *.safetensors in the directory.", "Pickled weights are not loaded.")
    files = sorted({file for pattern in MODEL_FILES for file in path.glob(pattern)})
    digests: dict[str, Any] = {file.name: _cached_digest(str(file), file.stat().st_mtime_ns) for file in files}
    if spec.trust_remote_code:
        refuse_floating_code(f"model {spec.model!r}", spec)
        digests["runs_code"] = code_digests(path)
    return digest_of(digests)


def looks_local(name: str) -> bool:
    """Tell a path from a hub id: ids are 'name' or 'owner/name' without dots at the start."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir()


def _refuse_absent(model: str) -> None:
    """Raise ``DataError`` for a path without a directory, which transformers takes for a hub id."""
    if looks_local(model) and not Path(model).expanduser().is_dir():
        raise DataError(f"model {model!r}: no such directory.", "Give a model directory or a hub id 'owner/name'.")


@functools.lru_cache(maxsize=256)
def _cached_digest(path: str, _modified_ns: int) -> str:
    return file_digest(Path(path))


def _hub_commit(spec: Model) -> str:
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        config = cached_file(spec.model, "config.json", revision=spec.revision)
    except OSError as error:
        _refuse_hub_adapter(spec)
        raise stored.not_loaded(spec.model, "not a local directory, and the hub answered", error) from None
    return str(extract_commit_hash(config, None) or spec.revision)


def model_directory(spec: Model) -> Path:
    """Return the directory that a model's files lie in: its own, or that of the hub's cache.

    Raises:
        DataError: It is neither a directory nor on the hub.
    """
    local = Path(spec.model).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    _hub_commit(spec)  # tells when there is no such model
    return Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=["*.safetensors*", "*.json"]))


def _refuse_hub_adapter(spec: Model) -> None:
    """Raise ``DataError`` when what the hub has under a model's name is an adapter."""
    from transformers.utils import cached_file

    try:
        file = cached_file(spec.model, stored.ADAPTER, revision=spec.revision)
    except OSError:
        return
    raise stored.adapter_error(spec.model, stored.read_json(Path(str(file))))


TOKENIZER_FILES = ("*token*", "*vocab*", "*.model", "merges.txt", "*.py")
"""Files that may hold a tokenizer, or tell of one."""
STATISTICS = {"mean", "std"}
"""Tensors in which makers (OpenRLHF) keep what they normalise a model's scores by."""
LEFT_OVER = re.compile(
    r"^(lm_head|embed_out|cls|lm_predictions|mask_predictions|discriminator_predictions|generator_\w+)\.|"
    r"\.(masked_bias|inv_freq|position_ids)$"
)
"""What a checkpoint may still hold of the language model that a score model was trained from, or of its buffers."""


def load_tokenizer(spec: Model) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; its padding token defaults to its end of sequence."""
    from transformers import AutoTokenizer

    path = Path(spec.model).expanduser()
    if path.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in path.glob(pattern)):
        raise DataError(
            f"model {spec.model!r}: no tokenizer in the directory (tokenizer.json, tokenizer.model).",
            "Copy the files of the tokenizer that the model was trained with into it.",
        )
    with named_errors(spec.model, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(spec.model, **source_options(spec))
    for argument in ("is_local", "local_files_only"):  # would make a saved policy's bytes depend on the machine
        tokenizer.init_kwargs.pop(argument, None)
    if tokenizer.eos_token_id is None and not (isinstance(spec, SequenceClassifier) and has_own_marks(tokenizer)):
        raise DataError(f"model {spec.model!r}: its tokenizer has no end-of-sequence token, so no response can end.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_own_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a tokenizer puts marks around a text and between two, as encoders' do: ``[CLS] a [SEP] b [SEP]``."""
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        return False
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False))


def check_vocabulary(spec: Model) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return a model's tokenizer and configuration, checked to be made for each other; loads no weights.

    Raises:
        DataError: The tokenizer knows more tokens than the model has embeddings, or a special token is beyond them: on
            a CPU such a token is an index error in the middle of a stage, on a GPU the end of the process.
    """
    tokenizer, config = load_tokenizer(spec), load_model_config(spec, "model")
    rows = int(config.get_text_config().vocab_size)
    if len(tokenizer) > rows:
        raise DataError(
            f"model {spec.model!r}: its tokenizer has {len(tokenizer)} tokens, the model has embeddings for {rows}.",
            "Give the tokenizer that the model was trained with.",
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
            f"model {spec.model!r}: special tokens without an embedding (there are {rows}): {', '.join(outside)}.",
            "Correct config.json, or give the tokenizer that the model was trained with.",
        )
    return tokenizer, config


def load_causal_lm(spec: Model, precision: str, quantize: str | None = None) -> PreTrainedModel:
    """Load a causal language model for inference or training; every weight must come from the checkpoint.

    ``quantize`` 'nf4' rounds the weights of its linear layers to 4 bits.
    """
    from transformers import AutoModelForCausalLM

    role = "causal language model"
    if quantize is None:
        model = load_whole(AutoModelForCausalLM, spec, precision, role)
    else:
        model = load_whole(
            AutoModelForCausalLM, spec, precision, role, quantized.loading_options(torch_dtype(precision))
        )
        quantized.make_trainable(model, spec.model)
    model.config.use_cache = False
    return model


def check_causal_lm(spec: Model) -> None:
    """Raise what opening a causal language model would raise, as far as its files tell without reading weights."""
    from transformers import AutoModelForCausalLM

    check_weights(AutoModelForCausalLM, spec, "causal language model")


def empty_causal_lm(spec: Model, precision: str, change: Callable[[Any], Any] = lambda same: same) -> PreTrainedModel:
    """Make a causal language model from its configuration, changed, for counting: its weights are not read."""
    from transformers import AutoModelForCausalLM

    config = change(load_model_config(spec, "causal language model"))
    with named_errors(spec.model, "causal language model"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(precision), trust_remote_code=source_options(spec)["trust_remote_code"]
        )
    model.config.use_cache = False
    return model


def load_whole(
    kind: Any,
    spec: Model,
    precision: str,
    role: str,
    options: Mapping[str, Any] = MappingProxyType({}),
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> Any:
    """Load a model of a class of transformers; every weight must come from the checkpoint, in the shape of its config.

    Args:
        kind: Class with ``from_pretrained``.
        spec: The model.
        precision: 'bf16' or 'fp32'.
        role: What it is loaded as, for messages.
        options: Further arguments of ``from_pretrained``.
        tell: Takes a line on tensors of the checkpoint that nothing reads and that have no part in a score.

    Raises:
        DataError: The model cannot be opened, or a weight is missing, has another shape, or (of a scorer) is not read.
    """
    with named_errors(spec.model, role):
        model, info = kind.from_pretrained(
            spec.model,
            **source_options(spec),
            use_safetensors=True,
            dtype=torch_dtype(precision),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused in our words
            **options,
        )
    if unread := refuse_unfit(spec, role, model.config, info):
        tell(f"nothing reads these tensors of the checkpoint, which have no part in a score: {_some(unread)}")
    return model


def check_weights(kind: Any, spec: Model, role: str) -> None:
    """Raise what ``load_whole`` would raise of a local model, from the headers of its files; no weights are read."""
    path = Path(spec.model).expanduser()
    if not path.is_dir():
        return
    stored.stored_tensors(path)
    config = load_model_config(spec, role)
    if spec.trust_remote_code or getattr(config, "quantization_config", None) is not None:
        return  # what such a model makes of its files is known when it is opened
    with named_errors(spec.model, role):
        _, info = kind.from_pretrained(
            str(path), use_safetensors=True, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    refuse_unfit(spec, role, config, info)


def refuse_unfit(spec: Model, role: str, config: Any, info: Mapping[str, Any]) -> list[str]:
    """Compare a checkpoint with the model that its configuration makes, by what transformers says of its names.

    Returns:
        The tensors of a score model that nothing reads and that have no part in its score.

    Raises:
        DataError: Weights are missing, have another shape, or are not read and may have a part in a score.
    """
    unread = sorted(name for name in info["unexpected_keys"] if not LEFT_OVER.search(name))
    if getattr(config, "normalize_reward", None) is False:
        unread = [name for name in unread if name not in STATISTICS]
    if info["mismatched_keys"]:
        name, stored_shape, made_shape = min(info["mismatched_keys"])
        raise DataError(
            f"model {spec.model!r}: the checkpoint's {name} has the shape {list(stored_shape)}, config.json makes it "
            f"{list(made_shape)}.",
            "Give the config.json that was saved with these weights.",
        )
    if info["missing_keys"]:
        instead = f" It holds {_some(unread)} instead, which nothing reads." if unread else ""
        raise DataError(
            f"model {spec.model!r}: weights missing from the checkpoint: {_some(info['missing_keys'])}; they would be "
            f"random.{instead}",
            f"Give a complete, trained {role}.",
        )
    statistics = STATISTICS & set(unread)
    if isinstance(spec, SequenceClassifier) and not isinstance(spec, Beaver) and statistics:
        raise DataError(
            f"scorer model {spec.model!r}: the checkpoint holds {' and '.join(sorted(statistics))} of its scores, "
            "which nothing reads, and config.json does not say whether its maker's loader normalises by them.",
            'Write "normalize_reward": false into config.json if its score is the raw one.',
        )
    if isinstance(spec, Beaver) and unread:
        raise DataError(
            f"model {spec.model!r}: the checkpoint holds weights of another layout: {_some(unread)}.",
            "Give a Beaver score model as it was published.",
        )
    if isinstance(spec, SequenceClassifier) and unread:
        raise DataError(
            f"scorer model {spec.model!r}: the checkpoint holds tensors that nothing reads: {_some(unread)}; the "
            "score may not be its maker's.",
            "Use a model that transformers reads whole, or remove them from the checkpoint if the score does not need "
            "them.",
        )
    return sorted(set(info["unexpected_keys"]) - set(unread)) if isinstance(spec, SequenceClassifier) else []


def load_model_config(spec: Model, role: str) -> Any:
    """Return a model's configuration; ``role`` says in messages what it is loaded as."""
    from transformers import AutoConfig

    stored.refuse_adapter(Path(spec.model))
    with named_errors(spec.model, role):
        return AutoConfig.from_pretrained(spec.model, **source_options(spec))


def generation_config(spec: Model) -> GenerationConfig:
    """Return what a model without its weights says of generation: generation_config.json, else its configuration."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(spec.model, revision=spec.revision)
    except OSError:
        return GenerationConfig.from_model_config(load_model_config(spec, "causal language model"))


def end_token_ids(generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token id that ends a response: the tokenizer's and the model's own."""
    declared: Any = getattr(generation_config, "eos_token_id", None)
    declared = [] if declared is None else [declared] if isinstance(declared, int) else list(declared)
    return sorted({tokenizer.eos_token_id, *declared})


def check_trainable(spec: Model) -> None:
    """Raise ``ConfigError`` when a model's weights are quantized; reads its configuration only."""
    quantization = getattr(load_model_config(spec, "causal language model"), "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method") if isinstance(quantization, dict) else quantization
        raise ConfigError(
            f"reference: model {spec.model!r} is stored quantized ({method}).",
            "Give the model as it was before: train.lora.quantize: nf4 loads its base in 4 bits under adapters "
            "(QLoRA), and writes a policy in full precision.",
        )


def context_length(model_or_config: Any) -> int:
    """Return the longest sequence a model takes beside others, in tokens.

    Of 'longrope' (Phi-3, Phi-4) that is the original context: one longer sequence changes the rotary frequencies of all
    that share its pass, and a text would have other numbers in other company.
    """
    config = getattr(model_or_config, "config", model_or_config).get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 10**9)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))):
        if part.get("rope_type") == "longrope":
            longest = min(longest, int(part["original_max_position_embeddings"]))
    modules = model_or_config.named_modules() if hasattr(model_or_config, "named_modules") else ()
    # RoBERTa and its kin count positions from behind the padding token's
    padding = [getattr(module, "padding_idx", None) for name, module in modules if name.endswith("position_embeddings")]
    return longest - max((index + 1 for index in padding if index is not None), default=0)


@contextlib.contextmanager
def named_errors(model: str, role: str) -> Iterator[None]:
    """Name the model in whatever transformers has to say about it, and keep its advice off the screen."""
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    shows_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        if isinstance(error, CanDistError):
            raise
        _refuse_absent(model)
        raise stored.not_loaded(model, f"cannot be loaded as a {role}", error) from None
    finally:
        logger.setLevel(level)
        if shows_bars:
            transformers_logging.enable_progress_bar()


def _some(names: Any, limit: int = 4) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
