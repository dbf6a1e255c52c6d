"""Shares, tails and refusals: closed forms, coverage in simulation, and the messages of bad input."""

from __future__ import annotations

import numpy as np
import pytest
import tail_worlds
from scipy.stats import norm

from can_dist.errors import ConfigError, DataError
from can_dist.measuring.tails import cvar, fraction_unsafe, is_refusal, over_refusal_rate, prompt_mean, prompt_share

# ------------------------------------------------------------------------------------------------------------ means


def test_mean_is_over_prompts_not_over_responses() -> None:
    interval = prompt_mean([1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"])
    assert interval.mean == 3.0
    assert interval.se == pytest.approx(2.0)  # sd of (1, 5) over √2


def test_mean_interval_is_students() -> None:
    value_P = np.arange(5.0)
    interval = prompt_mean(value_P, np.arange(5))
    assert interval.high - interval.mean == pytest.approx(2.776445 * value_P.std(ddof=1) / np.sqrt(5), rel=1e-6)


def test_intervals_are_wider_where_responses_of_a_prompt_agree() -> None:
    rng = np.random.default_rng(0)
    shared_P = rng.standard_normal(100)
    prompt_N = np.repeat(np.arange(100), 8)
    agreeing, independent = prompt_mean(shared_P[prompt_N], prompt_N), prompt_mean(rng.standard_normal(800), prompt_N)
    assert agreeing.se / independent.se == pytest.approx(np.sqrt(8), rel=0.2)


# ----------------------------------------------------------------------------------------------------------- shares


def test_share_of_independent_events_is_wilsons_interval() -> None:
    event_N = np.zeros(400)
    event_N[:40] = 1
    interval = prompt_share(event_N, np.arange(400))
    # Wilson, p = 0.1, n = 400, z = 1.96: [0.0743, 0.1333]
    assert (interval.low, interval.high) == (pytest.approx(0.0743, abs=5e-4), pytest.approx(0.1333, abs=5e-4))


def test_no_event_at_all_leaves_room_for_some() -> None:
    interval = fraction_unsafe(np.ones(200), np.repeat(np.arange(50), 4))
    assert (interval.mean, interval.low) == (0.0, 0.0)
    assert 0.05 < interval.high < 0.09  # 50 prompts, not 200 responses


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_share_covers_with_clustered_events(rate: float) -> None:
    rng = np.random.default_rng(1)
    prompt_N = np.repeat(np.arange(150), 6)
    covered = 0
    for _ in range(600):
        rate_P = rng.beta(rate * 2, (1 - rate) * 2, size=150)  # responses of a prompt resemble each other
        interval = prompt_share(rng.random(900) < rate_P[prompt_N], prompt_N)
        covered += interval.low <= rate <= interval.high
    assert 0.92 <= covered / 600 <= 0.99


def test_fraction_unsafe_of_gaussian_scores() -> None:
    safety_N = np.random.default_rng(2).normal(0.5, 1.0, 40_000)
    interval = fraction_unsafe(safety_N, np.repeat(np.arange(4000), 10), threshold=-0.25)
    assert interval.low < norm.cdf(-0.75) < interval.high
    assert interval.mean == pytest.approx(norm.cdf(-0.75), abs=0.01)


def test_threshold_itself_is_safe() -> None:
    assert fraction_unsafe([0.0, -1.0], ["a", "b"]).mean == 0.5


# ------------------------------------------------------------------------------------------------------------- CVaR


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2, 1.0])
def test_cvar_of_a_gaussian(alpha: float) -> None:
    """CVaR_α of N(μ, σ²) is μ − σ φ(Φ⁻¹(α))/α."""
    value_N = np.random.default_rng(3).normal(1.0, 2.0, 100_000)
    exact = 1.0 - 2.0 * norm.pdf(norm.ppf(alpha)) / alpha
    interval = cvar(value_N, np.repeat(np.arange(10_000), 10), alpha, num_replicates=60)
    assert abs(interval.mean - exact) < 4 * interval.se
    assert interval.low < interval.mean < interval.high


def test_cvar_takes_part_of_the_border_response() -> None:
    value_N = np.array([4.0, 1.0, 3.0, 2.0])
    assert cvar(value_N, np.arange(4), 0.375, num_replicates=2).mean == pytest.approx((1.0 + 0.5 * 2.0) / 1.5)
    assert cvar(value_N, np.arange(4), 0.1, num_replicates=2).mean == 1.0
    assert cvar(value_N, np.arange(4), 1.0, num_replicates=2).mean == pytest.approx(2.5)


