"""The scale of a log-ratio score: the fit against independent ones, its refusals, the stage, and the plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit

from can_dist.config import Model, validate_config
from can_dist.errors import DataError
from can_dist.reporting.figures.reliability import draw_reliability, reliability_bins
from can_dist.scoring.protocol import PolicyRatio
from can_dist.stages.calibrate import calibrate, fit_scale
from can_dist.tables.artifacts import open_stage, write_part
from can_dist.tables.schemas import PREFERENCES
from can_dist.workspace import Workspace


def preferences(scale: float, num_pairs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaps of a score, and preferences drawn from σ(scale·gap); one pair a prompt."""
    random = np.random.default_rng(seed)
    gap_N = random.normal(0, 2, size=num_pairs)
    return gap_N, random.random(num_pairs) < expit(scale * gap_N), np.arange(num_pairs)


@pytest.mark.parametrize("scale", [0.05, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e5])
def test_the_scale_is_the_maximum_of_the_likelihood(scale: float, unit: float) -> None:
    gap_N, preferred_N, prompt_N = preferences(scale, 2000)
    found = fit_scale(unit * gap_N, preferred_N, prompt_N, "safety")
    margin_N = np.where(preferred_N, gap_N, -gap_N)
    best = minimize_scalar(lambda a: np.logaddexp(0, -a * margin_N).sum(), bounds=(0, 10), method="bounded",
                           options={"xatol": 1e-10})  # fmt: skip
    assert found.scale * unit == pytest.approx(best.x, rel=1e-5)
    assert abs(found.scale * unit - scale) < 4 * found.scale_se * unit
    assert found.log_loss == pytest.approx(best.fun / 2000, rel=1e-9)
    assert (found.num_pairs, found.num_prompts) == (2000, 2000)
    assert found.accuracy == pytest.approx((margin_N > 0).mean())


def test_log_loss_before_is_that_of_the_score_as_it_is() -> None:
    gap_N, preferred_N, prompt_N = preferences(0.2, 500)
    found = fit_scale(gap_N, preferred_N, prompt_N, "safety")
    chosen = np.where(preferred_N, expit(gap_N), 1 - expit(gap_N))
    assert found.log_loss_before == pytest.approx(-np.log(chosen).mean())
    assert found.log_loss < found.log_loss_before


def test_the_standard_error_is_the_spread_of_repeated_fits() -> None:
    fits = [fit_scale(*preferences(0.7, 400, seed), "safety") for seed in range(300)]
    spread = np.std([one.scale for one in fits], ddof=1)
    assert np.mean([one.scale_se for one in fits]) == pytest.approx(spread, rel=0.12)


def test_pairs_of_one_prompt_are_not_taken_as_independent() -> None:
    gap_N, preferred_N, prompt_N = preferences(0.7, 400)
    once = fit_scale(gap_N, preferred_N, prompt_N, "safety")
    often = fit_scale(np.repeat(gap_N, 9), np.repeat(preferred_N, 9), np.repeat(prompt_N, 9), "safety")
    assert often.scale == pytest.approx(once.scale, rel=1e-9)
    assert often.scale_se == pytest.approx(once.scale_se, rel=1e-9)


def test_which_response_comes_first_does_not_matter() -> None:
    gap_N, preferred_N, prompt_N = preferences(0.7, 400)
    flip_N = np.random.default_rng(9).random(400) < 0.5
    turned = fit_scale(np.where(flip_N, -gap_N, gap_N), preferred_N ^ flip_N, prompt_N, "safety")
    assert turned == fit_scale(gap_N, preferred_N, prompt_N, "safety")


def test_a_score_that_does_not_order_preferences_is_refused() -> None:
    gap_N, preferred_N, prompt_N = preferences(0.0, 300, seed=4)
    margin_N = np.where(preferred_N, gap_N, -gap_N)
    with pytest.raises(DataError) as error:
        fit_scale(gap_N, preferred_N, prompt_N, "safety")
    text = str(error.value)
    assert text.startswith(
        f"scorer 'safety': its policy does not order people's preferences: {(margin_N > 0).mean():.1%} of 300 held-out "
        "pairs are ordered right, and the 95 % interval of a is "
    )
    assert text.endswith(
        ", expected above 0. Train it longer or on more preferences, check its criterion, or raise "
        "label.validation_fraction."
    )


