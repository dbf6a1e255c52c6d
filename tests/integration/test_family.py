"""SACPO, P-SACPO, C-DPO and CAID as whole runs: real models, Ray and two ranks of ZeRO-3, a few steps each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_lm

from can_dist.config import Config, validate_config
from can_dist.pipeline import run_pipeline
from can_dist.run import Run
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.verify import verify_run

WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder: people find 'w1' helpful and 'w2' safe."""
    folder = tmp_path_factory.mktemp("family")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [
        {"prompt": f"{a} {b}", "response_0": f"w1 {a}", "response_1": f"w2 {b}", "better_response_id": 0,
         "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
        for a in WORDS[:4] for b in WORDS[8:]
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder
    import ray

    ray.shutdown()


def configure(folder: Path, method: str, **sections: Any) -> Config:
    return validate_config(
        {
            "method": method,
            "beta": 0.5,
            "prompts": {"source": str(folder / "pairs.jsonl"), "num_test": 4, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(folder / "lm")},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "generate": {"num_responses": 4, "max_new_tokens": 6},
            "evaluate": {"num_responses": 2, "num_samples": 1},
            "train": {"learning_rate": 3e-3, "batch_size": 8, "max_steps": 4, "log_every": 1},
            **sections,
        }
    )


def run_whole(run_dir: Path, config: Config) -> tuple[Artifact, dict[str, Any]]:
    """Return the evaluation that the run gives, and its report; every artifact must be as recorded."""
    evaluation = run_pipeline(run_dir, config)
    assert evaluation.stage == "evaluate"
    count, problems = verify_run(run_dir)
    assert count
    assert not problems
    return evaluation, evaluation.read_json("report.json")


def source(run_dir: Path, artifact: Artifact, name: str) -> Artifact:
    """Return the input of that name."""
    return load_artifact(run_dir / artifact.manifest["inputs"][name]["artifact"])


def trajectory(run_dir: Path) -> Artifact:
    (path,) = run_dir.glob("trajectory-*/MANIFEST.json")
    return load_artifact(path.parent)


def events(run_dir: Path, event: str, stage: str) -> int:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return sum(line.get("event") == event and line.get("stage") == stage for line in lines)


@pytest.mark.slow
def test_cdpo_goes_on_between_rounds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before its second training, it goes on with that one; λ and the slack of each round are recorded."""
    run_dir = folder / "cdpo"
    options = {"rounds": 2, "step_size": 0.5, "standard_errors": 0}
    config = configure(folder, "cdpo", cdpo=options, label={"labels": "regression"})
    plain_train = Run.train

    def train_once(run: Run, *arguments: Any, **options: Any) -> Artifact:
        if list(run_dir.glob("train-*/MANIFEST.json")):
            raise RuntimeError("the machine goes down")
        return plain_train(run, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", train_once)
        with pytest.raises(RuntimeError, match="goes down"):
            run_pipeline(run_dir, config)
    assert events(run_dir, "started", "train") == 1
    assert not list(run_dir.glob("trajectory-*"))
    evaluation, report = run_whole(run_dir, config)
    assert events(run_dir, "started", "train") == 2  # the first one was not repeated
    assert events(run_dir, "started", "measure") == 2

    record = trajectory(run_dir)
    first, second = record.read_json("trajectory.json")["rounds"]
    slack = first["constraints"]["calm"]["slack"]
    assert first["lam"] == {"calm": 0.0}
    assert second["lam"]["calm"] == pytest.approx(max(0.0, -0.5 * slack), abs=1e-15)
    assert first["num_tokens"] > 0
    assert first["num_prompts"] == 12
    assert first["num_responses"] == 48
    assert (record.path / "trajectory.svg").read_text().startswith("<?xml")
    policy = source(run_dir, evaluation, "policy")
    assert policy.path.name == second["policy"]
    assert source(run_dir, policy, "preferences").manifest["identity"]["lam"] == second["lam"]
    assert "reference" not in policy.manifest["inputs"]
    assert "start" not in policy.manifest["inputs"]
    assert report["method"] == "cdpo"


@pytest.mark.slow
def test_caid_trains_on_from_the_one_shot_policy(folder: Path) -> None:
    run_dir = folder / "caid"
    evaluation, report = run_whole(run_dir, configure(folder, "caid", label={"labels": "listwise"}))
    one_shot, last = trajectory(run_dir).read_json("trajectory.json")["rounds"]
    policy = source(run_dir, evaluation, "policy")
    assert policy.path.name == last["policy"]
    assert source(run_dir, policy, "start").path.name == one_shot["policy"]
    assert "reference" not in policy.manifest["inputs"]  # relative to π_ref all the way
    first = source(run_dir, policy, "start")
    solution = source(run_dir, source(run_dir, first, "preferences"), "solution")
    assert solution.info["lam"] == one_shot["lam"]  # MoCAN's λ*
    assert source(run_dir, policy, "preferences").manifest["identity"]["lam"] == last["lam"] != one_shot["lam"]
    assert report["method"] == "caid"


@pytest.mark.slow
def test_primal_dual_learns_from_its_own_samples_and_goes_on_between_rounds(folder: Path) -> None:
    """A second round is added to a finished one: it samples, scores and trains once, from the first one's policy."""
    run_dir = folder / "primal_dual"
    options = {"rounds": 1, "step_size": 0.5}
    run_whole(run_dir, configure(folder, "primal_dual", primal_dual=options))
    assert events(run_dir, "started", "train") == 1
    evaluation, report = run_whole(run_dir, configure(folder, "primal_dual", primal_dual=options | {"rounds": 2}))
    assert events(run_dir, "started", "train") == 2
    records = [load_artifact(path.parent) for path in run_dir.glob("trajectory-*/MANIFEST.json")]
    record = max(records, key=lambda artifact: artifact.info["rounds"])
    first, second = record.read_json("trajectory.json")["rounds"]
    assert first["lam"]["calm"] == pytest.approx(0.5 * 0.1)  # from 0, by the margin that π_ref lacks
    expected = max(0.0, first["lam"]["calm"] - 0.5 * first["constraints"]["calm"]["slack"])
    assert second["lam"]["calm"] == pytest.approx(expected, abs=1e-15)
    assert first["kl"]["mean"] != 0.0
    policy = source(run_dir, evaluation, "policy")
    before, examples = source(run_dir, policy, "reference"), source(run_dir, policy, "preferences")
    assert (before.path.name, policy.path.name) == (first["policy"], second["policy"])
    assert (examples.info["loss"], examples.manifest["identity"]["lam"]) == ("clipped", second["lam"])
    responses = source(run_dir, examples, "responses")
    drawn = [source(run_dir, source(run_dir, before, "preferences"), "responses"), responses]
    assert len({artifact.manifest["identity"]["seed"] for artifact in drawn}) == 2  # noise of its own in every round
    assert report["method"] == "primal_dual"
    assert (record.path / "trajectory.svg").read_text().startswith("<?xml")


def weights(policy: Artifact) -> dict[str, torch.Tensor]:
    return load_file(policy.path / POLICY / "model.safetensors")


@pytest.mark.slow
def test_p_sacpo_gives_a_policy_for_every_q(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DPO on helpfulness, KTO on safety from there, and mixtures of the two; the last q is what the run returns."""
    run_dir = folder / "p_sacpo"
    config = configure(
        folder,
        "p_sacpo",
        sacpo={"first": {"smoothing": 0.1}, "second": {"loss": "kto"}, "beta_over_lambda": 0.1},
        p_sacpo={"q": [0.25, 1.0]},
        label={"preferences": {"source": str(folder / "pairs.jsonl")}},
    )
    evaluation, report = run_whole(run_dir, config)
    merged = source(run_dir, evaluation, "policy")
    assert merged.info == {"q": 1.0}
    assert report["variant"] == "q=1"
    told = capsys.readouterr().err
    reports = {load_artifact(p.parent).info["variant"]: p.parent for p in run_dir.glob("evaluate-*/MANIFEST.json")}
    assert set(reports) == {"q=0.25", "q=1"}
    for variant, path in reports.items():
        assert f"p_sacpo, {variant}: {path}" in told

    safe, helpful = (source(run_dir, merged, f"policy_{side}") for side in "ab")
    assert source(run_dir, safe, "reference").path == helpful.path  # SACPO's second step is relative to its first
    assert (helpful.manifest["identity"]["beta"], safe.manifest["identity"]["beta"]) == (0.5, 0.1)
    losses = [source(run_dir, policy, "preferences").info["loss"] for policy in (helpful, safe)]
    assert losses == ["sigmoid", "kto"]
    quarter = source(run_dir, load_artifact(reports["q=0.25"]), "policy")
    for name, found in weights(quarter).items():
        expected = 0.25 * weights(safe)[name] + 0.75 * weights(helpful)[name]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(weights(merged)[name], weights(safe)[name], rtol=0, atol=0)
    assert any(not torch.equal(weights(safe)[name], weights(helpful)[name]) for name in weights(safe))


@pytest.mark.slow
def test_sacpo_from_scores_in_the_other_order(folder: Path) -> None:
    """Safety first with β/λ, then helpfulness with β; `train` gives the last training."""
    run_dir = folder / "sacpo"
    options = {"order": "safe_first", "labels_from": "scores", "beta_over_lambda": 0.2}
    policy = run_pipeline(
        run_dir, configure(folder, "sacpo", sacpo=options, label={"labels": "sampled"}), until="train"
    )
    first = source(run_dir, policy, "reference")
    assert (first.manifest["identity"]["beta"], policy.manifest["identity"]["beta"]) == (0.2, 0.5)
    labels = [source(run_dir, one, "preferences") for one in (first, policy)]
    assert [one.manifest["identity"]["reward"] for one in labels] == ["calm", "reward"]
    before, after = (source(run_dir, one, "scores").table.column("logp.reference").to_pylist() for one in labels)
    assert before != after  # relative to π_ref, then to the first policy
    targets = {value for one in labels for row in one.table.column("target").to_pylist() for value in row}
    assert targets == {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "labels"),  # beside sacpo-sampled, cdpo-regression and caid-listwise above
    [("sacpo", "regression"), ("sacpo", "listwise"), ("cdpo", "soft"), ("cdpo", "listwise"), ("caid", "sampled")],
)
def test_every_kind_of_label_fits_every_method(folder: Path, method: str, labels: str) -> None:
    sections = {"sacpo": {"labels_from": "scores"}, "cdpo": {"rounds": 1}, "caid": {}}
    config = configure(folder, method, label={"labels": labels}, **{method: sections[method]})
    _, report = run_whole(folder / f"{method}-{labels}", config)
    assert report["method"] == method
    assert ("chose this policy’s λ by measurements of its trained policies" in report["unpredicted"]) is (
        method != "sacpo"
    )
