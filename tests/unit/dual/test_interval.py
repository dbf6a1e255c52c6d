"""The interval of a mean: its formula against a root finder, its promise against worlds that are not normal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from can_dist.dual import mean_interval
from can_dist.errors import ConfigError


def hall_by_root(value_P: np.ndarray, confidence: float) -> tuple[float, float]:
    """Invert g(T) = T + aT² + a²T³/3 + a/2 by bisection, with scipy's unbiased skewness."""
    a = stats.skew(value_P, bias=False) / (3 * math.sqrt(value_P.size))

    def g(t: float) -> float:
        return t + a * t**2 + a**2 * t**3 / 3 + a / 2

    quantile = stats.t.ppf(0.5 + confidence / 2, value_P.size - 1)
    roots = [optimize.brentq(lambda t, side=side: g(t) - side * quantile, -1e4, 1e4, xtol=1e-13) for side in (1, -1)]
    se = stats.sem(value_P)
    return value_P.mean() - se * roots[0], value_P.mean() - se * roots[1]


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.975])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_each_end_is_the_outer_of_students_and_halls(confidence: float, sign: float) -> None:
    value_P = sign * np.random.default_rng(3).lognormal(0, 1, 40)
    student = stats.ttest_1samp(value_P, 0).confidence_interval(confidence)
    hall = hall_by_root(value_P, confidence)
    interval = mean_interval(value_P, confidence)
    assert interval.low == pytest.approx(min(student.low, hall[0]), rel=1e-9)
    assert interval.high == pytest.approx(max(student.high, hall[1]), rel=1e-9)
    assert hall[0] < student.low if sign < 0 else hall[1] > student.high


def test_symmetric_values_have_students_interval() -> None:
    half = np.random.default_rng(1).normal(size=30)
    value_P = np.concatenate([half, -half]) + 2.0
    student = stats.ttest_1samp(value_P, 0).confidence_interval(0.95)
    interval = mean_interval(value_P)
    assert (interval.low, interval.high) == pytest.approx((student.low, student.high), rel=1e-9)
    assert (interval.mean, interval.se) == pytest.approx((value_P.mean(), stats.sem(value_P)))


def test_it_moves_and_stretches_with_the_values() -> None:
    value_P = np.random.default_rng(2).exponential(size=50)
    interval, moved = mean_interval(value_P), mean_interval(3.0 - 2.0 * value_P)
    assert (moved.low, moved.high) == pytest.approx((3.0 - 2.0 * interval.high, 3.0 - 2.0 * interval.low), rel=1e-9)


def test_the_ends_stay_where_the_mean_can_be() -> None:
    value_P = np.array([0.0, 0.0, 0.0, 1.0])
    assert mean_interval(value_P).low < 0 == mean_interval(value_P, least=0.0).low


def test_one_value_has_no_interval_and_equal_ones_have_no_width() -> None:
    alone = mean_interval(np.array([2.0]))
    assert (alone.mean, alone.low, alone.high) == (2.0, -math.inf, math.inf)
    assert math.isnan(alone.se)
    equal = mean_interval(np.full(9, 2.0))
    assert (equal.se, equal.low, equal.high) == (0.0, 2.0, 2.0)


def test_a_confidence_that_is_no_share_is_refused() -> None:
    with pytest.raises(ConfigError, match="confidence = 95: expected between 0 and 1"):
        mean_interval(np.arange(3.0), 95)


def rare_losers(generator: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """2 % lose 10, the others gain what makes up for it; only tables that hold a loser."""
    lost = generator.random(shape) < 0.02
    value_RP = np.where(lost, -10.0, 10.0 * 0.02 / 0.98) + 0.3 * generator.standard_normal(shape)
    return value_RP[lost.any(axis=1)]


@pytest.mark.parametrize(
    ("sample", "students"),
    [
        (lambda generator, shape: math.exp(0.5) - generator.lognormal(0, 1, shape), 0.06),
        (rare_losers, 0.0),
        (lambda generator, shape: generator.standard_t(3, shape), 0.0),
    ],
    ids=["lognormal losses", "rare losers", "t3"],
)
def test_a_margin_met_exactly_is_called_met_in_at_most_one_table_of_twenty(sample: object, students: float) -> None:
    """P = 64; Student's interval alone says so in 8.8 % of the tables of lognormal losses."""
    value_RP = sample(np.random.default_rng(7), (2000, 64))  # type: ignore[operator]
    met = np.mean([mean_interval(value_P).low > 0 for value_P in value_RP])
    assert met <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / len(value_RP))
    alone = np.mean(stats.ttest_1samp(value_RP, 0, axis=1).confidence_interval(0.95).low > 0)
    assert alone >= students
