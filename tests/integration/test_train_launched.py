"""Training as a user starts it: by the deepspeed launcher, and by Ray Train inside a run; both on a labelled run."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import loopback_nodes
import psutil
import pytest
from ruamel.yaml import YAML
from started import BIN, ENVIRONMENT, STEPS_IN_PLENTY, losses, start
from tiny import make_tiny_lm
from train_world import free_port

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(12)]
RAY_TRAIN = [str(BIN / "can-dist"), "train", "my.yaml", "--run"]
RARELY = ["--set", "train.checkpoint_every=1000"]  # where it is saved is no part of what is trained


def deepspeed(folder: Path, run: Path, *arguments: str) -> subprocess.Popen:
    """Start two ranks with DeepSpeed's launcher, on a port of their own."""
    port = str(free_port())
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, "--module", "can_dist.train"]
    return start(folder, *launcher, "--config", "my.yaml", "--run", str(run), *arguments)


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Return all output of a process; its ``returncode`` is set."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        pytest.fail(f"no end within {timeout} s:\n{process.communicate()[0]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a run whose preferences are labelled, ``runs/labelled``."""
    folder = tmp_path_factory.mktemp("user")
    make_tiny_lm(folder / "lm", WORDS)
    prompts = [f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:10]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    config = {
        "seed": 1,
        "beta": 0.5,
        "prompts": {"source": "prompts.jsonl", "num_test": 4, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {
            "calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.05},
        },
        "generate": {"num_responses": 4, "max_new_tokens": 6, "batch_prompts": 4, "shard_prompts": 20},
        "label": {"validation_fraction": 0.2, "pairs_per_prompt": 6},
        "train": STEPS_IN_PLENTY,
    }
    with (folder / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    process = start(folder, str(BIN / "can-dist"), "label", "my.yaml", "--run", "runs/labelled")
    output = finish(process)
    assert process.returncode == 0, output
    return folder


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder / "runs" / "labelled", folder / "runs" / name))


def policy_bytes(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("train-*/policy/*")}


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Return as soon as a training has logged a step, before it is over."""
    deadline = time.monotonic() + 200
    while max(losses(run), default=0) < step and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert not list(run.glob("train-*/policy")), "what follows comes too late to test anything"


def ray_workers(process: subprocess.Popen, run: Path, step: int) -> list[psutil.Process]:
    """Return the two ranks of a training that is at a step."""
    wait_for_step(process, run, step)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return workers


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[Path, str]:
    """The run trained by ``deepspeed --module can_dist.train``, and what that printed."""
    run = copied(folder, "launched")
    process = deepspeed(folder, run)
    output = finish(process)
    assert process.returncode == 0, output
    return run, output


def test_deepspeed_launcher_trains_and_commits_a_labelled_run(folder: Path, launched: tuple[Path, str]) -> None:
    run, output = launched
    stage = next(run.glob("train-*"))
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-3)
    listed = [entry["file"] for entry in json.loads((stage / "MANIFEST.json").read_text())["files"]]
    assert {
        "curve.json",
        "policy_probe.json",
        "policy/model.safetensors",
        "policy/config.json",
        "policy/tokenizer.json",
    } <= set(listed)
    assert not (stage / "checkpoints").exists(), "a finished policy needs no checkpoints"
    assert not (stage / "tensorboard").exists(), "trackers are off by default"
    ours = output.partition("train (policy): started")[2]  # before it the launcher speaks
    for noise in ("Traceback", "Warning", "WARNING", "not sharded", "Setting accelerator"):
        assert noise not in ours, ours
    verified = start(folder, str(BIN / "can-dist"), "verify", str(run))
    assert "every digest and every input as recorded" in finish(verified)


@pytest.mark.slow
def test_f31_ray_train_survives_the_loss_of_a_rank_and_ends_with_the_same_policy(
    folder: Path, launched: tuple[Path, str]
) -> None:
    run = copied(folder, "ray")
    process = start(folder, *RAY_TRAIN, str(run))
    workers = ray_workers(process, run, 5)
    workers[1].send_signal(signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "going on from checkpoint step-0000" in output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])
    assert not list(run.glob("train-*/checkpoints")) + list(run.glob("train-*/ray"))


def newest_checkpoint(run: Path) -> int:
    """Return the step of the newest committed checkpoint of a run's training; 0 when there is none."""
    return max((int(p.parent.name[5:]) for p in run.glob("train-*/checkpoints/step-*/COMMIT.json")), default=0)


