"""The full examination of a solved table: what the number rests on, and whether to believe it (docs/estimators.md).

Costs a dozen solves, so it is asked for by name and not done by every solve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from can_dist.dual.belief.choice import every_estimate
from can_dist.dual.belief.psis import pooled_shape, prompt_shapes
from can_dist.dual.belief.trust import judge, left_out_change
from can_dist.dual.estimators import prediction_from, with_level
from can_dist.dual.moments import PromptMoments, prompt_moments
from can_dist.dual.objective import tilt
from can_dist.dual.solution import DualSolution, Judgement, Margin
from can_dist.dual.solve import solve_table
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.dual.weights import percent, weight_diagnostics
from can_dist.errors import ConfigError

HEAVY_SHAPE = 0.7
UNSTABLE = 0.1
DISAGREEMENT = 0.03
INFLUENTIAL = 0.5
"""Share of its own standard error by which one prompt's removal must move λ̂ to be named in the verdict."""


@dataclass(frozen=True)
class Influence:
    """A prompt and how far λ̂ moves when it is left out, one Newton step from λ̂."""

    prompt: str
    lam_change: dict[str, float]
    standard_errors: float
    ess: float


@dataclass(frozen=True)
class ScorerSummary:
    """One score column, raw units; ``skewness`` and ``kurtosis`` (excess) of the within-prompt deviations.

    ``correlation`` is the within-prompt correlation with the reward; ``tied`` the share of responses that share their
    score with another response of their prompt.
    """

    mean: float
    within_sd: float
    between_sd: float
    low: float
    high: float
    skewness: float
    kurtosis: float
    correlation: float
    tied: float


@dataclass(frozen=True)
class Diagnosis:
    """What the examination found.

    Attributes:
        lam: λ̂ of each estimator by constraint; NaN where it has none.
        lam_se: their standard errors.
        judgement: what the solution's own λ̂ can be trusted for; None where the table enumerates its support.
        disagreement: largest relative difference between two estimators' λ̂.
        pareto_k: shape of the weights' tail: median and 90th percentile over prompts, share above 0.7, all pooled.
        k_stability: empirical λ̂ with a quarter, half and all responses per prompt (averaged over the parts).
        influence: the prompts whose removal moves λ̂ most, first the largest.
        scorers: one summary per score column, the reward first.
        verdict: all of it in plain words.
    """

    lam: dict[str, dict[str, float]]
    lam_se: dict[str, dict[str, float]]
    judgement: Judgement | None
    disagreement: float
    pareto_k: dict[str, float]
    k_stability: dict[str, dict[str, float]]
    influence: tuple[Influence, ...]
    scorers: dict[str, ScorerSummary]
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values; null for what is not a finite number."""
        record = _plain(self)
        assert isinstance(record, dict)
        return record


def diagnose(
    table: ScoreTable,
    solution: DualSolution,
    *,
    num_influential: int = 10,
    reward_name: str = "reward",
    seed: int = 0,
) -> Diagnosis:
    """Examine a solution with a finite λ on the table that gave it.

    Args:
        table: scores of P prompts.
        solution: of any estimator.
        num_influential: prompts to list.
        reward_name: name of the reward in the summaries.
        seed: of the split of the responses for the K-stability.

    Raises:
        ConfigError: the solution has no finite λ, no constraint, or another number of them than the table.
    """
    names = _check(table, solution)
    beta, margin_J = solution.beta, solution.margin_vector
    constraints = [Margin(name, float(value)) for name, value in zip(names, margin_J, strict=True)]
    level_J = np.array([float(solution.threshold[name] is not None) for name in names])
    lam_J = solution.lam_vector
    if solution.estimator != "empirical":
        lam_J = _paper(table, beta, constraints)
    estimates = every_estimate(table, beta, margin_J, lam_J, level_J)
    used = estimates[solution.estimator]
    trust = None if table.weighted or not used.converged else judge(table, beta, margin_J, used, level_J)
    moments = prompt_moments(table, lam_J, beta)
    shapes = _shapes(table, lam_J, beta)
    stability = _stability(table, beta, constraints, lam_J, np.random.default_rng(seed))
    slack_PJ = with_level(table, moments.gain_PJ - margin_J, level_J)
    influence = _influence(table, moments, slack_PJ, beta, lam_J, names, num_influential)
    lam = {name: _named(names, item.lam_J) for name, item in estimates.items()}
    disagreement = _disagreement(np.array([list(row.values()) for row in lam.values()]))
    summary = weight_diagnostics(
        table,
        used.lam_J,
        beta,
        prediction_from(table, used.moments, beta, margin_J),
        trust,
        dict(zip(names, level_J.tolist(), strict=True)),
    )
    return Diagnosis(
        lam=lam,
        lam_se={name: _named(names, item.lam_se_J) for name, item in estimates.items()},
        judgement=summary.get("judgement"),
        disagreement=disagreement,
        pareto_k=shapes,
        k_stability={part: _named(names, value_J) for part, value_J in stability.items()},
        influence=influence,
        scorers=_scorers(table, names, reward_name),
        verdict=" ".join([summary["verdict"], *_remarks(table, disagreement, shapes, stability, influence)]),
    )


def _check(table: ScoreTable, solution: DualSolution) -> list[str]:
    names = list(solution.lam)
    if not names or len(names) != table.num_constraints or not np.isfinite(solution.lam_vector).all():
        raise ConfigError(
            f"diagnose: a solution of {len(names)} constraints, status {solution.status.name}, for a table of "
            f"{table.num_constraints} utilities; it needs a finite lambda for each."
        )
    if (solution.lam_vector < 0).any():
        raise ConfigError(
            "diagnose: a negative multiplier (an equality); turn the sign of its utility and solve again."
        )
    return names


def _named(names: list[str], value_J: FloatArray) -> dict[str, float]:
    return dict(zip(names, np.asarray(value_J).tolist(), strict=True))


def _shapes(table: ScoreTable, lam_J: FloatArray, beta: float) -> dict[str, float]:
    weight_N = tilt(table, lam_J, beta).weight_N
    known_P = prompt_shapes(table, weight_N)
    known_P = known_P[np.isfinite(known_P)]
    median = p90 = heavy = math.nan
    if known_P.size:
        median, p90 = (float(value) for value in np.quantile(known_P, [0.5, 0.9]))
        heavy = float((known_P > HEAVY_SHAPE).mean())
    return {"median": median, "p90": p90, "share_above_0.7": heavy, "pooled": pooled_shape(table, weight_N)}


def _paper(table: ScoreTable, beta: float, constraints: Sequence[Margin]) -> FloatArray:
    """Return λ̂ of the paper's estimator; NaN where it has none."""
    return solve_table(table, beta=beta, constraints=constraints, throw=False, estimator="empirical").lam_vector


