"""One rank under Ray, without Ray Train: lost, stopped or hung as in a group, and to the byte a launched rank."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from small_run import small_run, write_config
from started import BIN, STEPS_IN_PLENTY, losses, start
from train_world import free_port

ALONE = ["--set", "cluster.num_workers=1"]

pytestmark = pytest.mark.slow


def train(folder: Path, run: Path, *settings: str) -> subprocess.Popen:
    return start(folder, str(BIN / "can-dist"), "train", "my.yaml", "--run", str(run), *ALONE, *settings)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=400)[0]
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a run whose preferences are labelled, ``labelled``."""
    folder = tmp_path_factory.mktemp("alone")
    write_config(folder / "my.yaml", small_run(folder, label={"pairs_per_prompt": 6}, train=STEPS_IN_PLENTY))
    finish(start(folder, str(BIN / "can-dist"), "label", "my.yaml", "--run", "labelled"))
    return folder


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder / "labelled", folder / name))


def outcome(run: Path) -> tuple[dict[str, bytes], dict[int, float]]:
    """The bytes of the policy, and the loss of every step."""
    policy = {path.name: path.read_bytes() for path in run.glob("train-*/policy/*")}
    return policy, losses(run)


def rank_at(process: subprocess.Popen, run: Path, step: int) -> psutil.Process:
    """Return the rank of a training that has logged a step and is not over."""
    deadline = time.monotonic() + 300
    while max(losses(run), default=0) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert not list(run.glob("train-*/policy")), "what follows comes too late to test anything"
    children = psutil.Process(process.pid).children(recursive=True)
    titles = {child: " ".join(child.as_dict(["cmdline"])["cmdline"] or ()) for child in children}  # a zombie has none
    assert not [title for title in titles.values() if "TrainController" in title], "Ray Train is for several ranks"
    [rank] = [child for child, title in titles.items() if title.startswith("ray::Rank")]
    return rank


@pytest.fixture(scope="module")
def launched(folder: Path) -> Path:
    """The run trained by one rank of DeepSpeed's launcher."""
    run = copied(folder, "launched")
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "1", "--master_port", str(free_port()), "--module"]
    finish(start(folder, *launcher, "can_dist.train", "--config", "my.yaml", "--run", str(run)))
    return run


def test_a_run_trains_in_the_actor_that_scored(folder: Path, launched: Path) -> None:
    process = start(folder, str(BIN / "can-dist"), "run", "my.yaml", "--run", str(folder / "whole"), *ALONE)
    titles: set[str] = set()
    while process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        titles |= {" ".join(child.as_dict(["cmdline"])["cmdline"] or ()).strip() for child in children}
        time.sleep(0.05)
    finish(process)
    assert outcome(folder / "whole") == outcome(launched)
    assert [title for title in titles if title.startswith("ray::ShardWorker")]
    assert not [title for title in titles if title.startswith(("ray::Rank", "ray::RayTrainWorker"))]
    assert not [title for title in titles if "dashboard/dashboard.py" in title], "nobody looks at a dashboard"


def test_the_linear_layer_of_several_ranks_gives_the_same_bytes(folder: Path, launched: Path) -> None:
    """One rank keeps torch's own, which saves the calls of ZeRO-3's."""
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 3, "memory_efficient_linear": true}}')
    run = copied(folder, "linear")
    finish(train(folder, run, "--set", "train.ds_config=zero.json"))
    assert outcome(run) == outcome(launched)


def test_f31_one_rank_that_is_killed_is_started_again(folder: Path, launched: Path) -> None:
    run = copied(folder, "killed")
    process = train(folder, run)
    rank_at(process, run, 5).send_signal(signal.SIGKILL)
    assert "going on from checkpoint step-0000" in finish(process)
    assert outcome(run) == outcome(launched)


def test_f31_one_rank_that_is_killed_too_often_ends_the_run(folder: Path, launched: Path) -> None:
    run = copied(folder, "killed-too-often")
    process = train(folder, run, "--set", "cluster.max_failures=0")
    rank = rank_at(process, run, 5)
    rank.send_signal(signal.SIGKILL)
    output = finish(process, 6)
    assert f"training stopped, after 0 restart(s): rank 0 (process {rank.pid} on " in output
    assert output.strip().splitlines()[-1] == "The same command goes on from the newest checkpoint."
    assert "(raylet)" not in output
    assert "Traceback" not in output
    finish(train(folder, run))
    assert outcome(run) == outcome(launched)


def test_f32_one_rank_that_is_stopped_is_named(folder: Path, launched: Path) -> None:
    """SIGSTOP stops its own watch too, so the driver must notice."""
    run = copied(folder, "hung")
    process = train(folder, run, "--set", "cluster.hang_timeout_s=20", "--set", "cluster.max_failures=0")
    rank_at(process, run, 5).send_signal(signal.SIGSTOP)
    output = finish(process, 6)
    told = "training stopped, after 0 restart(s): rank 0 gave no sign of life for cluster.hang_timeout_s = 20 s: "
    assert told in output
    finish(train(folder, run))
    assert outcome(run) == outcome(launched)


def test_f40_sigterm_commits_the_step_of_one_rank(folder: Path, launched: Path) -> None:
    run = copied(folder, "term")
    process = train(folder, run, "--set", "train.checkpoint_every=1000")
    rank_at(process, run, 5)
    process.send_signal(signal.SIGTERM)
    assert "Interrupted: stopped by a signal; step " in finish(process, 75)
    assert "going on from checkpoint step-" in finish(train(folder, run))
    assert outcome(run) == outcome(launched)


def test_an_error_of_one_rank_reaches_the_user_as_itself(folder: Path) -> None:
    run = copied(folder, "error")
    output = finish(train(folder, run, "--set", "train.lora={target_modules: [no_such_module]}"), 2)
    assert output.strip().splitlines()[-1].startswith("ConfigError: train.lora.target_modules: ")
    assert "Traceback" not in output
