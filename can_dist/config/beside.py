"""Paths in a YAML file that mean files beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PATHS = ("model", "source", "ds_config")
"""The keys that may hold a path."""
FREE = ("request", "template_options")
"""The keys whose content is handed on as it is."""


def beside(data: Any, directory: Path) -> Any:
    """Return plain data in which relative paths lead to what lies beside the file that they were written in.

    A path that exists in the working directory stays as it is, and so does a name with a ``revision``, which is one of
    the hub. No stage's identity holds a path, so where a file was reached from changes none.

    Args:
        data: What the YAML file holds.
        directory: The directory of the YAML file.
    """
    if isinstance(data, list):
        return [beside(entry, directory) for entry in data]
    if not isinstance(data, Mapping):
        return data
    # an endpoint's model is whatever its server calls it
    named_elsewhere = data.get("revision") is not None or not data.keys().isdisjoint(("url", "base_url"))
    led = {}
    for key, value in data.items():
        if key in PATHS and isinstance(value, str):
            led[key] = value if named_elsewhere else _led(value, directory)
        else:
            led[key] = value if key in FREE else beside(value, directory)
    return led


def _led(name: str, directory: Path) -> str:
    """Return a name, or the path beside the file that it means."""
    try:
        is_elsewhere = not name or name.startswith("~") or Path(name).exists() or not (directory / name).exists()
    except OSError:  # longer than any path can be: what reads it says so
        return name
    return name if is_elsewhere else os.path.normpath(directory / name)
