"""What a table can vouch for, against solves without a prompt, sums written out, and worlds whose truth is known."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from dual_worlds import LAWS, World

from can_dist import dual
from can_dist.dual import Margin, ScoreTable, Trust, judge
from can_dist.dual.belief.evidence import Evidence
from can_dist.dual.belief.trust import MIN_CARRIERS, MIN_SHARE, _objection, left_out_change, left_out_gain
from can_dist.dual.estimators import estimate
from can_dist.dual.moments import prompt_moments

solve_table = partial(dual.solve_table, estimator="empirical")  # the paper's, which has closed forms


def judged(
    reward: np.ndarray, utility: np.ndarray, prompt: np.ndarray, margin: float, beta: float = 1.0
) -> tuple[Trust, float]:
    """Return the judgement of the jackknife's λ̂, and that λ̂."""
    table = ScoreTable.build(reward, utility, prompt)
    solution = solve_table(table, beta=beta, constraints=[Margin("g", margin)])
    found = estimate(table, beta, solution.margin_vector, "jackknife", solution.lam_vector)
    return judge(table, beta, solution.margin_vector, found), float(found.lam_J[0])


def gaussian(num_prompts: int, num_responses: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return World("gaussian", 1.0, num_prompts=num_prompts, num_responses=num_responses).sample(seed)


def test_leaving_a_prompt_out_is_a_solve_on_the_others() -> None:
    generator = np.random.default_rng(0)
    reward, utility = generator.normal(size=60 * 12), generator.normal(size=(60 * 12, 2))
    table = ScoreTable.build(reward, utility, np.repeat(np.arange(60), 12))
    constraints = [Margin("a", 0.3), Margin("b", 0.2)]
    solution = solve_table(table, beta=1.0, constraints=constraints)
    moments = prompt_moments(table, solution.lam_vector, 1.0)
    slack_PJ = moments.gain_PJ - solution.margin_vector
    change_PJ = left_out_change(moments, slack_PJ, 1.0, solution.lam_vector)
    gain_PJ = left_out_gain(moments, slack_PJ, 1.0, solution.lam_vector)
    for prompt in range(0, 60, 7):
        others = solve_table(table.take(np.arange(60) != prompt), beta=1.0, constraints=constraints).lam_vector
        np.testing.assert_allclose(change_PJ[prompt], others - solution.lam_vector, rtol=0.15, atol=2e-3)
        there = prompt_moments(table.take(np.array([prompt])), others, 1.0).gain_PJ[0]
        np.testing.assert_allclose(gain_PJ[prompt], there - moments.gain_PJ[prompt], rtol=0.2, atol=2e-3)


def test_the_numbers_are_the_sums_written_out() -> None:
    reward, utility, prompt = gaussian(200, 16)
    trust, lam = judged(reward, utility, prompt, 0.5)
    shaped = [value.reshape(200, 16) for value in (reward, utility)]
    centred = [value - value.mean(axis=1, keepdims=True) for value in shaped]
    ratio = np.exp(centred[0] + lam * centred[1])
    weight = ratio / ratio.sum(axis=1, keepdims=True)
    variance, ess = utility.reshape(200, 16).var(axis=1, ddof=1), 1 / (weight**2).sum(axis=1)
    assert trust.ess_J[0] == pytest.approx(variance.sum() / (variance / ess).sum())
    for carriers, value in ((trust.evidence.carriers_J, ratio), (trust.evidence.own_carriers_J, 16 * weight)):
        carried = np.abs(centred[1]) * value**2
        assert carriers[0] == pytest.approx(carried.sum() ** 2 / (carried**2).sum())
    gain = (weight * centred[1]).sum(axis=1)
    left = np.array(
        [
            [np.average(np.delete(row, k), weights=np.delete(one, k)) for k in range(16)]
            for row, one in zip(centred[1], weight, strict=True)
        ]
    )
    assert trust.bias_J[0] == pytest.approx(abs((15 * (left.mean(axis=1) - gain)).mean()))
    assert trust.delivered[0].low < 0.5 - trust.bias_J[0]
    assert trust.num_flat == 0
    assert not trust.objection


def test_single_responses_count_as_an_error_and_many_of_them_as_an_objection() -> None:
    reward, utility, prompt = gaussian(200, 32)
    few = np.ones(prompt.size, dtype=bool)
    few[(prompt < 4) & (np.arange(prompt.size) % 32 > 0)] = False
    whole, cut = judged(reward, utility, prompt, 0.5)[0], judged(reward[few], utility[few], prompt[few], 0.5)[0]
    assert cut.num_flat == 4
    assert cut.bias_J[0] - whole.bias_J[0] == pytest.approx(0.5 * 4 / 196, rel=0.1)
    half = (prompt < 100) | (np.arange(prompt.size) % 32 == 0)
    trust = judged(reward[half], utility[half], prompt[half], 0.2)[0]
    assert trust.objection.startswith(
        "100 of 200 prompts have one response, which cannot show a change; leave them out"
    )


def test_a_minority_that_carries_everything_is_seen() -> None:
    """The median effective sample size is 120 of 128: the weights of the 7 % count by their variance."""
    generator = np.random.default_rng(1)
    scale = np.repeat(np.where(generator.random(300) < 0.07, 5.0, 0.25), 128)
    first, second = generator.normal(size=(2, scale.size))
    reward = scale * (-0.5 * first + math.sqrt(0.75) * second)
    trust = judged(reward, scale * first, np.repeat(np.arange(300), 128), 0.26)[0]
    assert trust.ess_J[0] < 4
    assert "of 128 responses carry a prompt's prediction, prompts weighted by how much they vary" in trust.objection


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (World("gaussian", 1.0, num_prompts=30), "30 prompts are too few, 200 are needed"),
        (World("gaussian", 10.0, num_prompts=200), "1.4 of 128 responses carry a prompt's prediction"),
        (World("t3", 1.0, num_prompts=200), "of all 25600 responses decide it"),
        (World("rare", 1.0, num_prompts=300), "rare responses decide it (Pareto k = 1."),
    ],
)
def test_says_why_not(world: World, words: str) -> None:
    assert words in judged(*world.sample(0), world.margin, world.beta)[0].objection


