"""Jobs as a user submits them to a cluster with token authentication: followed, failed, stopped, run again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import BIN, Head, ray_head
from small_run import small_run, write_config

from can_dist.tables.artifacts import load_artifact

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CANARY = "hf_canary_7f3a91c5e2"
PRIVATE = "zebracanary"  # in every prompt
PATIENCE_S = 600  # for a step and its checkpoint, on however busy a machine; what it takes is waited for, no more
ROWS = 240  # of a shard of the job that is stopped, which must not end before


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head whose nodes know a secret, as workers that read private models do, and whose jobs have time to stop."""
    with ray_head({"HF_TOKEN": CANARY, "RAY_JOB_STOP_WAIT_TIME_S": str(PATIENCE_S)}) as head:
        yield head


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    return write_config(folder / "my.yaml", small_run(folder, prompt_end=f" {PRIVATE}"))


def ray(head: Head, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Run ``ray job ...`` as a client that has the token, and the secret too."""
    environment = {**head.environment, "HF_TOKEN": CANARY}
    command = [str(BIN / "ray"), "job", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def submit(head: Head, *arguments: str) -> subprocess.CompletedProcess:
    """Submit with the documented command; a leading ``--no-wait`` or ``--submission-id`` is for ``ray job submit``."""
    split = next(index for index, word in enumerate(arguments) if word.startswith("ray_jobs/"))
    options, entry = arguments[:split], arguments[split:]
    return ray(head, "submit", "--working-dir", ".", *options, "--", "python", *entry)


@pytest.fixture(scope="module")
def finished(head: Head, config: Path) -> tuple[Path, str]:
    """The whole method as one job, followed to its end; its run directory and what the client printed."""
    run = config.parent / "runs" / "whole"
    done = submit(head, "ray_jobs/run.py", str(config), "--run", str(run), "--require-auth")
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stdout + done.stderr


def test_a_request_without_token_is_refused(head: Head) -> None:
    """S1."""
    assert head.ask("/api/jobs/", token=None)[0] == 401
    assert head.ask("/api/jobs/", token="f" * 64)[0] in (401, 403)
    assert head.ask("/api/jobs/")[0] == 200


def test_a_job_is_followed_to_its_end(finished: tuple[Path, str]) -> None:
    run, output = finished
    for line in ("generate (reference on train): done", "train (policy): done", "succeeded"):
        assert line in output
    reports = list(run.glob("evaluate-*/report.html"))
    assert len(reports) == 1
    assert str(reports[0].parent) in output
    assert "warning: the Ray cluster" not in output


def test_a_failing_job_tells_its_error_and_exit_code(head: Head, config: Path) -> None:
    run = str(config.parent / "runs" / "failing")
    done = submit(head, "ray_jobs/run.py", str(config), "--run", run, "--set", "reference.model=/nowhere/lm")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "DataError: model '/nowhere/lm': no such directory." in output
    assert "exit code 3" in output


def check_metrics(head: Head) -> None:
    """Scrape the exporter of the node, as Prometheus does, until this job's ledger and an actor have reported.

    The exporter goes on telling the numbers of drivers that have ended; the shards of this one have ROWS rows each.
    """
    deadline, found = time.monotonic() + 60, False
    while time.monotonic() < deadline and not found:
        with urllib.request.urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics") as response:
            text = response.read().decode()
        by_labels: dict[str, dict[str, float]] = {}
        for name, labels, value in re.findall(r"^ray_can_dist_(\w+)\{([^}]*)\} (\S+)$", text, flags=re.MULTILINE):
            if 'work="generate (reference on train)"' in labels:
                by_labels.setdefault(labels, {})[name] = float(value)
        reporters = list(by_labels.values())
        ledger = any(
            one.get("rows_done_total") == ROWS * one.get("shards_done_total", 0) > 0
            and 0 < one.get("shards_waiting", 0) < 20
            for one in reporters
        )
        found = ledger and any("shard_seconds_count" in one for one in reporters)
        time.sleep(0.2)
    assert found, text[-3000:]


def test_a_stopped_job_goes_on_when_submitted_again(head: Head, config: Path, finished: tuple[Path, str]) -> None:
    run = config.parent / "runs" / "stopped"
    keys = ("max_new_tokens=48", f"num_responses={ROWS}", "batch_prompts=1", "shard_prompts=1")
    slow = [word for key in keys for word in ("--set", f"generate.{key}")]
    entry = ["ray_jobs/stage.py", "generate", str(config), "--run", str(run), *slow]
    started = submit(head, "--no-wait", "--submission-id", "to-be-stopped", *entry)
    assert started.returncode == 0, started.stderr
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(run.glob("generate-*/part-*.arrow")):
        time.sleep(0.05)
    check_metrics(head)
    assert "RUNNING" in ray(head, "status", "to-be-stopped").stdout
    assert ray(head, "stop", "to-be-stopped").returncode == 0
    assert "was stopped" in ray(head, "status", "to-be-stopped").stdout
    assert "finished shards are kept, run again to continue" in ray(head, "logs", "to-be-stopped").stdout
    kept = {path: path.stat().st_mtime_ns for path in run.glob("generate-*/part-*.arrow")}
    assert kept
    assert not list(run.glob("generate-*/MANIFEST.json")), "the stop came too late to test anything"
    again = submit(head, *entry)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(run.glob("generate-*/MANIFEST.json"))) == 1


def digests(run: Path) -> dict[str, str]:
    """Return the digest of every artifact of a run."""
    return {path.parent.name: load_artifact(path.parent).digest for path in run.glob("*/MANIFEST.json")}


def last_step(run: Path) -> int:
    """Return the newest step in the metrics of a run's training; 0 before the first."""
    lines = [line for path in run.glob("train-*/metrics.jsonl") for line in path.read_text().split("\n")[:-1]]
    return max((int(json.loads(line)["step"]) for line in lines), default=0)


def test_f40_a_stopped_training_commits_its_step_and_goes_on_when_submitted_again(
    head: Head, config: Path, finished: tuple[Path, str]
) -> None:
    run = config.parent / "runs" / "stopped-training"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("train-*", "evaluate-*"))
    patience = ["--set", f"cluster.stop_grace_s={PATIENCE_S}"]
    entry = ["ray_jobs/run.py", str(config), "--run", str(run), "--require-auth", *patience]
    started = submit(head, "--no-wait", "--submission-id", "training", *entry)
    assert started.returncode == 0, started.stderr
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and last_step(run) < 1:
        time.sleep(0.05)
    assert ray(head, "stop", "training", timeout=2 * PATIENCE_S).returncode == 0
    told = ray(head, "status", "training").stdout + ray(head, "logs", "training").stdout
    stopped = last_step(run)
    assert stopped >= 1, f"no step was made:\n{told}"
    assert "was stopped" in told
    commits = [path.parent.name for path in run.glob("train-*/checkpoints/*/COMMIT.json")]
    # where the client of `ray job stop` is slower than the training, the policy is what is kept
    whole = bool(list(run.glob("train-*/MANIFEST.json")))
    kept = "the policy" if whole else f"step {stopped}"
    assert f"Interrupted: stopped by a signal; {kept} is committed, run again to continue." in told
    assert whole or commits == [f"step-{stopped:06d}"]
    again = submit(head, *entry)
    assert again.returncode == 0, again.stdout + again.stderr
    goes_on = "train (policy): reusing" if whole else f"going on from checkpoint step-{stopped:06d}"
    assert goes_on in again.stdout + again.stderr
    assert digests(run) == digests(finished[0])


