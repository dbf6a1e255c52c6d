"""The terminal: progress of long work, and signals that stop it in order."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import textwrap
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

from can_dist.errors import Interrupted

Amount = Literal["quiet", "usual", "verbose"]
_amount: list[Amount] = ["usual"]
COLOURS = {"red": 31, "green": 32, "yellow": 33}


def set_amount(amount: Amount) -> None:
    """Say how much of its progress this process prints: nothing, its lines, or its lines with the time of day."""
    _amount[0] = amount


def tell(message: str) -> None:
    """Print a line of progress on standard error, unless the process is quiet."""
    if _amount[0] == "quiet":
        return
    stamp = time.strftime("%H:%M:%S ") if _amount[0] == "verbose" else ""
    print(folded(printable(f"{stamp}can-dist: {message}"), sys.stderr), file=sys.stderr, flush=True)


def folded(text: str, stream: TextIO) -> str:
    """Return text whose lines fit the terminal that a stream writes to, broken between words; else the text itself.

    A line that goes on is indented by two more than it began. A path or a word longer than a line is left whole.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size((80, 24)).columns
    return "\n".join(part for line in text.split("\n") for part in _fold(line, width))


def _fold(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    wrapper = textwrap.TextWrapper(
        width,
        subsequent_indent=f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        drop_whitespace=True,
    )
    return wrapper.wrap(line)


def painted(text: str, colour: str, stream: TextIO) -> str:
    """Return text in a colour of ``COLOURS`` where a stream writes to a terminal that has it and nobody refused it.

    ``NO_COLOR`` with any content refuses (no-color.org), and so does ``TERM=dumb``.
    """
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


@contextmanager
def interruptible(ask: Callable[[], object] | None = None, grace_s: float = 0.0) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into ``Interrupted`` (exit code 75) in the main thread.

    With ``ask``, the first signal calls it and the work has ``grace_s`` seconds to end; then, or at a second signal,
    ``Interrupted`` is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    patience = threading.Timer(grace_s, os.kill, (os.getpid(), signal.SIGTERM))  # sends the second signal
    patience.daemon = True

    def stop(number: int, _frame: Any) -> None:
        if ask is not None and not patience.is_alive() and not patience.finished.is_set():
            patience.start()
            ask()
            return
        kept = "shards are" if ask is None else "work is"
        words = f"stopped by {signal.Signals(number).name}; finished {kept} kept, run again to continue."
        if ask is None:
            raise Interrupted(words)
        said.append(words)
        raise KeyboardInterrupt  # inside the ``ray.get`` of a group of ranks any other exception is lost

    said: list[str] = []
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        if said:
            raise Interrupted(said[-1]) from None
        raise
    except SystemError as error:
        # Ray's compiled deserialiser wraps an exception raised in our signal handler in a SystemError: unwrap it
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        if said and isinstance(error.__cause__, KeyboardInterrupt):
            raise Interrupted(said[-1]) from None
        raise
    finally:
        patience.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Lines:
    """Writes a bar as lines of a log, which keeps what a terminal draws over."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.encoding = stream, stream.encoding

    def write(self, text: str) -> int:
        """Write what tqdm draws, between its carriage return and its blanks, as a line of its own."""
        if drawn := text.strip():
            self.stream.write(f"{drawn}\n")
        return len(text)

    def flush(self) -> None:
        """Flush the log."""
        self.stream.flush()


@contextmanager
def progress(label: str, total: int, unit: str, *, delay: float = 0.0) -> Iterator[Any]:
    """Show a tqdm bar with rate and remaining time; one line a minute when the output is not a terminal.

    Work that ends within ``delay`` seconds shows none.
    """
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(
        file=sys.stderr if terminal else _Lines(sys.stderr),
        total=total,
        desc=label,
        unit=unit,
        unit_scale=total > 1_000_000,
        mininterval=0.5 if terminal else 60,
        maxinterval=10 if terminal else 60,  # tqdm's watcher would draw a log's bar again ten seconds later
        dynamic_ncols=terminal,
        smoothing=0.1,
        delay=delay,
        disable=_amount[0] == "quiet",
    ) as bar:
        yield bar


def tick(bar: Any) -> None:
    """Redraw a bar, so that its clock moves while no work ends; a log that is no terminal keeps its line a minute."""
    if sys.stderr.isatty():
        bar.refresh()


_listeners: list[Callable[[int], None]] = []


def advance(num_rows: int) -> None:
    """Say that rows of the work at hand are done; where nobody listens, nothing happens."""
    for listener in _listeners:
        listener(num_rows)


@contextmanager
def heard_by(listener: Callable[[int], None]) -> Iterator[None]:
    """Call ``listener`` with every number that ``advance`` is given in this process."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


MACHINE = {
    errno.ENOSPC: "Free space, or give a place on another disk",
    errno.EDQUOT: "Free space, or ask for a larger quota",
    errno.EROFS: "Give a place that can be written",
    errno.EACCES: "Give a place that you may write, or read",
    errno.EPERM: "Give a place that you may write, or read",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.EEXIST: "A file is in the way: give another path",
    errno.ENOTDIR: "A file is in the way: give another path",
    errno.EISDIR: "A directory is in the way: give another path",
    errno.EIO: "Look at the disk, or give a place on another",
}
"""What a disk or a path can refuse, and what to do."""


def of_machine(error: OSError) -> str:
    """Say what the machine refused, at which path, and what to do; the same command goes on from finished work."""
    place = error.filename if error.filename is not None else "standard output"
    remedy = MACHINE[error.errno or 0]
    return (
        f"{place}: {os.strerror(error.errno or 0)}. {remedy}. Finished work is kept; the same command goes on from it."
    )


def printable(text: str) -> str:
    """Return text in which control characters, which could steer a terminal, are written out as escapes."""
    return "".join(c if c in "\n\t" or unicodedata.category(c)[0] != "C" else repr(c)[1:-1] for c in text)
