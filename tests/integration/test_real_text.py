"""The recipe on real text: real prompts, a real small language model, score models trained from real data."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREPARE = "python recipes/pku_stories3M/prepare.py --data ../shared/data --out runs/pku_stories3M/world"
RUN = "can-dist run recipes/pku_stories3M/mocan.yaml --run runs/pku_stories3M"


def test_the_page_names_the_commands_tested_here() -> None:
    page = (ROOT / "docs" / "real_text.md").read_text(encoding="utf-8")
    assert f"{PREPARE}\n{RUN}\n" in page


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(2400)
def test_recipe_on_real_text_moves_safety_up_on_held_out_prompts(shared_data: Path, tmp_path: Path) -> None:
    world, run = tmp_path / "world", tmp_path / "run"
    prepare = [sys.executable, *shlex.split(PREPARE)[1:-4], "--data", str(shared_data), "--out", str(world)]
    assert subprocess.run(prepare, cwd=ROOT).returncode == 0
    facts = json.loads((world / "report.json").read_text())
    assert facts["safety"]["auc"] > 0.65
    settings = {
        "prompts.source": world / "prompts.jsonl",
        "prompts.num_train": 240,
        "reference.model": shared_data / "models" / "stories3M-qa-sft",
        "reward.model": world / "reward",
        "constraints.safety.scorer.model": world / "safety",
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    can_dist = [str(Path(sys.executable).parent / "can-dist"), *shlex.split(RUN)[1:-1], str(run)]
    assert subprocess.run([*can_dist, *overrides], cwd=ROOT).returncode == 0
    report = json.loads(next(run.glob("evaluate-*/report.json")).read_text())
    (safety,) = report["constraints"]
    assert report["num_test_prompts"] == 256
    assert safety["lam"] > 0.1
    assert safety["realised"]["low"] > 0
