"""Every margin from policies trained once: θ(a) = θ_ref + Σ_i a_i (θ_i − θ_ref), a in closed form.

Mixing weights mixes log-ratios, ℓ_a = Σ_i a_i ℓ_i, near the reference. To second order a mixture gains ⟨a, v_g⟩ and
costs KL ½ aᵀΣa, with v the within-prompt covariances of the ℓ_i with a score and Σ those of the ℓ_i. The best
mixture, argmax ⟨a, v_r⟩ − (β/2) aᵀΣa subject to ⟨a, v_j⟩ ≥ b_j, is a = Σ⁻¹ (v_r + Σ_j μ_j v_j)/β.

Higher orders are made up for by one scalar: estimate the policy of the mixed weights and choose its strength.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.estimate import aligned_log_ratio, centred, informative
from can_dist.dual.estimators import orthant_minimum, within_covariance
from can_dist.dual.feedback import check_regular
from can_dist.dual.interval import Interval, interval_of
from can_dist.dual.predict import check_beta
from can_dist.dual.solution import json_safe
from can_dist.dual.strength import Demand, check_num_prompts
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError, InfeasibleConstraint

MAX_CONDITION = 3e3
"""Of the log-ratios' correlations: two policies of correlation .9993, which is how well mixing is known to hold."""

MIXING = 0.97
"""Least correlation ρ, within prompts, of a mixture's log-ratio with the mixture of log-ratios.

The same gain in a direction of correlation ρ with the right one costs 1/ρ² as much KL: 6 % more at most.
"""

NONE_WITHIN = (
    "Train longer or at a higher learning rate, so that smaller coefficients are needed; raise beta; or ask for a "
    "margin nearer to those trained for."
)
NUM_MARGINS = 65
"""Margins that are tried, from the demanded one down, before a root is searched between two of them."""


