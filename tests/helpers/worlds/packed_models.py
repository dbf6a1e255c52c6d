"""Small causal models of several architectures, groups for packs, and the oracle: every sequence alone."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from can_dist.modeling.packs import Group

VOCAB = 50
# large weights: attention matters, so that a leak shows
SMALL = {"vocab_size": VOCAB, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None, "initializer_range": 0.3}
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2)
CONFIGS = {
    "llama": LLAMA,
    "qwen2": Qwen2Config(**SMALL, **HEADS, num_key_value_heads=1, tie_word_embeddings=True),
    "window": MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=4),
    "neox": GPTNeoXConfig(**SMALL, **HEADS),
}


def make_model(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


def make_groups(seed: int = 0, sizes: tuple[int, ...] = (2, 1, 3, 2)) -> list[Group]:
    """Prompts with 1 to 3 responses, none of the same length; one response is a single token."""
    random = np.random.default_rng(seed)
    groups = [
        (
            random.integers(2, VOCAB, size=random.integers(1, 14)).tolist(),
            [random.integers(2, VOCAB, size=random.integers(1, 12)).tolist() for _ in range(n)],
        )
        for n in sizes
    ]
    groups[0][1][0] = groups[0][1][0][:1]
    return groups


def alone(lm: torch.nn.Module, groups: list[Group]) -> torch.Tensor:
    """ln π of every response: one plain Hugging Face forward pass for each sequence, no argument but its tokens."""
    values = []
    for prompt, responses in groups:
        for response in responses:
            logp_TV = lm(torch.tensor([[*prompt, *response]])).logits[0].log_softmax(dim=-1)
            values.append(logp_TV[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(values)


def gradients(lm: torch.nn.Module, logp_R: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum with a different weight for every response."""
    lm.zero_grad()
    (logp_R * torch.linspace(-1, 1.5, len(logp_R))).sum().backward()
    return {name: p.grad.clone() for name, p in lm.named_parameters()}


def relative_error(values: torch.Tensor, expected: torch.Tensor) -> float:
    return ((values - expected).norm() / expected.norm()).item()


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        if gradient.norm() > 1e-6 * largest:  # a key's bias has none but rounding
            assert relative_error(found[name], gradient) < 1e-5, name
