"""Another user of this machine, who tries: Python code run under a user id and a group that are not ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

NOBODY = 65534
OUR_GROUP = 54321
"""A group that the other user shares with us."""

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user of this machine")


def attack(
    code: str,
    given: Mapping[str, Any],
    *,
    first: str = "",
    environment: Mapping[str, str] = MappingProxyType({}),
    user: int = NOBODY,
    group: int = NOBODY,
) -> Any:
    """Run ``code`` as another user; return what it leaves in ``answer``, or 'died' where it ended below Python.

    ``first`` is run before the rights are dropped: the Python of this environment may lie where nobody else can read.
    ``code`` finds ``given`` as its variables, and ``tried(function)``, which tells 'done' or the error of an attempt.
    """
    script = f"""
import json, os, sys
from pathlib import Path
{first}
os.setgroups([])
os.setgid({group})
os.setuid({user})

def tried(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return "done"

answer = None
globals().update(json.loads(sys.argv[1]))
{code}
print(json.dumps(answer))
"""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(dict(given))],
        cwd="/",
        env={**own, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode and "Traceback (most recent call last)" not in done.stderr:
        return "died"
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def place_that_all_enter() -> Iterator[Path]:
    """Make a directory that every user may enter and list, as a shared disk's is; pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="shared-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