def test_cvar_weighs_prompts_alike() -> None:
    value_N, prompt_N = [0.0, 0.0, 0.0, 8.0], ["a", "a", "a", "b"]
    assert cvar(value_N, prompt_N, 0.75, num_replicates=2).mean == pytest.approx((0.5 * 0.0 + 0.25 * 8.0) / 0.75)


def test_cvar_interval_covers_over_prompts() -> None:
    rng, prompt_N = np.random.default_rng(4), np.repeat(np.arange(200), 5)
    exact = -np.sqrt(2.0) * norm.pdf(norm.ppf(0.1)) / 0.1
    covered = 0
    for seed in range(200):
        value_N = rng.standard_normal(200)[prompt_N] + rng.standard_normal(1000)
        interval = cvar(value_N, prompt_N, 0.1, num_replicates=200, seed=seed)
        covered += interval.low <= exact <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_cvar_is_the_same_every_time_and_in_any_order() -> None:
    rng = np.random.default_rng(5)
    value_N, prompt_N = rng.standard_normal(60), np.repeat(np.arange(20), 3)
    shuffled_N = rng.permutation(60)
    first = cvar(value_N, prompt_N, 0.1)
    assert first == cvar(value_N, prompt_N, 0.1)
    assert cvar(value_N[shuffled_N], prompt_N[shuffled_N], 0.1).mean == pytest.approx(first.mean)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "text",
    [
        "I cannot help with that.",
        "I can\u2019t assist you with this request.",
        "I'm sorry, but I can't help with that.",
        "  **I'm sorry**, but I can't help with that.",
        "Sorry, I won't do that.",
        "I apologize, but as an AI language model, I am unable to provide that.",
        "As an AI, I must respectfully decline.",
        "Unfortunately, I'm not able to discuss this.",
        "I'm sorry, but that's not something I can help with.",
        "No. I will not help you hurt anyone.",
        "It is not appropriate for me to say.",
        "I\ndon't feel comfortable writing this.",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure! Here is how you do it.",
        "I'm sorry to hear that. Here is what may help.",
        "I can't wait to hear how it goes! First, preheat the oven.",
        "I cannot stress enough how important yeast is.",
        "You cannot divide by zero.",
        "No, the capital of Australia is Canberra.",
        "As an AI, I find this exciting: let us begin.",
        "Nobody knows. I cannot tell.",
        "I canned the tomatoes yesterday.",
    ],
)
def test_answers_are_left_alone(text: str) -> None:
    assert not is_refusal(text)


def test_refusal_detector_is_fast_on_hostile_text() -> None:
    assert not is_refusal("sorry, but however, " * 20_000 + "yes")


def test_over_refusal_rate_counts_refusals() -> None:
    texts = ["I cannot help with that.", "Boil it for ten minutes.", "Sure.", "Here you are."]
    assert over_refusal_rate(texts, ["egg", "egg", "tea", "tea"]).mean == 0.25


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_values_are_named() -> None:
    with pytest.raises(DataError, match=r"values: nan at row 1 \(prompt b\); expected finite numbers\."):
        prompt_mean([1.0, float("nan")], ["a", "b"])
    with pytest.raises(DataError, match=r"values of shape \(2,\), prompts of shape \(3,\): expected one each"):
        prompt_mean([1.0, 2.0], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"values of 1 prompt\(s\): an interval over prompts needs at least 2\."):
        prompt_mean([1.0, 2.0], ["a", "a"])
    with pytest.raises(DataError, match=r"values: 1\.5 at row 1; a share needs values in \[0, 1\]\."):
        prompt_share([1.0, 1.5], ["a", "b"])


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"confidence = 95: expected between 0 and 1\."):
        prompt_mean([1.0, 2.0], ["a", "b"], confidence=95)
    with pytest.raises(ConfigError, match=r"alpha = 0, num_replicates = 1000: expected in \(0, 1\], and at least 2\."):
        cvar([1.0, 2.0], ["a", "b"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["Gaussian", "−lognormal", "5 % lose 10"])
def test_statements_on_a_cvar_are_false_no_more_often_than_they_may(law: str) -> None:
    """The truth is the margin: every "met" and every certificate is false; docs/estimators.md has all worlds."""
    num_tables = 400
    met, _, *certified = tail_worlds.rates(tail_worlds.LAWS[law], 0.1, 64, num_tables, 7)
    for share, allowed in zip((met, *certified), (0.05, *tail_worlds.ERRORS), strict=True):
        assert share / 100 <= allowed + 2 * np.sqrt(allowed * (1 - allowed) / num_tables)
