"""The command line on a whole run with real models, Ray and two DeepSpeed ranks; then reuse, change, interruption."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader import NUM_PROMPTS, README, reader_folder, readme_block
from ruamel.yaml import YAML

CAN_DIST = str(Path(sys.executable).parent / "can-dist")


def can_dist(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([CAN_DIST, *arguments], cwd=folder, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader of the README: their models and data under its names, and its configuration."""
    folder = reader_folder(tmp_path_factory.mktemp("reader"))
    prompts = [json.loads(line)["prompt"] for line in (folder / "my_prompts.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": p, "response_0": f"{p} w1", "response_1": "w2 w3", "better_response_id": 0, "safer_response_id": 1,
         "is_response_0_safe": False, "is_response_1_safe": True}
        for p in prompts
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    scores = np.random.default_rng(0).normal(size=(2, 800))
    ids = [f"p{n // 8}" for n in range(800)]
    pq.write_table(pa.table({"prompt_id": ids, "reward": scores[0], "safety": scores[1]}), folder / "my_scores.parquet")
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """One whole run."""
    result = can_dist(folder, "run", "my.yaml", "--run", "runs/mine")
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "mine"


def manifests(run: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in run.glob("*-*/MANIFEST.json")}


def stages_in(run: Path, event: str, since: int = 0) -> list[str]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()[since:]]
    return [line["stage"] for line in lines if line.get("event") == event]


def log_length(run: Path) -> int:
    return len((run / "log.jsonl").read_text().splitlines())


def test_whole_run_leaves_every_artifact_with_verified_lineage(folder: Path, finished: Path) -> None:
    made = {name.split("-")[0] for name in manifests(finished)}
    assert made == {"prompts", "generate", "score", "scores", "solve", "label", "train", "evaluate"}
    verified = can_dist(folder, "verify", "runs/mine")
    assert verified.returncode == 0, verified.stderr
    assert f"{len(manifests(finished))} artifacts" in verified.stdout
    resolved = YAML(typ="safe", pure=True).load(finished / "config.yaml")
    assert resolved["train"]["max_grad_norm"] == 1.0
    assert not list(finished.rglob(".tmp-*"))


def test_report_of_a_run_is_consistent_with_its_tables(finished: Path) -> None:
    report = json.loads(next(finished.glob("evaluate-*/report.json")).read_text())
    assert report["num_train_prompts"] == NUM_PROMPTS - 64
    assert report["num_test_prompts"] == 64
    assert report["constraints"][0]["margin"] == 1.0
    means = {who: sum(values) / len(values) for who, values in report["scores"]["safety"].items()}
    realised = report["constraints"][0]["realised"]["mean"]
    assert realised == pytest.approx(means["policy"] - means["reference"], abs=1e-9)
    assert "<html" in next(finished.glob("evaluate-*/report.html")).read_text()