@pytest.mark.parametrize(
    ("ess", "share", "carriers", "own", "shape", "words"),
    [
        (7.0, 0.4, 41, 0, 0.4, ""),
        (3.9, 0.4, 41, 99, 0.4, "3.9 of 16 responses carry a prompt's prediction, prompts weighted"),
        (7.0, 0.4, 39, 99, 0.4, "39 of all 3200 responses decide it"),
        (7.0, 0.4, 41, 99, 0.6, "rare responses decide it (Pareto k = 0.60)"),
        (7.0, 0.4, 41, 99, math.nan, ""),
        (7.0, 0.17, 41, 99, 0.4, "vary, and 18% are needed; raise beta or lower the margin"),
        (15.0, 0.4, 9, 41, 0.4, ""),
        (15.0, 0.4, 41, 41, 0.9, ""),
        (15.0, 0.4, 9, 39, 0.4, "9 of all 3200 responses decide it"),
        (15.0, 0.4, 9, 99, 0.9, "9 of all 3200 responses decide it"),
        (15.0, 0.4, 9, 101, 0.9, ""),
        (15.0, 0.17, 9, 101, 0.9, "vary, and 18% are needed; raise beta or lower the margin"),
    ],
)
def test_what_each_condition_refuses(
    ess: float, share: float, carriers: float, own: float, shape: float, words: str
) -> None:
    table = ScoreTable.build(*gaussian(200, 16))
    evidence = Evidence(np.ones((1, 200)), np.array([carriers]), np.array([own]), shape)
    objection = _objection(table, 0.0, 0, np.array([ess]), np.array([share]), evidence)
    assert words in objection
    assert bool(words) == bool(objection)


