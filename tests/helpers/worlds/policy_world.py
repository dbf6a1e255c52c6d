"""Policies known in full: many prompts, 32 responses each with their probabilities, and policies tilted by any score.

What an estimate should say is a sum over all responses here, and sampled tables are drawn from the same pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax, softmax
from scipy.stats import t

from can_dist.dual import Interval, PolicyEstimate, ScoreTable


@dataclass(frozen=True)
class PolicyWorld:
    """P prompts × M responses: ln π_ref (P, M), r (P, M) and g (J, P, M)."""

    log_ref_PM: np.ndarray
    reward_PM: np.ndarray
    utility_JPM: np.ndarray

    def tilted(self, score_PM: np.ndarray) -> np.ndarray:
        """ln π for π ∝ π_ref exp(score)."""
        return log_softmax(self.log_ref_PM + score_PM, axis=1)

    def gain(self, log_policy_PM: np.ndarray, value_PM: np.ndarray) -> float:
        return float(((np.exp(log_policy_PM) - np.exp(self.log_ref_PM)) * value_PM).sum(axis=1).mean())

    def kl(self, log_policy_PM: np.ndarray) -> float:
        return float((np.exp(log_policy_PM) * (log_policy_PM - self.log_ref_PM)).sum(axis=1).mean())

    def covariance(self, first_PM: np.ndarray, second_PM: np.ndarray) -> float:
        """Mean over prompts of the covariance under π_ref, written as E ab − E a E b."""
        ref = np.exp(self.log_ref_PM)
        product = (ref * first_PM * second_PM).sum(axis=1)
        return float((product - (ref * first_PM).sum(axis=1) * (ref * second_PM).sum(axis=1)).mean())

    def enumerated(self, *columns: np.ndarray) -> tuple[ScoreTable, list[np.ndarray]]:
        """The table of all responses with their weights, and (P, M) columns as its rows; rows shuffled."""
        num_prompts, num_support = self.log_ref_PM.shape
        order = np.random.default_rng(0).permutation(num_prompts * num_support)
        prompt = np.repeat(np.arange(num_prompts), num_support)[order]
        utility_NJ = self.utility_JPM.reshape(-1, order.size).T[order]
        table = ScoreTable.build(self.reward_PM.ravel()[order], utility_NJ, prompt, self.log_ref_PM.ravel()[order])
        return table, [column.ravel()[order] for column in (self.log_ref_PM, *columns)]

    def sampled(
        self, generator: np.random.Generator, num_prompts: int, num_responses: int, *columns: np.ndarray
    ) -> tuple[ScoreTable, list[np.ndarray]]:
        """A table of prompts drawn from the pool and responses drawn from π_ref, and columns as its rows."""
        drawn = generator.integers(self.log_ref_PM.shape[0], size=num_prompts)
        ladder = np.exp(self.log_ref_PM[drawn]).cumsum(axis=1)
        uniform = generator.uniform(size=(num_prompts, num_responses))
        support = np.minimum((uniform[:, :, None] > ladder[:, None, :]).sum(axis=2), ladder.shape[1] - 1)
        rows = (np.repeat(drawn, num_responses), support.ravel())
        utility_NJ = self.utility_JPM[:, rows[0], rows[1]].T
        table = ScoreTable.build(self.reward_PM[rows], utility_NJ, np.repeat(np.arange(num_prompts), num_responses))
        return table, [column[rows] for column in (self.log_ref_PM, *columns)]


def make_world(seed: int, num_prompts: int = 2000, num_constraints: int = 1, *, skewed: bool = False) -> PolicyWorld:
    """Scores of unit scale, correlated, with a level of their own for each prompt; ``skewed``: a Gumbel reward."""
    generator = np.random.default_rng(seed)
    shape = (num_prompts, 32)
    log_ref_PM = np.log(softmax(1.5 * generator.normal(size=shape), axis=1))
    reward_PM = generator.gumbel(size=shape) / 1.28 if skewed else generator.normal(size=shape)
    utility_JPM = generator.normal(size=(num_constraints, *shape)) - 0.4 * reward_PM
    level_P = generator.normal(size=(num_prompts, 1))
    return PolicyWorld(log_ref_PM, reward_PM + level_P, utility_JPM + 2 * level_P)


def interval(mean: float, se: float, num_prompts: int) -> Interval:
    half = float(t.ppf(0.975, num_prompts - 1)) * se
    return Interval(mean, se, mean - half, mean + half)


def estimate(
    *gains: float, se: float = 0.02, kl: float = 0.1, lam: float = 1.0, num_prompts: int = 200
) -> PolicyEstimate:
    names = "abc"[: len(gains)]
    return PolicyEstimate(
        improvement={name: interval(gain, se, num_prompts) for name, gain in zip(names, gains, strict=True)},
        reward_improvement=interval(0.1, se, num_prompts),
        kl=interval(kl, 0.01, num_prompts),
        length=interval(0.4, 0.02, num_prompts),
        direction=interval(0.6, 0.02, num_prompts),
        ess=6.0,
        num_responses=8.0,
        num_prompts=num_prompts,
        num_single_response_prompts=0,
        estimator="average",
        sentence="",
        lam=dict.fromkeys(names, lam),
        beta=1.0,
        confidence=0.95,
    )
