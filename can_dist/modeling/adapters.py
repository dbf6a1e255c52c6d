"""Which modules of a model get LoRA adapters, known before any weight is read."""

from __future__ import annotations

from can_dist.config import Model
from can_dist.config.sections import Lora
from can_dist.errors import ConfigError
from can_dist.modeling.loading import empty_causal_lm


def check_adapters(reference: Model, lora: Lora) -> None:
    """Raise ``ConfigError`` where adapters could not be merged into the policy that is written.

    With tied embeddings one stored tensor is the embedding and the head. peft adapts one of the two uses; merged into
    the tensor, the change is in both, and the policy is not what was trained.

    Args:
        reference: The model that is trained.
        lora: Its adapters; 'all-linear' leaves the head out by itself.

    Raises:
        ConfigError: A name of ``target_modules`` is no module of the model, one that takes no adapter, or one that is
            tied.
    """
    if isinstance(lora.target_modules, str):
        return
    import torch
    from transformers.pytorch_utils import Conv1D

    takes_adapters = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d, Conv1D)
    with torch.device("meta"):
        model = empty_causal_lm(reference, "fp32")
    ends = {id(model.get_input_embeddings()): "embedding", id(model.get_output_embeddings()): "head"}
    is_tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    names = {name: module for name, module in model.named_modules() if name}
    for target in lora.target_modules:
        chosen = [module for name, module in names.items() if name == target or name.endswith(f".{target}")]
        if not chosen:
            linear = sorted({n.rpartition(".")[2] for n, m in names.items() if isinstance(m, torch.nn.Linear)})
            raise ConfigError(
                f"train.lora.target_modules: {target!r} is no module of {reference.model!r}.",
                f"Its linear layers are {', '.join(linear)}.",
            )
        unfit = next((type(module).__name__ for module in chosen if not isinstance(module, takes_adapters)), None)
        if unfit is not None:
            raise ConfigError(
                f"train.lora.target_modules: {target!r} is a {unfit} in {reference.model!r}, which takes no adapter.",
                "Name linear layers or embeddings, or leave target_modules out.",
            )
        tied = next((ends[id(module)] for module in chosen if id(module) in ends), None)
        if is_tied and tied is not None:
            raise ConfigError(
                f"train.lora.target_modules: {target!r} is the {tied} of {reference.model!r}, whose embedding and "
                "head are one tensor (tie_word_embeddings): an adapter of one cannot be merged into the other, and "
                "the policy would not be the one that was trained.",
                f"Leave {target!r} out.",
            )
