"""What a device can do at most: a product of square matrices, and a copy.

python benchmarks/ceilings.py --device cuda --output ceilings.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import machine

ROUNDS = 10
# edge of the matrices, bytes of the copy, dtype: a CPU takes them small, and bf16 is slow there
SIZES = {"cuda": (8192, 8 * 10**9, torch.bfloat16), "cpu": (512, 10**7, torch.float32)}


def seconds(function: Callable[[], object], device: str) -> float:
    """Return the median seconds of a function that works on a device, the first call left out."""
    taken = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SIZES), default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    edge, size, dtype = SIZES[arguments.device]
    a, b = (torch.randn(edge, edge, device=arguments.device, dtype=dtype) for _ in range(2))
    source = torch.empty(size // 2, dtype=torch.uint8, device=arguments.device)  # read and written: twice its bytes
    target = torch.empty_like(source)
    result = {
        "product_tflops": 2 * edge**3 / seconds(lambda: a @ b, arguments.device) / 1e12,
        "copy_gb_per_second": 2 * len(source) / seconds(lambda: target.copy_(source), arguments.device) / 1e9,
        "edge": edge,
        "dtype": str(dtype),
        "machine": machine("torch", "transformers"),
    }
    arguments.output.write_text(json.dumps(result))
    print(result)


if __name__ == "__main__":
    main()
