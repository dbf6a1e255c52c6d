"""Runs of the real-text recipe by the product's own command, and what their evaluations say, for the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machine import machine

from can_dist.stages.mixture import inputs_of
from can_dist.stages.report import lineage_of
from can_dist.tables.artifacts import Artifact, load_artifact

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
RECIPE = ROOT / "recipes" / "pku_stories3M" / "mocan.yaml"
AS_MEASURED_32: dict[str, Any] = {
    "basis": "false",
    "prompts.num_train": 640,
    "prompts.num_test": 200,
    "label.labels": "listwise",
    "evaluate.num_responses": 8,
}
"""The recipe while it trained lists of 32 responses to 640 prompts, as some rows were measured."""
AS_MEASURED = AS_MEASURED_32 | {"prompts.num_validation": 200, "generate.num_responses": 8, "train.num_epochs": 2}
"""The recipe before that, as other rows were measured."""


def command(verb: str, run: Path, settings: Mapping[str, Any], recipe: Path = RECIPE) -> list[str]:
    """Return the command line of one ``can-dist`` verb on a recipe with overridden keys."""
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "can_dist", verb, str(recipe), "--run", str(run), *overrides]


def evaluated(run: Path, settings: Mapping[str, Any], recipe: Path = RECIPE) -> Artifact:
    """Run the recipe to its report, which finished work shortens; return the evaluation.

    Raises:
        CalledProcessError: The run failed; its message is on the terminal.
    """
    finished = subprocess.run(command("run", run, settings, recipe), stdout=subprocess.PIPE, text=True, check=True)
    return load_artifact(Path(finished.stdout.split()[-1]))


def row(evaluation: Artifact) -> dict[str, Any]:
    """Return what an evaluation predicted, estimated on validation prompts and realised, tokens and code."""
    report = evaluation.read_json("report.json")
    estimated = report["estimate"] or {}
    policy = estimated.get("policy")
    solution = lineage_of(evaluation.input("policy"), evaluation).solution
    trainings = {training.path.name: training for training in trained(evaluation.input("policy"))}
    return {
        "constraints": {entry["name"]: constraint(entry, policy) for entry in report["constraints"]},
        "reward": {"predicted": mean(report["reward"], "predicted"), **span(report["reward"]["realised"])},
        "kl": {"predicted": report["kl"].get("predicted"), **span(report["kl"]["realised"])},
        "alpha": (estimated.get("strength") or {}).get("alpha", 1.0),
        "length": policy and policy["length"]["mean"],
        "direction": policy and policy["direction"]["mean"],
        "tokens": sum(training.info["summary"]["num_tokens"] for training in trainings.values()),
        "estimator": solution and solution.manifest["identity"]["estimator"],
        "commit": commit(),
        "run": str(evaluation.path.parent),
        "evaluation": evaluation.path.name,
    }


def commit() -> str:
    """Return the last commit that changed the package."""
    asking = ["git", "-C", str(ROOT), "log", "-1", "--format=%h", "--", "can_dist"]
    return subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def constraint(entry: Mapping[str, Any], policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return one constraint's margin, lambda, prediction, estimate, realised gain and verdict."""
    return {
        "margin": entry["margin"],
        "lam": entry.get("lam"),
        "predicted": mean(entry, "predicted"),
        "estimate": policy and span(policy["improvement"][entry["name"]]),
        **span(entry["realised"]),
        "verdict": entry["verdict"],
    }


def mean(record: Mapping[str, Any], name: str) -> float | None:
    """Return the mean of an interval that may be absent."""
    value: float | None = (record.get(name) or {}).get("mean")
    return value


def span(interval: Mapping[str, float]) -> dict[str, float]:
    """Return mean and ends of an interval."""
    return {name: interval[name] for name in ("mean", "low", "high")}


def trained(policy: Artifact) -> list[Artifact]:
    """Return every training that a policy came from, the last one first."""
    if policy.stage == "strength":
        return trained(policy.input("policy"))
    if policy.stage == "mixture":
        return [artifact for mixed in inputs_of(policy, "policy").values() for artifact in trained(mixed)]
    start = [policy.input("start")] if "start" in policy.manifest["inputs"] else []
    return [policy, *(earlier for artifact in start for earlier in trained(artifact))]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a result that was begun; none where there is no file."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return rows


def save_rows(path: Path, rows: list[dict[str, Any]], subject: str = "recipes/pku_stories3M/mocan.yaml") -> None:
    """Write the rows of a result as JSON, with what was run, the machine and the date."""
    record = {"what": subject, "machine": machine(), "rows": rows}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
