"""The ray of one training: the linear law at every strength, as far as the largest margin and half of it again."""

from __future__ import annotations

import numpy as np
import pytest
from policy_world import estimate

from can_dist.dual import Demand
from can_dist.measuring.ray import NUM_POINTS, ray


def test_gains_grow_as_the_strength_and_kl_as_its_square() -> None:
    found = ray(estimate(0.25, 0.4, kl=0.1), [Demand("a", 0.5), Demand("b", 0.2)])
    alpha = np.array(found["alpha"])
    assert (alpha[0], alpha[-1], len(alpha)) == (0.0, pytest.approx(1.5 * 0.5 / 0.25), NUM_POINTS)
    assert found["improvement"]["a"] == pytest.approx(alpha * 0.25)
    assert found["improvement"]["b"] == pytest.approx(alpha * 0.4)
    assert found["reward_improvement"] == pytest.approx(alpha * 0.1)
    assert found["kl"] == pytest.approx(alpha**2 * 0.1)
    assert all(low <= kl <= high for low, kl, high in zip(found["kl_low"], found["kl"], found["kl_high"], strict=True))


@pytest.mark.parametrize(("gain", "margin"), [(-0.2, 0.5), (0.0, 0.5), (0.25, 0.0), (0.25, 0.01)])
def test_ray_goes_at_least_to_the_policy_as_trained(gain: float, margin: float) -> None:
    assert ray(estimate(gain), [Demand("a", margin)])["alpha"][-1] == 1.0
