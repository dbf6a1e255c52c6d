"""The workflows of a fork call targets that exist, on Pythons that pyproject.toml allows, and may write nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[3]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def jobs(path: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe", pure=True).load(path)["jobs"])


def commands(path: Path) -> list[str]:
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


def test_there_are_three() -> None:
    assert [path.stem for path in WORKFLOWS] == ["ci", "nightly", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_calls_what_exists(path: Path) -> None:
    assert commands(path)
    for command in commands(path):
        words = command.split()
        if words[0] == "make":
            assert words[1] in TARGETS, command
        folders = [word for word in words if word.startswith(("tests/", "kernels/")) and "*" not in word]
        assert all((ROOT / folder).exists() for folder in folders), command
    assert YAML(typ="safe", pure=True).load(path)["permissions"] == {"contents": "read"}
    assert all("timeout-minutes" in job for job in jobs(path).values())


def test_unit_tests_run_on_three_allowed_pythons() -> None:
    versions = jobs(ROOT / ".github" / "workflows" / "ci.yml")["unit"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (allowed,) = re.findall(r'^requires-python = "(.+)"', project, re.MULTILINE)
    assert len(versions) == 3
    assert all(version in SpecifierSet(allowed) for version in versions)


def test_the_parts_of_a_night_are_all_tests() -> None:
    (parts,) = (job["strategy"]["matrix"]["part"] for job in jobs(WORKFLOWS[1]).values() if "strategy" in job)
    covered = {path for part in parts for pattern in part.split() for path in ROOT.glob(pattern)}
    tests = set((ROOT / "tests" / "integration").glob("test_*.py"))
    assert tests <= covered
    assert {ROOT / "tests" / "unit", ROOT / "kernels" / "tests"} <= covered


def test_ci_runs_what_make_test_runs() -> None:
    (recipe,) = re.findall(
        r"^test: setup\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    wanted = {line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()}
    assert wanted <= set(commands(WORKFLOWS[0]))