def _stability(
    table: ScoreTable, beta: float, constraints: list[Margin], lam_J: FloatArray, generator: np.random.Generator
) -> dict[str, FloatArray]:
    """Return the empirical λ̂ at K/4, K/2 and K: mean over disjoint parts of the responses, NaN where one has none.

    A prompt with fewer responses than parts is left out of the smaller sizes, as it has none to give to some part.
    """
    lam_of = {"K/4": np.full(lam_J.size, math.nan), "K/2": np.full(lam_J.size, math.nan), "K": lam_J}
    order_N = np.lexsort((generator.random(table.num_rows), table.row_prompt_N))
    rank_N = np.empty(table.num_rows, dtype=np.int64)
    rank_N[order_N] = np.arange(table.num_rows) - table.spread(table.start_P)
    reward_N = table.reward_N + table.spread(table.mean_reward_P)
    utility_JN = table.utility_JN + np.array([table.spread(mean_P) for mean_P in table.mean_utility_JP])
    for label, parts in (("K/4", 4), ("K/2", 2)):
        enough_N = table.spread(table.num_responses_P) >= 2 * parts
        if not enough_N.any():
            continue
        lams = []
        for part in range(parts):
            rows = enough_N & (rank_N % parts == part)
            weight_N = table.log_weight_N[rows] if table.weighted else None
            small = ScoreTable.build(reward_N[rows], utility_JN[:, rows].T, table.row_prompt_N[rows], weight_N)
            lams.append(_paper(small, beta, constraints))
        lam_of[label] = np.mean(lams, axis=0)
    return lam_of


