"""The numbers of the report against independent computations."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from can_dist.dual import Margin, solve_dual
from can_dist.stages.evaluate import held_out_prediction, improvement, interval, verdict, win_rate


def table(scores: dict[str, list[float]], name: str = "g") -> pa.Table:
    rows = [(prompt, value) for prompt, values in scores.items() for value in values]
    return pa.table({"prompt_id": [r[0] for r in rows], name: [r[1] for r in rows]})


def test_interval_is_scipys_one_sample_t_interval() -> None:
    values = np.random.default_rng(1).normal(2, 3, size=17)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = interval(values)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert found["mean"] == pytest.approx(values.mean())


def test_improvement_is_paired_by_prompt_whatever_the_order_and_the_number_of_responses() -> None:
    before = table({"a": [0.0, 2.0], "b": [10.0], "c": [5.0, 5.0, 5.0]})
    after = table({"c": [7.0], "a": [3.0], "b": [10.0, 12.0]})
    assert improvement(before, after, "g") == pytest.approx(interval(np.array([2.0, 1.0, 2.0])))


def test_interval_counts_prompts_not_responses() -> None:
    generator = np.random.default_rng(2)
    once = {str(p): [x] for p, x in enumerate(generator.normal(size=20))}
    often = {p: values * 50 for p, values in once.items()}
    zero = {p: [0.0] for p in once}
    assert improvement(table(zero), table(often), "g")["se"] == pytest.approx(
        improvement(table(zero), table(once), "g")["se"]
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.0, 2.0, "met"),
        (0.5, 1.5, "met within the interval"),
        (0.5, 1.0, "met within the interval"),
        (0, 0.9, "not met"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert verdict({"low": low, "high": high}, 1.0) == expected


def test_win_rate_compares_all_pairs_and_halves_ties() -> None:
    before, after = table({"a": [0.0, 1.0], "b": [0.0, 0.0]}), table({"b": [0.0, 0.0], "a": [1.0, 2.0]})
    assert win_rate(before, after, "g")["mean"] == pytest.approx(((1 + 0.5 + 1 + 1) / 4 + 0.5) / 2)


def test_held_out_prediction_reweights_the_references_responses() -> None:
    """Against the importance-weighted means written out."""
    generator = np.random.default_rng(3)
    prompts = np.repeat(np.arange(30), 6).astype(str)
    reward, safety = generator.normal(size=(2, 180))
    solution = solve_dual(reward, safety[:, None], prompts, beta=0.7, constraints=[Margin("safety", margin=0.3)])
    held_reward, held_safety = generator.normal(size=(2, 180))
    held = pa.table({"prompt_id": prompts, "reward": held_reward, "safety": held_safety})
    found = held_out_prediction(held, "reward", solution)
    weights = np.exp((held_reward + solution.lam["safety"] * held_safety) / 0.7).reshape(30, 6)
    weights /= weights.sum(axis=1, keepdims=True)
    for values, predicted in ((held_safety, found.slack_PJ[:, 0] + 0.3), (held_reward, found.reward_gain_P)):
        values = values.reshape(30, 6)
        expected = (weights * values).sum(axis=1) - values.mean(axis=1)
        np.testing.assert_allclose(np.sort(predicted), np.sort(expected), rtol=1e-10)
