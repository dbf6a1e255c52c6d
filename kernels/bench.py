"""Time and peak memory of the log-probabilities and their gradient: the Triton kernel beside torch and TRL.

    python kernels/bench.py --json kernels/bench.json

Prints a line per shape and, with --json FILE, writes the numbers; all alternate in one run, medians of ``ROUNDS``.
TRL's function takes part where TRL is installed; on CUDA it is a Triton kernel too. ``--device cpu`` runs small shapes,
of torch and TRL only, and says nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from can_kernels import target_log_probs

ROUNDS = 20
# rows of a chunk of the product's head (256 MiB in float32), by vocabulary
SHAPES = {"cuda": [(2097, 32_000), (523, 128_256), (441, 151_936)], "cpu": [(16, 1000)]}
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> None:
    """Measure every shape in both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.py needs a CUDA device; correctness alone is tested without one: pytest kernels/tests")
    functions, rows = contenders(arguments.device), []
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    for shape in SHAPES[arguments.device]:
        for dtype in (torch.bfloat16, torch.float32):
            rows.append(compare(shape, dtype, functions, arguments.device))
            print(rows[-1])
            if arguments.json is not None:
                result = {"device": name, "torch": torch.__version__, "rows": rows}
                arguments.json.write_text(json.dumps(result, indent=2))


def contenders(device: str) -> dict[str, Function]:
    """Return what is compared on a device, by name."""
    functions: dict[str, Function] = {"torch": target_log_probs}
    if device == "cuda":
        from can_kernels.fused import fused_target_log_probs

        functions["triton"] = fused_target_log_probs
    if importlib.util.find_spec("trl") is not None:
        from trl.trainer.utils import selective_log_softmax

        functions["trl"] = lambda logits_NV, targets_N: selective_log_softmax(logits_NV[None], targets_N[None])[0]
    return functions


def compare(shape: tuple[int, int], dtype: torch.dtype, functions: dict[str, Function], device: str) -> dict[str, Any]:
    """Return medians in ms and peaks in MB above the logits, and torch's time over each of the others."""
    logits = torch.randn(shape, device=device, dtype=dtype)
    targets = torch.randint(shape[1], shape[:1], device=device)
    for function in functions.values():
        measure(function, logits, targets)  # compiles
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            taken[name].append(measure(function, logits, targets))
    result: dict[str, Any] = {"rows": shape[0], "vocabulary": shape[1], "dtype": str(dtype)}
    for name, pairs in taken.items():
        result[f"{name}_ms"] = statistics.median(milliseconds for milliseconds, _ in pairs)
        result[f"{name}_mb"] = max(megabytes for _, megabytes in pairs)
    others = [name for name in functions if name != "torch"]
    return result | {f"torch_over_{name}": result["torch_ms"] / result[f"{name}_ms"] for name in others}


def measure(function: Function, logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """Return (milliseconds, megabytes) of one forward and backward pass on a copy that may be used up."""
    copy = logits.clone().requires_grad_()
    ones = torch.ones(len(targets), device=logits.device)
    on_gpu = logits.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    start = time.perf_counter()
    torch.autograd.grad(function(copy, targets), copy, ones.to(torch.float32))
    if on_gpu:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return milliseconds, (torch.cuda.max_memory_allocated() - before) / 1e6 if on_gpu else 0.0


if __name__ == "__main__":
    main()