@pytest.mark.slow
def test_f31_ranks_killed_more_often_than_allowed_end_the_run_which_the_same_command_finishes(folder: Path) -> None:
    run = copied(folder, "killed-twice")
    often = ["--set", "train.checkpoint_every=2", "--set", "train.num_epochs=6"]  # time enough for two kills
    process = start(folder, *RAY_TRAIN, str(run), *often)
    ray_workers(process, run, 3)[1].send_signal(signal.SIGKILL)
    [victim, _] = ray_workers(process, run, max(losses(run)) + 4)
    victim.send_signal(signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 6, output
    assert output.count("going on from checkpoint step-0000") == 1, output
    last = output.strip().splitlines()[-1]
    assert last == "The same command goes on from the newest checkpoint.", output
    assert re.search(r"EnvironmentProblem: training stopped, after 1 restart\(s\): rank [01] \(process ", output), (
        output
    )
    assert f"(process {victim.pid} on " in output
    assert "died. Killed, out of memory, or its node was lost" in output
    assert "Traceback" not in output
    kept = newest_checkpoint(run)
    assert kept >= 4
    again = start(folder, *RAY_TRAIN, str(run), *often)
    output = finish(again)
    assert again.returncode == 0, output
    assert f"going on from checkpoint step-{kept:06d}" in output
    undisturbed = copied(folder, "not-killed")
    process = start(folder, *RAY_TRAIN, str(undisturbed), *often)
    output = finish(process)
    assert process.returncode == 0, output
    assert losses(run) == losses(undisturbed)
    assert policy_bytes(run) == policy_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes_end_with_the_same_policy(folder: Path, launched: tuple[Path, str], launcher: str) -> None:
    """Two launches on loopback are two nodes to torchrun, and to DeepSpeed with a hostfile, ssh left out."""
    run = copied(folder, f"two-nodes-{launcher}")
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    meet = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    if launcher == "torchrun":
        kind, module = ["--nnodes", "2", "--nproc_per_node", "1"], ["-m", "--", "can_dist.train"]
    else:
        kind, module = ["--hostfile", "hosts", "--no_ssh"], ["--module", "can_dist.train"]
    nodes = [
        start(folder, str(BIN / launcher), *kind, "--node_rank", str(node), *meet, *module, "--config", "my.yaml",
              "--run", str(run))
        for node in range(2)
    ]  # fmt: skip
    for node in nodes:
        output = finish(node)
        assert node.returncode == 0, output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])


def installed(*programs: str) -> None:
    missing = loopback_nodes.missing(programs)
    if missing:
        pytest.skip(f"not installed here: {', '.join(missing)}")


@pytest.mark.slow
def test_deepspeed_over_ssh_ends_with_the_same_policy(folder: Path, launched: tuple[Path, str], tmp_path: Path) -> None:
    """A hostfile of two addresses of this machine; pdsh reaches both over real ssh, as docs/clusters.md has it."""
    installed(*loopback_nodes.SSH_PROGRAMS)
    run = copied(folder, "over-ssh")
    (folder / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    with loopback_nodes.ssh(tmp_path) as variables:
        command = ["deepspeed", "--hostfile", "hosts", "--master_addr", "127.0.0.1", "--master_port", str(free_port()),
                   "--module", "can_dist.train", "--config", "my.yaml", "--run", str(run)]  # fmt: skip
        process = start(folder, *command, env={**ENVIRONMENT, "PATH": f"{BIN}{os.pathsep}{variables['PATH']}"})
        output = finish(process)
    assert process.returncode == 0, output
    assert "Running on the following workers: 127.0.0.1,127.0.0.2" in output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])


SRUN = re.search(r"^srun .*$", (ROOT / "docs" / "clusters.md").read_text(), re.MULTILINE)


@pytest.mark.slow
def test_srun_on_two_nodes_ends_with_the_same_policy(folder: Path, launched: tuple[Path, str], tmp_path: Path) -> None:
    """The command of docs/clusters.md, with one process a node and this run's paths."""
    installed(*loopback_nodes.SLURM_PROGRAMS)
    run = copied(folder, "srun")
    assert SRUN is not None
    command = SRUN[0].replace("--nproc_per_node 8", "--nproc_per_node 1").replace("/shared/runs/mine", str(run))
    command = command.replace("--master_port 29500", f"--master_port {free_port()}")
    with loopback_nodes.slurm(tmp_path) as variables:
        process = start(folder, *shlex.split(command)[:1], "--nodes=2", *shlex.split(command)[1:],
                        env={**ENVIRONMENT, **variables})  # fmt: skip
        output = finish(process)
    assert process.returncode == 0, output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])


