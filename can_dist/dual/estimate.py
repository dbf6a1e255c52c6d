"""What a trained policy does, without generating: from the reference's scored responses and two log-probabilities.

With ℓ = ln π_θ − ln π_ref of a response, w = e^ℓ is its weight under the policy, so the reference's responses answer
for the policy as long as the two are near. The estimate means something on prompts that were not trained on: responses
that were are memorised, and say nothing of fresh ones.

Three ways to a gain E_{π_θ} g − E_{π_ref} g, each one number per prompt, each free of the bias of order 1/K:

``covariance``: K/(K−1) · mean_k (w − w̄)(g − ḡ), unbiased, since E_{π_ref} w = 1.
``self_normalised``: Σ_k w_k g_k / Σ_k w_k − ḡ, jackknifed.
``first_order``: the covariance of ℓ and g, which weighs no tail; exact where (ℓ, g) are jointly Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.estimators import within_covariance
from can_dist.dual.interval import Interval, interval_of
from can_dist.dual.jackknife import jackknife_mean
from can_dist.dual.predict import check_beta
from can_dist.dual.solution import json_safe, with_nan
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError, DataError

LEAST_ESS = 3.0
"""Median effective sample size under which the weights no longer speak for the policy; K/2 where that is less.

On real text the weights then miss 15 % of the gain and the first order, which always falls short, 20 %.
"""

_ROUNDING = 1e-3
_LARGEST_LOG_RATIO = 300.0  # a weight beyond it, times a score, may leave the finite numbers


@dataclass(frozen=True)
class PolicyEstimate:
    """Means over prompts of a policy against the reference. Numbers that do not exist are NaN (null in JSON).

    Attributes:
        improvement: E_{π_θ} g − E_{π_ref} g by constraint, utility units.
        reward_improvement: E_{π_θ} r − E_{π_ref} r, reward units.
        kl: KL(π_θ‖π_ref), nats.
        length: slope of ℓ on s = (r + ⟨λ,g⟩)/β within prompts: 1 is all the way to π_λ.
        direction: correlation of ℓ with s within prompts: 1 is the right way; NaN for the reference itself.
        ess: median over prompts of (Σ_k w)²/Σ_k w², between 1 and K.
        num_responses: median of K over the prompts used.
        num_prompts: prompts used: those with more than one response.
        num_single_response_prompts: prompts left out, since one response cannot be preferred to another.
        estimator: ``average`` (of covariance and self_normalised), ``first_order``, or ``exact`` where the table
            carries reference weights, so that it lists all that the reference can say.
        sentence: which of them was used, and why.
        lam: λ of ``length`` and ``direction``.
        beta: KL weight of the same.
        confidence: of the intervals (Student's t over prompts).
    """

    improvement: dict[str, Interval]
    reward_improvement: Interval
    kl: Interval
    length: Interval
    direction: Interval
    ess: float
    num_responses: float
    num_prompts: int
    num_single_response_prompts: int
    estimator: str
    sentence: str
    lam: dict[str, float]
    beta: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values, null for what is not a finite number."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in _INTERVALS:
            record[name] = vars(record[name])
        record["improvement"] = {name: vars(gain) for name, gain in self.improvement.items()}
        return {name: json_safe(value) for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> PolicyEstimate:
        """Rebuild an estimate from :meth:`to_dict`, null becoming NaN.

        Raises:
            DataError: a field is missing.
        """
        missing = [item.name for item in fields(cls) if item.name not in record]
        if missing:
            raise DataError(f"estimate: fields missing: {', '.join(missing)}; estimate again to write a whole one.")
        values = {item.name: with_nan(record[item.name]) for item in fields(cls)}
        for name in _INTERVALS:
            values[name] = Interval(**values[name])
        values["improvement"] = {name: Interval(**gain) for name, gain in values["improvement"].items()}
        return cls(**values)


_INTERVALS = ("reward_improvement", "kl", "length", "direction")


def estimate_policy(
    table: ScoreTable,
    log_prob_ref_N: npt.ArrayLike,
    log_prob_policy_N: npt.ArrayLike,
    *,
    lam: Mapping[str, float],
    beta: float,
    confidence: float = 0.95,
) -> PolicyEstimate:
    """Estimate what a policy does from scored responses of the reference to prompts it was not trained on.

    Args:
        table: scores of responses of π_ref to P prompts, the utilities in the order of ``lam``.
        log_prob_ref_N: ln π_ref(y|x), nats, in the row order of the arrays that ``table`` was built from.
        log_prob_policy_N: ln π_θ(y|x), likewise.
        lam: λ by constraint, reward units per utility unit: what the policy was trained towards.
        beta: KL weight β > 0.
        confidence: of the intervals.

    Raises:
        ConfigError: shapes, names, β or a confidence that cannot mean anything.
        DataError: a log-probability that is not finite or lies above 0, or one response per prompt.
    """
    lam_J = np.array(list(lam.values()), dtype=np.float64)
    check_beta(beta)
    if lam_J.shape != (table.num_constraints,) or not np.isfinite(lam_J).all():
        raise ConfigError(f"lam: found {dict(lam)}, expected {table.num_constraints} finite numbers, one per utility.")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence}: expected between 0 and 1.")
    kept, log_ratio_N = informative(table, aligned_log_ratio(table, log_prob_ref_N, log_prob_policy_N))
    weighing = _weigh(kept, log_ratio_N)
    gains = [weighing.gain(column_N) for column_N in (kept.reward_N, *kept.utility_JN)]
    means = [interval_of(float(gain_P.mean()), gain_P, confidence) for gain_P in gains]
    length, direction = _length_and_direction(kept, log_ratio_N, kept.score(lam_J) / beta, confidence)
    return PolicyEstimate(
        improvement=dict(zip(lam, means[1:], strict=True)),
        reward_improvement=means[0],
        kl=interval_of(float(weighing.kl_P.mean()), weighing.kl_P, confidence),
        length=length,
        direction=direction,
        ess=weighing.ess,
        num_responses=float(np.median(kept.num_responses_P)),
        num_prompts=kept.num_prompts,
        num_single_response_prompts=table.num_prompts - kept.num_prompts,
        estimator=weighing.estimator,
        sentence=weighing.sentence,
        lam={name: float(value) for name, value in lam.items()},
        beta=float(beta),
        confidence=confidence,
    )


def policy_gains(
    table: ScoreTable, log_prob_ref_N: npt.ArrayLike, log_prob_policy_N: npt.ArrayLike, policy: str = "the policy"
) -> tuple[FloatArray, FloatArray]:
    """Return what :func:`estimate_policy` averages: gains of r and of each utility, shape (1 + J, P), and KL, (P,)."""
    kept, log_ratio_N = informative(table, aligned_log_ratio(table, log_prob_ref_N, log_prob_policy_N, policy))
    weighing = _weigh(kept, log_ratio_N)
    return np.array([weighing.gain(column_N) for column_N in (kept.reward_N, *kept.utility_JN)]), weighing.kl_P


def aligned_log_ratio(
    table: ScoreTable, log_prob_ref_N: npt.ArrayLike, log_prob_policy_N: npt.ArrayLike, policy: str = "the policy"
) -> FloatArray:
    """Return ℓ = ln π_θ − ln π_ref of each row, in the table's order.

    Args:
        table: scores of the responses.
        log_prob_ref_N: ln π_ref(y|x), nats, in the row order of the arrays that ``table`` was built from.
        log_prob_policy_N: ln π_θ(y|x), likewise.
        policy: what messages call the policy.

    Raises:
        ConfigError: a length that is not the table's.
        DataError: a value that is not finite, or above 0.
    """
    columns = []
    for name, values in (("the reference", log_prob_ref_N), (policy, log_prob_policy_N)):
        column_N = np.asarray(values, dtype=np.float64)
        if column_N.shape != (table.num_rows,):
            raise ConfigError(
                f"log-probabilities of {name}: shape {column_N.shape}, expected ({table.num_rows},), one per response "
                "of the table, in the order of its arrays."
            )
        bad = np.flatnonzero(~(np.isfinite(column_N) & (column_N <= _ROUNDING)))
        if bad.size:
            raise DataError(
                f"log-probabilities of {name}: {bad.size} of {column_N.size} are not finite numbers of at most 0, "
                f"first at row {bad[0]}: {column_N[bad[0]]}. Give ln π(y|x) summed over the response's tokens, in nats."
            )
        columns.append(column_N[table.order_N])
    return columns[1] - columns[0]


def informative(table: ScoreTable, log_ratio_N: FloatArray) -> tuple[ScoreTable, FloatArray]:
    """Leave out the prompts with one response, on which no response can be preferred to another.

    Raises:
        DataError: none is left.
    """
    several_P = table.num_responses_P > 1
    if not several_P.any():
        raise DataError(
            "every prompt has one response (K = 1), so no response can be preferred to another and the table says "
            "nothing of a policy. Sample at least 2 responses per prompt (generate.num_responses)."
        )
    if several_P.all():
        return table, log_ratio_N
    return table.take(several_P), log_ratio_N[table.spread(several_P)]


def covariance_gain(table: ScoreTable, log_ratio_N: FloatArray, value_N: FloatArray) -> FloatArray:
    """Return the unbiased covariance of w = e^ℓ and a centred column within each prompt; shape (P,).

    It is E_{π_θ} g − E_{π_ref} g in the mean, since E_{π_ref} w = 1. Infinite or NaN where a weight overflows.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return within_covariance(table, np.exp(log_ratio_N), value_N)


def self_normalised_gain(table: ScoreTable, log_ratio_N: FloatArray, value_N: FloatArray) -> FloatArray:
    """Return Σ_k w_k g_k / Σ_k w_k of a centred column, jackknifed over the responses of each prompt; shape (P,).

    A table with reference weights lists every response, so nothing is sampled and nothing is to be jackknifed.
    """
    share_N = _shares(table, log_ratio_N)
    if table.weighted:
        return table.sum_rows(share_N * value_N)
    return jackknife_mean(table, share_N, value_N)


def first_order_gain(table: ScoreTable, log_ratio_N: FloatArray, value_N: FloatArray) -> FloatArray:
    """Return the unbiased covariance of ℓ and a centred column within each prompt; shape (P,)."""
    return within_covariance(table, log_ratio_N, value_N)


def effective_sample_size(table: ScoreTable, log_ratio_N: FloatArray) -> FloatArray:
    """Return (Σ_k w)²/Σ_k w² of each prompt, between 1 and K; with reference weights p, K (Σ p w)²/Σ p w²."""
    share_N = _shares(table, log_ratio_N)
    square_P = table.sum_rows(share_N**2 / np.exp(table.log_weight_N))
    return table.num_responses_P / square_P


@dataclass(frozen=True)
class _Weighing:
    """How a table's responses are made to speak for the policy."""

    table: ScoreTable
    log_ratio_N: FloatArray
    estimator: str
    ess: float
    sentence: str

    def gain(self, value_N: FloatArray) -> FloatArray:
        """Return E_{π_θ} − E_{π_ref} of a centred column by the estimator in use; shape (P,)."""
        if self.estimator == "first_order":
            return first_order_gain(self.table, self.log_ratio_N, value_N)
        unbiased_P = covariance_gain(self.table, self.log_ratio_N, value_N)
        return (unbiased_P + self_normalised_gain(self.table, self.log_ratio_N, value_N)) / 2

    @property
    def kl_P(self) -> FloatArray:
        """KL(π_θ‖π_ref): mean_k (w ℓ − w + 1), unbiased; to first order half the variance of ℓ. Shape (P,)."""
        if self.estimator == "first_order":
            centred_N = centred(self.table, self.log_ratio_N)
            return within_covariance(self.table, centred_N, centred_N) / 2
        term_N = np.exp(self.log_ratio_N) * self.log_ratio_N - np.expm1(self.log_ratio_N)
        return self.table.sum_rows(np.exp(self.table.log_weight_N) * term_N)


def _weigh(table: ScoreTable, log_ratio_N: FloatArray) -> _Weighing:
    """Choose the estimator by the effective sample size."""
    ess_P = effective_sample_size(table, log_ratio_N)
    ess, num_responses = float(np.median(ess_P)), float(np.median(table.num_responses_P))
    facts = f"median effective sample size {ess:.1f} of {num_responses:g} responses"
    largest = float(log_ratio_N.max())
    representable = largest < _LARGEST_LOG_RATIO
    if table.weighted and representable:
        sentence = f"Exact if the weighted table enumerates all that the reference can say ({facts})."
        return _Weighing(table, log_ratio_N, "exact", ess, sentence)
    if ess >= min(LEAST_ESS, num_responses / 2) and representable:
        return _Weighing(table, log_ratio_N, "average", ess, f"Estimated from the policy's weights ({facts}).")
    reason = facts if representable else f"a log-ratio of {largest:.3g} nats"
    sentence = (
        f"Estimated to first order: the policy is too far from the reference for its weights ({reason}). Gains are "
        "the covariances of the log-ratio with the scores, KL is half the variance of the log-ratio."
    )
    return _Weighing(table, log_ratio_N, "first_order", ess, sentence)


def _length_and_direction(
    table: ScoreTable, log_ratio_N: FloatArray, target_N: FloatArray, confidence: float
) -> tuple[Interval, Interval]:
    """Return slope and correlation of ℓ on s within prompts, from covariances averaged over prompts.

    Standard errors by the delta method: what a prompt adds to a ratio of means, linearised.
    """
    centred_N = centred(table, log_ratio_N)
    cross_P = within_covariance(table, centred_N, target_N)
    target_P = within_covariance(table, target_N, target_N)
    ratio_P = within_covariance(table, centred_N, centred_N)
    cross, target, ratio = (float(value_P.mean()) for value_P in (cross_P, target_P, ratio_P))
    nothing = Interval(np.nan, np.nan, np.nan, np.nan)
    if target == 0.0:
        return nothing, nothing
    slope = cross / target
    length = interval_of(slope, (cross_P - slope * target_P) / target, confidence)
    if ratio == 0.0:
        return length, nothing
    scale = float(np.sqrt(target * ratio))
    correlation = cross / scale
    influence_P = cross_P / scale - correlation / 2 * (target_P / target + ratio_P / ratio)
    return length, interval_of(correlation, influence_P, confidence)


def _shares(table: ScoreTable, log_ratio_N: FloatArray) -> FloatArray:
    """Return the weights p w, normalised within each prompt; no weight overflows."""
    log_share_N = log_ratio_N + table.log_weight_N
    table.apply_rows(np.subtract, log_share_N, table.max_rows(log_share_N))
    share_N = np.exp(log_share_N)
    table.apply_rows(np.divide, share_N, table.sum_rows(share_N))
    return share_N


def centred(table: ScoreTable, value_N: FloatArray) -> FloatArray:
    """Subtract the reference mean of each prompt: (N,) to (N,)."""
    deviation_N = value_N.copy()
    table.apply_rows(np.subtract, deviation_N, table.sum_rows(np.exp(table.log_weight_N) * value_N))
    return deviation_N
