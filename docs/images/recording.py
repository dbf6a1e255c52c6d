"""Record a command in a terminal of 80 × 24, and draw the recording as a moving picture of 20 seconds.

    python docs/images/recording.py record demo.cast can-dist demo --run runs/demo
    python docs/images/recording.py draw demo.cast docs/images/recording.svg

A recording is an asciicast (version 2) with its times as they were. The picture plays it faster, and says so in its
title; what stands still, such as a viewer without animation, shows the last screen. The same recording gives the same
bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import time
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

COLUMNS, ROWS = 80, 24
SECONDS, LAST_S = 20.0, 4.0  # of the picture, and of its last screen
LONGEST_GAP_S = 4.0  # a longer silence is played as this long
SHORTEST_S = 0.2  # of the picture: what a bar shows for less is left out
CONTROL = re.compile(r"\x1b\[(?P<numbers>[\d;]*)(?P<kind>[A-Za-z])|\x1b\[\?\d+[hl]|(?P<plain>[^\x1b\r\n]+)|[\r\n]")
COLOURS = {"31": "#ff7b72", "32": "#7ee787", "33": "#e3b341"}
FONTS = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
CHARACTER, LINE, EDGE, TOP = 7.8, 17, 12, 34  # pixels


@dataclass
class Shown:
    """A version of a line of the terminal, on its row, from one second to another (None: to the end)."""

    row: int
    text: str
    colour: str
    since: float
    until: float | None = None


def record(path: Path, command: list[str]) -> int:
    """Run a command in a pseudo-terminal; write what it prints, with times; return its exit status."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    start, lines = time.monotonic(), [json.dumps({"version": 2, "width": COLUMNS, "height": ROWS, "command": command})]
    while True:
        try:
            text = os.read(terminal, 65536)
        except OSError:  # the other end of the terminal is closed
            break
        sys.stdout.buffer.write(text)
        sys.stdout.flush()
        lines.append(json.dumps([round(time.monotonic() - start, 3), "o", text.decode(errors="replace")]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def played(times: list[float]) -> list[float]:
    """Return when each event is played, so that all of them, without long silences, fill the picture's seconds."""
    passed = [0.0]
    for before, after in pairwise([0.0, *times]):
        passed.append(passed[-1] + min(after - before, LONGEST_GAP_S))
    scale = (SECONDS - LAST_S) / max(passed[-1], 1e-9)
    return [scale * moment for moment in passed[1:]]


def lines_of(events: list[tuple[float, str]]) -> list[Shown]:
    """Return every version of every line: a bar writes over its line, all else goes on below."""
    done: list[Shown] = []
    now: dict[int, Shown] = {}
    row, column, colour = 0, 0, ""
    for moment, text in events:
        for match in CONTROL.finditer(text):
            if match[0] == "\n":
                row, column = row + 1, 0
            elif match[0] == "\r":
                column = 0
            elif match["kind"] == "A":
                row = max(row - int(match["numbers"] or 1), 0)
            elif match["kind"] == "m":
                colour = COLOURS.get(match["numbers"], "")
            elif match["plain"]:
                before = now.get(row, Shown(row, "", "", moment))
                whole = (
                    before.text[:column].ljust(column) + match["plain"] + before.text[column + len(match["plain"]) :]
                )
                column += len(match["plain"])
                is_seen = moment - before.since >= SHORTEST_S
                if is_seen:
                    before.until = moment
                    done.append(before)
                since = moment if is_seen else before.since
                now[row] = Shown(row, whole.rstrip(), colour or before.colour, since)
    return [line for line in [*done, *now.values()] if line.text]


def draw(recording: str) -> str:
    """Return the picture of a recording."""
    head, *rows = [json.loads(line) for line in recording.splitlines()]
    times = [float(moment) for moment, _, _ in rows]
    command = " ".join(head["command"])
    texts = [text for _, _, text in rows]
    events = [(0.0, f"$ {command}\r\n"), *zip(played(times), texts, strict=True)]
    shown = lines_of([(round(moment, 2), text) for moment, text in events])
    width, height = 2 * EDGE + COLUMNS * CHARACTER, TOP + EDGE + ROWS * LINE
    title = f"{command}: {times[-1]:.0f} seconds, played in {SECONDS:.0f}"
    shown.sort(key=lambda line: (line.since, line.row))
    scrolled = {0.0: 0}
    for line in shown:
        scrolled[line.since] = max(*scrolled.values(), line.row - ROWS + 1)
    steps = {moment: f"transform:translateY({-LINE * rows}px)" for moment, rows in scrolled.items()}
    rules = [
        f"text{{font:13px {FONTS};fill:#e6edf3;white-space:pre}}",
        f"g *,g{{animation:{SECONDS:.0f}s step-end infinite}}",
        *(keyframes(f"t{number}", visibility(line)) for number, line in enumerate(shown)),
        keyframes("scroll", steps) + f"g{{animation-name:scroll;{list(steps.values())[-1]}}}",
        "@media (prefers-reduced-motion:reduce){*{animation:none!important}}",
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
            f"<title>{escape(title)}</title>",
            "<style>" + "\n".join(rules) + "</style>",
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
            f'<text x="{EDGE}" y="22" opacity=".6">{escape(title)}</text>',
            f'<svg y="{TOP}" width="100%" height="{ROWS * LINE}"><g>',
            *(drawn(line, f"t{number}") for number, line in enumerate(shown)),
            "</g></svg></svg>\n",
        ]
    )


def visibility(line: Shown) -> dict[float, str]:
    """Return what a version of a line is, from when on."""
    moments = {0.0: "hidden", line.since: "visible"} | ({} if line.until is None else {line.until: "hidden"})
    return {moment: f"visibility:{value}" for moment, value in moments.items()}


def keyframes(name: str, steps: dict[float, str]) -> str:
    """Return the rule of an animation that jumps from step to step."""
    inner = "".join(f"{100 * moment / SECONDS:.2f}%{{{step}}}" for moment, step in steps.items())
    return f"@keyframes {name}{{{inner}}}"


def drawn(line: Shown, name: str) -> str:
    """Return a version of a line; without animation, the last one shows."""
    style = f"animation-name:{name}" + ("" if line.until is None else ";visibility:hidden")
    style += f";fill:{line.colour}" if line.colour else ""
    return f'<text x="{EDGE}" y="{LINE * line.row + 13}" style="{style}">{escape(line.text)}</text>'


def main(verb: str, cast: str, *rest: str) -> None:
    """Record, or draw."""
    if verb == "record":
        sys.exit(record(Path(cast), list(rest)))
    Path(rest[0]).write_text(draw(Path(cast).read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
