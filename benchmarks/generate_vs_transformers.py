"""Generation beside transformers' ``generate(num_return_sequences=K, do_sample=True)``: same models, same prompts.

    python benchmarks/generate_vs_transformers.py                 # one core; benchmarks/results/
    python benchmarks/generate_vs_transformers.py --cases long    # some of the cases; the file keeps the others

Models are random, 0.1 to 30 million parameters, in float32. A bias on the end token makes lengths geometric. The two
sides draw other tokens of the same distribution, so they are compared by the tokens that they keep per CPU second:
those of responses, with their end tokens. Both decode the responses of as many prompts at once, in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from machine import machine
from meter import alternate
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from can_dist.config.sections import Generate
from can_dist.modeling.sampling import row_seed, sample

RESULTS = Path(__file__).parent / "results" / "generate_vs_transformers.json"
PAD, END = 0, 1
ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A model, prompts of three quarters of a length to that length, and how long responses are (None: the longest)."""

    vocabulary: int
    width: int
    layers: int
    num_prompts: int
    prompt_length: int
    num_responses: int
    mean_length: int | None
    max_new_tokens: int
    batch_prompts: int
    wanted: float = 1.0


CASES = {
    "demo": Case(256, 64, 2, 80, 12, 16, 12, 20, 8),
    "short": Case(4096, 256, 6, 12, 24, 8, 40, 128, 4),
    "no spread": Case(4096, 256, 6, 8, 24, 8, None, 32, 4),
    "large vocabulary": Case(49152, 256, 6, 6, 24, 8, 24, 64, 2),
    "long": Case(4096, 256, 6, 4, 512, 16, 80, 256, 2, wanted=2.0),
}


def model_of(case: Case) -> LlamaForCausalLM:
    """Return a random model that ends a response after each token with the same probability."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=max(2, case.width // 64),
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = LlamaForCausalLM(config)
    head = torch.nn.Linear(case.width, case.vocabulary)
    torch.nn.init.zeros_(head.bias)
    torch.nn.init.normal_(head.weight, std=0.02)
    torch.nn.init.zeros_(head.weight[END])
    # odds of the end token against all others, whose logits are near zero
    odds = None if case.mean_length is None else (case.vocabulary - 1) / (case.mean_length - 1)
    head.bias.data[END] = -math.inf if odds is None else math.log(odds)
    model.lm_head = head
    return model.eval()


def prompts_of(case: Case) -> list[list[int]]:
    """Return random tokens in the lengths of a case."""
    random = np.random.default_rng(1)
    lengths = random.integers(3 * case.prompt_length // 4, case.prompt_length, size=case.num_prompts, endpoint=True)
    return [random.integers(2, case.vocabulary, size=length).tolist() for length in lengths]


def ours(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], case: Case) -> int:
    """Sample with the product; return the number of tokens kept."""
    options = Generate(
        num_responses=case.num_responses,
        max_new_tokens=case.max_new_tokens,
        batch_prompts=case.batch_prompts,
        shard_prompts=case.batch_prompts * len(prompts),
    )
    pairs = [(p, k) for p in range(len(prompts)) for k in range(case.num_responses)]
    seeds = [row_seed(0, str(p), k) for p, k in pairs]
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
    samples = sample(model, tokenizer, [prompts[p] for p, _ in pairs], seeds, options, [END])
    return sum(len(tokens) for tokens, _ in samples)


def theirs(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], case: Case) -> int:
    """Sample with ``generate``, batch by batch; return the number of tokens kept."""
    torch.manual_seed(0)
    generation = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        num_return_sequences=case.num_responses,
        max_new_tokens=case.max_new_tokens,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    kept = 0
    for start in range(0, len(prompts), case.batch_prompts):
        batch = prompts[start : start + case.batch_prompts]
        length = max(len(ids) for ids in batch)
        ids_BT = torch.tensor([[PAD] * (length - len(ids)) + list(ids) for ids in batch])
        with torch.inference_mode():
            output_RT = model.generate(ids_BT, attention_mask=(ids_BT != PAD).long(), generation_config=generation)
        kept += sum(([*row, END]).index(END) + (END in row) for row in output_RT[:, length:].tolist())
    return kept


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Return medians of both sides, in turn, and the ratio of tokens kept per CPU second."""
    model, prompts = model_of(case), prompts_of(case)
    sides: dict[str, Callable[..., int]] = {"ours": ours, "transformers": theirs}
    kept: dict[str, int] = {}

    def run(name: str) -> None:
        kept[name] = sides[name](model, prompts, case)

    seconds = alternate({name: lambda name=name: run(name) for name in sides}, rounds)
    rates = {name: kept[name] / cpu for name, (_, cpu) in seconds.items()}
    return {
        "case": asdict(case),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "prompt_tokens": sum(len(ids) for ids in prompts),
        "kept_tokens": kept,
        "wall_seconds": {name: wall for name, (wall, _) in seconds.items()},
        "cpu_seconds": {name: cpu for name, (_, cpu) in seconds.items()},
        "tokens_per_cpu_second": rates,
        "ratio": rates["ours"] / rates["transformers"],
    }


def main() -> None:
    """Measure, print a line for each case, and write the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(given.output.read_text(encoding="utf-8")) if given.output.is_file() else {"cases": {}}
    for name in given.cases:
        record = measured(CASES[name], given.rounds)
        results["cases"][name] = {**record, "machine": machine("torch", "transformers")}
        told = ", ".join(f"{side} {rate:.0f}" for side, rate in record["tokens_per_cpu_second"].items())
        print(
            f"{name}: {told} tokens per CPU second, {record['ratio']:.2f}x (wanted {CASES[name].wanted}x)", flush=True
        )
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
