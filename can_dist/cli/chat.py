"""``can-dist chat``: the reference and the policy of a run, side by side on typed prompts."""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from can_dist.cli.options import LOCAL_PATH
from can_dist.console import printable

if TYPE_CHECKING:
    from can_dist.outcomes.chat import Answers

GAP = " │ "


@click.command()
@click.argument("run_dir", metavar="RUN", type=LOCAL_PATH)
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="Answer this and end; default: ask.")
def chat(run_dir: Path, prompts: tuple[str, ...]) -> None:
    """Show the answers of RUN's reference and policy side by side, to each line that is typed or comes in.

    An answer is the first that the run itself draws of the prompt: its temperature, its seed. Both models are loaded.
    """
    with contextlib.redirect_stdout(sys.stderr):  # libraries announce themselves on standard output
        from can_dist.outcomes.chat import Chat

        opened = Chat(run_dir)
    for prompt in prompts or typed():
        with contextlib.redirect_stdout(sys.stderr):
            answers = opened.answer(prompt)
        click.echo(side_by_side(answers, shutil.get_terminal_size((80, 24)).columns))


def typed() -> Iterator[str]:
    """Yield the lines of standard input that say something, asking for each where somebody types."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def side_by_side(answers: Answers, width: int) -> str:
    """Return a prompt and its two answers in two columns of a terminal of ``width`` columns."""
    half = max((width - len(GAP)) // 2, 20)
    columns = [
        [role.ljust(half), *_wrapped(text + (" […]" if role in answers.cut else ""), half)]
        for role, text in (("reference", answers.reference), ("policy", answers.policy))
    ]
    rows = (f"{left:<{half}}{GAP}{right}".rstrip() for left, right in zip_longest(*columns, fillvalue=""))
    return "\n".join([*_wrapped(f"> {answers.prompt}", width), *rows, ""])


def _wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, broken between words where they fit; what could steer a terminal is written out."""
    lines = printable(text).expandtabs(4).split("\n")
    return [part for line in lines for part in (textwrap.wrap(line, width, drop_whitespace=True) or [""])]
