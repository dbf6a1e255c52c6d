"""``can-dist status`` beside a real run: while it goes on, after it was killed, and after its next command."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from ray_head import BIN
from ruamel.yaml import YAML
from tiny import make_tiny_lm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WORDS = [f"w{i}" for i in range(12)]


def status(folder: Path) -> dict:
    command = [str(BIN / "can-dist"), "status", "runs/mine", "--json"]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout)


def test_status_follows_a_run_through_a_kill_to_its_end(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)
    prompts = [f"{a} {b}" for a in WORDS[:6] for b in WORDS[6:10]]
    # ids that would lead out of the run directory, if they were ever part of a path (S6)
    rows = [{"prompt_id": f"../../outside-{n}", "prompt": prompt} for n, prompt in enumerate(prompts)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "beta": 0.5,
        "prompts": {"source": "prompts.jsonl", "num_test": 4, "num_validation": 0}, "strength": 1,
        "reference": {"model": "lm"},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.05}},
        "generate": {"num_responses": 16, "max_new_tokens": 24, "batch_prompts": 1, "shard_prompts": 1},
        "label": {"pairs_per_prompt": 6},
        "train": {
            "learning_rate": 1e-3, "batch_size": 12, "num_epochs": 20, "log_every": 1,
            "checkpoint_every": 2, "ds_config": str(ROOT / "ds_configs" / "zero3_cpu.json"),
        },
        "evaluate": {"num_responses": 4},
    }  # fmt: skip
    with (tmp_path / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    command = [str(BIN / "can-dist"), "run", "my.yaml", "--run", "runs/mine"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen: dict[tuple[str, str], dict] = {}
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "runs/mine/log.jsonl").is_file():
            now = status(tmp_path)
            assert now["owner"] is None or now["owner"]["alive"]
            seen |= {(stage["stage"], stage["state"]): stage for stage in now["stages"]}
        if (
            seen.get(("train", "in progress"), {}).get("checkpoint")
            and seen["train", "in progress"].get("step", 0) >= 4
        ):
            break
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.send_signal(signal.SIGKILL)
    process.wait()
    generating = seen["generate", "in progress"]
    assert generating["shards_total"] == 20
    assert 0 <= generating["shards_done"] < 20
    after = status(tmp_path)
    assert after["owner"] == {**after["owner"], "process": process.pid, "alive": False}
    [training] = [stage for stage in after["stages"] if stage["stage"] == "train"]
    assert training["state"] == "interrupted"
    assert training["step"] >= 4
    assert training["steps_total"] > training["step"], "the kill came too late to test anything"
    again = subprocess.run(
        [str(BIN / "can-dist"), *shlex.split(after["next"])[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "going on from checkpoint" in again.stderr
    end = status(tmp_path)
    assert {stage["state"] for stage in end["stages"]} == {"finished"}
    assert end["next"] == "can-dist verify runs/mine"
    assert end["owner"] is None
    assert list(tmp_path.rglob("*outside*")) == []
    assert list(tmp_path.parent.glob("*outside*")) == []
