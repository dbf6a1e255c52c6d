"""A real run (Ray, two ZeRO-3 ranks) with sealed prompts, its certificate, kills in between, and its export."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sealed_run import NUM_SEALED, change, sealed_config
from small_run import write_config

from can_dist.doctor.status import read_status
from can_dist.measuring.certificate import CERTIFIED
from can_dist.outcomes.export import find_policy
from can_dist.stages.certify import CERTIFICATE
from can_dist.stages.sealed import LEDGER, read_looks
from can_dist.tables.artifacts import MANIFEST, load_artifact
from can_dist.tables.verify import verify_run

CAN_DIST = str(Path(sys.executable).parent / "can-dist")
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def can_dist(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [CAN_DIST, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)


def environment() -> dict[str, str]:
    paths = (ROOT, ROOT / "tests" / "helpers" / "worlds", os.environ.get("PYTHONPATH", ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}


def killed_when(folder: Path, pattern: str, *arguments: object) -> None:
    """Start a command and kill -9 it as soon as a file that matches ``pattern`` is there that was not before."""
    before = set(folder.glob(pattern))
    process = subprocess.Popen([CAN_DIST, *map(str, arguments)], cwd=folder, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None and not set(folder.glob(pattern)) - before:
        time.sleep(0.01)
    assert process.poll() is None, "ended before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def digests(run: Path) -> dict[str, str]:
    return {path.parent.name: load_artifact(path.parent).digest for path in run.glob(f"*/{MANIFEST}")}


def test_run_certify_and_export_with_kills_between(tmp_path: Path) -> None:
    config = sealed_config(tmp_path)
    config["cluster"] = {"num_actors": 1, "num_workers": 2}
    config["generate"]["shard_prompts"] = 32
    write_config(tmp_path / "small.yaml", config)
    run, calm = tmp_path / "run", tmp_path / "calm"
    done = can_dist(tmp_path, "run", "small.yaml", "--run", "run")
    assert done.returncode == 0, done.stderr
    change(run, "constraints.calm.margin", -5.0)  # a demand that even this policy meets
    shutil.copytree(run, calm)
    undisturbed = can_dist(tmp_path, "certify", "calm", "--delta", "0.05")
    assert undisturbed.returncode == 0, undisturbed.stderr
    assert undisturbed.stdout.startswith("CERTIFIED at a joint error of 0.0304, on 64 sealed prompts")

    killed_when(tmp_path, "run/generate-*/part-00000.arrow", "certify", "run", "--delta", "0.05")
    (look,) = read_looks(run)
    assert look.policy == find_policy(run)[0].path.name, "the look was recorded before it was taken"
    assert list(run.glob(f"certify-*/{MANIFEST}")) == []
    assert read_status(run)["next"] == f"can-dist certify {run}"
    refused = can_dist(tmp_path, "export", "policy", "run", "--out", "safer", "--require-certificate")
    assert refused.returncode == 3
    assert "has no certificate" in refused.stderr
    assert not (tmp_path / "safer").exists()
    killed_when(tmp_path, "run/score-*/part-00000.arrow", "certify", "run")
    again = can_dist(tmp_path, "certify", "run")
    assert again.returncode == 0, again.stderr
    assert len(read_looks(run)) == 1
    certificate = load_artifact(next(run.glob("certify-*")))
    assert {row["answer"] for row in certificate.read_json(CERTIFICATE)["constraints"]} == {CERTIFIED}
    assert certificate.input("scores_reference").num_rows == 2 * NUM_SEALED
    assert digests(run) == digests(calm)
    assert again.stdout.splitlines()[:-1] == undisturbed.stdout.splitlines()[:-1]
    assert verify_run(run)[1] == []

    exported = can_dist(tmp_path, "export", "policy", "run", "--out", "safer", "--require-certificate")
    assert exported.returncode == 0, exported.stderr
    assert "**CERTIFIED at a joint error of 0.0304" in (tmp_path / "safer" / "README.md").read_text(encoding="utf-8")
    ledger = (run / LEDGER).read_bytes()
    missed = can_dist(tmp_path, "certify", "run", "--delta", "0.05")
    assert missed.returncode == 0
    assert (run / LEDGER).read_bytes() == ledger
    change(run, "constraints.calm.margin", 5.0)
    assert can_dist(tmp_path, "certify", "run").returncode == 4
    refused = can_dist(tmp_path, "export", "policy", "run", "--out", "other", "--require-certificate")
    assert refused.returncode == 3
    assert "NOT CERTIFIED" in refused.stderr
