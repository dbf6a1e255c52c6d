"""A home for one test session: no test reads or writes the user's home, caches, settings and credentials."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

PREFIX = "can-dist-home-"

# What leads a library out of its home, to an account of the user, or to a cluster of theirs
PREFIXES = ("HF_", "HUGGING_FACE_", "MLFLOW_", "RAY_", "TRACKIO_", "VLLM_CACHE_", "WANDB_", "XDG_")
NAMES = {
    "CUDA_CACHE_PATH",
    "GIT_CONFIG_GLOBAL",
    "IPYTHONDIR",
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "MPLCONFIGDIR",
    "NETRC",
    "NUMBA_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR",
    "TORCH_HOME",
    "TRANSFORMERS_CACHE",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
}


def move_in() -> tempfile.TemporaryDirectory[str] | None:
    """Give this process, and all that it starts, an empty home in which every library's own default then lies.

    Libraries fix their paths when they are imported, so this comes first.

    Returns:
        The home, which is removed with this object; None in a process of a session that has one (a worker of
        pytest-xdist, or the second conftest.py of `pytest tests kernels`).
    """
    if Path(os.environ.get("HOME", "")).name.startswith(PREFIX):
        return None
    home = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
    for name in list(os.environ):
        if name in NAMES or name.startswith(PREFIXES):
            del os.environ[name]
    os.environ["HOME"] = home.name
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{home.name}/.cache/torchinductor"  # its default is in /tmp
    return home