@dataclass(frozen=True)
class Mixture:
    """Coefficients of a basis of policies, and what the mixture does to second order.

    Attributes:
        coefficient: a by policy.
        mu: μ by constraint, reward units per utility unit; 0 where the margin is exceeded for nothing.
        improvement: ⟨a, v_j⟩ by constraint, utility units.
        reward_improvement: ⟨a, v_r⟩, reward units.
        kl: ½ aᵀΣa, nats.
        num_prompts: prompts used.
    """

    coefficient: dict[str, float]
    mu: dict[str, float]
    improvement: dict[str, Interval]
    reward_improvement: Interval
    kl: Interval
    num_prompts: int

    def scaled(self, alpha: float) -> dict[str, float]:
        """Return α·a: the coefficients at the strength that the estimate of the mixture asks for."""
        return {name: alpha * value for name, value in self.coefficient.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values, null for what is not a finite number."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        record["improvement"] = {name: vars(gain) for name, gain in self.improvement.items()}
        record |= {"reward_improvement": vars(self.reward_improvement), "kl": vars(self.kl)}
        return {name: json_safe(value) for name, value in record.items()}


@dataclass(frozen=True)
class Basis:
    """What a validation table says of a basis of policies: every mixture of them follows from it.

    Attributes:
        names: of the I policies.
        covariance_PII: within-prompt covariances of the ℓ_i, nats².
        score_PIC: those of the ℓ_i with r and with each utility, nats times the unit of the score.
        beta: KL weight β.
    """

    names: tuple[str, ...]
    covariance_PII: FloatArray
    score_PIC: FloatArray
    beta: float


def mix(
    table: ScoreTable,
    log_prob_ref_N: npt.ArrayLike,
    log_prob_policy_N: Mapping[str, npt.ArrayLike],
    demands: Sequence[Demand],
    *,
    beta: float,
    confidence: float = 0.95,
) -> Mixture:
    """Return the mixture of a basis of policies that meets the demands at the least cost.

    Args:
        table: scores of the reference's responses to P prompts that no policy was trained on.
        log_prob_ref_N: ln π_ref(y|x), nats, in the row order of the arrays that ``table`` was built from.
        log_prob_policy_N: ln π_i(y|x) of each policy by its name, likewise.
        demands: one demand per utility of the table, in its order.
        beta: KL weight β > 0.
        confidence: of the intervals, at fixed coefficients.

    Raises:
        ConfigError: demands or policies that do not fit the table.
        DataError: too few prompts, one response per prompt, or log-probabilities that are none.
        NumericalError: two policies say the same, or the policies cannot tell two constraints apart.
        InfeasibleConstraint: no policy of the basis moves a constraint.
    """
    if len(demands) != table.num_constraints or not log_prob_policy_N:
        raise ConfigError(
            f"basis: {len(demands)} demands and {len(log_prob_policy_N)} policies for a table of "
            f"{table.num_constraints} utilities; give one demand per utility, and at least one policy."
        )
    return mixture_of(basis_of(table, log_prob_ref_N, log_prob_policy_N, beta=beta), demands, confidence=confidence)


def basis_of(
    table: ScoreTable, log_prob_ref_N: npt.ArrayLike, log_prob_policy_N: Mapping[str, npt.ArrayLike], *, beta: float
) -> Basis:
    """Return the covariances of a basis of policies; arguments and errors are those of :func:`mix`."""
    check_beta(beta)
    ratios = [
        informative(table, aligned_log_ratio(table, log_prob_ref_N, column_N, name))
        for name, column_N in log_prob_policy_N.items()
    ]
    kept = ratios[0][0]
    check_num_prompts(kept.num_prompts)
    ratio_IN = np.array([centred(kept, ratio_N) for _, ratio_N in ratios])
    covariance_PII = _covariances(kept, ratio_IN, ratio_IN)
    score_PIC = _covariances(kept, ratio_IN, np.vstack([kept.reward_N, kept.utility_JN]))
    names = list(log_prob_policy_N)
    check_regular(covariance_PII.mean(axis=0), names, MAX_CONDITION, "their mixture is not determined")
    return Basis(tuple(names), covariance_PII, score_PIC, float(beta))


def mixture_of(basis: Basis, demands: Sequence[Demand], *, confidence: float = 0.95) -> Mixture:
    """Return the mixture that meets the demands at the least cost; arguments and errors are those of :func:`mix`."""
    a_I, mu_J = _solve(basis, demands)
    gain_PC = np.einsum("pic,i->pc", basis.score_PIC, a_I)
    kl_P = np.einsum("pij,i,j->p", basis.covariance_PII, a_I, a_I) / 2
    gains = [interval_of(float(gain_P.mean()), gain_P, confidence) for gain_P in gain_PC.T]
    return Mixture(
        coefficient=dict(zip(basis.names, a_I.tolist(), strict=True)),
        mu={demand.name: float(value) for demand, value in zip(demands, mu_J, strict=True)},
        improvement={demand.name: gain for demand, gain in zip(demands, gains[1:], strict=True)},
        reward_improvement=gains[0],
        kl=interval_of(float(kl_P.mean()), kl_P, confidence),
        num_prompts=kl_P.size,
    )


def reachable(basis: Basis, demands: Sequence[Demand], mixture: Mixture, correlation: float) -> dict[str, float]:
    """Return the largest margin of each constraint that a refused mixture lets expect within ``MIXING``, by its name.

    A log-ratio is linear in the weights up to a term of second order. Its share grows as the coefficients do, and so
    what the correlation lacks to 1 grows as their square, as KL, or faster: a mixture beyond the range lets expect at
    least the share of its KL that this says. The other demands stay. A constraint is left out where none of its
    margins is so cheap.

    Args:
        basis: of the policies.
        demands: what the mixture was made for.
        mixture: as it was measured.
        correlation: of its log-ratio with the mixture of log-ratios, below ``MIXING``.
    """
    if not 0 < correlation < 1:
        return {}
    return largest_margins(basis, demands, mixture.kl.mean * (1 - MIXING) / (1 - correlation))


def largest_margins(basis: Basis, demands: Sequence[Demand], kl: float) -> dict[str, float]:
    """Return the largest margin of each constraint whose mixture has at most ``kl`` nats, where there is one."""
    from scipy.optimize import brentq  # 0.3 s of every start, needed after a mixture only

    sigma = basis.covariance_PII.mean(axis=0)
    largest = {}
    for index, demand in enumerate(demands):

        def beyond(margin: float, index: int = index, demand: Demand = demand) -> float:
            a_I, _ = _solve(basis, [*demands[:index], replace(demand, margin=margin), *demands[index + 1 :]])
            return float(a_I @ sigma @ a_I) / 2 - kl

        without = replace(basis, score_PIC=np.delete(basis.score_PIC, index + 1, axis=2))
        free_I, _ = _solve(without, [*demands[:index], *demands[index + 1 :]])
        free = float(free_I @ basis.score_PIC.mean(axis=0)[:, index + 1])
        low, high = min(free, 0.0, demand.margin), max(free, 0.0, demand.margin)
        step = high - low
        while beyond(high) < 0:  # KL grows as the square of a margin above 0
            high += step
        # it falls towards 0 from a gain below it that costs nothing, so the margins are tried from the largest down
        margins = np.linspace(high, low, NUM_MARGINS).tolist()
        cheap = next((n for n, margin in enumerate(margins) if beyond(margin) <= 0), None)
        if cheap is not None:
            largest[demand.name] = float(brentq(beyond, margins[cheap], margins[cheap - 1])) if cheap else margins[0]
    return largest


def mixing_correlation(
    table: ScoreTable,
    log_prob_ref_N: npt.ArrayLike,
    log_prob_policy_N: Mapping[str, npt.ArrayLike],
    log_prob_mixed_N: npt.ArrayLike,
    coefficient: Mapping[str, float],
) -> float:
    """Return how well mixing weights mixed log-ratios: their correlation within prompts, measured on the mixed policy.

    Args:
        table: as :func:`mix` takes it.
        log_prob_ref_N: ln π_ref(y|x), likewise.
        log_prob_policy_N: ln π_i(y|x) of each policy by its name.
        log_prob_mixed_N: ln π(y|x) of the policy whose weights were mixed.
        coefficient: a by policy.

    Returns:
        NaN where one of the two log-ratios is the same for all responses of every prompt.
    """
    mixed_N = np.zeros(table.num_rows)
    for name, weight in coefficient.items():
        mixed_N += weight * centred(table, aligned_log_ratio(table, log_prob_ref_N, log_prob_policy_N[name], name))
    actual_N = centred(table, aligned_log_ratio(table, log_prob_ref_N, log_prob_mixed_N, "the mixed policy"))
    cross, mixed, actual = (
        float(within_covariance(table, first_N, second_N).mean())
        for first_N, second_N in ((mixed_N, actual_N), (mixed_N, mixed_N), (actual_N, actual_N))
    )
    return cross / math.sqrt(mixed * actual) if mixed * actual > 0 else math.nan


def mixes(correlation: float) -> bool:
    """Return whether mixing weights mixed log-ratios; a correlation of NaN does not."""
    return correlation >= MIXING


def outside(coefficient: Mapping[str, float], correlation: float, reach: Mapping[str, float]) -> InfeasibleConstraint:
    """Return what refuses a mixture that does not mix; ``reach`` are margins that one is expected to meet."""
    weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in coefficient.items())
    largest = " or ".join(f"{name} {_rounded_down(margin):+.2g}" for name, margin in reach.items())
    return InfeasibleConstraint(
        f"basis: the mixture ({weights}) lies outside the range where mixing weights mixes log-ratios: their "
        f"correlation is {correlation:.4f}, expected at least {MIXING:g}. "
        + (f"Ask for a margin nearer to those trained for: at most about {largest}." if largest else NONE_WITHIN)
    )


