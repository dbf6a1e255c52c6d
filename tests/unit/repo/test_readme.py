"""The README fits on a page, and what scripts write into it is what they write today."""

from __future__ import annotations

import importlib.util
import sys
from html import escape
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location("script_of_the_readme", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "script_of_the_readme", module)
    spec.loader.exec_module(module)
    return module


def test_it_is_short_and_its_lines_are() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 120] == []


def test_its_table_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    table = script("benchmarks/readme_table.py", monkeypatch)
    rows = table.read_rows(ROOT / "benchmarks" / "results" / "every_margin.json")
    assert table.written(TEXT, table.table(rows)) == TEXT, "run benchmarks/readme_table.py"


def test_its_picture_says_what_its_summary_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both come from one run of the demo; the picture's legend has the numbers of the table."""
    demo = script("docs/images/demo.py", monkeypatch)
    block = TEXT.split(demo.BEGIN)[1].split(demo.END)[0]
    picture = (ROOT / "docs" / "images" / "demo.svg").read_text(encoding="utf-8")
    rows = [line for line in block.splitlines() if line.startswith(("safety", "reward"))]
    assert len(rows) == 2
    for row in rows:
        mean, interval = row.split("[")[0].split()[-1], row.split("[")[1].split("]")[0]
        assert f"realised {mean} [{interval}]" in picture
    assert demo.written(TEXT, block.strip().splitlines()[1:-1]) == TEXT


def test_its_replay_ends_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture of the lines is drawn from the same run as the other."""
    demo = script("docs/images/demo.py", monkeypatch)
    rows = TEXT.split(demo.BEGIN)[1].split(demo.END)[0].strip().splitlines()[1:5]
    picture = (ROOT / "docs" / "images" / "recording.svg").read_text(encoding="utf-8")
    assert len(rows) == 4
    assert [row for row in rows if f">{escape(row)}</text>" not in picture] == []
    assert "seconds, played in 20" in picture


def test_a_replay_shows_each_line_from_its_moment_on(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = script("docs/images/recording.py", monkeypatch)
    assert recording.played([1.0, 2.0, 102.0]) == [15 / 4, 30 / 4, 15.0], "a long silence is as two seconds"
    lines = [(0.0, "first"), *((float(second), f"<{second}>") for second in range(1, 31))]
    root = ElementTree.fromstring(recording.draw(lines, 30.0))
    first, _, *texts = root.iter("{http://www.w3.org/2000/svg}text")
    assert first.text == "can-dist demo --run runs/demo: 30 seconds, played in 20"
    assert [text.text for text in texts] == [line for _, line in lines]
    style = root.find("{http://www.w3.org/2000/svg}style").text  # type: ignore[union-attr]
    assert texts[10].get("style") == "animation-name:t11", "the tenth of thirty seconds, after a third of fifteen"
    assert "@keyframes t11{0.00%{visibility:hidden}25.00%{visibility:visible}}" in style
    assert f"g{{animation-name:scroll;transform:translateY({-17 * (32 - 24)}px)}}" in style, "the last screen"
