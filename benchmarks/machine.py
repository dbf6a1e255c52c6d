"""What a result was measured on: printed beside every benchmark."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Describe the machine, and the versions of ``packages``."""
    model, info = platform.processor(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "system": platform.platform(),
        **gpu(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def gpu() -> dict[str, Any]:
    """Describe the GPU that torch uses: name, memory, CUDA and driver; empty without one, or without torch."""
    try:
        import torch
    except ModuleNotFoundError:
        return {}
    if not torch.cuda.is_available():
        return {}
    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = ""
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split("\n")[0]
    return {
        "gpu": device.name,
        "gpu_gb": device.total_memory / 1e9,
        "capability": f"{device.major}.{device.minor}",
        "cuda": torch.version.cuda,
        "driver": driver,
    }
