"""The estimator of λ that is used where none is named (``auto``), and all of them beside each other.

The jackknife: of the estimators here it delivers closest to the margin in every world but the exactly Gaussian ones
(docs/estimators.md, "What each delivers"). Where it has no solution, the paper's.
"""

from __future__ import annotations

from can_dist.dual.columns import Scores
from can_dist.dual.estimators import Estimate, estimate
from can_dist.dual.table import FloatArray, ScoreTable

SAMPLED = ("empirical", "jackknife", "gaussian")
"""The estimators of a table whose responses were sampled."""


def choose(
    table: Scores, beta: float, margin_J: FloatArray, empirical_J: FloatArray, level_J: FloatArray | None = None
) -> tuple[Estimate, str]:
    """Return λ̂ of the estimator ``auto`` and why it is not the jackknife's; an empty reason where it is.

    Args:
        table: scores of P prompts.
        beta: KL weight β > 0.
        margin_J: b.
        empirical_J: the empirical λ̂.
        level_J: 1 where the constraint is an absolute level, 0 where a margin.
    """
    if not table.weighted:
        jackknife = estimate(table, beta, margin_J, "jackknife", empirical_J, level_J)
        if jackknife.converged:
            return jackknife, ""
    reason = "the table carries reference weights, so it is read as enumerating its support"
    if not table.weighted:
        reason = "the jackknife has no solution: leaving one response out of a prompt changes too much"
    return estimate(table, beta, margin_J, "empirical", empirical_J, level_J), reason


def every_estimate(
    table: ScoreTable, beta: float, margin_J: FloatArray, empirical_J: FloatArray, level_J: FloatArray | None = None
) -> dict[str, Estimate]:
    """Return λ̂ of every estimator that can read the table, by name; arguments as in :func:`choose`."""
    names = ("empirical",) if table.weighted else SAMPLED
    return {name: estimate(table, beta, margin_J, name, empirical_J, level_J) for name in names}
