"""The interval of a mean over prompts: one for every mean that is printed, holding where values are skewed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """A mean over prompts, its standard error and its confidence interval."""

    mean: float
    se: float
    low: float
    high: float


def mean_interval(value_P: FloatArray, confidence: float = 0.95, *, least: float = -math.inf) -> Interval:
    """Return the mean of P values with an interval that holds when the values are skewed.

    Each end is the outer of two: Student's, mean ± t·SE, and Hall's, mean − SE·g⁻¹(∓t), where
    g(T) = T + aT² + a²T³/3 + a/2 has a nearly symmetric law, a = γ/(3√P), γ the sample skewness (Hall 1992, "On the
    removal of skewness by transformation", J. R. Statist. Soc. B 54; with Student's quantile: Willink 2005). Student's
    alone calls a margin met too often when a few prompts lose much; Hall's alone when the tails are heavy on both sides
    (docs/estimators.md, "Intervals of a mean").

    Args:
        value_P: one finite number per prompt, shape (P,), any unit.
        confidence: of the interval, in (0, 1).
        least: a value below which the mean cannot lie, such as 0 of a KL divergence; the interval is cut there.

    Returns:
        Mean, SE and both ends. One value alone has no spread: its SE is NaN, and its interval is unbounded.

    Raises:
        ConfigError: confidence outside (0, 1).

    >>> mean_interval(np.array([1.0, 2.0, 3.0, -14.0])).high > 9.4  # the loser may be an accident
    True
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence}: expected between 0 and 1.")
    mean, count = float(value_P.mean()), value_P.size
    if count < 2:
        return Interval(mean, math.nan, max(-math.inf, least), math.inf)
    deviation_P = value_P - mean
    variance = float(deviation_P @ deviation_P) / (count - 1)
    se, quantile = math.sqrt(variance / count), float(stdtrit(count - 1, 0.5 + confidence / 2))
    reaches = [_hall_reach(deviation_P, variance, side * quantile) for side in (1.0, -1.0)]
    low, high = mean - se * max(quantile, reaches[0]), mean + se * max(quantile, -reaches[1])
    return Interval(mean, se, max(low, least), max(high, least))


def interval_of(mean: float, influence_P: FloatArray, confidence: float) -> Interval:
    """Return Student's interval of a statistic over prompts: ``mean`` ± t·SE, P − 1 degrees of freedom.

    Args:
        mean: the statistic.
        influence_P: what each prompt adds to it, up to a constant: the prompt's value where the statistic is a mean,
            the linearised value (delta method) where it is a ratio of means.
        confidence: of the interval.

    Returns:
        NaN for what does not exist: the error of a single prompt.
    """
    num_prompts = influence_P.size
    if num_prompts < 2:
        return Interval(mean, math.nan, math.nan, math.nan)
    se = float(influence_P.std(ddof=1) / math.sqrt(num_prompts))
    half = float(stdtrit(num_prompts - 1, 0.5 + confidence / 2)) * se
    return Interval(mean, se, mean - half, mean + half)


def _hall_reach(deviation_P: FloatArray, variance: float, target: float) -> float:
    """Return T with g(T) = ``target``, Hall's cubic of these deviations; ``target`` itself where they are symmetric."""
    count = deviation_P.size
    if count < 3 or variance <= 0:
        return target
    skewness = float((deviation_P**3).sum()) * count / ((count - 1) * (count - 2)) / variance**1.5
    slope = skewness / (3 * math.sqrt(count))
    if abs(slope) < 1e-6:
        return target
    return float((np.cbrt(1 + 3 * slope * (target - slope / 2)) - 1) / slope)
