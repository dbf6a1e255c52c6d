"""The user's cache, which all runs share."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """Return ``can_dist`` in XDG_CACHE_HOME, or in ~/.cache; it need not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "can_dist"
