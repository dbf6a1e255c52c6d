"""The bound of a certificate: Gaffke's against draws from the simplex and a closed form, and its promise in worlds."""

from __future__ import annotations

import math

import certificate_worlds
import numpy as np
import pytest
from scipy import stats

from can_dist.dual import lower_bound, mean_interval
from can_dist.dual.bound import _gaffke
from can_dist.errors import ConfigError


@pytest.mark.parametrize("error", [0.1, 0.03, 0.005])
@pytest.mark.parametrize("num_prompts", [8, 64])
def test_gaffkes_bound_is_the_quantile_of_draws_from_the_simplex(num_prompts: int, error: float) -> None:
    random = np.random.default_rng(num_prompts)
    value_P = -random.lognormal(0, 1, num_prompts)
    draws = random.dirichlet(np.ones(num_prompts), 200_000) @ value_P
    low = _gaffke(value_P, error)
    assert np.mean(draws <= low) == pytest.approx(error, rel=0.05, abs=3 * math.sqrt(error / 200_000))


def test_gaffkes_bound_of_two_values_is_a_uniform_quantile_and_of_three_a_root() -> None:
    """Of two values Σ D v is uniform between them; of three the area below b is that of a triangle."""
    assert _gaffke(np.array([2.0, 4.0]), 0.1) == pytest.approx(2.2, abs=0.06)
    assert _gaffke(np.array([0.0, 1.0, 1.0]), 0.04) == pytest.approx(0.2, abs=0.01)


def test_the_bound_is_the_lower_of_both_and_moves_and_stretches_with_the_values() -> None:
    random = np.random.default_rng(4)
    for value_P in (random.normal(size=80), -random.lognormal(0, 1, 80), random.lognormal(0, 1, 80)):
        bound = lower_bound(value_P, 0.03)
        floor = value_P.min() - 0.5 * (value_P.mean() - value_P.min())
        assert bound.floor == pytest.approx(floor)
        ends = (mean_interval(value_P, 0.94).low, _gaffke(np.append(value_P, floor), 0.03))
        assert bound.low == min(ends)
        assert lower_bound(3.0 + 2.0 * value_P, 0.03).low == pytest.approx(3.0 + 2.0 * bound.low, rel=1e-7)
        lows = [lower_bound(value_P, error).low for error in (0.3, 0.1, 0.01, 1e-4, 1e-9)]
        assert lows == sorted(lows, reverse=True)
        assert lower_bound(value_P, 1e-13).low == -math.inf


def test_a_loser_that_lies_farther_out_lowers_the_bound_more_than_students() -> None:
    value_P = np.append(np.full(199, 0.2) + 0.01 * np.sin(np.arange(199)), -10.0)
    student = value_P.mean() - stats.t.ppf(0.97, 199) * stats.sem(value_P)
    assert lower_bound(value_P, 0.03).low < student - 0.05


def test_what_shows_no_spread_has_no_bound_and_an_error_that_is_no_probability_is_refused() -> None:
    assert lower_bound(np.full(100, 0.3), 0.05).low == -math.inf
    assert lower_bound(np.array([0.3]), 0.05).low == -math.inf
    for error in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="expected between 0 and 1"):
            lower_bound(np.arange(5.0), error)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_prompts", [64, 200])
def test_a_policy_that_meets_its_margin_exactly_is_certified_no_more_often_than_the_error(num_prompts: int) -> None:
    """In every world of docs/estimators.md, at four errors, plus two standard errors of so many tables."""
    measured = {}
    for world in certificate_worlds.worlds():
        value_RP = world.tables(np.random.default_rng(17), 1500, num_prompts)
        shares = certificate_worlds.certified(certificate_worlds.bound_low, value_RP)
        for error, share in zip(certificate_worlds.ERRORS, shares, strict=True):
            if share > certificate_worlds.allowed(error, len(value_RP)):
                measured[world.name, error] = share
    assert measured == {}
    assert len(list(certificate_worlds.worlds())) >= 28


@pytest.mark.slow
def test_the_ends_of_the_interval_would_not_keep_the_error() -> None:
    """The test above can fail: on −lognormal losses the one-sided ends of ``mean_interval`` certify too often."""
    world = next(world for world in certificate_worlds.worlds() if world.name == "−lognormal(1)")
    value_RP = world.tables(np.random.default_rng(17), 1500, 64)
    shares = certificate_worlds.certified(certificate_worlds.interval_low, value_RP)
    assert shares[0] > certificate_worlds.allowed(0.05, len(value_RP))