def _rounded_down(margin: float) -> float:
    """Return a margin with two digits that is no larger: what is named as reachable is asked for next."""
    unit = 10.0 ** (math.floor(math.log10(abs(margin))) - 1) if margin else 1.0
    return math.floor(round(margin / unit, 9)) * unit


def _covariances(table: ScoreTable, first_AN: FloatArray, second_BN: FloatArray) -> FloatArray:
    """Return the within-prompt covariances of two stacks of centred columns, shape (P, A, B)."""
    rows = [[within_covariance(table, first_N, second_N) for second_N in second_BN] for first_N in first_AN]
    return np.moveaxis(np.array(rows), 2, 0)


def _solve(basis: Basis, demands: Sequence[Demand]) -> tuple[FloatArray, FloatArray]:
    """Return a, shape (I,), and μ, shape (J,)."""
    sigma, cross = basis.covariance_PII.mean(axis=0), basis.score_PIC.mean(axis=0)
    mu_J = _multipliers(sigma, cross, demands, basis.beta)
    a_I: FloatArray = np.linalg.solve(sigma, cross[:, 0] + cross[:, 1:] @ mu_J) / basis.beta
    return a_I, mu_J


def _multipliers(sigma_II: FloatArray, cross_IC: FloatArray, demands: Sequence[Demand], beta: float) -> FloatArray:
    """Return μ: argmin ½ μᵀAμ + ⟨Vᵀa₀ − b, μ⟩ over μ ≥ 0, A = VᵀΣ⁻¹V/β and a₀ = Σ⁻¹v_r/β (the mixture's dual)."""
    reach_JJ = cross_IC[:, 1:].T @ np.linalg.solve(sigma_II, cross_IC[:, 1:]) / beta
    names = [demand.name for demand in demands]
    check_regular(reach_JJ, names, MAX_CONDITION, f"{len(sigma_II)} policies cannot meet their margins separately")
    free_J = cross_IC[:, 1:].T @ np.linalg.solve(sigma_II, cross_IC[:, 0]) / beta
    margin_J = np.array([demand.margin for demand in demands])
    return orthant_minimum(reach_JJ, free_J - margin_J, np.array([demand.equal for demand in demands]))
