"""docs/compatibility.md says what the records of the runs say, and every version that was run is within its bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compatibility as c
import pytest
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
    assert c.PAGE.read_text(encoding="utf-8") == c.page(RECORDS, c.requirements(), c.pins(), sentences), (
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
        c.pins() | {"torch": "2.8.0"},
        {"2.11.0": "attention by varlen_attn"},
    )
    assert text.endswith(
        "| 1.10 | attention by sdpa |\n| 2.9.0+cpu | attention by sdpa |\n| 2.11.0 | attention by varlen_attn |\n"
    )
    assert f"| {2 * len(c.ROOMS):,} passed, {len(c.ROOMS)} skipped | 2 passed, 1 skipped | 2026-11-28 |" in text
    assert "| 3 passed, 0 skipped, **2 failed** (dual) | not run | 2026-11-28 |" in text
    assert f"| torch | `{c.requirements()['torch']}` | 1.10 | 2.9.0+cpu | 2.8.0 |" in text


def test_the_bounds_are_read_from_the_project() -> None:
    bounds = c.requirements()
    assert bounds["ray"].startswith(">=2.")
    assert "pytest" not in bounds


def test_a_report_of_pytest_is_counted_by_room(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    ended = ["pytest ended with exit code 5"]
    nothing = {"passed": 0, "skipped": 0, "failed": ended}
    assert c.read_report(report, 5, ["dual"]) == {"dual": nothing}, "no test ran"
    dual, cli = 'classname="tests.unit.dual.test_a"', 'classname="tests.unit.cli.test_b"'
    cases = f'<testcase {dual} name="x"/><testcase {dual} name="y"><skipped/></testcase>'
    cases += f'<testcase {cli} name="z"><failure/></testcase><testcase {dual} name="z"><error/></testcase>'
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert c.read_report(report, 1, ["dual", "cli"]) == {
        "dual": {"passed": 1, "skipped": 1, "failed": ["tests/unit/dual/test_a.py::z"]},
        "cli": {"passed": 0, "skipped": 0, "failed": ["tests/unit/cli/test_b.py::z"]},
    }
    interrupted = c.read_report(report, 2, ["dual", "cli"])
    assert all("pytest ended with exit code 2" in result["failed"] for result in interrupted.values())


def test_what_failed_is_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_tests(python: Path, tests: list[str], rooms: list[str]) -> dict[str, Any]:
        assert (tests, rooms) == (["a.py::x", "a.py::y"], ["dual"])
        return {"dual": {"passed": 1, "skipped": 0, "failed": ["a.py::y"]}}

    monkeypatch.setattr(c, "run_tests", run_tests)
    earlier = {"passed": 5, "skipped": 2, "failed": ["a.py::x", "a.py::y"]}
    assert c.run_failed(Path("python"), "dual", earlier) == {"passed": 6, "skipped": 2, "failed": ["a.py::y"]}


def test_the_sentence_on_attention_is_kept_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(python: Path, names: list[str]) -> dict[str, Any]:
        assert names == ["torch"], "a torch alone is enough"
        return {"python": "3.11.7", "packages": {"torch": "2.11.0"}, "attention": "attention by varlen_attn"}

    monkeypatch.setattr(c, "ask", ask)
    path = tmp_path / "attention.json"
    path.write_text('{"2.9.1": "attention by sdpa", "2.11.0": "stale"}')
    c.record_attention(Path("python"), path)
    assert list(json.loads(path.read_text()).items()) == [
        ("2.9.1", "attention by sdpa"),
        ("2.11.0", "attention by varlen_attn"),
    ]
