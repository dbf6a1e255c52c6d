"""The look before training: ``run --until solve``, ``solve --report``, and the gate ``solve.require``."""

from __future__ import annotations

import html
import json
import subprocess
from pathlib import Path

import pytest
from ray_head import BIN
from ruamel.yaml import YAML
from tiny import make_tiny_lm

pytestmark = pytest.mark.slow

WORDS = [f"w{i}" for i in range(12)]


def can_dist(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "can-dist"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_one_looks_before_training_and_the_gate_holds(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)
    prompts = [f"{a} {b}" for a in WORDS[:4] for b in WORDS[6:10]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    config = {
        "beta": 0.5,
        "prompts": {"source": "prompts.jsonl", "num_test": 4, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.05}},
        "generate": {"num_responses": 4, "max_new_tokens": 8},
    }
    with (tmp_path / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    look = can_dist(tmp_path, "run", "my.yaml", "--run", "r", "--until", "solve")
    assert look.returncode == 0, look.stderr
    assert Path(look.stdout.strip()).name.startswith("solve-")
    page = (tmp_path / "r/belief.html").read_text(encoding="utf-8")
    reason = "Do not trust the prediction or lambda: 12 prompts that can show a change are too few"
    assert reason in html.unescape(page)
    assert reason in look.stderr

    again = can_dist(tmp_path, "solve", "my.yaml", "--run", "r", "--report", "p.html", "--json", "-")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == page
    assert json.loads(again.stdout)["lam"]["calm"] > 0

    for verb in (["run"], ["solve", "--report", "q.html"]):
        refused = can_dist(tmp_path, verb[0], "my.yaml", "--run", "r", *verb[1:], "--set", "solve.require=roughly")
        assert (refused.returncode, refused.stdout) == (8, "")
        assert (
            f"NotBelieved: solve.require is roughly, and the prediction of {Path(look.stdout.strip()).name} is not"
            in (refused.stderr)
        )
        assert "The page: r/belief.html. Nothing was trained. Do what it says" in refused.stderr
        assert "Traceback" not in refused.stderr
    assert (tmp_path / "q.html").read_text(encoding="utf-8") == page
    assert not list((tmp_path / "r").glob("train-*"))
    status = can_dist(tmp_path, "status", "r").stdout
    assert reason in status
    assert "pages: r/belief.html\n" in status
    assert "last error" in status