@pytest.mark.slow
def test_f32_hang_under_ray_is_named_and_the_same_command_finishes(folder: Path, launched: tuple[Path, str]) -> None:
    run = copied(folder, "ray-hang")
    process = start(
        folder, *RAY_TRAIN, str(run), "--set", "cluster.hang_timeout_s=20", "--set", "cluster.max_failures=0"
    )
    workers = ray_workers(process, run, 5)
    workers[1].send_signal(signal.SIGSTOP)
    output = finish(process)
    assert process.returncode == 6, output
    last = output.strip().splitlines()[-1]
    assert "EnvironmentProblem: training stopped, after 0 restart(s): training made no progress for " in last
    assert f"(process {workers[1].pid} on " in last
    assert "gave no sign of life since then" in last
    again = start(folder, *RAY_TRAIN, str(run))
    output = finish(again)
    assert again.returncode == 0, output
    assert "going on from checkpoint step-0000" in output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "code"),
    [("ray", 75), ("deepspeed", -signal.SIGTERM), ("torchrun", 1)],
    ids=["ray", "deepspeed", "torchrun"],
)
def test_f40_sigterm_commits_the_step_and_the_same_command_finishes(
    folder: Path, launched: tuple[Path, str], launcher: str, code: int
) -> None:
    """Exit code 75 of what is ours; the launchers have their own, and ``deepspeed`` hands no signal on."""
    run = copied(folder, f"term-{launcher}")
    process = train_with(launcher, folder, run)
    wait_for_step(process, run, 5)
    told = psutil.Process(process.pid).children(recursive=True) if launcher == "deepspeed" else []
    for one in (*told, process):
        one.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == code, output
    assert "Interrupted: stopped by a signal; step " in output
    stopped = max(losses(run))
    [checkpoint] = run.glob("train-*/checkpoints/step-*")  # none was due before
    assert checkpoint.name == f"step-{stopped:06d}"
    assert f"step {stopped} is committed, run again to continue" in output
    again = train_with(launcher, folder, run)
    output = finish(again)
    assert again.returncode == 0, output
    assert f"going on from checkpoint step-{stopped:06d}" in output
    assert losses(run) == losses(launched[0])
    assert policy_bytes(run) == policy_bytes(launched[0])


def train_with(launcher: str, folder: Path, run: Path) -> subprocess.Popen:
    if launcher == "ray":
        return start(folder, *RAY_TRAIN, str(run), *RARELY)
    if launcher == "deepspeed":
        return deepspeed(folder, run, *RARELY)
    torchrun = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "--"]
    return start(folder, *torchrun, "can_dist.train", "--config", "my.yaml", "--run", str(run), *RARELY)


@pytest.mark.slow
def test_f41_stale_build_lock_is_named_by_launched_ranks_and_not_waited_for(folder: Path, tmp_path: Path) -> None:
    """The other node's cache is seen by its own rank only, and all ranks say so."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 3600,) * 2)
    run = copied(folder, "stale-lock")
    port = str(free_port())
    command = ["-m", "can_dist.train", "--config", "my.yaml", "--run", str(run)]
    ranks = []
    for rank in range(2):
        environment = ENVIRONMENT | {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCH_EXTENSIONS_DIR": str(tmp_path / ("extensions" if rank == 1 else "empty")),
        }  # fmt: skip
        ranks.append(
            subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        )  # fmt: skip
    for rank in ranks:
        output = finish(rank, timeout=120)
        assert rank.returncode == 6, output
        assert "on rank 1 only: a killed build of a DeepSpeed extension left its lock" in output
        assert f"delete {lock}." in output


@pytest.mark.slow
def test_error_in_ray_workers_reaches_the_user_as_itself(folder: Path) -> None:
    run = copied(folder, "ray-error")
    lora = "train.lora={target_modules: [no_such_module]}"
    process = start(folder, *RAY_TRAIN, str(run), "--set", lora)
    output = finish(process)
    assert process.returncode == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("ConfigError: train.lora.target_modules: ")
    assert "no_such_module" in last
    assert "Traceback" not in output
    assert "going on" not in output
    assert not list(run.glob("train-*/MANIFEST.json"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "code", "message"),
    [
        ("train.lora={target_modules: [no_such_module]}", 2, "ConfigError: train.lora.target_modules: "),
        ("generate.top_p=0.5", 3, "DataError: "),
        ("train.no_such_key=1", 2, "ConfigError: "),
    ],
    ids=["worker", "unfinished stage", "configuration"],
)
def test_launched_errors_are_said_once_with_their_exit_code(
    folder: Path, setting: str, code: int, message: str
) -> None:
    run = copied(folder, f"launched-error-{setting.split('=')[0]}")
    process = deepspeed(folder, run, "--set", setting)
    output = finish(process)
    assert process.returncode == code, output
    assert output.count(message) == 1, output
    assert "Traceback" not in output
