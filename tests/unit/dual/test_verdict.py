"""The sentence on a trained policy, word for word."""

from __future__ import annotations

import dataclasses

import pytest
from policy_world import estimate, interval

from can_dist.dual import Demand, PolicyEstimate, estimate_line, verdict


def policy(*gains: float, direction: float = 0.59, length: float = 0.36, **change: float) -> PolicyEstimate:
    result = estimate(*gains, **change)  # type: ignore[arg-type]
    return dataclasses.replace(result, direction=interval(direction, 0.02, 200), length=interval(length, 0.02, 200))


def test_short_in_length_and_direction() -> None:
    result = verdict(policy(0.267, kl=0.112), [Demand("a", 0.5)], predicted_kl=0.26)
    assert result == (
        "Stopped short: a went 53% of the way (+0.267 ± 0.039 of +0.5), length 0.36, direction 0.59: strength 1.9 "
        "would meet the margins at KL 0.39 (0.26 predicted)."
    )


def test_short_in_length_alone() -> None:
    result = verdict(policy(0.1, kl=0.01, direction=0.94, length=0.21), [Demand("a", 0.5)], predicted_kl=0.26)
    assert "length 0.21, direction 0.94 (length alone is missing): strength 5 would meet" in result


@pytest.mark.parametrize("gain", [0.49, 0.53])
def test_arrived(gain: float) -> None:
    result = verdict(policy(gain, kl=0.27), [Demand("a", 0.5)], predicted_kl=0.26)
    assert (
        result
        == f"Arrived: a went {gain / 0.5:.0%} of the way ({gain:+.3g} ± 0.039 of +0.5), at KL 0.27 (0.26 predicted)."
    )


def test_too_far() -> None:
    result = verdict(policy(0.8, kl=0.6), [Demand("a", 0.5)], predicted_kl=0.26)
    assert result == (
        "Went too far: a went 160% of the way (+0.8 ± 0.039 of +0.5) at KL 0.6: strength 0.62 would meet the margins "
        "at KL 0.23 (0.26 predicted)."
    )
    free = verdict(policy(0.8, kl=0.6, lam=0.0), [Demand("a", 0.5)], predicted_kl=0.26)
    assert free.startswith("Arrived: a went 160%")


def test_the_worst_of_several_and_what_may_be_lost() -> None:
    demands = [Demand("a", 0.5), Demand("b", -0.3)]
    assert verdict(policy(0.5, -0.31), demands, predicted_kl=0.1).startswith(
        "Arrived: a went 100% of the way (+0.5 ± 0.039 of +0.5); b -0.31 ± 0.039 where at least -0.3 is asked, at KL"
    )
    result = verdict(policy(0.4, -0.7), demands, predicted_kl=0.1)
    assert result.startswith(
        "Stopped short: b -0.7 ± 0.039 where at least -0.3 is asked, length 0.36, direction 0.59: no "
    )
    assert result.endswith("one strength cannot meet both.")


def test_no_strength_is_named_where_none_is_known() -> None:
    wrong = verdict(policy(-0.2), [Demand("a", 0.5)], predicted_kl=0.26)
    assert (
        "no strength can be named, since a: the policy gains -0.2 ± 0.039 where +0.5 is asked, so no strength" in wrong
    )
    bounded = verdict(policy(0.2), [Demand("a", 0.5)], predicted_kl=0.26, max_strength=2.0)
    assert bounded.endswith("above strength.max = 2.")
    few = verdict(policy(0.2, num_prompts=20), [Demand("a", 0.5)], predicted_kl=0.26)
    assert "since validation table: 20 prompts" in few


def test_without_constraints() -> None:
    assert verdict(policy(), [], predicted_kl=0.2) == "Arrived: no margin is asked for, at KL 0.1 (0.2 predicted)."


def test_an_estimate_is_a_line() -> None:
    line = estimate_line(policy(0.239, -0.0001, direction=0.64), [Demand("a", 0.5)])
    assert line == ("a +0.24 ± 0.04 of +0.50, b +0.00 ± 0.04, reward +0.10, KL 0.10, length 0.36, direction 0.64")
