"""``can-dist demo`` as a new user runs it: a real run of all stages, and a report that says the margin was met."""

import json
import subprocess
import sys
from pathlib import Path

CAN_DIST = str(Path(sys.executable).parent / "can-dist")


def test_demo_meets_its_margin_on_held_out_prompts_and_draws_the_report(tmp_path: Path) -> None:
    run = tmp_path / "demo"
    result = subprocess.run([CAN_DIST, "demo", "--run", str(run)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    started = [line["stage"] for line in log if line.get("event") == "started"]
    stages = ["generate", "score", "solve", "label", "train", "estimate", "strength", "evaluate"]
    assert list(dict.fromkeys(started)) == stages
    first = {line["artifact"]: line["event"] for line in reversed(log) if "artifact" in line and "event" in line}
    assert "reused" not in first.values(), "nothing may be precomputed"

    report = json.loads(next(run.glob("evaluate-*/report.json")).read_text())
    (safety,) = report["constraints"]
    assert safety["lam"] > 0.1, "without a price on safety the demo would show nothing"
    assert safety["realised"]["low"] > 0
    assert safety["verdict"] in ("met", "undecided")
    assert report["reward"]["realised"]["low"] > 0
    assert abs(report["kl"]["realised"]["mean"] - report["kl"]["predicted"]) < 0.5
    losses = [loss for _, loss in report["training"]["loss"]]
    assert abs(losses[0] - 0.6931) < 1e-3
    assert losses[-1] < losses[0]

    assert f"{safety['realised']['mean']:+.2f}" in result.stdout
    page = next(run.glob("evaluate-*/report.html")).read_text()
    assert page.count("<svg") >= 5
    assert subprocess.run([CAN_DIST, "verify", str(run)], capture_output=True).returncode == 0
