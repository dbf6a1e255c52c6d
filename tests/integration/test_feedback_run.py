"""Whole runs (Ray, two ZeRO-3 ranks) whose λ moves within the training: what the run, its report and its card say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from small_run import WORDS, small_run, write_config

from can_dist.config import load_config
from can_dist.errors import ConfigError
from can_dist.outcomes.estimate import find_solution
from can_dist.outcomes.export import facts_of
from can_dist.pipeline import run_pipeline
from can_dist.stages.estimate import load_estimate
from can_dist.stages.report import as_trained
from can_dist.stages.solve import load_solution
from can_dist.tables.artifacts import Artifact
from can_dist.tables.verify import verify_run
from can_dist.workspace import PAGE, REPORT

pytestmark = pytest.mark.slow


def configuration(folder: Path, **sections: Any) -> dict[str, Any]:
    config = small_run(
        folder,
        prompts={"source": str(folder / "prompts.jsonl"), "num_test": 12, "num_validation": 48},
        generate={"num_responses": 4, "max_new_tokens": 6, "batch_prompts": 8, "shard_prompts": 16},
        label={"labels": "listwise"},
        cluster={"num_workers": 2},
        **sections,
    )
    config["constraints"]["calm"]["margin"] = 0.1
    config["train"] |= {"learning_rate": 2e-3, "batch_size": 16, "max_steps": 9, "num_epochs": 3, "eval_every": 3}
    prompts = [f"{a} {b}" for a in WORDS for b in WORDS][:112]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return config


def run(folder: Path, config: dict[str, Any]) -> Artifact:
    return run_pipeline(folder / "run", load_config(write_config(folder / "my.yaml", config)))


def test_lambda_is_steered_said_drawn_and_known_to_what_follows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configuration(tmp_path, strength={"max": 100})
    config["train"]["feedback"] = "validation"
    evaluation = run(tmp_path, config)
    said = capfd.readouterr().err
    assert "can-dist: train: step 3: calm " in said
    assert " of +0.10, reward " in said
    assert "; lambda " in said
    policy = evaluation.input("policy")
    trained = as_trained(policy)
    solution = load_solution(find_solution(policy))
    (last,) = trained.info["summary"]["lam"].values()
    assert last > solution.lam["calm"], "so few steps stop short of the margin"
    assert {"preferences", "validation", "solution"} <= trained.manifest["inputs"].keys()
    report = evaluation.read_json(REPORT)
    lams = [value for _, value in report["training"]["estimates"]["lam.calm"]]
    assert [step for step, _ in report["training"]["estimates"]["gain.calm"]] == [3, 6, 9]
    assert lams[0] == solution.lam["calm"]
    assert lams[-1] == last
    assert report["solution"]["lam"] == solution.lam, "what is predicted is predicted of the table's own"
    assert report["prediction"] is not None
    estimate = load_estimate(policy.input("estimate"))
    assert estimate.lam == {"calm": last}, "length and direction are along what it was trained towards"
    page = (evaluation.path / PAGE).read_text(encoding="utf-8")
    assert "λ moved by it: calm from " in page
    assert ("λ, steered in the training", f"calm {last:.4g} at the end") in facts_of(policy, evaluation)["made_from"]
    verify_run(tmp_path / "run")


def test_feedback_without_validation_prompts_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    config = configuration(tmp_path, strength=1)
    config["train"]["feedback"] = "validation"
    config["prompts"] = {"source": config["prompts"]["source"], "num_test": 12}  # too few for any by default
    with pytest.raises(ConfigError, match=r"train\.feedback: no validation prompts are held out of the 112 of"):
        run(tmp_path, config)
    assert not list((tmp_path / "run").glob("generate-*"))


@pytest.mark.parametrize("within", [False, True])
def test_caid_reads_its_slack_off_the_validation_responses(tmp_path: Path, within: bool) -> None:
    config = configuration(tmp_path, strength=1)
    config |= {"method": "caid", "caid": {"rounds": 2, "slack": "estimate", "within": within}}
    config["train"] |= {"max_steps": 100, "num_epochs": 1}
    evaluation = run(tmp_path, config)
    policy, place = evaluation.input("policy"), tmp_path / "run"
    generated = {path.name for path in place.glob("generate-*")}
    labels = [json.loads((place / name / "STAGE.json").read_text())["identity"]["label"] for name in generated]
    assert sorted(labels) == ["policy on test", "reference on test", "reference on train", "reference on validation"]
    report, log = evaluation.read_json(REPORT), (place / "log.jsonl").read_text(encoding="utf-8")
    assert report["estimate"] is not None, "a policy kept as trained is estimated all the same"
    assert re.search(r"estimate: (Stopped short|Arrived|Went too far): calm went -?\d+% of the way", log)
    trainings = list(place.glob("train-*"))
    if within:
        assert len(trainings) == 1
        estimates = report["training"]["estimates"]
        assert len({value for _, value in estimates["lam.calm"]}) == 3, "λ*, and one for each round"
        lam, eta = (value for _, value in estimates["lam.calm"]), policy.manifest["identity"]["ascent"]["step_size"]
        first, second, _ = list(dict.fromkeys(lam))
        (gain,) = (value for step, value in estimates["gain.calm"] if step == policy.info["summary"]["num_steps"] // 3)
        assert second == pytest.approx(max(0.0, first - eta["calm"] * (gain - 0.1)))
    else:
        assert len(trainings) == 3
        (trajectory,) = place.glob("trajectory-*/trajectory.json")
        rounds = json.loads(trajectory.read_text())["rounds"]
        assert all(
            entry["constraints"]["calm"]["slack"] == pytest.approx(entry["constraints"]["calm"]["improvement"] - 0.1)
            for entry in rounds
        )
