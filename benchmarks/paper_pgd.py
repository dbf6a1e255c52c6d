"""The peer's frontier: the threshold of a wanted λ by bisection, one whole descent of the authors' solver per trial.

The solver itself is ``published_dual.py``. The comparison favours it: it is leaner than the original.
"""

from __future__ import annotations

from dataclasses import dataclass

from published_dual import published_pgd

from can_dist.dual.table import FloatArray


@dataclass(frozen=True)
class BisectionResult:
    """The threshold whose λ is the wanted one, and the solves spent."""

    threshold: float
    num_solves: int


def bisect_threshold(
    reward_PK: FloatArray,
    utility_PK: FloatArray,
    target_lam: float,
    beta: float,
    *,
    bracket: tuple[float, float],
    tolerance: float = 1e-3,
    max_solves: int = 40,
    lr: float | None = 2.0,
) -> BisectionResult:
    """Find the threshold whose λ is within ``tolerance`` of the target, one whole descent per trial.

    A trial that gives up counts as a threshold too high, as the authors read it ("may not have a finite maximizer").
    """
    low, high = bracket
    middle = (low + high) / 2
    for count in range(1, max_solves + 1):
        middle = (low + high) / 2
        lam = published_pgd(reward_PK, utility_PK, middle, beta, lr=lr).lam
        if lam is not None and abs(lam - target_lam) < tolerance:
            return BisectionResult(middle, count)
        low, high = (low, middle) if lam is None or lam > target_lam else (middle, high)
    return BisectionResult(middle, max_solves)
