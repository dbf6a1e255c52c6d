"""A real run (Ray, ZeRO-3) with a basis: mixed, given its strength, evaluated; another margin without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from small_run import WORDS, small_run, write_config

from can_dist.cli import cli
from can_dist.config import load_config
from can_dist.doctor.status import read_status
from can_dist.outcomes.compare import find_evaluations
from can_dist.pipeline import run_pipeline
from can_dist.stages.cost import cost_of
from can_dist.stages.estimate import MIXTURE, load_estimate
from can_dist.stages.mixture import MAIN
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.verify import verify_run
from can_dist.workspace import PAGE, REPORT

pytestmark = pytest.mark.slow
MARGIN, OTHER = 0.06, 0.05


def configuration(folder: Path) -> dict[str, Any]:
    config = small_run(
        folder,
        prompts={"source": str(folder / "prompts.jsonl"), "num_test": 12, "num_validation": 48},
        strength={},
        basis=True,
        generate={"num_responses": 8, "max_new_tokens": 6, "batch_prompts": 8, "shard_prompts": 32},
        label={"labels": "listwise"},
        evaluate={"num_responses": 8},
    )
    config["beta"] = 2.0  # near the reference, where mixing weights mixes log-ratios
    config["constraints"]["calm"]["margin"] = MARGIN
    config["train"] |= {"learning_rate": 2e-3, "batch_size": 16, "max_steps": 12, "num_epochs": 4}
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS][:112]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return config


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("basis")
    config = load_config(write_config(folder / "small.yaml", configuration(folder)))
    return folder, run_pipeline(folder / "run", config)


def test_policy_is_the_strength_of_a_mixture_of_two_trainings(evaluated: tuple[Path, Artifact]) -> None:
    folder, evaluation = evaluated
    policy = evaluation.input("policy")
    mixed = policy.input("policy") if policy.stage == "strength" else policy
    assert mixed.stage == "mixture"
    record = mixed.read_json(MIXTURE)
    assert list(record["coefficient"]) == [MAIN, "calm"]
    assert record["correlation"] > 0.99
    assert mixed.input("policy").digest != mixed.input("policy-calm").digest
    after = load_estimate(evaluation.input("estimate"))
    assert after.improvement["calm"].mean == pytest.approx(MARGIN, rel=0.25)
    assert cost_of(evaluation).num_trainings == 2
    assert verify_run(folder / "run")[1] == []
    report = evaluation.read_json(REPORT)
    assert report["estimate"]["mixture"]["coefficient"] == record["coefficient"]
    assert report["constraints"][0]["lam"] > 0
    page = (evaluation.path / PAGE).read_text(encoding="utf-8")
    assert "mixture of policies of r + ⟨λ, g⟩" in page
    assert find_evaluations([folder / "run"])[0].digest == evaluation.digest
    stages = read_status(folder / "run")["stages"]
    assert {stage["state"] for stage in stages} == {"finished"}
    assert "mixture" in {stage["stage"] for stage in stages}


def test_another_margin_needs_no_training(evaluated: tuple[Path, Artifact], tmp_path: Path) -> None:
    folder, evaluation = evaluated
    trainings = sorted((folder / "run").glob("train-*"))
    arguments = ["export", "policy", str(folder / "run"), "--margin", str(OTHER), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted((folder / "run").glob("train-*")) == trainings
    assert "mixed weights and mixed log-ratios correlate by" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = run_pipeline(folder / "run", load_config(folder / "small.yaml"))
    assert again.digest == evaluation.digest, "the run's own policy stays what it was"


def test_curves_of_what_is_reached(evaluated: tuple[Path, Artifact], tmp_path: Path) -> None:
    folder, _ = evaluated
    page = tmp_path / "reach.html"
    arguments = ["frontier", str(folder / "run"), "--realised", "--json", "-", "--report", str(page)]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    curve = json.loads(result.stdout)["constraints"]["calm"]
    assert curve["asked"] == MARGIN
    assert len(curve["basis"]["kl"]) == len(curve["ray"]["kl"]) == len(curve["margin"])
    assert f"--margin calm={MARGIN:g}" in page.read_text(encoding="utf-8")


def test_a_basis_is_trained_once_for_all_margins(evaluated: tuple[Path, Artifact]) -> None:
    """Another margin trains the policy of r + ⟨λ, g⟩ anew, and no policy of a constraint."""
    folder, _ = evaluated
    alone = {path for path in (folder / "run").glob("train-*") if label_of(path) == "policy of calm"}
    run_pipeline(folder / "run", load_config(folder / "small.yaml", ["constraints.calm.margin=0.05"]), "strength")
    assert {path for path in (folder / "run").glob("train-*") if label_of(path) == "policy of calm"} == alone


def label_of(path: Path) -> str:
    return str(load_artifact(path).manifest["identity"]["label"])
