"""What a table of scores says of the margins and β that are asked of it, before a dual is solved for good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from can_dist.dual import Margin, ScoreTable, solve_table
from can_dist.dual.belief.level import Level, level_of
from can_dist.dual.belief.trust import MIN_PROMPTS
from can_dist.dual.weights import percent
from can_dist.errors import CanDistError

STEPS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
"""Digits of the β that are tried, in every power of ten."""
LEAST, MOST = 0.1, 10.0
"""Range of the β that are tried, in standard deviations of the reward within a prompt."""


@dataclass(frozen=True)
class BetaAdvice:
    """How far the prediction for the given margins can be trusted, by β.

    Attributes:
        level: at the given β.
        ess: median of the effective responses of a prompt there; NaN where there is no finite λ.
        spread: least β tried from which on the prediction may be trusted; None where there is none.
        spread_ess: median of the effective responses of a prompt at ``spread``; NaN without.
        num_prompts: of the table.
    """

    level: Level
    ess: float
    spread: float | None
    spread_ess: float
    num_prompts: int

    @property
    def too_few(self) -> bool:
        """Whether there are too few prompts to trust any prediction."""
        return self.num_prompts < MIN_PROMPTS


def margin_words(table: ScoreTable, column: int, margin: Margin) -> str:
    """Return a demand in units of the table: standard deviations within a prompt, and the share that reaches it.

    A threshold is an improvement over the table's mean; the share is then that of responses at or above it.

    Args:
        table: scores of sampled responses.
        column: of the constraint's utility.
        margin: what is demanded of it.
    """
    value_N = table.utility_JN[column]
    if margin.threshold is None:
        demand, given = float(margin.margin or 0.0), f"a margin of {margin.margin:g}"
        share, far = float(np.mean(value_N >= demand)), "lie as far above their prompt's mean"
    else:
        demand, given = margin.threshold - float(table.centre_J[column]), f"a threshold of {margin.threshold:g}"
        raw_N = value_N + table.spread(table.mean_utility_JP[column])
        share, far = float(np.mean(raw_N >= margin.threshold)), "are at or above it"
    sd = table.within_sd(value_N)
    if not sd > 0:
        return f"{given} of a score that never differs between the responses to a prompt"
    over = "" if margin.threshold is None else f", {demand:+.3g} over the reference's mean"
    units = f"{demand / sd:.2g} standard deviations of the scores within a prompt"
    return f"{given} is {units}{over}; {percent(share)} of the responses {far}"


def beta_advice(table: ScoreTable, margins: Sequence[Margin], beta: float, estimator: str = "auto") -> BetaAdvice:
    """Solve the dual at β and at a grid of others, and say from which on the prediction may be trusted.

    The grid has the digits ``STEPS`` in every power of ten, between ``LEAST`` and ``MOST`` standard deviations of the
    reward within a prompt. Costs about fifteen solves.
    """
    level, ess = _at(table, margins, beta, estimator)
    spread: tuple[float, float] | None = None
    for trial in reversed(_grid(table.reward_spread)):
        trial_level, trial_ess = _at(table, margins, trial, estimator)
        if trial_level != "trusted":
            break
        spread = trial, trial_ess
    least, least_ess = spread or (None, math.nan)
    return BetaAdvice(level, ess, least, least_ess, table.num_prompts)


def beta_words(advice: BetaAdvice, beta: float, num_responses: float) -> str:
    """Return the advice as a sentence."""
    now = f"at beta = {beta:g} the prediction for these margins is {SAID[advice.level]}"
    if math.isfinite(advice.ess):
        now += f" (a median of {advice.ess:.1f} of {num_responses:g} responses carry a prompt)"
    if advice.too_few:
        return f"{now}; {advice.num_prompts} prompts are too few for any beta, {MIN_PROMPTS} are needed"
    if advice.spread is None:
        return f"{now}; no beta that was tried makes it one to trust"
    carried = f"(a median of {advice.spread_ess:.1f} of {num_responses:g})"
    return f"{now}; beta ≈ {advice.spread:g} keeps the weights spread {carried}: from there on it may be trusted"


SAID: dict[Level, str] = {
    "trusted": "to be trusted",
    "roughly": "to be trusted roughly",
    "not trusted": "not to be trusted",
}


def _grid(sd: float) -> list[float]:
    """Return the β to try, increasing; none where no reward differs."""
    if not sd > 0:
        return []
    powers = range(math.floor(math.log10(LEAST * sd)) - 1, math.ceil(math.log10(MOST * sd)) + 1)
    return [step * 10.0**power for power in powers for step in STEPS if LEAST * sd <= step * 10.0**power <= MOST * sd]


def _at(table: ScoreTable, margins: Sequence[Margin], beta: float, estimator: str) -> tuple[Level, float]:
    try:
        solution = solve_table(table, beta=beta, constraints=margins, estimator=estimator)
    except CanDistError:  # infeasible, or no solution of the estimator: there is no prediction to trust
        return "not trusted", math.nan
    return level_of(solution.diagnostics), float(solution.diagnostics["ess"]["median"])
