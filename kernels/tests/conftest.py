"""An empty home and, without a GPU, Triton's interpreter: both have to be set before triton is imported."""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))

import private_home

HOME = private_home.move_in()

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
