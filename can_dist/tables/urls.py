"""URLs of object stores, told from paths and hub ids."""

from __future__ import annotations

import re

from can_dist.errors import ConfigError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}(?=[^/])")
"""The beginning of a URL; a path made of one has a single slash left."""


def is_remote(name: str) -> bool:
    """Return whether a name is a URL of an object store, not a path or a hub id.

    >>> is_remote("s3://bucket/prompts.jsonl"), is_remote("data/prompts.jsonl"), is_remote("owner/name")
    (True, False, False)
    """
    return URL.match(name) is not None


def check_run_directory(path: str) -> None:
    """Raise ``ConfigError`` where a run directory is given as the URL of an object store."""
    if is_remote(path):
        raise ConfigError(
            f"run directory {path}: needs a file system with atomic rename, which no object store has.",
            "Give a directory; data and exported policies may lie in a store (docs/howto/object-storage.md).",
        )
