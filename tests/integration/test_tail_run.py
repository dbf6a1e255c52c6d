"""A whole run (Ray, two ZeRO-3 ranks) with a constraint on a CVaR: labels, report, certificate and model card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from sealed_run import sealed_config
from small_run import write_config

from can_dist.cli import cli
from can_dist.config import load_config
from can_dist.pipeline import run_pipeline
from can_dist.stages.certify import CERTIFICATE
from can_dist.stages.solve import load_solution, solved_columns
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.verify import verify_run
from can_dist.workspace import PAGE, REPORT

ALPHA = 0.3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def tail_mean(table: pa.Table) -> float:
    """The mean of the worst share of the responses, filled from below; every prompt has as many of them."""
    calm = np.sort(table.column("calm").to_numpy())
    share = np.diff(np.minimum(np.arange(1, calm.size + 1) / calm.size, ALPHA), prepend=0.0)
    return float(share @ calm / ALPHA)


def test_a_cvar_reaches_labels_report_certificate_and_card(tmp_path: Path) -> None:
    config = sealed_config(tmp_path)
    config["cluster"] = {"num_actors": 1, "num_workers": 2}
    config["constraints"]["calm"] |= {"of": "cvar", "alpha": ALPHA, "margin": 0.1}
    run = tmp_path / "run"
    evaluation = run_pipeline(run, load_config(write_config(tmp_path / "small.yaml", config)))
    policy = evaluation.input("policy")
    preferences = policy.input("preferences")
    solution, scores = preferences.input("solution"), preferences.input("scores").table
    (made,) = solved_columns(solution)
    assert made.tau is not None
    lam, calm = load_solution(solution).lam["calm"], scores["calm"].to_numpy()
    total = scores["reward"].to_numpy() + lam * (made.tau - np.maximum(made.tau - calm, 0) / ALPHA)
    of = dict(zip(scores["response_id"].to_pylist(), total, strict=True))
    for row in preferences.table.to_pylist():
        first, second = (of[name] for name in row["response_ids"])
        assert row["target"][0] == pytest.approx(1 / (1 + np.exp(second - first)))

    report = evaluation.read_json(REPORT)
    (row,) = report["constraints"]
    gained = tail_mean(evaluation.input("scores_after").table) - tail_mean(evaluation.input("scores_before").table)
    assert row["realised"]["mean"] == pytest.approx(gained)
    assert (row["margin"], row["threshold"]) == (0.1, None)
    assert row["utility"] == "the worst 30% of all responses (CVaR)"
    assert report["tails"]["calm"]["worst_share"] == ALPHA
    assert "mean of the worst 30% of all responses (CVaR)" in (evaluation.path / PAGE).read_text(encoding="utf-8")

    answer = CliRunner().invoke(cli, ["certify", str(run)])
    assert answer.exit_code in (0, 4, 7), answer.output
    (certificate,) = (load_artifact(path.parent) for path in run.glob(f"certify-*/{MANIFEST}"))
    record = certificate.read_json(CERTIFICATE)
    assert "in the mean of the worst 30% of all responses (CVaR)" in record["sentences"][1]
    ends = [tail_mean(certificate.input(f"scores_{who}").table) for who in ("policy", "reference")]
    assert record["constraints"][0]["mean"] <= ends[0] - ends[1] + 1e-12
    out = tmp_path / "exported"
    done = CliRunner().invoke(cli, ["export", "policy", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "calm, mean of the worst 30% of all responses (CVaR)" in (out / "README.md").read_text(encoding="utf-8")
    verify_run(run)
