"""Every reader is fed with damaged files for a minute: what is not sound is refused by an error of ours, or read.

``CAN_DIST_FUZZ_SECONDS`` is the time for each reader, ``CAN_DIST_FUZZ_SEED`` repeats a run (the seed is printed).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest

SECONDS = float(os.environ.get("CAN_DIST_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("CAN_DIST_FUZZ_SEED", time.time_ns() % 10**6))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 3 * SECONDS)]


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_damaged_file_ends_a_reader_by_an_exception_that_is_not_ours(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "faulthandler", fuzz.__file__, name, str(SECONDS), str(SEED), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"{name}, seed {SEED}: {done.stdout}")
    assert done.returncode == 0, f"seed {SEED}: {done.stderr[-6000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert min(counts.values()) > 0, "some files must be read and some refused"
