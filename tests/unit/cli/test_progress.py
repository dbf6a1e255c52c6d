"""A bar on a terminal moves; a log gets a line a minute, however often the work looks at its clock."""

from __future__ import annotations

import io
import sys

import pytest

from can_dist.console import progress, tell, tick


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how often a bar of 50 steps is drawn when the clock is looked at after each."""
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("score", 50, "row") as bar:
        for _ in range(50):
            tick(bar)
            bar.update(1)
    return stream.getvalue().count("score:")


def test_a_log_is_told_the_beginning_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(io.StringIO(), monkeypatch) == 2


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(Terminal(), monkeypatch) >= 50


def test_nothing_draws_a_logs_bar_sooner_than_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """tqdm's watcher draws a bar that waits for many steps as soon as maxinterval, by default ten seconds, is over."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("score", 50, "row") as bar:
        assert (bar.mininterval, bar.maxinterval) == (60, 60)


def test_a_log_has_a_line_for_each_and_nothing_of_a_bar_beside_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress("score", 50, "row") as bar:
        tell("a message")
        bar.update(50)
    first, message, last = log.getvalue().splitlines()
    assert first.startswith("score:   0%|")
    assert message.endswith("can-dist: a message")
    assert last.startswith("score: 100%|")
    assert "\r" not in log.getvalue()
