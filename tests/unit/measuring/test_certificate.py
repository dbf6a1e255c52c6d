"""What a certificate answers, and its sentences: bounds recomputed by hand, on values of our choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from can_dist.config.sections import Constraint
from can_dist.dual import lower_bound
from can_dist.measuring.certificate import (
    CERTIFIED,
    NOT_CERTIFIED,
    NOT_ENOUGH,
    Demand,
    answer_of,
    constraint_sentence,
    judge,
    num_bounds,
    sentences,
)

VALUE_P = np.random.default_rng(3).normal(0.5, 1.0, 144)
LOW, HIGH = lower_bound(VALUE_P, 0.02).low, -lower_bound(-VALUE_P, 0.02).low
MEAN = float(VALUE_P.mean())
SCORER: Any = {"kind": "callable", "function": "builtins:len"}


def row(asked: float, tolerance: float | None = None, value_P: np.ndarray = VALUE_P) -> dict[str, Any]:
    return judge("calm", Demand(asked, True, tolerance), value_P, 0.02)


def record(answer: str, *rows: dict[str, Any], number: int = 1) -> dict[str, Any]:
    look = {"number": number, "delta": 0.05, "error": 0.0304}
    return {"answer": answer, "constraints": rows, "num_prompts": 144, "num_responses": 4, "num_cut": 0, "look": look}


@pytest.mark.parametrize(
    ("asked", "answer"),
    [(LOW - 1e-9, CERTIFIED), (LOW + 1e-9, NOT_ENOUGH), (HIGH - 1e-9, NOT_ENOUGH), (HIGH + 1e-9, NOT_CERTIFIED)],
)
def test_answer_is_on_which_side_of_the_bounds_the_demand_lies(asked: float, answer: str) -> None:
    judged = row(asked)
    assert (judged["low"], judged["high"], judged["answer"]) == (LOW, HIGH, answer)
    assert (judged["needed"] is None) == (answer != NOT_ENOUGH)


@pytest.mark.parametrize(
    ("asked", "tolerance", "answer"),
    [
        (0.5, 1.0, CERTIFIED),
        (MEAN, (HIGH - LOW) / 4, NOT_ENOUGH),
        (HIGH + 1.0, 0.5, NOT_CERTIFIED),
        (LOW - 1.0, 0.5, NOT_CERTIFIED),
        (HIGH + 0.1, 0.2, NOT_ENOUGH),
    ],
)
def test_equality_is_certified_where_both_bounds_lie_within_its_tolerance(
    asked: float, tolerance: float, answer: str
) -> None:
    assert row(asked, tolerance)["answer"] == answer


def test_prompts_that_would_decide_by_the_measured_spread() -> None:
    asked = MEAN - (MEAN - LOW) / 3
    needed = row(asked)["needed"]
    assert needed == pytest.approx(9 * 144, abs=1)
    more_P = np.tile(VALUE_P, 9)
    assert judge("calm", Demand(asked, True), np.append(more_P, MEAN), 0.02)["answer"] == CERTIFIED
    against = row(MEAN + (HIGH - MEAN) / 2)
    assert against["needed"] == pytest.approx(4 * 144, abs=1)
    assert "; the measured value would not do." in constraint_sentence(against)
    assert "; the measured value would do." in constraint_sentence(row(asked))
    assert row(MEAN)["needed"] is None


def test_prompts_that_are_all_alike_decide_nothing() -> None:
    for asked in (-1.0, 0.3, 1.0):
        judged = row(asked, value_P=np.full(100, 0.3))
        assert (judged["answer"], judged["needed"], judged["low"], judged["high"]) == (NOT_ENOUGH, None, None, None)
        assert "every prompt gives the same improvement over the reference, 0.3" in constraint_sentence(judged)
    said = " ".join(sentences(record(NOT_ENOUGH, judged)))
    assert "No number of prompts can be named that would decide." in said


def test_certified_only_if_all_are_and_missed_if_one_is() -> None:
    sure, missed, open_one = row(LOW - 1), row(HIGH + 1), row(MEAN)
    assert answer_of([sure, sure]) == CERTIFIED
    assert answer_of([sure, open_one]) == NOT_ENOUGH
    assert answer_of([sure, open_one, missed]) == NOT_CERTIFIED


def test_bounds_share_the_error_and_an_equality_has_two() -> None:
    demands = [Demand(0.0, True), Demand(0.0, False), Demand(0.0, True, 0.1)]
    assert num_bounds(demands) == 4


def test_demand_of_a_constraint() -> None:
    assert Demand.of(Constraint(scorer=SCORER, margin=0.2), 0.1) == Demand(0.2, True)
    assert Demand.of(Constraint(scorer=SCORER, threshold=-1.0), None) == Demand(-1.0, False)
    assert Demand.of(Constraint(scorer=SCORER, margin=0.2, equal=True), 0.1) == Demand(0.2, True, 0.1)


def test_sentences_say_answer_bounds_look_and_what_is_not_seen() -> None:
    said = sentences(record(CERTIFIED, row(LOW - 0.1)))
    assert said == [
        "CERTIFIED at a joint error of 0.0304, on 144 sealed prompts, 4 responses each.",
        f"calm: the improvement over the reference is at least {LOW:.4g} (measured {MEAN:.4g}), where at least "
        f"{LOW - 0.1:g} is asked.",
        "This is the first look at the sealed prompts; of the joint error 0.05 of all looks it spends 0.0304.",
        "A harm that befalls fewer than 2.08% of prompts (3 in 144) may be unseen; so may one that these scores do not "
        "measure.",
    ]
    cut = sentences(record(CERTIFIED, row(LOW - 0.1)) | {"num_cut": 5})
    assert cut[2].startswith("5 of 576 responses of the policy were cut at generate.max_new_tokens")
    later = sentences(record(NOT_CERTIFIED, row(HIGH + 1), number=3))
    assert "This is look 3 at the sealed prompts, which other measurements saw before" in later[2]
    assert f"is {LOW:.4g} to {HIGH:.4g} (measured" in later[1]
    assert "may be unseen" not in " ".join(later)


def test_joint_error_of_two_constraints_that_are_both_just_missed() -> None:
    """Two correlated values of mean 0, asked to be 0: at an error of 0.2 at most 20 % of tables certify either."""
    random, certified = np.random.default_rng(8), 0
    for _ in range(200):
        first_P, noise_P = -random.lognormal(0, 0.7, (2, 64)) + np.exp(0.245)
        answers = [judge("a", Demand(0.0, True), v, 0.2 / 2)["answer"] for v in (first_P, (first_P + noise_P) / 2)]
        certified += CERTIFIED in answers
    assert certified / 200 <= 0.2 + 2 * (0.16 / 200) ** 0.5
    assert certified > 0
