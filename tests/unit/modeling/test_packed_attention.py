"""The instrument that is run on a GPU: it passes on a CPU, and sees a mask that is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import packed_attention
import pytest
import torch

from can_dist.modeling import segments

ROOT = Path(__file__).parents[3]
NAMES = list(packed_attention.architectures("cpu"))


@pytest.mark.parametrize("texts", ["pairs", "16 of a prompt", "one token"])
@pytest.mark.parametrize("name", NAMES)
def test_packs_on_a_cpu_keep_the_bounds(name: str, texts: str) -> None:
    config, groups = packed_attention.architectures("cpu")[name], packed_attention.texts("cpu")[texts]
    result = packed_attention.compare(config, groups, "cpu")
    assert result["ok"], result
    assert result["repeat shared"] == result["repeat plain"] == 0.0, "a CPU repeats every bit"


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_aligned_to_the_top_left_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel would do that knows no prefixes: every response would miss most of its prompt."""

    def top_left(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
        return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(0)

    monkeypatch.setattr(segments, "_lower_right", top_left)
    config, groups = packed_attention.architectures("cpu")[name], packed_attention.texts("cpu")["pairs"]
    result = packed_attention.compare(config, groups, "cpu")
    assert not result["ok"]
    assert result["bf16 shared"][0] > 10 * result["bf16 alone"][0], result


@pytest.mark.slow
def test_the_gpu_tests_are_collected() -> None:
    """Of files with the same name in two folders, and of the kernels, which are a package of their own."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "tests", "kernels"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    collected = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert collected == {
        "kernels/tests/test_log_probs.py",
        "tests/gpu/test_attention_on_a_gpu.py",
        "tests/gpu/test_memory_on_a_gpu.py",
    }
