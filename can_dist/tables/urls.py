"""URLs of object stores, told from paths and hub ids."""

from __future__ import annotations

import re

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/{1,2}(?=[^/])")
"""The beginning of a URL; a path made of one has a single slash left."""


def is_remote(name: str) -> bool:
    """Return whether a name is a URL of an object store, not a path or a hub id.

    >>> is_remote("s3://bucket/prompts.jsonl"), is_remote("data/prompts.jsonl"), is_remote("owner/name")
    (True, False, False)
    """
    return URL.match(name) is not None
