"""Margins in units of the scores, and the β from which on a prediction may be trusted."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy.stats import norm

from can_dist.dual import Margin, ScoreTable, solve_table
from can_dist.dual.belief.level import level_of
from can_dist.measuring.advice import beta_advice, beta_words, margin_words

P, K = 220, 16


def table(scale: float = 1.0, spread: float = 1.0) -> ScoreTable:
    """Gaussian scores: reward of sd ``spread`` and safety of sd ``scale`` within prompts, around 0.3 and −0.2."""
    generator = np.random.default_rng(0)
    reward, safety = generator.normal(size=(2, P * K))
    prompt = np.repeat(np.arange(P), K)
    return ScoreTable.build(0.3 + spread * reward, (scale * safety - 0.2)[:, None], prompt, names=["safety"])


def test_a_margin_is_told_in_standard_deviations_and_by_who_reaches_it() -> None:
    """Of Gaussian scores 1 − Φ(0.8) = 21 % lie 0.8 sd above the mean, and above that of their own 16 a little fewer."""
    words = margin_words(table(scale=1.25), 0, Margin("safety", margin=1.0))
    share = 100 * norm.sf(0.8 / math.sqrt(1 - 1 / K))
    assert words.startswith("a margin of 1 is 0.8")
    assert " standard deviations of the scores within a prompt; " in words
    assert float(words.split("; ")[1].split("%")[0]) == pytest.approx(share, abs=1.5)
    assert words.endswith("% of the responses lie as far above their prompt's mean")


def test_a_threshold_is_told_over_the_references_mean() -> None:
    built = table()
    words = margin_words(built, 0, Margin("safety", threshold=0.3))
    assert f", {0.3 - built.centre_J[0]:+.3g} over the reference's mean; " in words
    assert float(words.split("; ")[1].split("%")[0]) == pytest.approx(100 * norm.sf(0.5), abs=2.5)
    flat = ScoreTable.build(np.arange(8.0), np.zeros((8, 1)), np.repeat([0, 1], 4), names=["g"])
    assert margin_words(flat, 0, Margin("g", margin=0.5)) == (
        "a margin of 0.5 of a score that never differs between the responses to a prompt"
    )


@pytest.mark.parametrize(("threshold", "share"), [(-1e3, "100%"), (1e3, "0%"), (-0.2 + 1e-9, None)])
def test_a_share_is_never_written_with_an_exponent(threshold: float, share: str | None) -> None:
    words = margin_words(table(), 0, Margin("safety", threshold=threshold))
    assert re.search(r"; (less than )?\d+(\.\d+)?% of the responses are at or above it$", words)
    assert share is None or f"; {share} of" in words


@pytest.mark.parametrize("spread", [0.01, 1.0, 300.0])
def test_the_beta_named_is_the_least_of_the_grid_that_is_trusted(spread: float) -> None:
    built, margins = table(spread=spread), [Margin("safety", margin=0.3)]
    advice = beta_advice(built, margins, 0.15 * spread)
    assert advice.level == "not trusted"
    assert advice.spread is not None

    def level(beta: float) -> str:
        return level_of(solve_table(built, beta=beta, constraints=margins).diagnostics)

    assert level(advice.spread) == "trusted"
    assert level(advice.spread / 1.5) != "trusted"
    words = beta_words(advice, 0.15 * spread, K)
    assert words.startswith(
        f"at beta = {0.15 * spread:g} the prediction for these margins is not to be trusted (a median"
    )
    assert f"beta ≈ {advice.spread:g} keeps the weights spread" in words


def test_where_no_beta_helps_it_says_so() -> None:
    advice = beta_advice(table(), [Margin("safety", margin=2.5)], 1.0)
    assert advice.spread is None
    words = beta_words(advice, 1.0, K)
    assert words.startswith("at beta = 1 the prediction for these margins is not to be trusted; no beta that was tried")
    flat = ScoreTable.build(np.zeros(8), np.arange(8.0)[:, None], np.repeat([0, 1], 4), names=["g"])
    few = beta_advice(flat, [Margin("g", margin=0.1)], 1.0)
    assert few.spread is None
    assert beta_words(few, 1.0, 4).endswith("; 2 prompts are too few for any beta, 200 are needed")
