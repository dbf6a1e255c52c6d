"""What a table can vouch for: how well λ is known, and what π_λ delivers on new prompts.

Both statements are intervals at 95 % that count two errors. The prompts drawn: each prompt is predicted with the λ of
the others (one Newton step), and the mean over prompts has an interval that holds under skew. The few responses per
prompt: the jackknife removes the bias of order 1/K, and the size of its correction bounds the bias left. That bound
holds only while no few responses carry the correction, so the statements have conditions; where one fails, they are
replaced by the reason. How often each is printed and how often it is then true: docs/estimators.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from can_dist.dual.belief.evidence import Evidence, weigh_evidence
from can_dist.dual.columns import Scores
from can_dist.dual.estimators import Estimate, with_level
from can_dist.dual.interval import Interval, mean_interval
from can_dist.dual.jackknife import both_moments
from can_dist.dual.moments import PromptMoments
from can_dist.dual.table import FloatArray

CONFIDENCE = 0.95

MIN_PROMPTS = 200
"""Fewest prompts: of fewer, a kind that decides may be missing (7 % of all prompts from 1 table of 100 in 1,400)."""

MIN_SHOWING = 50
"""Fewest prompts that can show a change: below, the interval of a mean misses too often."""

MIN_ESS = 4.0
"""Effective responses per prompt, weighted by the prompts' variance of g, from which the correction bounds the bias."""

MIN_SHARE = 0.18
"""Least share of a prompt's responses that carry it, 1/E[(π_λ/π_ref)²] in the limit: farther away, π_λ may rest on
responses so rare that no table has them, and those that look well lack them."""

MIN_CARRIERS = 40.0
"""Responses, of all prompts together, that must carry the bias of order 1/K."""

MAX_SHAPE = 0.5
"""Pareto k̂ of the density ratios of all prompts: from 1/2 on their squares, which carry the bias, have no mean."""

SPREAD_ESS = 15.0
"""Effective responses per prompt from which a prompt's own normaliser is known, so that carriers by it count."""

MANY_CARRIERS = 100.0
"""Carriers by each prompt's own normaliser that suffice alone; ``MIN_CARRIERS`` of them stand for one of the others."""

SPREAD_SHARE = 0.8
"""Share of a prompt's responses that carry it from which a larger β would spread the weights no further."""

MAX_SINGLE = 0.1
"""Share of prompts with one response, which show no change, up to which it is counted as an error."""

LAM_LIMIT = 0.25
"""Relative error up to which λ counts as known; beyond, its error is not a symmetric interval."""


@dataclass(frozen=True)
class Trust:
    """The two statements of one table, arrays in the order of the constraints.

    Attributes:
        delivered: E_{π_λ} g − E_{π_ref} g of new prompts (E_{π_λ} g where the constraint is a level), bias included in
            both ends; utility units.
        kl: KL(π_λ‖π_ref) of a prompt, nats, bias included in both ends; ``kl_bias`` is that part of each arm.
        bias_J: how much of each arm allows for the finite K and for prompts with one response; utility units.
        lam_error_J: half the length of λ's interval over λ: bias and sampling; 0 where λ = 0 for certain, infinite
            where λ = 0 may be wrong.
        lam_bias_J: how much of that length allows for the finite K and for prompts with one response; λ's units.
        ess_J: effective responses per prompt by constraint, ΣV/Σ(V/ESS), V the prompt's variance of g.
        evidence: what the weights rest on.
        num_flat: prompts on which no response scores differently, so that they cannot show a change.
        objection: why neither statement is made; empty where they are.
    """

    delivered: tuple[Interval, ...]
    kl: Interval
    kl_bias: float
    bias_J: FloatArray
    lam_error_J: FloatArray
    lam_bias_J: FloatArray
    ess_J: FloatArray
    evidence: Evidence
    num_flat: int
    objection: str

    @property
    def lam_known(self) -> bool:
        """Whether every λ is known to within ``LAM_LIMIT``."""
        return not self.objection and bool(np.all(self.lam_error_J <= LAM_LIMIT))


