"""``can-dist`` in a process of its own: for what a user sees of a command, and for what a command imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(sys.executable).parent / "can-dist"
HEAVY = {"torch", "ray", "transformers", "deepspeed", "pandas", "datasets", "peft", "matplotlib"}


@dataclass(frozen=True)
class Result:
    """What a process left: ``imported`` are the top-level packages it loaded."""

    code: int
    out: str
    err: str
    imported: frozenset[str]


def can_dist(*arguments: object, cwd: Path) -> Result:
    """Run the installed program in a process of its own."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [str(PROGRAM), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    profile = re.compile(r"^import time:.*\|\s+(\S+)\n", re.MULTILINE)
    imported = frozenset(name.split(".")[0] for name in profile.findall(done.stderr))
    assert "can_dist" in imported, "the import profile was not written"
    return Result(done.returncode, done.stdout, profile.sub("", done.stderr), imported)


def assert_refused(result: Result, code: int, kind: str) -> None:
    """One message on standard error that starts with the kind of error; nothing on standard output; no traceback."""
    assert result.code == code, result.err
    assert re.search(rf"^{kind}: ", result.err, re.MULTILINE)
    assert "Traceback" not in result.err
    assert result.out == ""
