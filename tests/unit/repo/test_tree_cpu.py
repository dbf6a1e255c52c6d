"""CPU seconds of a process tree, held against what a process counts of itself."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tree_cpu import metered

ORPHAN = """
import os, time
if os.fork():
    time.sleep(1.2)  # longer than two looks
    os._exit(0)  # the child is init's from now on
while time.process_time() < 1.5:
    pass
time.sleep(1.2)
print(time.process_time(), flush=True)
"""


def test_cpu_of_a_process_that_outlives_its_parent_is_counted() -> None:
    root = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {ORPHAN!r}], text=True))"
    printed, seconds = metered([sys.executable, "-c", root])
    assert seconds["Ray"] == pytest.approx(float(printed), abs=0.6)  # what is neither the root nor known by its title


def test_a_command_that_fails_is_not_measured() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        metered([sys.executable, "-c", "raise SystemExit(3)"])
