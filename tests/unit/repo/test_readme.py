"""The README fits on a page, and what scripts write into it is what they write today."""

from __future__ import annotations

import importlib.util
import json
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
    rows = table.read_rows(ROOT / "benchmarks" / "results" / "real_margins.json")
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


def test_its_recording_ends_as_it_says_and_stands_still_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = script("docs/images/demo.py", monkeypatch)
    block = TEXT.split(demo.BEGIN)[1].split(demo.END)[0]
    rows = [escape(line) for line in block.splitlines() if line.startswith(("safety", "reward", "λ*"))]
    recording = (ROOT / "docs" / "images" / "recording.svg").read_text(encoding="utf-8")
    for row in rows:
        assert f">{row}</text>" in recording
    assert "played in 20" in recording


def test_a_recording_is_drawn_with_what_a_bar_wrote_over(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = script("docs/images/recording.py", monkeypatch)
    texts = ["one <\r\n", "\r 10%", "\r 100%", "\x1b[A\r", "\r\n\r\n\x1b[32mmet\x1b[0m\r\n"]
    shown = recording.lines_of(list(enumerate(texts)))
    assert [(line.row, line.text, line.since, line.until) for line in shown] == [
        (1, " 10%", 1, 2),
        (0, "one <", 0, None),
        (1, " 100%", 2, None),
        (2, "met", 4, None),
    ]
    assert recording.played([1.0, 2.0, 102.0]) == [16 / 6, 32 / 6, 16.0], "a long silence is as four seconds"
    cast = [{"command": ["x"]}, *([moment, "o", text] for moment, text in enumerate(texts))]
    picture = recording.draw("\n".join(map(json.dumps, cast)))
    root = ElementTree.fromstring(picture)
    still = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if "hidden" not in text.get("style", "")]
    assert [text.text for text in still] == ["x: 4 seconds, played in 20", "$ x", "one <", " 100%", "met"]
    assert "fill:#7ee787" in picture
