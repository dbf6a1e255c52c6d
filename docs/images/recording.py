"""Draw what a demo printed as a moving picture of 20 seconds: ``python docs/images/recording.py runs/demo``.

The lines and their times are those of the run's log, and of its world; bars, which leave no trace there, are missing.
The picture plays them faster, and says so. A viewer without animation shows the last screen. The same run gives the
same bytes.
"""

from __future__ import annotations

import io
import json
import os
import sys
from html import escape
from itertools import pairwise
from pathlib import Path

from can_dist.console import folded, printable
from can_dist.demo.run import MAKING, summary_lines
from can_dist.workspace import LOG, PAGE, REPORT

HERE = Path(__file__).parent
COMMAND = "can-dist demo --run runs/demo"
COLUMNS, ROWS = 80, 24
SECONDS, LAST_S = 20.0, 5.0  # of the picture, and of its last screen
LONGEST_S = 2.0  # a longer silence is played as this long
FONTS = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"
CHARACTER, LINE, EDGE, TOP = 7.8, 17, 12, 34  # pixels


class Terminal(io.StringIO):
    """A terminal, whatever this process has."""

    def isatty(self) -> bool:
        """Return that it is one."""
        return True


def printed(run: Path) -> tuple[list[tuple[float, str]], float]:
    """Return the lines that a demo printed, with when (seconds from its start), and how long it took."""
    os.environ["COLUMNS"] = str(COLUMNS)  # what the lines are folded for
    world = json.loads((run / "world" / "world.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (run / LOG).read_text(encoding="utf-8").splitlines()]
    start = log[0]["time"] - world["seconds"]
    told = [(0.0, MAKING)] + [(event["time"] - start, event["message"]) for event in log if "message" in event]
    lines = [
        (moment, line)
        for moment, message in told
        for line in folded(printable(f"can-dist: {message}"), Terminal()).splitlines()
    ]
    [report] = run.glob(f"evaluate-*/{REPORT}")
    end = log[-1]["time"] - start
    summary = [*summary_lines(json.loads(report.read_text(encoding="utf-8"))), f"report: {COMMAND.split()[-1]}/{PAGE}"]
    lines += [(end, line) for text in summary for line in folded(text, Terminal()).splitlines()]
    return lines, end


def played(times: list[float]) -> list[float]:
    """Return when each line is shown, so that all of them, without long silences, fill the picture's seconds."""
    passed = [0.0]
    for before, after in pairwise([0.0, *times]):
        passed.append(passed[-1] + min(after - before, LONGEST_S))
    return [(SECONDS - LAST_S) * moment / (passed[-1] or 1.0) for moment in passed[1:]]


def draw(lines: list[tuple[float, str]], seconds: float) -> str:
    """Return the picture: each line appears at its moment, and the terminal scrolls."""
    moments = [0.0, *played([moment for moment, _ in lines])]
    texts = [f"$ {COMMAND}", *(text for _, text in lines)]
    title = f"{COMMAND}: {seconds:.0f} seconds, played in {SECONDS:.0f}"
    shown = {moment: row for row, moment in enumerate(moments)}  # the last row of each moment
    steps = {moment: f"transform:translateY({-LINE * max(0, row - ROWS + 1)}px)" for moment, row in shown.items()}
    rules = [
        f"text{{font:13px {FONTS};fill:#e6edf3;white-space:pre}}",
        f"g *,g{{animation:{SECONDS:.0f}s step-end infinite}}",
        *(
            keyframes(f"t{row}", {0.0: "visibility:hidden", moment: "visibility:visible"})
            for moment, row in shown.items()
        ),
        keyframes("scroll", steps) + f"g{{animation-name:scroll;{list(steps.values())[-1]}}}",
        "@media (prefers-reduced-motion:reduce){*{animation:none!important}}",
    ]
    width, height = 2 * EDGE + COLUMNS * CHARACTER, TOP + EDGE + ROWS * LINE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}">',
            f"<title>{escape(title)}</title>",
            "<style>" + "\n".join(rules) + "</style>",
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>',
            f'<text x="{EDGE}" y="22" opacity=".6">{escape(title)}</text>',
            f'<svg y="{TOP}" width="100%" height="{ROWS * LINE}"><g>',
            *(
                f'<text x="{EDGE}" y="{LINE * row + 13}" style="animation-name:t{shown[moment]}">{escape(text)}</text>'
                for row, (moment, text) in enumerate(zip(moments, texts, strict=True))
            ),
            "</g></svg></svg>\n",
        ]
    )


def keyframes(name: str, steps: dict[float, str]) -> str:
    """Return the rule of an animation that jumps from step to step."""
    inner = "".join(f"{100 * moment / SECONDS:.2f}%{{{step}}}" for moment, step in steps.items())
    return f"@keyframes {name}{{{inner}}}"


if __name__ == "__main__":
    (HERE / "recording.svg").write_text(draw(*printed(Path(sys.argv[1]))), encoding="utf-8")