def test_policy_loads_in_plain_transformers_and_differs_from_the_reference(folder: Path, finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = next(finished.glob("train-*")) / "policy"
    policy, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    reference = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert any(not p.equal(q) for p, q in zip(policy.parameters(), reference.parameters(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(path).chat_template
        == AutoTokenizer.from_pretrained(folder / "my-model").chat_template
    )
    assert not (path.parent / "checkpoints").exists()


def test_same_command_again_computes_nothing(folder: Path, finished: Path) -> None:
    before, since = manifests(finished), log_length(finished)
    again = can_dist(folder, "run", "my.yaml", "--run", "runs/mine")
    assert again.returncode == 0
    assert manifests(finished) == before
    assert not stages_in(finished, "started", since)


def test_runtime_settings_recompute_nothing(folder: Path, finished: Path) -> None:
    since = log_length(finished)
    result = can_dist(folder, "run", "my.yaml", "--run", "runs/mine", "--set", "cluster.num_actors=1")
    assert result.returncode == 0
    assert not stages_in(finished, "started", since)


def test_changed_margin_scores_nothing_again_and_says_why(folder: Path, finished: Path) -> None:
    before, since = manifests(finished), log_length(finished)
    change = ("--set", "constraints.safety.margin=0.25")
    result = can_dist(folder, "label", "my.yaml", "--run", "runs/mine", *change)
    assert result.returncode == 0, result.stderr
    assert stages_in(finished, "started", since) == ["solve", "label"]
    assert "constraints.safety.margin was 1.0, is 0.25" in result.stderr
    assert before.items() <= manifests(finished).items()


def test_damaged_score_is_found_before_it_is_used(folder: Path, finished: Path) -> None:
    import shutil

    copy = finished.parent / "damaged"
    shutil.copytree(finished, copy)
    part = next(copy.glob("scores-*/part-00000.arrow"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    verified = can_dist(folder, "verify", "runs/damaged")
    assert verified.returncode == 3
    assert f"{part.relative_to(folder)}: the content changed" in verified.stderr
    for stage in copy.glob("solve-*"):
        shutil.rmtree(stage)
    for stage in copy.glob("scores-*"):
        if stage != part.parent:
            shutil.rmtree(stage)
    solved = can_dist(folder, "solve", "my.yaml", "--run", "runs/damaged")
    if part.parent.name in solved.stderr:  # the damaged table was the training one
        assert solved.returncode == 3
        assert "the content changed since it was committed" in solved.stderr


def test_infeasible_margin_stops_before_training_with_exit_4(folder: Path, finished: Path) -> None:
    before = sorted(path.name for path in finished.glob("train-*"))
    result = can_dist(folder, "run", "my.yaml", "--run", "runs/mine", "--set", "constraints.safety.margin=50")
    assert result.returncode == 4
    assert "InfeasibleConstraint: no policy supported on this table meets the constraints." in result.stderr
    assert "safety: margin 50.00 requested, at most " in result.stderr
    assert sorted(path.name for path in finished.glob("train-*")) == before


def test_pairs_of_a_preference_data_set_can_be_labelled_instead(folder: Path, finished: Path) -> None:
    options = ("label.pairs=preferences", "label.preferences.source=pairs.jsonl", "label.labels=sampled")
    arguments = [word for option in options for word in ("--set", option)]
    result = can_dist(folder, "label", "my.yaml", "--run", "runs/mine", *arguments)
    assert result.returncode == 0, result.stderr
    assert "PKU-SafeRLHF" in result.stderr
    newest = Path(folder / result.stdout.strip())
    with pa.memory_map(str(newest / "part-00000.arrow")) as source:
        rows = pa.ipc.open_file(source).read_all().to_pylist()
    assert len(rows) == NUM_PROMPTS - 64
    assert {tuple(row["target"]) for row in rows} <= {(0.0, 1.0), (1.0, 0.0)}
    assert all(row["texts"][1] == "w2 w3" and row["texts"][0].endswith(" w1") for row in rows)


@pytest.mark.slow  # two whole runs
def test_f07_driver_stopped_by_sigterm_exits_75_and_the_same_command_completes(folder: Path) -> None:
    """Stop the driver while it generates; nothing finished is lost, and the artifacts are those of a calm run."""
    options = ("--set", "generate.max_new_tokens=32", "--set", "generate.shard_prompts=4")
    arguments = [CAN_DIST, "generate", "my.yaml", "--run", "runs/stopped", *options]
    process = subprocess.Popen(arguments, cwd=folder, stderr=subprocess.PIPE, text=True)
    run = folder / "runs" / "stopped"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(run.glob("generate-*/part-*.arrow")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "finished shards are kept, run again to continue" in stderr
    kept = len(list(run.glob("generate-*/part-*.arrow")))
    assert 1 <= kept < 7
    assert not list(run.glob("generate-*/MANIFEST.json"))
    assert subprocess.run(arguments, cwd=folder, capture_output=True).returncode == 0
    calm = subprocess.run([*arguments[:4], "runs/calm", *options], cwd=folder, capture_output=True)
    assert calm.returncode == 0
    assert manifests(run) == manifests(folder / "runs" / "calm")


@pytest.mark.slow
def test_f07_killed_driver_leaves_a_run_that_the_same_command_completes(folder: Path, finished: Path) -> None:
    """kill -9 in the middle of a run: the lock is free again, and the digests are those of the undisturbed run."""
    run = folder / "runs" / "killed"
    arguments = [CAN_DIST, "solve", "my.yaml", "--run", "runs/killed"]
    process = subprocess.Popen(arguments, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(run.glob("score-*/STAGE.json")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert manifests(run).items() <= manifests(finished).items()


@pytest.mark.slow
def test_every_readme_command_about_the_readers_own_run_works(folder: Path, finished: Path) -> None:
    """All commands of the README, as printed, one after the other, and a launched training.

    But the two ``make`` lines (test_demo.py runs the demo).
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    blocks = README.read_text(encoding="utf-8").count("```bash")
    commands = [line for n in range(blocks) for line in readme_block("bash", n).splitlines() if line.strip()]
    made = [line for line in commands if line.startswith("make ")]
    assert made == ["make demo", "make test"]
    launched = [
        "can-dist label my.yaml --run runs/launched",
        "deepspeed --num_gpus 2 --module can_dist.train --config my.yaml --run runs/launched",
    ]
    for command in [*commands, *launched]:
        if command in made:
            continue
        result = subprocess.run(
            shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, f"{command}\n{result.stderr}"
    assert len(list(finished.glob("train-*/MANIFEST.json"))) == 2, "one policy for each margin"
    assert list(folder.glob("runs/launched/train-*/policy/model.safetensors"))
