"""A real run (Ray, two ZeRO-3 ranks) whose policy is given the strength that its margin needs; what follows from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_run import WORDS, small_run, write_config

from can_dist.config import load_config
from can_dist.errors import InfeasibleConstraint
from can_dist.outcomes.estimate import estimate_text, run_estimate
from can_dist.outcomes.stretch import export_strength
from can_dist.pipeline import run_pipeline
from can_dist.stages.estimate import load_estimate
from can_dist.stages.solve import demands
from can_dist.stages.strength import STRENGTH
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.verify import verify_run
from can_dist.workspace import PAGE, REPORT

MARGIN = 0.1
LAW = 0.25
"""Share by which the gain of a tiny model may miss the law of small steps, beside the error of 48 prompts."""


def configuration(folder: Path) -> dict[str, Any]:
    config = small_run(
        folder,
        prompts={"source": str(folder / "prompts.jsonl"), "num_test": 12, "num_validation": 48},
        strength={},
        generate={"num_responses": 8, "max_new_tokens": 6, "batch_prompts": 8, "shard_prompts": 16},
        label={"labels": "listwise"},
        cluster={"num_workers": 2},
        evaluate={"num_responses": 8},
    )
    config["constraints"]["calm"]["margin"] = MARGIN
    config["train"] |= {"learning_rate": 2e-3, "batch_size": 16, "max_steps": 12, "num_epochs": 4}
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS][:112]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return config


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("strength")
    config = load_config(write_config(folder / "small.yaml", configuration(folder)))
    return folder, run_pipeline(folder / "run", config)


def test_the_policy_that_is_evaluated_has_the_strength_that_its_margin_needs(
    evaluated: tuple[Path, Artifact],
) -> None:
    folder, evaluation = evaluated
    policy = evaluation.input("policy")
    assert policy.stage == "strength"
    chosen, trained = policy.read_json(STRENGTH), policy.input("policy")
    before = load_estimate(policy.input("estimate"))
    (demand,) = demands(policy.input("solution"))
    assert trained.stage == "train"
    assert chosen["limiting"] == "calm"
    assert chosen["alpha"] == pytest.approx(demand.margin / before.improvement["calm"].mean)
    assert chosen["alpha"] != pytest.approx(1.0, abs=0.05)
    after = load_estimate(evaluation.input("estimate"))
    assert after.num_prompts == 48
    assert after.improvement["calm"].mean == pytest.approx(MARGIN, rel=LAW), "the check at the chosen strength"
    assert verify_run(folder / "run")[1] == []


def test_validation_responses_are_scored_and_never_trained_on(evaluated: tuple[Path, Artifact]) -> None:
    _, evaluation = evaluated
    validation = evaluation.input("estimate").input("validation")
    prompts = validation.input("responses").input("prompts").table.to_pylist()
    held_out = {row["prompt_id"] for row in prompts if row["split"] == "validation"}
    assert set(validation.table.column("prompt_id").to_pylist()) == held_out
    assert {"reward", "calm", "logp.reference"} <= set(validation.table.column_names)
    trained = evaluation.input("policy").input("policy").input("preferences").table
    assert held_out.isdisjoint(trained.column("prompt_id").to_pylist())


def test_report_shows_the_estimate_beside_what_was_predicted_and_realised(evaluated: tuple[Path, Artifact]) -> None:
    _, evaluation = evaluated
    record = evaluation.read_json(REPORT)["estimate"]
    assert record["strength"]["alpha"] == evaluation.input("policy").info["alpha"]
    assert record["line"].startswith("calm +")
    assert record["verdict"].startswith(("Stopped short", "Went too far", "Arrived"))
    assert len(record["ray"]["alpha"]) == len(record["ray"]["improvement"]["calm"]) == len(record["ray"]["kl"])
    page = (evaluation.path / PAGE).read_text(encoding="utf-8")
    assert "Estimated without generating" in page
    assert record["verdict"] in page
    assert "KL (nats) against calm" in page


def test_estimate_of_any_policy_needs_no_sampling(evaluated: tuple[Path, Artifact]) -> None:
    folder, evaluation = evaluated
    generated = set((folder / "run").glob("generate-*"))
    own = run_estimate(folder / "run")
    assert own.digest == evaluation.input("estimate").digest
    reference = run_estimate(folder / "run", folder / "lm")
    assert load_estimate(reference).kl.mean == pytest.approx(0.0, abs=1e-9)
    assert estimate_text(reference).splitlines()[0].startswith("calm +0.00 ± 0.00 of +0.10, reward +0.00, KL 0.00")
    assert set((folder / "run").glob("generate-*")) == generated


def test_a_margin_of_its_own_is_written_without_training(evaluated: tuple[Path, Artifact], tmp_path: Path) -> None:
    folder, evaluation = evaluated
    found = export_strength(folder / "run", tmp_path / "less", margins={"": MARGIN / 2})
    own = evaluation.input("policy").info["alpha"]
    assert found.alpha == pytest.approx(own / 2)
    estimate = load_estimate(run_estimate(folder / "run", tmp_path / "less"))
    assert estimate.improvement["calm"].mean == pytest.approx(MARGIN / 2, rel=LAW)


def test_refusal_leaves_a_policy_that_is_evaluated_as_trained(evaluated: tuple[Path, Artifact]) -> None:
    folder, evaluation = evaluated
    copy = folder / "copy"
    shutil.copytree(folder / "run", copy)
    overrides = ["strength.max=1.01"]
    if evaluation.input("policy").info["alpha"] < 1.01:
        overrides = ["strength.max_kl=0.0001"]
    with pytest.raises(InfeasibleConstraint, match="--set strength=1 goes on with it"):
        run_pipeline(copy, load_config(folder / "small.yaml", overrides))
    trainings = set(copy.glob("train-*"))
    as_trained = run_pipeline(copy, load_config(folder / "small.yaml", ["strength=1"]))
    assert as_trained.input("policy").stage == "train"
    assert set(copy.glob("train-*")) == trainings
    assert load_artifact(as_trained.path).read_json(REPORT)["estimate"]["strength"] is None
