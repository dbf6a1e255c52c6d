"""Which estimator to believe, how far, and why: the ``auto`` estimator (ALGORITHMS section 2).

Every candidate carries a bound on its relative error, bias estimate + 3 standard errors, and conditions under which
that bound means something. The smallest valid bound wins; λ̂ is declared trustworthy where it is under the tolerance.

- jackknife: its correction bounds the bias that is left. Valid where the weights are spread: median effective sample
  size 10, tenth percentile 5, and pooled tail shape k̂ at most 0.5 (below it the correction sees what the tail does).
- gaussian: the third and fourth cumulants, which it leaves out, move λ by −H⁻¹(c₃/(2β²) + c₄/(6β³)); this shift and its
  standard error bound the bias. Valid where the tilt stays inside the data: enough responses lie as far above their
  prompt's mean as the tilted policy does. Beyond the data normality cannot be checked, so it is never trusted there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from can_dist.dual.belief.psis import pooled_shape
from can_dist.dual.estimators import Estimate, estimate, with_level, within_covariance
from can_dist.dual.objective import tilt
from can_dist.dual.table import FloatArray, ScoreTable

TOLERANCE = 0.03
"""Relative error of λ̂ up to which it is declared trustworthy."""

SIGMAS = 3.0
MIN_MEDIAN_ESS = 10.0
MIN_LOW_ESS = 5.0
MAX_SHAPE = 0.5
MIN_TAIL_ROWS = 100
MAX_DEPARTURE = 4.0


@dataclass(frozen=True)
class Candidate:
    """One estimator's λ̂ and how far it may be off.

    Attributes:
        estimate: λ̂ and its moments.
        bias_J: estimate of the bias left, in units of λ, absolute.
        error_J: standard error of λ̂ together with that of the bias estimate.
        bound: largest relative error over the constraints, bias + 3 errors.
        objection: why the bound does not hold; empty where it does.
        departure: of the gaussian, how many standard errors the third or fourth cumulant lies from zero.
    """

    estimate: Estimate
    bias_J: FloatArray
    error_J: FloatArray
    bound: float
    objection: str
    departure: float = math.nan


@dataclass(frozen=True)
class Choice:
    """The estimator chosen, whether λ̂ may be trusted, and the sentence that says why."""

    chosen: Estimate
    candidates: dict[str, Candidate]
    bound: float
    trustworthy: bool
    reason: str


def choose(
    table: ScoreTable,
    beta: float,
    margin_J: FloatArray,
    empirical_J: FloatArray,
    *,
    level_J: FloatArray | None = None,
    tolerance: float = TOLERANCE,
) -> Choice:
    """Choose among the estimators by their error bounds.

    Args:
        table: scores of P prompts.
        beta: KL weight β > 0.
        margin_J: b.
        empirical_J: the empirical λ̂.
        level_J: 1 where the constraint is an absolute level, 0 where a margin.
        tolerance: relative error up to which λ̂ is trustworthy.
    """
    empirical = estimate(table, beta, margin_J, "empirical", empirical_J, level_J)
    if table.weighted:
        reason = "empirical: the table carries reference weights, so it is read as enumerating its support."
        return Choice(empirical, {}, math.nan, True, reason)
    jackknife = estimate(table, beta, margin_J, "jackknife", empirical_J, level_J)
    gaussian = estimate(table, beta, margin_J, "gaussian", empirical_J, level_J)
    sampled = _sampled_candidates(table, beta, empirical, jackknife, margin_J)
    candidates = {
        "empirical": sampled[0],
        "jackknife": sampled[1],
        "gaussian": _gaussian_candidate(table, beta, gaussian, margin_J, level_J),
    }
    valid = {name: item for name, item in candidates.items() if not item.objection and math.isfinite(item.bound)}
    best = min(valid, key=lambda key: valid[key].bound, default=None)
    if best is not None and valid[best].bound <= tolerance:
        bound = valid[best].bound
        reason = f"{best}: its lambda is known to within {_percent(bound)} (bias and three standard errors)."
        return Choice(valid[best].estimate, candidates, bound, True, reason)
    name, detail = _least_bad(candidates)
    bound = candidates[name].bound if name in valid else math.inf
    objections = [f"{key}: {item.objection or _wide(item.bound, tolerance)}" for key, item in candidates.items()]
    reason = (
        f"{name} as the least bad, since {detail}; no estimator can vouch for its lambda ({'; '.join(objections)})."
    )
    return Choice(candidates[name].estimate, candidates, bound, False, reason)


def _least_bad(candidates: dict[str, Candidate]) -> tuple[str, str]:
    """Return what to use where nothing can be trusted: normal theory unless the scores contradict it."""
    gaussian = candidates["gaussian"]
    if gaussian.estimate.converged and gaussian.departure <= MAX_DEPARTURE:
        return "gaussian", "no departure from normal scores is visible"
    name = "jackknife" if candidates["jackknife"].estimate.converged else "empirical"
    return name, "the scores are visibly not normal"


def _sampled_candidates(
    table: ScoreTable, beta: float, empirical: Estimate, jackknife: Estimate, margin_J: FloatArray
) -> tuple[Candidate, Candidate]:
    """Bound the empirical λ̂ by twice the jackknife's correction, the jackknife's by the correction."""
    gap_J = np.abs(jackknife.lam_J - empirical.lam_J)
    shift_J = np.abs((jackknife.moments.gain_PJ - empirical.moments.gain_PJ).mean(axis=0))
    several = table.num_responses_P > 1
    ess = np.quantile(empirical.moments.ess_P[several], [0.1, 0.5]) if several.any() else np.zeros(2)
    shape = pooled_shape(table, tilt(table, empirical.lam_J, beta).weight_N)
    objection = ""
    if not jackknife.converged:
        objection = "leaving one response out changes too much for a solution to exist"
    elif ess[1] < MIN_MEDIAN_ESS or ess[0] < MIN_LOW_ESS:
        objection = f"the median effective sample size is {ess[1]:.1f}, the tenth percentile {ess[0]:.1f}"
    elif math.isnan(shape):
        objection = "the weights are too few to judge their tail"
    elif shape > MAX_SHAPE:
        objection = f"the weights have a heavy tail, pooled Pareto k = {shape:.2f}"
    bounds = [
        relative_bound(found, margin_J, factor * gap_J, found.lam_se_J, factor * shift_J)
        for found, factor in ((empirical, 2.0), (jackknife, 1.0))
    ]
    return (
        Candidate(empirical, 2 * gap_J, empirical.lam_se_J, bounds[0], objection),
        Candidate(jackknife, gap_J, jackknife.lam_se_J, bounds[1], objection),
    )


def _gaussian_candidate(
    table: ScoreTable, beta: float, gaussian: Estimate, margin_J: FloatArray, level_J: FloatArray | None
) -> Candidate:
    bias_J, error_J = np.zeros(gaussian.lam_J.size), gaussian.lam_se_J.copy()
    num_prompts = table.num_prompts
    if num_prompts < 2 or table.num_responses_P.min() < 4:
        few = "fewer than four responses in some prompt, or one prompt alone, cannot show a departure from normal"
        return Candidate(gaussian, np.full_like(bias_J, np.inf), error_J, math.inf, few)
    third_PJ, fourth_PJ = higher_cumulants(table, gaussian.lam_J, beta)
    free = np.flatnonzero(gaussian.lam_J > 0)
    if free.size:
        slack_PJ = with_level(table, gaussian.moments.gain_PJ - margin_J, level_J)
        inverse = np.linalg.pinv(gaussian.hessian_JJ[np.ix_(free, free)], hermitian=True)
        parts = [value_PJ[:, free] @ inverse for value_PJ in (third_PJ, fourth_PJ, slack_PJ)]
        bias_J[free] = np.abs(parts[0].mean(axis=0)) + np.abs(parts[1].mean(axis=0))
        error_J[free] = np.sqrt(np.sum([part.var(axis=0, ddof=1) for part in parts], axis=0) / num_prompts)
    extra_PJ = third_PJ + fourth_PJ
    shift_J = np.abs(extra_PJ.mean(axis=0)) + SIGMAS * extra_PJ.std(axis=0, ddof=1) / math.sqrt(num_prompts)
    departure = _departure(table, gaussian.lam_J, beta)
    beyond = _rows_beyond(table, gaussian, beta)
    few = f"only {beyond} responses lie as far above their prompt's mean as the tilted policy"
    bound = relative_bound(gaussian, margin_J, bias_J, error_J, shift_J)
    return Candidate(gaussian, bias_J, error_J, bound, few if beyond < MIN_TAIL_ROWS else "", departure)


def higher_cumulants(table: ScoreTable, lam_J: FloatArray, beta: float) -> tuple[FloatArray, FloatArray]:
    """Return what the third and fourth cumulants add to each prompt's improvement, shape (P, J) each.

    With s = r + ⟨λ,g⟩ and joint k-statistics (unbiased for any K ≥ 4): k(s,s,g)/(2β²) and k(s,s,s,g)/(6β³).
    """
    score_N = table.score(lam_J) / beta
    parts = [_joint_cumulants(table, score_N, column_N) for column_N in table.utility_JN]
    return np.array([part[0] for part in parts]).T, np.array([part[1] for part in parts]).T


def _joint_cumulants(table: ScoreTable, score_N: FloatArray, column_N: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return k(s,s,g)/2 and k(s,s,s,g)/6 of each prompt, shape (P,) each."""
    count_P = table.num_responses_P.astype(np.float64)
    square_N = score_N**2
    with np.errstate(divide="ignore", invalid="ignore"):
        third_P = count_P / ((count_P - 1) * (count_P - 2))
        fourth_P = third_P / (count_P - 3)
    third_P *= table.sum_rows(square_N * column_N) / 2
    pairs_P = 3 * (count_P - 1) / count_P * table.sum_rows(square_N) * table.sum_rows(score_N * column_N)
    fourth_P *= ((count_P + 1) * table.sum_rows(square_N * score_N * column_N) - pairs_P) / 6
    return third_P, fourth_P


