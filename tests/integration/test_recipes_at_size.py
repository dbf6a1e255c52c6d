"""The recipes for 7B and 8B: planned from the shapes of their models, and run whole in their smoke form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import serving_hub

ROOT = Path(__file__).resolve().parents[2]
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32001,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LLAMA_31_8B = LLAMA_7B | {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
QWEN_25_HALF = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SHAPES = {
    "Qwen/Qwen2.5-0.5B-Instruct": QWEN_25_HALF,
    "PKU-Alignment/alpaca-7b-reproduced": LLAMA_7B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_31_8B,
}
SMOKE_METHODS = {
    "pku_7b/lora": ("mocan", "pecan"),
    "pku_7b/full": ("mocan,pecan", "sacpo,p_sacpo", "cdpo"),
    "instruct_0.5b/mocan": ("",),
    "instruct_8b/mocan": ("",),
    "instruct_8b/helpful_harmless_honest": ("",),
}
SMOKES = [(recipe, methods) for recipe, parts in SMOKE_METHODS.items() for methods in parts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "memory", "elements"),
    [
        ("pku_7b/lora", "48GB", 6_738_423_808 + 6_291_456),  # 32,001 words, and three adapters of rank 8 a layer
        ("pku_7b/full", "80GB", 6_738_423_808),
        ("instruct_0.5b/mocan", "24GB", 494_032_768),  # 0.49 billion on its card, the shared embedding counted once
        ("instruct_8b/mocan", "80GB", 8_030_261_248 + 41_943_040),  # as Meta counts it, and adapters of rank 16
        ("instruct_8b/helpful_harmless_honest", "80GB", 8_030_261_248 + 41_943_040),
    ],
)
def test_recipe_is_planned_from_its_models_shape_and_fits(
    recipe: str, memory: str, elements: int, tmp_path: Path
) -> None:
    for name, shape in SHAPES.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(shape))
    command = [sys.executable, "-c", "from can_dist.cli import main; main()"]
    command += ["plan", str(pinned(ROOT / "recipes" / f"{recipe}.yaml", tmp_path)), "--memory", memory, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["elements"] == elements
    assert plan["on_gpu"]
    assert plan["precision"] == "bf16"
    assert plan["largest_tokens_per_pack"] >= plan["tokens"], f"{recipe} does not fit into {memory}"


def pinned(recipe: Path, directory: Path) -> Path:
    """A copy of a recipe after pin.py, the first command of its head: `plan` refuses data without a commit."""
    copy = Path(shutil.copy(recipe, directory))
    with serving_hub() as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        subprocess.run([sys.executable, str(ROOT / "recipes" / "pin.py"), str(copy)], env=env, timeout=120, check=True)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "methods"), SMOKES)
def test_recipe_runs_in_its_smoke_form(
    recipe: str, methods: str, tmp_path_factory: pytest.TempPathFactory, smoke_runs: dict[str, Path]
) -> None:
    """The methods of a recipe share a run directory, so that its stand-ins, responses and scores are made once."""
    run = smoke_runs.setdefault(recipe, tmp_path_factory.mktemp("smoke"))
    command = [sys.executable, str(ROOT / "recipes" / "smoke.py"), str(ROOT / "recipes" / f"{recipe}.yaml")]
    command += ["--run", str(run), *(["--methods", methods] if methods else [])]
    before = set(run.glob("evaluate-*/report.html"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=590, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    policies = {"sacpo,p_sacpo": 4, "mocan,pecan": 2}.get(methods, 1)
    assert len(set(run.glob("evaluate-*/report.html")) - before) == policies


@pytest.fixture(scope="module")
def smoke_runs() -> dict[str, Path]:
    return {}
