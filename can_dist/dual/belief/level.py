"""One scale of belief: what the log, the terminal, the pages, the model card and the gate say of a solution."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

Level = Literal["not trusted", "roughly", "trusted"]

LEVELS: tuple[Level, ...] = ("not trusted", "roughly", "trusted")
"""From the least to the most; how often each is said and how often it is then true: docs/estimators.md."""


def level_of(diagnostics: Mapping[str, Any]) -> Level:
    """Return how far a solution can be trusted.

    Args:
        diagnostics: of a :class:`~can_dist.dual.solution.DualSolution`, or those of its JSON record.

    Returns:
        ``trusted``: what π_λ delivers on new prompts and λ are both known; ``roughly``: what it delivers is, λ is not;
        ``not trusted``: neither, or there is no finite λ. A table that enumerates what the reference can say is exact.
    """
    judgement = diagnostics.get("judgement")
    if judgement is None:
        median = diagnostics["ess"]["median"]  # null in JSON, NaN here: no finite λ, or one response to every prompt
        return "trusted" if median is not None and math.isfinite(median) else "not trusted"
    if judgement["objection"]:
        return "not trusted"
    return "trusted" if judgement["lam_known"] else "roughly"


def stated(diagnostics: Mapping[str, Any]) -> str:
    """Return the one text on a solution that is said everywhere: its level, then the solver's verdict."""
    judgement, verdict = diagnostics.get("judgement"), str(diagnostics["verdict"])
    if judgement is None or judgement["objection"]:
        return verdict
    if level_of(diagnostics) == "trusted":
        return f"May be trusted. {verdict}"
    return f"May be trusted roughly: for what the policy delivers, not for lambda. {verdict}"
