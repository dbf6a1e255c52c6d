"""A score for the benchmarks with a second constraint: how short a response's words are."""

from __future__ import annotations

from collections.abc import Sequence


def plain_words(_conversations: Sequence[object], responses: Sequence[str]) -> list[float]:
    """Return minus the characters per word of each response; 0 for one without words."""
    return [-len(text) / max(1, len(text.split())) for text in responses]
