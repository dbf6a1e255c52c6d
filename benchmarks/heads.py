"""The head of a training pass, hidden states to log-probabilities and back: ours beside TRL's, time and memory.

    python benchmarks/heads.py --device cuda --output heads.json

Both are given the hidden states of response tokens and the weight of the head, and return ln π of the targets; both
make a part of the logits at a time, and make it anew in the backward pass. TRL's folds each part by a Triton kernel
where there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from can_dist.modeling.logprobs import HEAD_BYTES_ON, HeadLogProbs

ROUNDS = 7
TRL_COLUMNS = 32768  # of its own trainer
# rows, width, vocabulary: response tokens of a pack of 16,384 HH-like tokens, under the heads of 7B and 1B shapes
SHAPES = {"cuda": [(8192, 4096, 32_000), (8192, 2048, 128_256)], "cpu": [(64, 32, 1000)]}

Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """The product's head."""
    rows = max(1, HEAD_BYTES_ON[hidden_NH.device.type] // (4 * len(weight_VH)))
    logp_N: torch.Tensor = HeadLogProbs.apply(hidden_NH, weight_VH, None, targets_N, rows)
    return logp_N


def trl(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """TRL's head, without the numbers that it logs."""
    from trl.kernels import ChunkedLogProbFunction

    logp_N: torch.Tensor = ChunkedLogProbFunction.apply(
        hidden_NH, weight_VH, None, targets_N, 1.0, TRL_COLUMNS, None, 1.0, ()
    )[0]
    return logp_N


def measure(head: Head, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, targets_N: torch.Tensor) -> dict[str, Any]:
    """Return milliseconds and megabytes of a forward and backward pass, and the log-probabilities."""
    on_gpu = hidden_NH.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    logp_N = head(hidden_NH, weight_VH, targets_N)
    gradients = torch.autograd.grad(logp_N, (hidden_NH, weight_VH), torch.ones_like(logp_N))
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start)
    megabytes = (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else None
    return {"ms": milliseconds, "mb": megabytes, "logp": logp_N.detach(), "norm": float(gradients[1].float().norm())}


def compare(shape: tuple[int, int, int], device: str) -> dict[str, Any]:
    """Return medians of both in turn, and how far their values are apart."""
    rows, width, vocabulary = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden_NH = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    weight_VH = (torch.randn(vocabulary, width, device=device, dtype=dtype) / width**0.5).requires_grad_()
    targets_N = torch.randint(vocabulary, (rows,), device=device)
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for _ in range(ROUNDS + 1):
        for name, head in (("ours", ours), ("trl", trl)):
            runs[name].append(measure(head, hidden_NH, weight_VH, targets_N))
    apart = float((runs["ours"][0]["logp"] - runs["trl"][0]["logp"]).abs().max())
    result: dict[str, Any] = {"rows": rows, "width": width, "vocabulary": vocabulary, "apart_nats": apart}
    for name, records in runs.items():
        result[f"{name}_ms"] = statistics.median(record["ms"] for record in records[1:])
        result[f"{name}_mb"] = records[-1]["mb"]
    return result | {"gradient_norms": [runs[name][0]["norm"] for name in ("ours", "trl")]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES[arguments.device]:
        rows.append(compare(shape, arguments.device))
        arguments.output.write_text(json.dumps({"rows": rows}))
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
