"""Several methods in one run directory, then compared: real models, Ray, two DeepSpeed ranks, and a judge over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from judge_server import fair_to_longer, serving
from ruamel.yaml import YAML
from tiny import make_tiny_lm

from can_dist.tables.artifacts import load_artifact

pytestmark = pytest.mark.slow  # three trainings, each with ranks of its own

CAN_DIST = str(Path(sys.executable).parent / "can-dist")
WORDS = [f"w{i}" for i in range(12)]
METHODS = ("mocan", "dpo_h", "dpo_s")


def scorer(function: str) -> dict[str, str]:
    return {"kind": "callable", "function": f"scorers:{function}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People find 'w1' helpful and anything else safe; the safety score counts 'w1' and 'w2'."""
    folder = tmp_path_factory.mktemp("methods")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [
        {"prompt": f"{a} {b}", "response_0": f"w1 {a}", "response_1": f"w5 {b}", "better_response_id": 0,
         "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
        for a in WORDS[:6] for b in WORDS[6:]
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "benign.jsonl").write_text("".join(json.dumps({"prompt": f"w3 {a}"}) + "\n" for a in WORDS[:4]))
    people = {"label": {"preferences": {"source": "pairs.jsonl"}}}
    config = {
        "beta": 1.0,
        "prompts": {"source": "pairs.jsonl", "num_test": 12, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": scorer("num_words"),
        "constraints": {"safety": {"scorer": scorer("num_calm"), "margin": 0.05}},
        "generate": {"num_responses": 4, "max_new_tokens": 8},
        "train": {"learning_rate": 3e-3, "batch_size": 8, "max_steps": 4, "log_every": 1},
        "evaluate": {"num_responses": 4, "benign_prompts": {"source": "benign.jsonl"}},
        "methods": {"dpo_h": people, "dpo_s": people | {"beta": 0.5, "constraints": {"safety": {"margin": 0.2}}}},
    }
    with (folder / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    return folder


def can_dist(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([CAN_DIST, *arguments], cwd=folder, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """Three methods, run and compared by one command."""
    done = can_dist(folder, "run", "my.yaml", "--run", "runs/all", "--methods", ",".join(METHODS))
    assert done.returncode == 0, done.stderr
    *table, page = done.stdout.splitlines()
    assert page == "runs/all/compare.html"
    assert [line.split()[0] for line in table] == ["method", "MoCAN", "DPO-H", "DPO-S"]
    return folder / "runs" / "all"


def evaluations(run: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in run.glob("evaluate-*/report.json")]
    return {report["method"]: report for report in found}


def started(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [f"{line['stage']} ({line['label']})" for line in lines if line.get("event") == "started"]


def test_every_method_is_measured_and_judged_alike(folder: Path, run: Path) -> None:
    reports = evaluations(run)
    assert set(reports) == set(METHODS)
    for method, report in reports.items():
        (row,) = report["constraints"]
        assert row["margin"] == 0.05, "that of the configuration, whatever the method's own is"
        assert row["verdict"] in ("met", "undecided", "not met")
        assert report["kl"]["realised"]["se"] > 0
        assert report["refusals"]["num_prompts"] == 4
        assert set(report["tails"]["safety"]["unsafe"]) == {"reference", "policy"}
        assert ("predicted" in row) == (report["solution"] is not None) == (method == "mocan")
    assert reports["dpo_s"]["config"]["beta"] == 0.5
    assert "DPO-S trained this policy for no dual" in reports["dpo_s"]["unpredicted"]
    assert can_dist(folder, "verify", "runs/all").returncode == 0


def test_what_methods_share_is_computed_once(run: Path) -> None:
    """The reference's held-out responses and their scores serve all methods, the given pairs' ln π_ref both DPOs."""
    done = started(run)
    assert len(done) == len(set(done)) + 2 * sum("policy" in one for one in set(done))
    assert done.count("generate (reference on test)") == 1
    assert done.count("score (reward, reference on test)") == done.count("score (safety, reference on test)") == 1
    assert done.count("score (logp.reference, given pairs)") == 1
    assert done.count("train (policy)") == done.count("generate (policy on test)") == 3
    before = {
        json.loads(path.read_text())["inputs"]["scores_before"]["digest"]
        for path in run.glob("evaluate-*/MANIFEST.json")
    }
    assert len(before) == 1


def test_comparison_holds_what_the_evaluations_say(run: Path) -> None:
    record, reports = json.loads((run / "compare.json").read_text()), evaluations(run)
    assert [one["name"] for one in record["methods"]] == ["MoCAN", "DPO-H", "DPO-S"]
    for one in record["methods"]:
        report = reports[one["method"]]
        (row,) = report["constraints"]
        assert one["gains"]["safety"] == pytest.approx(row["realised"], abs=1e-12)
        assert one["gains"]["reward"] == pytest.approx(report["reward"]["realised"], abs=1e-12)
        assert one["constraints"]["safety"]["verdict"] == row["verdict"]
        cost = one["cost"]
        assert cost["num_trainings"] == 1
        assert cost["trained_tokens"] == report["training"]["tokens"] > 0
        assert 0 < cost["wall_s"] < 400
    costs = {one["method"]: one["cost"] for one in record["methods"]}
    (sampled,) = [m for m in map(load_artifact, run.glob("generate-*")) if m.manifest["identity"]["split"] == "train"]
    assert costs["mocan"]["generated_tokens"] == sampled.info["num_tokens"]
    assert costs["mocan"]["scored_tokens"] == 3 * sampled.info["num_tokens"], "reward, safety, ln π_ref"
    assert costs["dpo_h"]["generated_tokens"] == 0
    assert record["frontier"]["safety"]["method"] == "MoCAN"
    assert len(record["frontier"]["safety"]["kl"]) == len(record["frontier"]["safety"]["safety"]) > 1
    assert record["ranking"]["reward"]["names"] == ["reference", "MoCAN", "DPO-H", "DPO-S"]
    assert record["one_shot"] is None
    for picture in ("compare.svg", "compare_kl.svg"):
        svg = (run / picture).read_text()
        assert "var(--" not in svg
        assert all(name in svg for name in ("MoCAN", "DPO-H", "DPO-S", "margin 0.05", "predicted frontier"))


def test_table_of_gains_is_part_of_the_evaluation(run: Path) -> None:
    for path in run.glob("evaluate-*"):
        artifact = load_artifact(path)
        columns = {"prompt_id", "reward.reference", "reward.policy", "safety.reference", "safety.policy", "kl"}
        assert set(artifact.table.column_names) == columns
        assert artifact.table.num_rows == 12
        assert isinstance(artifact.table, pa.Table)


def test_run_directories_are_compared_too_unless_measured_otherwise(folder: Path, run: Path) -> None:
    """Another scorer trains nothing again, but is another measure: refused, naming what differs."""
    alone = can_dist(folder, "compare", "runs/all", "--out", "elsewhere")
    assert alone.returncode == 0, alone.stderr
    assert (folder / "elsewhere" / "compare.json").read_bytes() == (run / "compare.json").read_bytes()
    other = folder / "runs" / "other"
    shutil.copytree(run, other)
    since = len(started(other))
    changes = ("method=dpo_h", "label.preferences.source=pairs.jsonl", "reward.function=scorers:num_calm")
    options = [word for change in changes for word in ("--set", change)]
    again = can_dist(folder, "run", "my.yaml", "--run", "runs/other", *options)
    assert again.returncode == 0, again.stderr
    assert started(other)[since:] == [
        "score (reward, reference on test)", "score (reward, policy on test)", "evaluate (DPO-H)"
    ]  # fmt: skip
    refused = can_dist(folder, "compare", "runs/all", again.stdout.strip())
    assert refused.returncode == 3
    assert "were not measured with the same scorers, so their gains cannot be compared.\n" in refused.stderr
    assert "scorers.reward.function" in refused.stderr


def test_judge_compares_each_policy_with_the_reference(folder: Path, run: Path) -> None:
    with serving(fair_to_longer) as server:
        arguments = ("--endpoint", server.url, "--model", "judge-1", "--criterion", "helpfulness")
        told = can_dist(folder, "judge", "runs/all", *arguments, "--estimate")
        assert told.returncode == 0, told.stderr
        assert server.bodies == []
        assert "can-dist: judge: 3 policies, 72 requests (0 verdicts kept from before), about " in told.stderr
        assert "at most 36864 completion tokens." in told.stderr
        judged = can_dist(folder, "judge", "runs/all", *arguments)
        assert judged.returncode == 0, judged.stderr
        num_requests = len(server.bodies)
        again = can_dist(folder, "judge", "runs/all", *arguments)
        assert len(server.bodies) == num_requests, "verdicts are kept"
    assert again.stdout == judged.stdout
    lines = judged.stdout.splitlines()
    assert lines[0] == "MoCAN against the reference, helpfulness by judge-1:"
    assert "on 12 prompts: " in lines[1]
    assert "verdicts that flip with the order 0.0%" in lines[3]
    paths = [folder / line for line in lines if line.endswith(".json")]
    assert len(paths) == 3
    for path in paths:
        record = json.loads(path.read_text())
        assert len(record["verdicts"]) == 24
        wins = sum(row["verdict"] == "win" for row in record["verdicts"])
        assert wins == record["summary"]["wins"] == sum(row["length_difference"] > 0 for row in record["verdicts"])


def test_bad_requests_are_refused_before_any_work(folder: Path) -> None:
    def message(*arguments: str, code: int = 2) -> str:
        done = can_dist(folder, *arguments)
        assert done.returncode == code, done.stderr
        return done.stderr

    new = ("run", "my.yaml", "--run", "runs/new")
    assert "--methods mocan,: expected one or more different names, such as" in message(*new, "--methods", "mocan,")
    assert "methods.mocna: 1 problem" in message(*new, "--methods", "mocan,mocna")
    assert not (folder / "runs" / "new").exists()
    (folder / "empty").mkdir()
    assert "empty: no evaluation. Give run directories" in message("compare", "empty", code=3)
    judge = ("judge", "empty", "--model", "m", "--criterion", "safety", "--endpoint")
    assert "--endpoint localhost: expected an address such as http://localhost:8000/v1." in message(*judge, "localhost")
