"""The frontier of a constraint on a CVaR: every margin is solved at its own τ (docs/dual.md, 8 and 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from can_dist.dual.frontier import REACH, Frontier, FrontierPoint, frontier_table
from can_dist.dual.objective import tilt
from can_dist.dual.solution import Margin
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.dual.tails import Column, settle, worst_mean
from can_dist.errors import ConfigError


def tail_frontier(
    column: Column,
    reward_N: FloatArray,
    score_N: FloatArray,
    prompt_N: npt.NDArray[np.generic],
    *,
    beta: float,
    margins: Sequence[float] | None = None,
    num_points: int = 50,
    confidence: float = 0.95,
) -> Frontier:
    """Return the frontier of one ``cvar``: margins are improvements of the CVaR over the reference's.

    Every point is :func:`~can_dist.dual.settle` and a solve of its own, since each margin has its own τ; its λ is the
    one that the paper's estimator gives at this margin. The bands are those at this τ, the reference's CVaR as known.

    Args:
        column: a ``cvar``.
        reward_N: r of every response.
        score_N: the score whose tail is constrained.
        prompt_N: prompt ids.
        beta: KL weight β > 0.
        margins: to go through, ascending; default: from what λ = 0 gives to near the most attainable.
        num_points: number of margins, where none are given.
        confidence: of the bands.

    Raises:
        ConfigError: fewer than 2 points.
    """
    if num_points < 2:
        raise ConfigError(f"num_points = {num_points}: expected at least 2.")
    table = ScoreTable.build(reward_N, score_N, prompt_N, names=[column.name])
    raw_N = table.utility_JN[0] + table.spread(table.mean_utility_JP[0])
    share_N, alpha = np.exp(table.log_weight_N) / table.num_prompts, column.alpha or 1.0
    reference = worst_mean(raw_N, share_N, alpha)
    unpriced = worst_mean(raw_N, tilt(table, np.zeros(1), beta).weight_N / table.num_prompts, alpha)
    best_P = table.max_rows(raw_N)
    most = worst_mean(best_P, np.full(best_P.size, 1 / best_P.size), alpha)
    spaced = np.linspace(unpriced, unpriced + REACH * (most - unpriced), num_points) - reference
    points = [
        point
        for margin in (spaced.tolist() if margins is None else margins)
        for point in _at(float(margin), column, reward_N, score_N, prompt_N, beta, reference, most)
    ]
    attainable = {column.name: most - reference}
    return Frontier((column.name,), tuple(points), (len(points),), attainable, float(beta), confidence)


def _at(
    margin: float,
    column: Column,
    reward_N: FloatArray,
    score_N: FloatArray,
    prompt_N: npt.NDArray[np.generic],
    beta: float,
    reference: float,
    most: float,
) -> Sequence[FrontierPoint]:
    """Return the point of one margin, in units of the CVaR."""
    demand = Margin(column.name, threshold=min(reference + margin, most))
    settled = settle([column], [demand], reward_N, score_N[:, None], prompt_N, beta=beta)
    table = ScoreTable.build(reward_N, settled.columns[0].values([score_N]), prompt_N, names=[column.name])
    centre = float(table.centre_J[0])
    shift = reference - centre
    curve = frontier_table(table, beta=beta, names=[column.name], margins=[margin + shift])
    return [
        replace(point, margin_J=np.array([margin]), improvement_J=point.improvement_J - shift) for point in curve.points
    ]
