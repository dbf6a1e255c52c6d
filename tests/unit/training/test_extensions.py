"""What DeepSpeed does not import, for no rank would use it."""

from __future__ import annotations

import subprocess
import sys

IMPORT = """
import sys
from can_dist.training.extensions import without_mlflow
with without_mlflow():
    import deepspeed.autotuning.autotuner as tuner
assert not tuner.has_mlflow
assert "mlflow" not in sys.modules
import mlflow
"""


def test_mlflow_is_left_to_those_that_ask_for_it() -> None:
    """DeepSpeed's tuner imports it where it is installed, as it is here; a tracker imports it later."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