def files_of(run: Path, head: Head) -> tuple[list[Path], list[Path]]:
    """Return the files of a run, and the logs of a cluster."""
    logs = [path for path in (head.temporary / "ray").glob("session_2*/logs/**/*") if path.is_file()]
    assert any(path.name.startswith("job-driver") for path in logs)
    return [path for path in run.rglob("*") if path.is_file()], logs


def test_s2_secret_of_the_environment_is_nowhere_in_run_logs_and_job_metadata(
    head: Head, finished: tuple[Path, str]
) -> None:
    run, output = finished
    status, jobs = head.ask("/api/jobs/")
    assert status == 200
    assert "ray_jobs/run.py" in jobs
    assert CANARY not in output + jobs
    ours, logs = files_of(run, head)
    assert [path for path in [*ours, *logs] if CANARY.encode() in path.read_bytes()] == []


def test_s8_prompts_are_in_artifacts_and_not_in_logs(head: Head, finished: tuple[Path, str]) -> None:
    run, output = finished
    ours, logs = files_of(run, head)
    assert PRIVATE not in output
    assert [path for path in [run / "log.jsonl", *logs] if PRIVATE.encode() in path.read_bytes()] == []
    private = [path for path in ours if PRIVATE.encode() in path.read_bytes()]
    holders = {path.name if path.parent == run else path.parent.name.partition("-")[0] for path in private}
    pages = {"solve", "evaluate", "belief.html", "report.html"}  # which begin what they say of a prompt with its text
    assert holders <= {"prompts", "pairs", "generate", "label"} | pages
    assert "prompts" in holders


def test_doctor_looks_at_the_cluster(head: Head, config: Path) -> None:
    """Reached with its token; without it, the finding says so."""
    command = [str(BIN / "can-dist"), "doctor", "--config", str(config), "--set", f"cluster.address={head.address}"]
    environment = {name: value for name, value in head.environment.items() if name != "RAY_ADDRESS"}
    good = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0, good.stdout + good.stderr
    assert re.search(rf"^ok +Ray +{head.address}: Ray ", good.stdout, flags=re.MULTILINE)
    assert re.search(r"^ok +Ray authentication +the job server refuses strangers", good.stdout, flags=re.MULTILINE)
    assert re.search(r"^ok +Ray resources +4 CPU, 0 GPU$", good.stdout, flags=re.MULTILINE)
    strange = environment | {"RAY_AUTH_MODE": "disabled"}
    bad = subprocess.run(command, cwd=ROOT, env=strange, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 6, bad.stdout + bad.stderr
    assert re.search(rf"^error +Ray +Ray at {head.address} cannot be reached", bad.stdout, flags=re.MULTILINE)
    assert "export RAY_AUTH_MODE=token" in bad.stdout
