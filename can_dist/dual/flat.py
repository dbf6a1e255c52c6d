"""When a training is flat: what it gains on validation prompts no longer rises by more than it varies between them.

A policy that is trained on memorises its examples: on them it goes on gaining long after it has stopped gaining on
prompts that it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.estimate import policy_gains
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError

PATIENCE = 2
"""Evaluations in a row without a rise after which a training is flat."""


@dataclass(frozen=True)
class Best:
    """The evaluation that all later ones are compared with.

    Attributes:
        step: optimizer steps done then.
        objective_P: the objective of each validation prompt then, reward units; shape (P,).
        num_flat: evaluations since then, none of which rose above it.
    """

    step: int
    objective_P: FloatArray
    num_flat: int = 0

    @property
    def is_flat(self) -> bool:
        """Whether the training is flat."""
        return self.num_flat >= PATIENCE

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values, the same bits when they are read again."""
        return {"step": self.step, "objective_P": self.objective_P.tolist(), "num_flat": self.num_flat}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Best:
        """Rebuild from :meth:`to_dict`."""
        return cls(record["step"], np.array(record["objective_P"], dtype=np.float64), record["num_flat"])


def objective(
    table: ScoreTable,
    log_prob_ref_N: npt.ArrayLike,
    log_prob_policy_N: npt.ArrayLike,
    lam_J: npt.ArrayLike,
    beta: float,
) -> FloatArray:
    """Return the estimate of what a training towards λ maximises, by prompt: E_{π_θ}(r + ⟨λ,g⟩) − β KL(π_θ‖π_ref).

    It is relative to the reference, whose own is 0: the gains and the KL are those of
    :func:`can_dist.dual.estimate.estimate_policy`.

    Args:
        table: scores of responses of π_ref to P prompts, the utilities in the order of ``lam_J``.
        log_prob_ref_N: ln π_ref(y|x), nats, in the row order of the arrays that ``table`` was built from.
        log_prob_policy_N: ln π_θ(y|x), likewise.
        lam_J: λ, reward units per utility unit.
        beta: KL weight β.

    Returns:
        Reward units, shape (P,); prompts with one response are left out.
    """
    gains, kl_P = policy_gains(table, log_prob_ref_N, log_prob_policy_N)
    score_P: FloatArray = gains[0] + np.asarray(lam_J, dtype=np.float64) @ gains[1:]
    return score_P - beta * kl_P


def compared(best: Best, objective_P: FloatArray, step: int) -> Best:
    """Return the best evaluation after that of ``step``, which is the new best if it rose.

    It rose where the mean over prompts of its difference from the best is above the standard error of that mean: both
    are of the same prompts and responses, so what these have in common cancels.

    Raises:
        ConfigError: the evaluations are of different prompts, or of fewer than two.
    """
    if objective_P.shape != best.objective_P.shape or objective_P.size < 2:
        raise ConfigError(
            f"flat: evaluations of {best.objective_P.size} and {objective_P.size} prompts; expected the same ones, "
            "two or more."
        )
    rise_P = objective_P - best.objective_P
    if rise_P.mean() > rise_P.std(ddof=1) / np.sqrt(rise_P.size):
        return Best(step, objective_P)
    return Best(best.step, best.objective_P, best.num_flat + 1)


def flat_sentence(num_steps: int, *, of_steps: int, best_step: int) -> str:
    """Return why a training ended after ``num_steps`` of ``of_steps``; ``best_step`` is that of the best evaluation."""
    best = f"that of step {best_step}" if best_step else "the start's"
    return (
        f"stopped after step {num_steps} of {of_steps}: on the validation prompts r + ⟨λ, g⟩ − β KL was, in the last "
        f"{PATIENCE} evaluations that count, no more than a standard error above {best}"
    )
