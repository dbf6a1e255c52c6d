"""When a training is flat: the objective by enumeration, the rise by SciPy's paired t, the rule by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from can_dist.dual import ScoreTable
from can_dist.dual.flat import Best, compared, flat_sentence, objective
from can_dist.errors import ConfigError


def test_the_objective_of_an_enumerated_world_is_what_its_training_maximises() -> None:
    """E_{π_θ}(r + ⟨λ,g⟩) − E_{π_ref} of the same − β KL, over all that two prompts' reference can say."""
    random = np.random.default_rng(4)
    ref_PK, policy_PK = (random.dirichlet(np.ones(5), size=2) for _ in range(2))
    r_PK, g_PKJ, lam_J, beta = random.normal(size=(2, 5)), random.normal(size=(2, 5, 2)), [0.7, 1.3], 0.4
    table = ScoreTable.build(
        r_PK.ravel(), g_PKJ.reshape(-1, 2), np.repeat([0, 1], 5), np.log(ref_PK).ravel(), names=["a", "b"]
    )
    value_P = objective(table, np.log(ref_PK).ravel(), np.log(policy_PK).ravel(), lam_J, beta)
    score_PK = r_PK + g_PKJ @ lam_J
    kl_P = (policy_PK * np.log(policy_PK / ref_PK)).sum(1)
    np.testing.assert_allclose(value_P, ((policy_PK - ref_PK) * score_PK).sum(1) - beta * kl_P, rtol=1e-10)
    best_PK = ref_PK * np.exp(score_PK / beta)
    best_PK /= best_PK.sum(1, keepdims=True)
    most_P = objective(table, np.log(ref_PK).ravel(), np.log(best_PK).ravel(), lam_J, beta)
    assert (most_P > value_P).all(), "π_λ has the most of it"


@pytest.mark.parametrize("rise", [-0.2, 0.0, 0.05, 0.08, 0.12, 0.3])
def test_a_rise_is_a_paired_t_above_one(rise: float) -> None:
    random = np.random.default_rng(11)
    before_P = random.normal(size=60)
    after_P = before_P + random.normal(rise, 0.7, size=60)
    rose = ttest_rel(after_P, before_P).statistic > 1
    after = compared(Best(3, before_P), after_P, 6)
    assert (after.step, after.num_flat) == ((6, 0) if rose else (3, 1))
    np.testing.assert_array_equal(after.objective_P, after_P if rose else before_P)


def test_two_evaluations_in_a_row_without_a_rise_are_flat_and_a_rise_begins_anew() -> None:
    at_0 = np.zeros(40)
    slope_P = np.random.default_rng(0).normal(1.0, 0.5, size=40)
    course = [0.1, 0.2, 0.19, 0.4, 0.39, 0.38, 0.9]
    best, seen = Best(0, at_0), []
    for step, height in enumerate(course, start=1):
        best = compared(best, height * slope_P, step)
        seen.append((best.step, best.num_flat, best.is_flat))
    assert seen[:6] == [(1, 0, False), (2, 0, False), (2, 1, False), (4, 0, False), (4, 1, False), (4, 2, True)]
    # two small rises are one large one: they are compared with the best, not with the one before
    noise_P = np.random.default_rng(1).normal(size=40)
    noise_P -= noise_P.mean()
    first = compared(Best(0, at_0), 0.1 + noise_P, 1)
    assert (first.step, first.num_flat) == (0, 1)
    assert compared(first, 0.2 + noise_P, 2).step == 2


def test_equal_policies_are_flat_without_a_standard_error() -> None:
    assert compared(Best(1, np.ones(3)), np.ones(3), 2).num_flat == 1
    assert compared(Best(1, np.ones(3)), np.full(3, 1.5), 2).step == 2, "all prompts rose alike"


def test_it_is_kept_to_the_bit() -> None:
    best = Best(7, np.random.default_rng(2).normal(size=9), 1)
    again = Best.from_dict(json.loads(json.dumps(best.to_dict())))
    assert (again.step, again.num_flat) == (7, 1)
    np.testing.assert_array_equal(again.objective_P, best.objective_P)


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match="evaluations of 3 and 4 prompts"):
        compared(Best(1, np.ones(3)), np.ones(4), 2)
    with pytest.raises(ConfigError, match="two or more"):
        compared(Best(1, np.ones(1)), np.ones(1), 2)


def test_the_sentence() -> None:
    sentence = flat_sentence(40, of_steps=120, best_step=24)
    assert sentence.startswith("stopped after step 40 of 120: on the validation prompts r + ⟨λ, g⟩ − β KL was")
    assert sentence.endswith("no more than a standard error above that of step 24")
    assert flat_sentence(4, of_steps=9, best_step=0).endswith("above the start's")
