"""Training on people's labels with real models, Ray and DeepSpeed: by the command line, and in two steps by Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ruamel.yaml import YAML
from tiny import make_tiny_lm

from can_dist.algorithms.dpo import dpo
from can_dist.config import load_config
from can_dist.run import Run
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.training.metrics import METRICS, read_metrics

CAN_DIST = str(Path(sys.executable).parent / "can-dist")
WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: people find 'w1' helpful and 'w2' safe."""
    folder = tmp_path_factory.mktemp("people")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [
        {"prompt": f"{a} {b}", "response_0": f"w1 {a}", "response_1": f"w2 {b}", "better_response_id": 0,
         "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
        for a in WORDS[:6] for b in WORDS[6:]
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = {"kind": "callable", "function": "scorers:num_words"}
    config = {
        "method": "dpo_h",
        "beta": 0.5,
        "prompts": {"source": "pairs.jsonl", "num_test": 4, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": scorer,
        "constraints": {"safety": {"scorer": scorer, "margin": 0.1}},
        "generate": {"max_new_tokens": 8},
        "label": {"preferences": {"source": "pairs.jsonl"}, "validation_fraction": 0.2},
        "train": {"learning_rate": 3e-3, "batch_size": 8, "num_epochs": 2, "log_every": 1},
    }
    with (folder / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    return folder


def metrics(policy: Artifact) -> list[dict[str, float]]:
    return [line for line in read_metrics(policy.path / METRICS) if "loss" in line]


@pytest.mark.slow
def test_dpo_by_the_command_line(folder: Path) -> None:
    """The whole method; a stage that it has not is refused."""

    def run(verb: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [CAN_DIST, verb, "my.yaml", "--run", "runs/dpo", *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)

    refused = run("solve")
    assert refused.returncode == 2
    assert "method dpo_h has no stage 'solve'. Its stages: score, label, train, evaluate." in refused.stderr
    trained = run("run", "--set", "label.human.smoothing=0.1")
    assert trained.returncode == 0, trained.stderr
    policy = load_artifact(folder / trained.stdout.strip()).input("policy")
    made = {path.parent.name.split("-")[0] for path in (folder / "runs" / "dpo").glob("*-*/MANIFEST.json")}
    assert made == {"prompts", "pairs", "score", "scores", "label", "train", "generate", "evaluate"}
    lines = metrics(policy)
    assert lines[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert lines[-1]["loss"] < 0.6
    assert lines[-1]["fit_accuracy"] == 1.0
    verified = subprocess.run([CAN_DIST, "verify", "runs/dpo"], cwd=folder, capture_output=True, text=True)
    assert verified.returncode == 0, verified.stderr


@pytest.mark.slow
def test_second_training_is_relative_to_the_first_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SACPO: helpfulness first, then safety from, and relative to, that policy; here by KTO."""
    monkeypatch.chdir(folder)
    ray.shutdown()  # of another module: its workers' directory is another, and the model's path is relative
    config = load_config("my.yaml", ["label.human.loss=kto"])
    with Run("runs/two", config) as run:
        prompts = run.prompts()
        first = dpo(run, prompts=prompts, reference=config.reference, criterion="helpful", beta=0.5)
        pairs = run.human_pairs(config.reference, prompts)
        logps = run.log_probs(pairs, first)
        preferences = run.label_human(pairs, logps, "safe")
        second = run.train(first, preferences, 0.25)
    assert second.manifest["inputs"]["reference"]["artifact"] == first.path.name
    before, after = (
        logps.table.column("logp.reference").to_pylist()
        for logps in (run.ancestor(policy, "scores") for policy in (first, second))
    )
    assert before != after
    for policy in (first, second):
        lines = metrics(policy)
        assert lines[0]["loss"] == pytest.approx(0.5, abs=1e-3)  # of log-ratios that are zero, λ_D = λ_U = 1
        assert lines[0]["fit_kl"] == pytest.approx(0, abs=1e-6)
        assert lines[-1]["loss"] < 0.48
        assert (policy.path / POLICY / "model.safetensors").is_file()