def _influence(
    table: ScoreTable,
    moments: PromptMoments,
    slack_PJ: FloatArray,
    beta: float,
    lam_J: FloatArray,
    names: list[str],
    count: int,
) -> tuple[Influence, ...]:
    """Rank prompts by the one-step change of λ̂ without them: (Σ_{k≠i} C_k/β)⁻¹ u_i, over the active constraints."""
    free, change_PJ = np.flatnonzero(lam_J > 0), left_out_change(moments, slack_PJ, beta, lam_J)
    if not change_PJ.any():
        return ()
    error_J = np.sqrt((change_PJ**2).sum(axis=0))[free]
    size_P = np.max(np.abs(change_PJ[:, free]) / np.maximum(error_J, 1e-300), axis=1)
    largest = np.argsort(-size_P, kind="stable")[:count]
    return tuple(
        Influence(
            prompt=str(table.prompt_P[i]),
            lam_change=_named(names, change_PJ[i]),
            standard_errors=float(size_P[i]),
            ess=float(moments.ess_P[i]),
        )
        for i in largest
    )


def _scorers(table: ScoreTable, names: list[str], reward_name: str) -> dict[str, ScorerSummary]:
    columns = [(reward_name, table.reward_N, table.mean_reward_P)]
    columns += list(zip(names, table.utility_JN, table.mean_utility_JP, strict=True))
    return {name: _summary(table, value_N, mean_P) for name, value_N, mean_P in columns}


def _summary(table: ScoreTable, value_N: FloatArray, mean_P: FloatArray) -> ScorerSummary:
    raw_N = value_N + table.spread(mean_P)
    sd = table.within_sd(value_N)
    unit_N = value_N / sd if sd > 0 else value_N
    product = table.within_sd(table.reward_N) * sd
    shared = table.sum_rows(table.reward_N * value_N) / np.maximum(table.num_responses_P - 1, 1)
    order_N = np.lexsort((raw_N, table.row_prompt_N))
    same = (np.diff(raw_N[order_N]) == 0) & (np.diff(table.row_prompt_N[order_N]) == 0)
    tied = np.concatenate((same, [False])) | np.concatenate(([False], same))
    second = float((unit_N**2).mean()) or 1.0
    return ScorerSummary(
        mean=float(mean_P.mean()),
        within_sd=sd,
        between_sd=float(mean_P.std(ddof=1)) if mean_P.size > 1 else math.nan,
        low=float(raw_N.min()),
        high=float(raw_N.max()),
        skewness=float((unit_N**3).mean()) / second**1.5,
        kurtosis=float((unit_N**4).mean()) / second**2 - 3 if sd > 0 else math.nan,
        correlation=min(float(shared.mean()) / product, 1.0) if product > 0 else math.nan,
        tied=float(tied.mean()),
    )


def _disagreement(lam_EJ: FloatArray) -> float:
    """Return the largest over constraints of (largest − smallest λ̂)/largest over the estimators that have one."""
    known = lam_EJ[np.isfinite(lam_EJ).all(axis=1)]
    if known.shape[0] < 2:
        return math.nan
    top = known.max(axis=0)
    gap = top - known.min(axis=0)
    return float(np.max(np.where(top > 0, gap / np.where(top > 0, top, 1.0), 0.0), initial=0.0))


def _remarks(
    table: ScoreTable,
    disagreement: float,
    shapes: Mapping[str, float],
    stability: Mapping[str, FloatArray],
    influence: tuple[Influence, ...],
) -> list[str]:
    """Say beside the verdict what else moves λ̂; nothing of a table that enumerates its support."""
    if table.weighted:
        return []
    remarks = []
    if disagreement > DISAGREEMENT:
        remarks.append(f"the estimators differ by {percent(disagreement)}")
    change = _relative_change(stability["K/2"], stability["K"])
    if change > UNSTABLE:
        remarks.append(f"half the responses per prompt move the empirical lambda by {percent(change)}")
    if shapes["pooled"] > HEAVY_SHAPE:
        remarks.append(f"rare responses carry the weight (Pareto k = {shapes['pooled']:.2g})")
    if influence and influence[0].standard_errors > INFLUENTIAL:
        remarks.append(
            f"one prompt, {influence[0].prompt}, moves lambda by {influence[0].standard_errors:.2g} standard errors"
        )
    return [f"Note: {'; '.join(remarks)}."] if remarks else []


def _relative_change(first_J: FloatArray, second_J: FloatArray) -> float:
    if not np.isfinite(first_J).all():
        return math.nan
    active = second_J > 0
    return float(np.max(np.abs(first_J / np.where(active, second_J, 1.0) - 1)[active], initial=0.0))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