def test_a_policy_far_from_the_reference_is_refused_however_many_responses_carry_it() -> None:
    """12 of 128 responses, hundreds of carriers, no tail: winners of both scores, 1 in 40,000, would change it."""
    generator = np.random.default_rng(2)
    body = generator.normal(size=(2, 1000 * 128))
    first, second = np.where(generator.random(body.shape) < 0.005, 6.0, body)
    both = (first > 5.9) & (second > 5.9)
    second[both] = 0.0  # this table has none of them
    scale = math.sqrt(1 + 0.005 * 35 - 0.03**2)
    first, second = first / scale, second / scale
    trust = judged(-0.5 * first + math.sqrt(0.75) * second, first, np.repeat(np.arange(1000), 128), 0.5)[0]
    assert trust.evidence.carriers_J[0] > 2 * MIN_CARRIERS
    assert trust.evidence.shape < 0.2
    assert trust.ess_J[0] / 128 < MIN_SHARE
    assert "of 128 responses carry a prompt's prediction" in trust.objection


def test_largest_weights_that_are_all_alike_are_no_rare_responses() -> None:
    """A quarter of the responses to every prompt is best: the tail does not vary, and its shape is no number."""
    reward, utility = (np.tile(values, 250 * 4).astype(np.float64) for values in ([0, 0, 1, 1], [0, 1, 0, 1]))
    trust = judged(reward, utility, np.repeat(np.arange(250), 16), 0.1)[0]
    assert math.isnan(trust.evidence.shape)
    assert not trust.objection


def test_prompts_that_show_nothing_may_be_many_but_not_all() -> None:
    reward, utility, prompt = gaussian(200, 16)
    for num_flat, words in ((140, ""), (160, "40 prompts that can show a change are too few (160 have responses")):
        flat = utility.copy()
        flat[prompt < num_flat] = 0.0
        objection = judged(reward, flat, prompt, 0.02)[0].objection
        assert words in objection
        assert "too few" not in objection or words


def test_a_level_is_judged_by_its_own_mean() -> None:
    """The interval of a threshold is wider by the spread of the reference's means, and lies around the threshold."""
    reward, utility, prompt = gaussian(200, 32)
    utility = utility + np.random.default_rng(5).normal(3.0, 1.0, 200)[prompt]
    table = ScoreTable.build(reward, utility, prompt)
    solution = solve_table(table, beta=1.0, constraints=[Margin("g", threshold=3.5)], estimator="auto")
    one = solution.diagnostics["judgement"]["delivered"]["g"]
    assert one["low"] < 3.5 < one["high"]
    assert one["se"] == pytest.approx(1.0 / math.sqrt(200), rel=0.2)
    assert "has a mean g of +3." in solution.diagnostics["verdict"]


def test_lambda_zero_is_known_only_with_room() -> None:
    reward, utility, prompt = World("gaussian", 1.0, correlation=0.5, num_prompts=300, num_responses=32).sample(0)
    sure, close = judged(reward, utility, prompt, 0.2)[0], judged(reward, utility, prompt, 0.46)[0]
    assert (sure.lam_error_J[0], sure.lam_known) == (0.0, True)
    assert (close.lam_error_J[0], close.lam_known) == (math.inf, False)


@pytest.mark.parametrize("law", ["gaussian", "binary", "skewed_down"])
def test_the_truth_lies_inside_what_is_printed(law: str) -> None:
    """π_λ̂ of 40 tables at the population's own improvement; docs/estimators.md has 18 worlds and all sizes."""
    world = World(law, 1.0, num_prompts=240, num_responses=24)
    inside, known = [], []
    for seed in range(40):
        trust, lam = judged(*world.sample(seed), world.margin, world.beta)
        if trust.objection:
            continue
        assert trust.evidence.carriers_J[0] >= MIN_CARRIERS or trust.ess_J[0] >= 15
        inside.append(trust.delivered[0].low <= truth(world, lam) <= trust.delivered[0].high)
        known.append(abs(lam - world.population_lam()) <= trust.lam_error_J[0] * lam)
    assert len(inside) >= 20, "the sentence is printed in these worlds"
    assert np.mean(inside) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / len(inside))
    assert np.mean(known) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / len(known))


def truth(world: World, lam: float) -> float:
    """Return the population's improvement at λ, by quadrature over the law (scores have variance 1)."""
    point, log_weight = (value[::100] for value in LAWS[world.law].nodes())
    log_weight = log_weight + (world.correlation + lam) * world.sd_over_beta * point
    return float(np.average(point, weights=np.exp(log_weight - log_weight.max())))
