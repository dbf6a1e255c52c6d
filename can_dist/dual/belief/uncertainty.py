"""What the prompts drawn cost in certainty: bootstrap over prompts, cross-fitted predictions (docs/estimators.md, 7).

The unit of replication is the prompt. ḡ is recomputed in every replicate by itself: each prompt's slack u_i carries
its own reference mean (paired), and where the constraint is an absolute level, u_i = Σ_k w_ik g_ik − τ is not centred.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from can_dist.dual.estimators import estimator_moments, orthant_minimum, with_level
from can_dist.dual.interval import Interval, mean_interval
from can_dist.dual.solution import DualSolution, Margin
from can_dist.dual.solve import solve_table
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError

_CHUNK = 4_000_000


@dataclass(frozen=True)
class Bootstrap:
    """λ̂ on resampled prompts.

    Attributes:
        names: the constraints.
        lam_RJ: λ̂ of each replicate; NaN where an exact one was infeasible.
        lam_se: standard deviation over replicates.
        lam_low: lower percentile of λ̂.
        lam_high: upper percentile.
        confidence: of the interval between them.
        exact: whether each replicate was solved, or took one Newton step from λ̂.
    """

    names: tuple[str, ...]
    lam_RJ: FloatArray
    lam_se: dict[str, float]
    lam_low: dict[str, float]
    lam_high: dict[str, float]
    confidence: float
    exact: bool


@dataclass(frozen=True)
class CrossFit:
    """Predictions for prompts that did not give λ: each fold is predicted with the λ of the others, then pooled.

    Attributes:
        improvement: E_{π_λ} g − E_{π_ref} g by constraint.
        level: E_{π_λ} g, what a threshold is compared with.
        reward_improvement: E_{π_λ} r − E_{π_ref} r.
        kl: KL(π_λ‖π_ref), nats.
        lam_FJ: λ of each fold, in the order of the constraints.
        confidence: of the intervals, each a :func:`mean_interval`.
        num_folds: folds.
    """

    improvement: dict[str, Interval]
    level: dict[str, Interval]
    reward_improvement: Interval
    kl: Interval
    lam_FJ: FloatArray
    confidence: float
    num_folds: int


def bootstrap(
    table: ScoreTable,
    solution: DualSolution,
    *,
    num_replicates: int = 1000,
    seed: int = 0,
    weights: str = "multinomial",
    exact: bool = False,
    confidence: float = 0.95,
) -> Bootstrap:
    """Resample prompts and redo the solve: one Newton step per replicate, or a full solve where ``exact``.

    A replicate counts prompt i n_i times; from λ̂ its step minimises ½ dᵀH*d + ⟨G*,d⟩ over λ̂ + d ≥ 0 with
    G* = Σ_i n_i u_i/Σ_i n_i and H* likewise. The error of the step is of the order of 1/P.

    Args:
        table: the table that gave ``solution``.
        solution: a solution with a finite λ.
        num_replicates: R.
        seed: of the resampling.
        weights: ``multinomial`` (P draws with replacement) or ``poisson`` (independent counts of mean 1).
        exact: solve each replicate from scratch. One whose prompts cannot meet the margins counts as λ̂ = ∞.
        confidence: of the percentile interval.

    Raises:
        ConfigError: arguments that cannot mean anything, or a solution without a finite λ.
    """
    names = _check(table, solution, confidence)
    if num_replicates < 2 or weights not in ("multinomial", "poisson"):
        raise ConfigError(
            f"num_replicates = {num_replicates}, weights = {weights!r}: expected at least 2, and 'multinomial' or "
            "'poisson'."
        )
    lam_J, beta, margin_J = solution.lam_vector, solution.beta, solution.margin_vector
    level_J = np.array([float(value is not None) for value in solution.threshold.values()])
    moments = estimator_moments(table, lam_J, beta, solution.estimator)
    slack_PJ = with_level(table, moments.gain_PJ - margin_J, level_J)
    parts = []
    for count_RP in _counts(np.random.default_rng(seed), num_replicates, table.num_prompts, weights):
        share_RP = count_RP / np.maximum(count_RP.sum(axis=1, keepdims=True), 1)
        if exact:
            parts.append(np.array([_solve_replicate(table, solution, count_P) for count_P in count_RP]))
        else:
            parts.append(_step(lam_J, share_RP, slack_PJ, moments.covariance_PJJ / beta))
    lam_RJ = np.concatenate(parts)
    tail = 0.5 - confidence / 2
    ordered = np.where(np.isnan(lam_RJ), np.inf, lam_RJ)
    low, high = (np.quantile(ordered, share, axis=0, method="inverted_cdf") for share in (tail, 1 - tail))
    spread = np.nanstd(lam_RJ, axis=0, ddof=1)
    columns = [dict(zip(names, row.tolist(), strict=True)) for row in (spread, low, high)]
    return Bootstrap(names, lam_RJ, columns[0], columns[1], columns[2], confidence, exact)


def cross_fit(
    table: ScoreTable,
    *,
    beta: float,
    constraints: Sequence[Margin],
    num_folds: int = 5,
    seed: int = 0,
    estimator: str = "auto",
    confidence: float = 0.95,
) -> CrossFit:
    """Predict every prompt with a λ solved on other prompts.

    In sample an active constraint is met exactly by construction; this is what to expect of new prompts.

    Args:
        table: scores of P prompts.
        beta: KL weight β > 0.
        constraints: the constraints; a threshold becomes a margin over the reference mean of the solving prompts.
        num_folds: folds, at most P.
        seed: of the split.
        estimator: of λ and of the predictions, see :func:`solve_dual`.
        confidence: of the intervals.

    Raises:
        ConfigError: arguments that cannot mean anything.
        InfeasibleConstraint: the margins cannot be met on the prompts outside some fold.
    """
    num_prompts = table.num_prompts
    if not 2 <= num_folds <= num_prompts or not 0 < confidence < 1:
        raise ConfigError(
            f"num_folds = {num_folds}, confidence = {confidence}: expected 2 to {num_prompts} (the prompts), and "
            "between 0 and 1."
        )
    fold_P = np.random.default_rng(seed).permutation(np.arange(num_prompts) % num_folds)
    gain_PJ = np.empty((num_prompts, table.num_constraints))
    reward_P, kl_P = np.empty(num_prompts), np.empty(num_prompts)
    lams = []
    for fold in range(num_folds):
        held = fold_P == fold
        solution = solve_table(table.take(~held), beta=beta, constraints=constraints, estimator=estimator)
        lams.append(solution.lam_vector)
        moments = estimator_moments(table.take(held), lams[-1], beta, solution.estimator)
        gain_PJ[held], reward_P[held], kl_P[held] = moments.gain_PJ, moments.reward_gain_P, moments.kl_P
    level_PJ = gain_PJ + table.mean_utility_JP.T
    names = [constraint.name for constraint in constraints]
    return CrossFit(
        improvement={name: mean_interval(gain_PJ[:, j], confidence) for j, name in enumerate(names)},
        level={name: mean_interval(level_PJ[:, j], confidence) for j, name in enumerate(names)},
        reward_improvement=mean_interval(reward_P, confidence),
        kl=mean_interval(kl_P, confidence, least=0.0),
        lam_FJ=np.array(lams),
        confidence=confidence,
        num_folds=num_folds,
    )


def lam_interval(solution: DualSolution, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """Return λ̂ ± z·SE by constraint, cut at 0; NaN where λ̂ is at the bound."""
    half = float(ndtri(0.5 + confidence / 2))
    return {
        name: (float(np.maximum(lam - half * solution.lam_se[name], 0.0)), lam + half * solution.lam_se[name])
        for name, lam in solution.lam.items()
    }


def _check(table: ScoreTable, solution: DualSolution, confidence: float) -> tuple[str, ...]:
    names = tuple(solution.lam)
    if len(names) != table.num_constraints or not names:
        raise ConfigError(f"solution: {len(names)} constraints for a table of {table.num_constraints} utilities.")
    if not np.isfinite(solution.lam_vector).all():
        raise ConfigError(f"solution: status {solution.status.name} has no finite lambda to resample; solve first.")
    if (solution.lam_vector < 0).any():
        raise ConfigError("solution: a negative multiplier (an equality); its replicates are not implemented.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence}: expected between 0 and 1.")
    return names


def _counts(generator: np.random.Generator, num_replicates: int, num_prompts: int, kind: str) -> Iterator[FloatArray]:
    """Yield prompt counts, shape (some replicates, P), a bounded number of them at a time."""
    rows = max(1, _CHUNK // num_prompts)
    for first in range(0, num_replicates, rows):
        size = min(rows, num_replicates - first)
        if kind == "poisson":
            yield generator.poisson(1.0, size=(size, num_prompts)).astype(np.float64)
            continue
        drawn = generator.integers(num_prompts, size=(size, num_prompts))
        drawn += np.arange(size)[:, None] * num_prompts
        yield np.bincount(drawn.ravel(), minlength=size * num_prompts).reshape(size, num_prompts).astype(np.float64)


def _step(lam_J: FloatArray, share_RP: FloatArray, slack_PJ: FloatArray, curvature_PJJ: FloatArray) -> FloatArray:
    """Return λ of each replicate after one Newton step kept at λ ≥ 0, shape (R, J)."""
    num_constraints = lam_J.size
    gradient_RJ = share_RP @ slack_PJ
    flat = share_RP @ curvature_PJJ.reshape(slack_PJ.shape[0], -1)
    hessian_RJJ = flat.reshape(-1, num_constraints, num_constraints)
    if num_constraints == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = np.maximum(lam_J - gradient_RJ / hessian_RJJ[:, 0], 0.0)
        return np.where(hessian_RJJ[:, 0] > 0, moved, lam_J)
    return np.array(
        [
            orthant_minimum(hessian, slope - hessian @ lam_J)
            for hessian, slope in zip(hessian_RJJ, gradient_RJ, strict=True)
        ]
    )


def _solve_replicate(table: ScoreTable, solution: DualSolution, count_P: FloatArray) -> FloatArray:
    """Solve one replicate; NaN where its prompts cannot meet the margins."""
    constraints = [
        Margin(name, threshold=solution.threshold[name])
        if solution.threshold[name] is not None
        else Margin(name, margin)
        for name, margin in solution.margin.items()
    ]
    drawn = table.take(np.repeat(np.arange(table.num_prompts), count_P.astype(np.int64)))
    return solve_table(
        drawn, beta=solution.beta, constraints=constraints, estimator=solution.estimator, throw=False
    ).lam_vector
