"""docs/compatibility.md says what the records of the runs say, and every version that was run is within its bounds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import compatibility as c
import pytest
import torch
from packaging.specifiers import SpecifierSet

RECORDS = c.read_records(c.RESULTS)


def record(**changes: Any) -> dict[str, Any]:
    """A run of everything, under versions that are all 1.10."""
    runs = {room: {"passed": 2, "skipped": 1, "failed": []} for room in [c.TRAINING, *c.ROOMS]}
    packages = dict.fromkeys(c.requirements(), "1.10")
    about = {"python": "3.10.1", "packages": packages, "attention": "attention by sdpa", "date": "2026-11-28"}
    return {"versions": "lowest", **about, "runs": runs, **changes}


def test_the_page_is_that_of_the_records() -> None:
    sentences = json.loads(c.ATTENTION.read_text(encoding="utf-8"))
    assert c.PAGE.read_text(encoding="utf-8") == c.page(RECORDS, c.requirements(), sentences), (
        "run: python benchmarks/compatibility.py page"
    )


def test_what_was_run_is_within_the_bounds_and_passed() -> None:
    for run in RECORDS:
        outside = {
            name: run["packages"][name]
            for name, bound in c.requirements().items()
            if not SpecifierSet(bound).contains(run["packages"][name], prereleases=True)
        }
        assert outside == {}, run["python"]
        assert [test for result in run["runs"].values() for test in result["failed"]] == [], run["python"]


@pytest.mark.parametrize("run", [run for run in RECORDS if run["versions"] == "lowest" and run["python"] < "3.11"])
def test_lower_bounds_are_those_of_the_lowest_run(run: dict[str, Any]) -> None:
    for name, bound in c.requirements().items():
        (lower,) = (part.removeprefix(">=") for part in bound.split(",") if part.startswith(">="))
        ran = c.order(run["packages"][name])
        assert ran[: len(c.order(lower))] == c.order(lower), f"{name}{bound}: the lowest run is {ran}"


def test_a_page_names_what_failed_and_what_was_not_run() -> None:
    newer = {**record()["packages"], "torch": "2.9.0+cpu"}
    partial = {"dual": {"passed": 3, "skipped": 0, "failed": ["tests.a", "tests.b"]}}
    text = c.page(
        [record(), record(versions="newest", python="3.13.0", packages=newer, runs=partial)],
        c.requirements(),
        {"2.11.0": "attention by varlen_attn"},
    )
    assert text.endswith(
        "| 1.10 | attention by sdpa |\n| 2.9.0+cpu | attention by sdpa |\n| 2.11.0 | attention by varlen_attn |\n"
    )
    assert f"| {2 * len(c.ROOMS):,} passed, {len(c.ROOMS)} skipped | 2 passed, 1 skipped | 2026-11-28 |" in text
    assert "| 3 passed, 0 skipped, **2 failed** (dual) | not run | 2026-11-28 |" in text
    assert f"| torch | `{c.requirements()['torch']}` | 1.10 | 2.9.0+cpu |" in text


def test_the_bounds_are_read_from_the_project() -> None:
    bounds = c.requirements()
    assert bounds["ray"].startswith(">=2.")
    assert "pytest" not in bounds


def test_a_report_of_pytest_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    ended = ["pytest ended with exit code 5"]
    assert c.read_report(report, 5) == {"passed": 0, "skipped": 0, "failed": ended}, "no test ran"
    cases = '<testcase classname="a" name="x"/><testcase classname="a" name="y"><skipped/></testcase>'
    cases += (
        '<testcase classname="a" name="z"><failure/></testcase><testcase classname="b.c" name="z"><error/></testcase>'
    )
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert c.read_report(report, 1) == {"passed": 1, "skipped": 1, "failed": ["a.py::z", "b/c.py::z"]}
    assert "pytest ended with exit code 2" in c.read_report(report, 2)["failed"], "it was interrupted"


def test_what_failed_is_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_tests(python: Path, tests: list[str]) -> dict[str, Any]:
        assert tests == ["a.py::x", "a.py::y"]
        return {"passed": 1, "skipped": 0, "failed": ["a.py::y"]}

    monkeypatch.setattr(c, "run_tests", run_tests)
    earlier = {"passed": 5, "skipped": 2, "failed": ["a.py::x", "a.py::y"]}
    assert c.run_failed(Path("python"), earlier) == {"passed": 6, "skipped": 2, "failed": ["a.py::y"]}


def test_the_sentence_on_attention_is_that_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    path.write_text('{"99.1": "of the future", "2.9.1": "of the past"}')
    c.record_attention(Path(sys.executable), path)
    kept = json.loads(path.read_text())
    version = torch.__version__.split("+")[0]
    assert list(kept) == ["2.9.1", version, "99.1"]
    assert f"of torch {torch.__version__} (" in kept[version]
