"""A method is added by its file, its row and its adapter, and nothing else: a copy of can_dist gets one and runs it."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_run, write_config

from can_dist.tables.artifacts import load_artifact

PACKAGE = Path(__file__).parents[2] / "can_dist"
METHOD = '''"""Toy: the reward plus twice the sum of the constraints, learned by one DPO; no dual."""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.config import Constraint, Model, Scorer
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact


def toy(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
) -> Artifact:
    """Return the policy of the multipliers 2."""
    responses = run.generate(reference, prompts)
    scores = run.score(responses, reward, constraints, reference)
    preferences = run.label(responses, scores, dict.fromkeys(constraints, 2.0), beta)
    return run.train(reference, preferences, beta)
'''
NAME = ('MethodName = Literal["mocan", ', 'MethodName = Literal["toy", "mocan", ')
ROW = (
    "METHODS: dict[str, Method] = {\n",
    "METHODS: dict[str, Method] = {\n"
    '    "toy": Method("Toy", stages=("generate", "score", "label", "train", "evaluate")),\n',
)
IMPORT = (
    "from can_dist.algorithms.sacpo import sacpo\n",
    "from can_dist.algorithms.sacpo import sacpo\nfrom can_dist.algorithms.toy import toy\n",
)
ADAPTER = (
    '    "mocan": lambda run, config, prompts:',
    '    "toy": lambda run, config, prompts: {"": toy(run, **_scored(config, prompts))},\n'
    '    "mocan": lambda run, config, prompts:',
)


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert text.count(before) == 1, (path.name, before)
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def different_files(comparison: filecmp.dircmp[str], folder: str = "") -> set[str]:
    names = {*comparison.diff_files, *comparison.left_only, *comparison.right_only}
    inner = [different_files(inside, f"{folder}{name}/") for name, inside in comparison.subdirs.items()]
    return {f"{folder}{name}" for name in names}.union(*inner)


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """The folder of a copy of can_dist with one method more."""
    copy = tmp_path / "extended" / "can_dist"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "algorithms" / "toy.py").write_text(METHOD, encoding="utf-8")
    edit(copy / "config" / "methods.py", NAME, ROW)
    edit(copy / "algorithms" / "__init__.py", IMPORT, ADAPTER)
    return copy.parent


def can_dist(extended: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(extended), os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-m", "can_dist", *arguments]
    return subprocess.run(command, cwd=extended, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.slow  # a whole run
def test_a_method_is_a_file_a_row_and_an_adapter(extended: Path, tmp_path: Path) -> None:
    changed = different_files(filecmp.dircmp(PACKAGE, extended / "can_dist", ignore=["__pycache__"]))
    assert changed == {"algorithms/toy.py", "algorithms/__init__.py", "config/methods.py"}
    config = write_config(tmp_path / "toy.yaml", {**small_run(tmp_path), "method": "toy"})
    done = can_dist(extended, "run", str(config), "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    [evaluation] = (tmp_path / "run").glob("evaluate-*")
    report = json.loads((evaluation / "report.json").read_text(encoding="utf-8"))
    assert report["method"] == "toy"
    assert load_artifact(evaluation).manifest["identity"]["label"] == "Toy"
    [labels] = (tmp_path / "run").glob("label-*")
    assert load_artifact(labels).manifest["identity"]["lam"] == {"calm": 2.0}
    assert list((tmp_path / "run").glob("solve-*")) == [], "no dual: it calls no such stage"
    assert (evaluation / "report.html").is_file()


def test_stages_and_sections_of_the_new_method_are_checked_as_those_of_any(extended: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "toy.yaml", {**small_run(tmp_path), "method": "toy"})
    done = can_dist(extended, "solve", "--config", str(config), "--run", str(tmp_path / "run"))
    assert (done.returncode, "method toy has no stage 'solve'" in done.stderr) == (2, True), done.stderr
    done = can_dist(extended, "run", str(config), "--run", str(tmp_path / "run"), "--set", "cdpo.rounds=2")
    assert (done.returncode, "method toy does not use this section" in done.stderr) == (2, True), done.stderr
