"""Norm, rotary embedding and SwiGLU of a loaded model by liger-kernel's Triton kernels (arXiv 2410.10989).

The head and the loss stay ours: they see the labelled tokens only.
"""

from __future__ import annotations

import importlib.metadata
from importlib.util import find_spec
from typing import Any

from can_dist.config import Model
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling.loading import load_model_config

MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Types of models whose numbers a test compares with those of transformers."""
PARTS = {"rms_norm": True, "rope": True, "swiglu": True, "cross_entropy": False, "fused_linear_cross_entropy": False}


def check_kernels(model: Model, *, on_gpu: bool) -> None:
    """Raise the error that ``use_kernels`` would meet, from the model's configuration alone.

    Args:
        model: What would be trained.
        on_gpu: Whether a rank of the training has a GPU.

    Raises:
        ConfigError: liger-kernel is not installed, or has no tested kernels for this type of model.
        EnvironmentProblem: There is no GPU.
    """
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "train.kernels: liger needs the package 'liger-kernel', which is not installed.",
            "pip install 'can-dist[liger]' on every machine of the run, or leave train.kernels out.",
        )
    if not on_gpu:
        raise EnvironmentProblem(
            "train.kernels: liger computes on GPUs, and a rank of the training has none.",
            "Set cluster.gpus_per_worker: 1, or leave train.kernels out.",
        )
    kind = load_model_config(model, "causal language model").model_type
    if kind not in MODELS:
        raise ConfigError(
            f"train.kernels: model {model.model!r} is of type {kind}; liger is offered for {', '.join(MODELS)}.",
            "Leave train.kernels out.",
        )


def use_kernels(model: Any) -> str:
    """Let a loaded model of a type of ``MODELS`` compute by the kernels; return the sentence that says so.

    liger replaces the rotary embedding, and the classes of the norm and of the MLP, for this type of model in the whole
    process.
    """
    from liger_kernel import transformers as liger

    getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")(model=model, **PARTS)
    version = importlib.metadata.version("liger-kernel")
    return f"norm, rotary embedding and SwiGLU by liger-kernel {version}"