def judge(
    table: Scores, beta: float, margin_J: FloatArray, estimated: Estimate, level_J: FloatArray | None = None
) -> Trust:
    """Judge λ̂ of any estimator on the table that gave it.

    Args:
        table: scores of P sampled prompts, J ≥ 1 utilities.
        beta: KL weight β > 0.
        margin_J: b.
        estimated: λ̂, finite.
        level_J: 1 where the constraint is an absolute level, 0 where a margin.
    """
    lam_J, num_prompts = estimated.lam_J, table.num_prompts
    confidence = 1 - (1 - CONFIDENCE) / lam_J.size
    moments, corrected = both_moments(table, lam_J, beta)
    single = float((table.num_responses_P == 1).mean())
    silent = single / max(1 - single, 1e-9)
    silent_J = np.abs(corrected.gain_PJ.mean(axis=0)) * silent
    correction_J = moments.gain_PJ.mean(axis=0) - corrected.gain_PJ.mean(axis=0)
    bias_J = np.abs(correction_J) + silent_J
    slack_PJ = with_level(table, corrected.gain_PJ - margin_J, level_J)
    value_PJ = corrected.gain_PJ + left_out_gain(moments, slack_PJ, beta, lam_J)
    if level_J is not None:
        value_PJ = value_PJ + level_J * table.mean_utility_JP.T
    delivered = tuple(
        widened(mean_interval(value_P, confidence), bias)
        for value_P, bias in zip(value_PJ.T, bias_J.tolist(), strict=True)
    )
    evidence = weigh_evidence(table, lam_J, beta)
    ess_J, num_flat = _weighted(evidence.variance_JP, moments.ess_P), _num_flat(evidence.variance_JP)
    share_J = _weighted(evidence.variance_JP, moments.ess_P / table.num_responses_P)
    offset_J = np.where(lam_J > 0, corrected.gain_PJ.mean(axis=0) - margin_J, 0.0)
    steps = [np.abs(_step(moments, beta, lam_J, part_J)) for part_J in (correction_J, offset_J, silent_J)]
    lam_bias_J: FloatArray = np.sum(steps, axis=0)
    quantile = float(stdtrit(max(num_prompts - 1, 1), 0.5 + confidence / 2))
    kl_bias = abs(float(corrected.kl_P.mean() - moments.kl_P.mean())) + float(corrected.kl_P.mean()) * silent
    return Trust(
        delivered=delivered,
        kl=widened(mean_interval(corrected.kl_P, CONFIDENCE), kl_bias),
        kl_bias=kl_bias,
        bias_J=bias_J,
        lam_error_J=_lam_error(estimated, lam_bias_J, quantile, delivered, _demand(table, margin_J, level_J)),
        lam_bias_J=lam_bias_J,
        ess_J=ess_J,
        evidence=evidence,
        num_flat=num_flat,
        objection=_objection(table, single, num_flat, ess_J, share_J, evidence),
    )


def left_out_gain(moments: PromptMoments, slack_PJ: FloatArray, beta: float, lam_J: FloatArray) -> FloatArray:
    """Return how each prompt's gain changes when λ is solved on the others, shape (P, J): C_i (λ_{−i} − λ)/β."""
    change_PJ = left_out_change(moments, slack_PJ, beta, lam_J)
    gain_PJ: FloatArray = np.einsum("pjk,pk->pj", moments.covariance_PJJ, change_PJ) / beta
    return gain_PJ


def left_out_change(moments: PromptMoments, slack_PJ: FloatArray, beta: float, lam_J: FloatArray) -> FloatArray:
    """Return λ_{−i} − λ of each prompt by one Newton step, (Σ_{k≠i} C_k/β)⁻¹ u_i over the constraints with λ > 0."""
    change_PJ = np.zeros_like(slack_PJ)
    free, num_prompts = np.flatnonzero(lam_J > 0), slack_PJ.shape[0]
    if num_prompts < 3 or free.size == 0:
        return change_PJ
    curvature_PJJ = moments.covariance_PJJ[:, free][:, :, free] / beta
    rest_PJJ = curvature_PJJ.sum(axis=0) - curvature_PJJ
    scale_J = np.sqrt(np.diag(curvature_PJJ.mean(axis=0)))
    if not np.all(scale_J > 0):
        return change_PJ
    unit_PJJ = rest_PJJ / np.outer(scale_J, scale_J) + 1e-12 * num_prompts * np.eye(free.size)
    change_PJ[:, free] = np.linalg.solve(unit_PJJ, (slack_PJ[:, free] / scale_J)[:, :, None])[:, :, 0] / scale_J
    return change_PJ


