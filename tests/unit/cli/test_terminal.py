"""What a terminal shows: lines that fit it, colours that nobody refused, verbs in groups, and as much as was asked."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.cli.look import in_colours
from can_dist.cli.main import GROUPS
from can_dist.console import folded, painted, progress, set_amount, tell

RED = "\x1b[31m"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield
    set_amount("usual")


def test_every_verb_is_in_one_group_and_the_help_fits() -> None:
    verbs = [verb for group in GROUPS.values() for verb in group]
    assert sorted(verbs) == sorted(cli.commands)
    shown = CliRunner().invoke(cli, ["--help"], terminal_width=80).output
    assert max(map(len, shown.splitlines())) <= 80
    assert all(f"\n{title}:\n" in shown for title in GROUPS)
    assert all(f"\n  {verb} " in shown for verb in verbs)


def test_lines_are_broken_between_words_and_nothing_is_lost() -> None:
    path = "/very/long-path/" + "x" * 90
    text = f"warning  beta    {'one two three ' * 12}\n  - kept {path} whole"
    broken = folded(text, Terminal())
    lines = broken.splitlines()
    assert all(len(line) <= 80 or path in line for line in lines)
    assert broken.split() == text.split()
    assert lines[1].startswith("  ")
    assert folded(text, io.StringIO()) == text
    assert folded("short\n\nlines  kept", Terminal()) == "short\n\nlines  kept"


def test_colours_are_for_terminals_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert painted("error", "red", Terminal()) == f"{RED}error\x1b[0m"
    assert painted("error", "red", io.StringIO()) == "error"
    monkeypatch.setenv("TERM", "dumb")
    assert painted("error", "red", Terminal()) == "error"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert painted("error", "red", Terminal()) == "error"


def test_severities_alone_are_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    shown = in_colours("error    Ray  ok\n         → do\nnote     GPUs  none")
    assert shown == f"{RED}error\x1b[0m    Ray  ok\n         → do\nnote     GPUs  none"


def test_quiet_prints_no_progress_and_verbose_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    set_amount("quiet")
    tell("hidden")
    with progress("score", 5, "row") as bar:
        bar.update(5)
    assert stream.getvalue() == ""
    set_amount("verbose")
    tell("shown")
    assert stream.getvalue()[2:3] == ":"
    assert stream.getvalue().endswith(" can-dist: shown\n")


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """Return what a command prints on the standard error of a real terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "can_dist", *arguments]
    done = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, **environment})
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed: so Linux says it
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert done.wait(60) == 3
    return shown.decode()


def test_an_error_on_a_real_terminal_is_folded_and_red_unless_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "scores.jsonl")
    command = ("solve", "--scores", missing, "--reward", "r", "--constraint", "s:margin=1", "--beta", "1")
    shown = on_a_terminal(*command)
    assert shown.startswith(f"{RED}DataError\x1b[0m:")
    lines = shown.replace("\r", "").removeprefix(RED).replace("\x1b[0m", "").splitlines()
    assert all(len(line) <= 80 or missing in line for line in lines)
    assert "\x1b" not in on_a_terminal(*command, NO_COLOR="1")