def test_a_score_of_the_wrong_criterion_is_refused() -> None:
    gap_N, preferred_N, prompt_N = preferences(-1.0, 300)
    with pytest.raises(DataError, match="its policy does not order people's preferences"):
        fit_scale(gap_N, preferred_N, prompt_N, "safety")


@pytest.mark.parametrize(
    ("gaps", "prompts", "reason"),
    [
        ([], [], "0 held-out pair(s) of 0 prompt(s) are too few"),
        ([1.0, -0.5], [7, 7], "2 held-out pair(s) of 1 prompt(s) are too few"),
        ([0.0, 0.0], [0, 1], "the scores of both responses are equal in each of 2 held-out pairs"),
        ([0.5, 2.0, 0.0], [0, 1, 2], "each of 3 held-out pairs is ordered right, so the larger a the better"),
        ([-0.5, -2.0], [0, 1], "each of 2 held-out pairs is ordered wrong"),
    ],
)
def test_where_no_scale_can_be_fitted(gaps: list[float], prompts: list[int], reason: str) -> None:
    with pytest.raises(DataError) as error:
        fit_scale(np.array(gaps), np.ones(len(gaps), dtype=bool), np.array(prompts), "safety")
    assert str(error.value) == (
        f"scorer 'safety': cannot be calibrated: {reason}. Bring more preferences, raise label.validation_fraction, "
        "or leave out calibrate."
    )


def test_preferences_without_held_out_pairs_are_refused(tmp_path: Path) -> None:
    row = {
        "example_id": "p/0a|0b", "prompt_id": "p", "split": "train", "messages": [{"role": "user", "content": "w1"}],
        "response_ids": ["p/0a", "p/0b"], "texts": ["w1", "w2"], "token_ids": [[5], [6]], "logp_ref": [-1.0, -2.0],
        "scores": [], "target": [1.0, 0.0], "weight": 1.0,
    }  # fmt: skip
    stage = open_stage(tmp_path, "label", "safe preferences", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist([row], schema=PREFERENCES))
    scorer = {"kind": "callable", "function": "builtins:len"}
    config = {
        "prompts": {"source": "prompts.jsonl", "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": scorer,
        "constraints": {"safety": {"scorer": scorer, "margin": 0.1}},
    }
    work = Workspace(tmp_path, validate_config(config))
    with pytest.raises(DataError) as error:
        calibrate(work, "safety", stage.commit(), PolicyRatio(Model(model="lm"), Model(model="lm"), 0.1))
    work.close()
    assert str(error.value) == (
        "scorer 'safety': cannot be calibrated: none of 1 pairs is held out. Raise label.validation_fraction, bring "
        "more preferences, or leave out calibrate."
    )


# ---------------------------------------------------------------------------------------------------------- the plot


def test_bins_hold_all_pairs_and_their_intervals_are_wilsons() -> None:
    from scipy.stats import binomtest

    gap_N, preferred_N, _ = preferences(1.0, 205)
    predicted_N, agrees_N = expit(np.abs(gap_N)), (gap_N > 0) == preferred_N
    bins = reliability_bins(predicted_N, agrees_N)
    assert len(bins) == 10
    order = np.argsort(predicted_N)
    for row, members in zip(bins, np.array_split(order, 10), strict=True):
        expected = binomtest(int(agrees_N[members].sum()), len(members)).proportion_ci(method="wilson")
        np.testing.assert_allclose(
            row, [predicted_N[members].mean(), agrees_N[members].mean(), expected.low, expected.high], rtol=1e-6
        )


def test_few_pairs_share_one_bin() -> None:
    assert len(reliability_bins(np.array([0.6, 0.7, 0.9]), np.array([True, False, True]))) == 1


def test_the_plot_is_a_drawing_with_both_scales_and_always_the_same_bytes(tmp_path: Path) -> None:
    gap_N, preferred_N, _ = preferences(0.4, 300)
    for name in ("a.svg", "b.svg"):
        draw_reliability(gap_N, preferred_N, 0.412, 0.05, tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert ET.fromstring(text).tag.endswith("svg")
    for label in ("as trained, a = 1", "calibrated, a = 0.412 ± 0.05", "people agree as predicted"):
        assert label in text
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
