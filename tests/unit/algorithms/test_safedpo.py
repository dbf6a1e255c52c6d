"""SafeDPO where everything is enumerated: its closed form, for every offset, and what an offset does on the way."""

from __future__ import annotations

from itertools import combinations

import enumerable_world as world
import numpy as np
import pytest
import torch

from can_dist.stages.safe_pairs import relabelled, unusable
from can_dist.training.losses import example_losses

BETA = 0.5
REF_PK = np.random.default_rng(5).dirichlet(np.ones(64), size=3)
SAFE_PK = world.HARMLESS_PK >= 0
SHARE = (REF_PK * SAFE_PK).sum(axis=1).mean()


def closed_form() -> np.ndarray:
    """π_ref exp(r/β) on the safe responses, nothing on the others."""
    weight_PK = REF_PK * np.exp(world.REWARD_PK / BETA) * SAFE_PK
    return weight_PK / weight_PK.sum(axis=1, keepdims=True)


def population_loss(offset: float) -> torch.nn.Module:
    """The loss of infinitely many people who prefer as Bradley and Terry say, on every pair of responses."""
    places, targets, weights = [], [], []
    for p in range(3):
        for a, b in combinations(range(64), 2):
            share = 1 / (1 + np.exp(world.REWARD_PK[p, b] - world.REWARD_PK[p, a]))
            for better, weight in ((1, share), (0, 1 - share)):
                first = {"better": better, "safe": int(SAFE_PK[p, a])}
                second = {"better": 1 - better, "safe": int(SAFE_PK[p, b])}
                if not unusable(first, second):
                    places.append((p, a, b))
                    targets.append(relabelled(first, second, offset)[0])
                    weights.append(weight)
    p_V, a_V, b_V = torch.tensor(places).T
    target_V2, weight_V = torch.tensor(targets, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    ref_PK = torch.tensor(np.log(REF_PK))

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit_PK = torch.nn.Parameter(ref_PK.clone())

        def forward(self) -> torch.Tensor:
            ratio_PK = self.logit_PK.log_softmax(dim=1) - ref_PK
            ratio_V2 = torch.stack([ratio_PK[p_V, a_V], ratio_PK[p_V, b_V]], dim=1)
            loss_V = example_losses("offset", ratio_V2, target_V2, torch.ones_like(target_V2, dtype=torch.bool), BETA)
            return (weight_V * loss_V).sum() / weight_V.sum()

        def policy(self) -> np.ndarray:
            return self.logit_PK.detach().softmax(dim=1).numpy()

    return Loss()


@pytest.mark.parametrize("offset", [0.0, 4.0])
def test_the_limit_is_the_closed_form_whatever_the_offset(offset: float) -> None:
    loss = population_loss(offset)
    optimizer = torch.optim.LBFGS(
        loss.parameters(), max_iter=400, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    policy_PK, optimum_PK = loss.policy(), closed_form()
    assert np.abs(optimum_PK - REF_PK).sum(axis=1).min() > 0.5
    assert (policy_PK * ~SAFE_PK).sum(axis=1).max() < 1e-4
    on_safe_PK = np.where(SAFE_PK, policy_PK, 0) / (policy_PK * SAFE_PK).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(on_safe_PK, optimum_PK, atol=2e-3)


def test_an_offset_gets_rid_of_unsafe_responses_sooner_and_keeps_the_order_of_the_safe_ones() -> None:
    """The same number of equal steps: more mass is safe the larger the offset; the rewards order the safe ones."""
    safe_mass = []
    for offset in (0.0, 1.0, 2.0, 4.0):
        loss = population_loss(offset)
        optimizer = torch.optim.SGD(loss.parameters(), lr=100.0)
        for _ in range(20):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        policy_PK = loss.policy()
        safe_mass.append((policy_PK * SAFE_PK).sum(axis=1).mean())
        for p in range(3):
            safe = np.flatnonzero(SAFE_PK[p])
            ratio = np.log(policy_PK[p, safe] / REF_PK[p, safe])
            assert (np.argsort(ratio) == np.argsort(world.REWARD_PK[p, safe])).all()
    print(f"safe mass, from {SHARE:.3f}: {np.round(safe_mass, 4)}")
    assert safe_mass[0] > SHARE + 0.05
    assert (np.diff(safe_mass) > 1e-3).all()
    assert safe_mass[-1] < 1