def _departure(table: ScoreTable, lam_J: FloatArray, beta: float) -> float:
    """Return how many standard errors the third or fourth cumulant, of the score or with a utility, is from zero."""
    score_N = table.score(lam_J) / beta
    worst = 0.0
    for column_N in (score_N, *table.utility_JN):
        for part_P in _joint_cumulants(table, score_N, column_N):
            error = float(part_P.std(ddof=1)) / math.sqrt(part_P.size)
            worst = max(worst, abs(float(part_P.mean())) / error if error > 0 else 0.0)
    return worst


def relative_bound(
    found: Estimate, margin_J: FloatArray, bias_J: FloatArray, error_J: FloatArray, shift_J: FloatArray
) -> float:
    """Return the largest over constraints of (bias + 3 errors)/λ.

    A constraint at λ = 0 counts as exact where its slack exceeds three standard errors and ``shift_J``, the bias of
    the improvement, and as unbounded otherwise: it may in truth be active.
    """
    if not found.converged:
        return math.inf
    active = found.lam_J > 0
    gain_PJ = found.moments.gain_PJ
    spread_J = gain_PJ.std(axis=0, ddof=1) / math.sqrt(gain_PJ.shape[0]) if gain_PJ.shape[0] > 1 else np.inf
    sure = gain_PJ.mean(axis=0) - margin_J - SIGMAS * spread_J - shift_J > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_J = np.where(active, (bias_J + SIGMAS * error_J) / found.lam_J, np.where(sure, 0.0, np.inf))
    return float(np.max(np.where(np.isnan(ratio_J), np.inf, ratio_J), initial=0.0))


def _rows_beyond(table: ScoreTable, gaussian: Estimate, beta: float) -> int:
    """Count the responses at least as far above their prompt's mean as the mean of the Gaussian tilted policy."""
    score_N = table.score(gaussian.lam_J)
    mean_P = within_covariance(table, score_N, score_N) / beta
    return int(np.count_nonzero(score_N >= table.spread(mean_P)))


def _wide(bound: float, tolerance: float) -> str:
    return f"known only to within {_percent(bound)}, more than the {_percent(tolerance)} asked for"


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 10 else "more than ten times itself"
