"""The peer: projected gradient descent on the dual, by the rules of the CAN authors' code.

(shuoli90/CAN, safe_rlhf/trainers/model_based.py and the notebooks beside it.)

Own implementation of its behaviour, with its conventions:

- λ starts at 1 and moves by λ ← max(0, λ − η·∂D/∂λ), at most 200 times (``num_iters``; the ``max_iters`` that the
  authors' calls pass is not read by their solver);
- the step η is twice the ``lr`` passed (1 when none is passed; the authors pass 2, so η = 4);
- it stops when, after at least 11 steps, λ is within 1e-5 of each of the last five λ;
- otherwise it starts again at λ = 1 with the step divided by 2, then by a further 4, 8, ... (the division compounds),
  and gives up after five rounds (ten in the notebooks);
- the constraint is an absolute level, E_π g ≥ threshold;
- a frontier is drawn by bisecting the threshold until the solver returns the wanted λ.

Leaner than the original, which also records the objective and both means at every step: the comparison favours it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PgdResult:
    """λ (None where it gave up), the gradient steps taken over all rounds, and the rounds."""

    lam: float | None
    num_steps: int
    num_rounds: int


def paper_pgd(
    reward_PK: FloatArray,
    utility_PK: FloatArray,
    threshold: float,
    beta: float,
    *,
    lr: float | None = 2.0,
    num_iters: int = 200,
    tolerance: float = 1e-5,
    max_rounds: int = 5,
) -> PgdResult:
    """Solve for λ as the authors' code does; ``lr=None`` is their default of η = 1."""
    step = 1.0 if lr is None else 2.0 * lr
    total = 0
    for round_index in range(max_rounds):
        step /= 2.0**round_index
        lam, history = 1.0, []
        for index in range(num_iters):
            weight_PK = softmax((reward_PK + (utility_PK - threshold) * lam) / beta, axis=1)
            gradient = float(np.sum(weight_PK * (utility_PK - threshold), axis=1).mean())
            lam = max(lam - step * gradient, 0.0)
            history.append(lam)
            total += 1
            if index >= 10 and max(abs(lam - past) for past in history[-5:]) < tolerance:
                return PgdResult(lam, total, round_index + 1)
    return PgdResult(None, total, max_rounds)


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
        lam = paper_pgd(reward_PK, utility_PK, middle, beta, lr=lr).lam
        if lam is not None and abs(lam - target_lam) < tolerance:
            return BisectionResult(middle, count)
        low, high = (low, middle) if lam is None or lam > target_lam else (middle, high)
    return BisectionResult(middle, max_solves)