def widened(interval: Interval, reach: float) -> Interval:
    """Return the interval with both arms longer by ``reach``."""
    return Interval(interval.mean, interval.se, interval.low - reach, interval.high + reach)


def _step(moments: PromptMoments, beta: float, lam_J: FloatArray, gain_J: FloatArray) -> FloatArray:
    """Return H⁻¹ of a change of the mean gain, over the constraints with λ > 0."""
    step_J, free = np.zeros_like(lam_J), np.flatnonzero(lam_J > 0)
    if free.size:
        step_J[free] = np.linalg.pinv(moments.hessian(beta)[np.ix_(free, free)], hermitian=True) @ gain_J[free]
    return step_J


def _weighted(variance_JP: FloatArray, value_P: FloatArray) -> FloatArray:
    """Return the harmonic mean ΣV/Σ(V/value) of each constraint; NaN where no response of any prompt differs."""
    with np.errstate(invalid="ignore"):
        mean_J: FloatArray = variance_JP.sum(axis=1) / (variance_JP / value_P).sum(axis=1)
    return mean_J


def _num_flat(variance_JP: FloatArray) -> int:
    """Return how many prompts have no response that differs from the others in any utility."""
    return int((variance_JP <= 0).all(axis=0).sum())


def _demand(table: Scores, margin_J: FloatArray, level_J: FloatArray | None) -> FloatArray:
    """Return what ``delivered`` is compared with: the margin, or the threshold of a level."""
    return margin_J if level_J is None else margin_J + level_J * table.centre_J


def _lam_error(
    estimated: Estimate, bias_J: FloatArray, quantile: float, delivered: tuple[Interval, ...], demand_J: FloatArray
) -> FloatArray:
    error_J = np.empty(estimated.lam_J.size)
    for j, lam in enumerate(estimated.lam_J.tolist()):
        if lam > 0:
            error_J[j] = (bias_J[j] + quantile * estimated.lam_se_J[j]) / lam
        else:
            error_J[j] = 0.0 if delivered[j].low >= demand_J[j] else math.inf
    return np.where(np.isnan(error_J), math.inf, error_J)


def _objection(
    table: Scores,
    single: float,
    num_flat: int,
    ess_J: FloatArray,
    share_J: FloatArray,
    evidence: Evidence,
) -> str:
    """Return why nothing can be vouched for, the first reason that holds; empty where none does."""
    num_prompts, typical = table.num_prompts, float(np.median(table.num_responses_P))
    if single > MAX_SINGLE:
        return (
            f"{round(single * num_prompts)} of {num_prompts} prompts have one response, which cannot show a change; "
            "leave them out or sample more responses to them"
        )
    if num_prompts < MIN_PROMPTS:
        return f"{num_prompts} prompt{'s are' if num_prompts > 1 else ' is'} too few, {MIN_PROMPTS} are needed"
    if num_prompts - num_flat < MIN_SHOWING:
        return (
            f"{num_prompts - num_flat} prompts that can show a change are too few ({num_flat} have responses that all "
            f"score alike), {MIN_SHOWING} are needed"
        )
    if np.isnan(ess_J).any():
        return "a score never differs between the responses to a prompt"
    ess, share = float(ess_J.min()), float(share_J.min())
    carried = f"{ess:.1f} of {typical:g} responses carry a prompt's prediction, prompts weighted by how much they vary"
    advice = (
        "raise beta or the number of responses" if ess < SPREAD_SHARE * typical else "raise the number of responses"
    )
    if ess < MIN_ESS:
        return f"{carried}; {advice}"
    carriers, shape = float(evidence.carriers_J.min()), evidence.shape
    thin = not shape > MAX_SHAPE  # NaN: the largest of so many weights are all alike, as of scores of few values
    own = float(evidence.own_carriers_J.min()) if ess >= SPREAD_ESS else 0.0
    if own < (MIN_CARRIERS if carriers >= MIN_CARRIERS or thin else MANY_CARRIERS):
        if carriers < MIN_CARRIERS:
            return f"{carriers:.0f} of all {table.num_rows} responses decide it; {advice}"
        if not thin:
            return f"rare responses decide it (Pareto k = {shape:.2f}); {advice}"
    if share < MIN_SHARE:
        return f"{carried}, and {100 * MIN_SHARE:g}% are needed; raise beta or lower the margin"
    return ""
