"""Is the attention of packs right on this device? Packs against every sequence alone, values and gradients.

    python benchmarks/packed_attention.py --device cuda --output attention.json

The oracle is plain transformers on float32 weights, one sequence at a time (the bf16 weights, widened). Float32 packs
must agree with it; bf16 packs may be no further from it than ``FACTOR`` times what bf16 sequences alone are. Every bf16
pass runs twice: how far the second is from the first says whether bytes can be promised.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedConfig

from can_dist.modeling.attention import attention_for
from can_dist.modeling.logprobs import ResponseModel, response_logp
from can_dist.modeling.packs import Group

FACTOR = 1.5
# of float32 packs: values and gradients, relative; and what is added to the bound of bf16
EXACT = (1e-5, 1e-4)
FLOOR = (1e-4, 1e-3)
SIZES = {  # vocabulary, heads of 64 numbers, inner width, layers, prompts of the pairs, tokens of a length
    "cuda": (32000, 16, 2816, 4, 24, 1.0),
    "cpu": (200, 2, 64, 1, 2, 0.25),  # where bf16 is slow
}


def architectures(device: str) -> dict[str, PreTrainedConfig]:
    """Return models of a kind each: heads of their own keys, shared keys, wide heads, a window."""
    vocabulary, heads, inner, layers, _, scale = SIZES[device]
    common = {
        "vocab_size": vocabulary,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "initializer_range": 0.1,  # large weights: attention matters, so that a leak shows
    }
    narrow = {**common, "hidden_size": 64 * heads, "num_attention_heads": heads}
    wide = {**common, "hidden_size": 64 * heads, "num_attention_heads": heads // 2, "head_dim": 128}
    shared = max(1, heads // 4)
    return {
        "own keys, heads of 64": LlamaConfig(**narrow, num_key_value_heads=heads),
        "shared keys, heads of 64": LlamaConfig(**narrow, num_key_value_heads=shared),
        "shared keys, heads of 128": LlamaConfig(**wide, num_key_value_heads=max(1, shared // 2)),
        "window": MistralConfig(**narrow, num_key_value_heads=shared, sliding_window=int(64 * scale)),
    }


def texts(device: str) -> dict[str, list[Group]]:
    """Return sets of prompts with responses of lognormal lengths."""
    random, (vocabulary, _, _, _, prompts, scale) = np.random.default_rng(0), SIZES[device]

    def draw(median: int) -> list[int]:
        length = max(1, int(scale * median * np.exp(0.5 * random.normal())))
        return [int(token) for token in random.integers(2, vocabulary, size=length)]

    return {
        "pairs": [(draw(130), [draw(60), draw(60)]) for _ in range(prompts)],
        "16 of a prompt": [(draw(300), [draw(50) for _ in range(16)]) for _ in range(max(1, prompts // 8))],
        "one token": [([5, 6, 7], [[9], [10, 11]])],
    }


def alone(model: torch.nn.Module, groups: Sequence[Group], device: str) -> torch.Tensor:
    """Return ln π of every response by a forward pass of its own, float32."""
    values = []
    for prompt, responses in groups:
        for response in responses:
            logits_TV = model(torch.tensor([[*prompt, *response]], device=device)).logits[0].float()
            targets_N1 = torch.tensor(response, device=device)[:, None]
            values.append(logits_TV.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, targets_N1).sum())
    return torch.stack(values)


def gradient(model: torch.nn.Module, logp_R: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a weighted sum of responses, of all weights, float64."""
    model.zero_grad(set_to_none=True)
    (logp_R * torch.linspace(-1, 1.5, len(logp_R), device=logp_R.device)).sum().backward()
    return torch.cat([weight.grad.flatten().double() for weight in model.parameters() if weight.grad is not None])


def distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance of two vectors."""
    return float((values.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def compare(config: PreTrainedConfig, groups: Sequence[Group], device: str) -> dict[str, Any]:
    """Compare packs of one architecture and one set of texts with every sequence alone.

    Returns:
        Relative errors as [of the values, of the gradient], and whether all of them keep their bounds.
    """
    torch.manual_seed(0)
    plain16 = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16).to(device).eval()
    plain32 = copy.deepcopy(plain16).float()
    packed16, packed32 = (ResponseModel(copy.deepcopy(plain)).eval() for plain in (plain16, plain32))
    values = alone(plain32, groups, device)
    exact = (values, gradient(plain32, values))

    def errors(model: torch.nn.Module, logp_R: torch.Tensor) -> tuple[list[float], torch.Tensor]:
        grad = gradient(model, logp_R)
        return [distance(logp_R, exact[0]), distance(grad, exact[1])], grad

    result: dict[str, Any] = {"fp32": errors(packed32.lm, response_logp(packed32, groups, "shared", device))[0]}
    result["bf16 alone"], _ = errors(plain16, alone(plain16, groups, device))
    ok = all(error <= bound for error, bound in zip(result["fp32"], EXACT, strict=True))
    for layout in ("shared", "plain"):
        result[f"bf16 {layout}"], grad = errors(packed16.lm, response_logp(packed16, groups, layout, device))
        again = gradient(packed16.lm, response_logp(packed16, groups, layout, device))
        result[f"repeat {layout}"] = distance(again, grad)
        bounds = [FACTOR * error + floor for error, floor in zip(result["bf16 alone"], FLOOR, strict=True)]
        ok &= all(error <= bound for error, bound in zip(result[f"bf16 {layout}"], bounds, strict=True))
    return result | {"ok": bool(ok)}


def main() -> None:
    """Compare all, print, write; the exit code is 1 when one does not keep its bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"attention": str(attention_for(arguments.device, torch.bfloat16, (64, 64))), "cases": {}}
    for name, config in architectures(arguments.device).items():
        for kind, groups in texts(arguments.device).items():
            case = compare(config, groups, arguments.device)
            result["cases"][f"{name}, {kind}"] = case
            arguments.output.write_text(json.dumps(result))
            print(f"{name}, {kind}: {case}", flush=True)
    sys.exit(not all(case["ok"] for case in result["cases"].values()))


if __name__ == "__main__":
    main()
