"""The kernels of liger-kernel: refused where they cannot be had, named and applied as liger wants it, exact.

Triton's interpreter computes the real kernels on a CPU where liger-kernel and triton are installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_tiny_lm
from transformers import GPT2Config

from can_dist.config import Config, Model, validate_config
from can_dist.doctor.preflight import preflight
from can_dist.errors import ConfigError, EnvironmentProblem
from can_dist.modeling import liger
from can_dist.stages import train as stage
from can_dist.tables.artifacts import open_stage

CALLABLE = {"kind": "callable", "function": "scorers:num_words"}
INTERPRETED = Path(__file__).parents[2] / "helpers" / "runs" / "liger_interpreted.py"


def configuration(root: Path, **changes: Any) -> Config:
    (root / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n' * 3, encoding="utf-8")
    base: dict[str, Any] = {
        "prompts": {"source": str(root / "prompts.jsonl"), "num_validation": 0},
        "strength": 1,
        "precision": "fp32",
        "reference": {"model": str(make_tiny_lm(root / "lm", ["w1", "w2"]))},
        "reward": CALLABLE,
        "constraints": {"safety": {"scorer": CALLABLE, "margin": 0.1}},
        "train": {"kernels": "liger"},
    }
    return validate_config(base | changes)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: object())


def test_missing_package_names_its_extra_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.kernels: .*'liger-kernel'.* pip install 'can-dist\[liger\]'"):
        preflight(configuration(tmp_path))


def test_ranks_without_a_gpu_are_refused_before_any_work(tmp_path: Path, installed: None) -> None:
    with pytest.raises(EnvironmentProblem, match=r"train\.kernels: liger computes on GPUs.*gpus_per_worker: 1") as told:
        preflight(configuration(tmp_path))
    assert told.value.exit_code == 6


def test_a_model_without_tested_kernels_is_refused(tmp_path: Path, installed: None) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is of type gpt2; liger is offered for llama, mistral, qwen2, qwen3"):
        liger.check_kernels(Model(model=str(tmp_path)), on_gpu=True)


@pytest.mark.parametrize("kind", liger.MODELS)
def test_liger_is_asked_for_norm_rotary_and_swiglu_and_not_for_the_head(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    package, module, calls = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers"), []

    def apply(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        """The signature of liger-kernel 0.8.5."""
        calls.append((rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy, model))

    setattr(module, f"apply_liger_kernel_to_{kind}", apply)
    package.transformers = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"0.8.5 of {name}")
    model = SimpleNamespace(config=SimpleNamespace(model_type=kind))
    assert liger.use_kernels(model) == "norm, rotary embedding and SwiGLU by liger-kernel 0.8.5 of liger-kernel"
    assert calls == [(True, True, True, False, False, model)]


def test_a_training_by_kernels_is_another_training(tmp_path: Path) -> None:
    with_kernels = configuration(tmp_path)
    without = with_kernels.model_copy(update={"train": with_kernels.train.model_copy(update={"kernels": None})})
    preferences = open_stage(tmp_path / "run", "label", "preferences", {}, {}).commit()
    identities = []
    for config in (without, with_kernels):
        work = SimpleNamespace(open=lambda name, kind, keys, inputs: identities.append(keys))
        stage._open(work, config, {"reference": config.reference}, {"preferences": preferences}, 0.1, None, "policy")
    assert identities[1] == identities[0] | {"train": identities[0]["train"] | {"kernels": "liger"}}
    assert "kernels" not in identities[0]["train"], "trainings made before it keep their names"


@pytest.mark.slow
@pytest.mark.parametrize("kind", liger.MODELS)
def test_the_real_kernels_are_exact(kind: str) -> None:
    """Loss and gradients are those of float64; on a GPU in bf16 too, as near to them as transformers' own."""
    for package in ("liger_kernel", "triton"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(
        [sys.executable, str(INTERPRETED), kind],
        cwd=Path(__file__).parents[3],
        env={**environment, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
