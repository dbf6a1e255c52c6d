"""The strength of adapters, of weights in bf16 and of PeCAN by `can-dist run`: chosen, written, checked, followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from people_run import can_dist, user_folder
from safetensors import safe_open
from small_run import WORDS, small_run, write_config
from transformers import AutoModelForCausalLM

from can_dist.stages.estimate import load_estimate
from can_dist.stages.solve import demands
from can_dist.stages.strength import STRENGTH
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.training import ADAPTER, POLICY
from can_dist.workspace import REPORT

pytestmark = pytest.mark.slow
NUM_VALIDATION = 48
LORA = {"r": 4, "alpha": 16, "dropout": 0.0}


def configuration(folder: Path, **train: Any) -> dict[str, Any]:
    config = small_run(
        folder,
        prompts={"source": str(folder / "prompts.jsonl"), "num_test": 12, "num_validation": NUM_VALIDATION},
        strength={},
        generate={"num_responses": 8, "max_new_tokens": 6, "batch_prompts": 8, "shard_prompts": 16},
        label={"labels": "listwise"},
        evaluate={"num_responses": 8},
    )
    config["constraints"]["calm"]["margin"] = 0.1
    config["train"] |= {"learning_rate": 2e-3, "batch_size": 16, "max_steps": 12, "num_epochs": 4, **train}
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS][:112]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return config


def run(folder: Path, config: str) -> tuple[Artifact, str]:
    """Run by the command, return the evaluation and what was said."""
    done = can_dist(folder, "run", config, "--run", "run")
    assert done.returncode == 0, done.stderr
    verified = can_dist(folder, "verify", "run")
    assert verified.returncode == 0, verified.stderr
    return load_artifact(folder / done.stdout.split()[-1]), done.stderr


def check_strength(folder: Path, evaluation: Artifact, said: str, *, holds: bool = True) -> tuple[Artifact, Artifact]:
    """The strength is the margin over the estimate at 1; all that reads the policy knows of it.

    What it gives is the margin where the law of small steps ``holds``; where it does not, a warning says so.

    Returns the policy as trained and as it was given its strength.
    """
    policy = evaluation.input("policy")
    assert policy.stage == "strength"
    trained, chosen = policy.input("policy"), policy.read_json(STRENGTH)
    (demand,) = demands(policy.input("solution"))
    before, after = load_estimate(policy.input("estimate")), load_estimate(evaluation.input("estimate"))
    gain = after.improvement[demand.name]
    print(f"strength {chosen['alpha']:.3f}; before {before.improvement[demand.name]}; of {demand.margin}: {gain}")
    assert chosen["limiting"] == demand.name
    assert chosen["alpha"] == pytest.approx(demand.margin / before.improvement[demand.name].mean)
    assert chosen["alpha"] != pytest.approx(1.0, abs=0.02)
    assert after.num_prompts == NUM_VALIDATION
    assert (gain.low <= demand.margin <= gain.high) == holds, "the check at the chosen strength"
    warning = f"strength: warning: at strength {chosen['alpha']:.3g} {demand.name} is"
    assert (warning in said) != holds
    report = evaluation.read_json(REPORT)
    assert report["estimate"]["strength"]["alpha"] == policy.info["alpha"] == chosen["alpha"]
    assert report["constraints"][0]["lam"] > 0, "the dual's solution is still known behind the strength"
    exported = can_dist(folder, "export", "policy", "run", "--out", "exported")
    assert exported.returncode == 0, exported.stderr
    assert f"{chosen['alpha']:.4g} times what was trained" in (folder / "exported" / "README.md").read_text()
    return trained, policy


def tensors(model: Path) -> dict[str, torch.Tensor]:
    """The weights of a model directory."""
    with safe_open(model / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_adapters(tmp_path: Path) -> None:
    """Adapters on random layers between frozen embeddings saturate far from the margin: the check says so."""
    write_config(tmp_path / "my.yaml", configuration(tmp_path, lora=LORA, learning_rate=1.5e-2))
    trained, policy = check_strength(tmp_path, *run(tmp_path, "my.yaml"), holds=False)
    scaled = json.loads((policy.path / ADAPTER / "adapter_config.json").read_text())["lora_alpha"]
    assert scaled == pytest.approx(16 * policy.info["alpha"])
    reference, merged, stretched = (
        tensors(path) for path in (tmp_path / "lm", trained.path / POLICY, policy.path / POLICY)
    )
    for name, start in reference.items():
        along = start + policy.info["alpha"] * (merged[name] - start)
        torch.testing.assert_close(stretched[name], along, atol=1e-6, rtol=1e-5)


def test_weights_in_bf16(tmp_path: Path) -> None:
    config = configuration(tmp_path) | {"precision": "bf16"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "lm")
    write_config(tmp_path / "my.yaml", config)
    trained, policy = check_strength(tmp_path, *run(tmp_path, "my.yaml"))
    for path in (trained.path / POLICY, policy.path / POLICY):
        assert {weight.dtype for weight in tensors(path).values()} == {torch.bfloat16}


def test_pecan(tmp_path: Path) -> None:
    folder = user_folder(tmp_path)
    splits = ["prompts.num_train=76", f"prompts.num_validation={NUM_VALIDATION}"]
    settings = [*splits, "strength={}", "beta=0.5", "label.labels=listwise"]  # near enough for the law of small steps
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = can_dist(folder, "config", "my.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    (folder / "with.yaml").write_text(done.stdout)
    trained, policy = check_strength(folder, *run(folder, "with.yaml"))
    validation = policy.input("estimate").input("validation")
    assert validation.info["scorers"]["safety"]["scale"] != 1.0, "calibrated as the training scores are"
    held_out = set(validation.table.column("prompt_id").to_pylist())
    assert held_out.isdisjoint(trained.input("preferences").table.column("prompt_id").to_pylist())
