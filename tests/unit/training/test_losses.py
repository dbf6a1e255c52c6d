"""The losses: values and gradients against plain float64 arithmetic, minimisers in a world that can be enumerated."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import enumerable_world as world
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from can_dist.modeling.packs import Pack
from can_dist.training import objective
from can_dist.training.batches import Batch, Example, Slot, collate
from can_dist.training.losses import agreement, example_losses, implicit_margin, sigmoid_loss

BETA = 0.5


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def all_real(ratio_BN: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ratio_BN, dtype=torch.bool)


# ------------------------------------------------------------------------------------- the definitions, one by one


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def exact_sigmoid(z: float, p: float) -> float:
    """−p ln σ(z) − (1−p) ln σ(−z), from ln(1 + e^x) in float64."""
    return p * softplus(-z) + (1 - p) * softplus(z)


def exact(name: str, ratios: list[float], targets: list[float], beta: float) -> float:
    """The loss of one example by its definition."""
    if name == "listwise":
        total = sum(math.exp(ratio) for ratio in ratios)
        return -sum(t * math.log(math.exp(ratio) / total) for t, ratio in zip(targets, ratios, strict=True))
    if name in ("pairwise", "regression"):
        pairs = [
            (beta * (ratios[a] - ratios[b]), targets[a] - targets[b]) for a, b in combinations(range(len(ratios)), 2)
        ]
        if name == "regression":
            return sum((z - gap) ** 2 for z, gap in pairs) / len(pairs)
        return sum(exact_sigmoid(z, 1 / (1 + math.exp(-gap))) for z, gap in pairs) / len(pairs)
    z = beta * (ratios[0] - ratios[1])
    if name == "sigmoid":
        return exact_sigmoid(z, targets[0])
    if name == "offset":  # −ln σ(z_w − Δ)
        return softplus((max(targets) - 1) - (z if targets[0] else -z))
    if name == "clipped":  # PPO's, a response as one action
        gains = [
            min(math.exp(r) * a, min(max(math.exp(r), 0.8), 1.2) * a) for r, a in zip(ratios, targets, strict=True)
        ]
        return -sum(gains) / len(gains)
    return 1 - 1 / (1 + math.exp(-z if targets[0] else z))


EXAMPLES = {
    "sigmoid": ([[0.3, -1.2], [-2.0, 0.5]], [[0.8, 0.2], [0.0, 1.0]]),
    "pairwise": ([[0.3, -1.2, 2.0, 0.1], [-2.0, 0.5, 0.0, 1.0]], [[3.0, -1.0, 0.5, 40.0], [0.2, 0.7, -3.0, 0.0]]),
    "regression": ([[0.3, -1.2, 2.0], [-2.0, 0.5, 1.0]], [[3.0, -1.0, 0.0], [0.2, 0.7, 0.2]]),
    "listwise": ([[0.3, -1.2, 2.0, 0.1], [-2.0, 0.5, 0.0, 1.0]], [[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01]]),
    "kto": ([[0.3, 0.1], [-2.0, 0.1]], [[1.0, 0.0], [0.0, 1.0]]),
    "offset": ([[0.3, -1.2], [-2.0, 0.5], [4.0, -4.0]], [[1.0, 0.0], [0.0, 3.5], [3.5, 0.0]]),
    # inside the bounds; above and below them where more would earn, and where it would cost
    "clipped": (
        [[0.1, -0.1, 0.05], [0.5, -0.5, 0.0], [0.5, -0.5, 0.0]],
        [[1.0, -2.0, 1.0], [1.0, -2.0, 1.0], [-1.0, 3.0, -2.0]],
    ),
}


@pytest.mark.parametrize("name", ["sigmoid", "pairwise", "regression", "listwise", "kto", "offset", "clipped"])
def test_value_and_gradient_are_those_of_the_definition(name: str) -> None:
    ratios, targets = EXAMPLES[name]
    ratio_BN = tensor(ratios).requires_grad_()
    loss_B = example_losses(name, ratio_BN, tensor(targets), all_real(ratio_BN), BETA)
    assert loss_B.tolist() == pytest.approx([exact(name, *row, BETA) for row in zip(ratios, targets, strict=True)])
    loss_B.sum().backward()
    step = 1e-6
    for b, (row, target) in enumerate(zip(ratios, targets, strict=True)):
        for n in range(len(row)):
            ahead, behind = ([*row[:n], row[n] + sign * step, *row[n + 1 :]] for sign in (1, -1))
            slope = (exact(name, ahead, target, BETA) - exact(name, behind, target, BETA)) / (2 * step)
            assert ratio_BN.grad[b, n].item() == pytest.approx(slope, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sigmoid", [math.log(2)] * 2),
        ("pairwise", [math.log(2)] * 2),
        ("regression", [26 / 3, 0.5 / 3]),
        ("listwise", [math.log(4)] * 2),
        ("kto", [0.5] * 2),
        ("offset", [math.log(2), *[math.log(1 + math.exp(2.5))] * 2]),
        ("clipped", [0.0] * 3),
    ],
)
def test_loss_of_the_reference_itself(name: str, expected: list[float]) -> None:
    ratios, targets = EXAMPLES[name]
    zeros = torch.zeros_like(tensor(ratios))
    assert example_losses(name, zeros, tensor(targets), all_real(zeros), BETA).tolist() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------------- sigmoid


@given(st.floats(-50, 50), st.floats(0, 1))
@example(0.0, 0.5)
@example(1e4, 0.0)
@example(-1e4, 1.0)
def test_sigmoid_loss_is_the_cross_entropy_and_its_gradient_sigma_minus_p(z: float, p: float) -> None:
    margin = tensor([z]).requires_grad_()
    loss = sigmoid_loss(margin, tensor([p]))
    assert loss.item() == pytest.approx(exact_sigmoid(z, p), rel=1e-12, abs=1e-300)
    loss.sum().backward()
    sigma = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
    assert margin.grad.item() == pytest.approx(sigma - p, abs=1e-12)


@given(st.floats(0.01, 0.99), st.floats(0.01, 5))
def test_sigmoid_loss_is_least_where_the_margin_is_the_score_gap(p: float, away: float) -> None:
    best = math.log(p / (1 - p))
    below, at, above = sigmoid_loss(tensor([best - away, best, best + away]), tensor([p] * 3))
    assert at < below
    assert at < above
    assert at.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-12)


def test_sigmoid_loss_does_not_overflow_in_float32() -> None:
    margin = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = sigmoid_loss(margin, torch.tensor([0.0, 1.0, 1.0, 0.5]))
    assert loss.tolist() == [1e4, 1e4, 0.0, 5e3]
    loss.sum().backward()
    assert margin.grad.tolist() == [1.0, -1.0, 0.0, -0.5]


def test_margin_is_beta_times_the_difference_of_log_ratios() -> None:
    assert implicit_margin(tensor([[1.0, 2.0]]), beta=0.1).item() == pytest.approx(-0.1)


# ----------------------------------------------------------------------------------------- lists, and what is shown


@pytest.mark.parametrize("name", ["pairwise", "regression", "listwise"])
@given(st.lists(st.tuples(st.floats(-30, 30), st.floats(0.01, 1)), min_size=2, max_size=6), st.integers(0, 4))
def test_padding_of_a_list_changes_nothing(name: str, responses: list[tuple[float, float]], num_padding: int) -> None:
    ratios, weights = (list(column) for column in zip(*responses, strict=True))
    target = [weight / sum(weights) for weight in weights]
    padding = [0.0] * num_padding
    ratio_BN = tensor([ratios + padding]).requires_grad_()
    is_real_BN = torch.tensor([[True] * len(ratios) + [False] * num_padding])
    loss = example_losses(name, ratio_BN, tensor([target + padding]), is_real_BN, BETA)
    assert loss.item() == pytest.approx(exact(name, ratios, target, BETA), rel=1e-9, abs=1e-12)
    loss.sum().backward()
    assert not ratio_BN.grad[0, len(ratios) :].any()
    shown = agreement(ratio_BN, tensor([target + padding]), is_real_BN, BETA)
    alone = agreement(tensor([ratios]), tensor([target]), all_real(tensor([ratios])), BETA)
    torch.testing.assert_close(shown, alone)


def test_agreement_counts_pairs_in_the_direction_of_the_target() -> None:
    ratio_BN = tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    accuracy, margin = agreement(ratio_BN, tensor([[0.7, 0.3]] * 3), all_real(ratio_BN), BETA)
    assert (accuracy.tolist(), margin.tolist()) == ([1.0, 0.0, 0.5], [1.0, -1.0, 0.0])
    ratio_BN = tensor([[3.0, 1.0, 2.0]])  # of the three pairs one, the last two, is the wrong way
    accuracy, margin = agreement(ratio_BN, tensor([[0.5, 0.3, 0.2]]), all_real(ratio_BN), BETA)
    assert accuracy.item() == pytest.approx(2 / 3)
    assert margin.item() == pytest.approx(BETA * (2 + 1 - 1) / 3)


# ------------------------------------------------------------------------------------------------------ minimisers

REF_PK = np.random.default_rng(5).dirichlet(np.ones(64), size=3)


def minimise(loss_of: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Return the policy, (3, 64), whose log-ratios have the least loss; its logits are free."""
    logit_PK = tensor(np.log(REF_PK)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logit_PK], max_iter=5000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(logit_PK.log_softmax(dim=1) - tensor(np.log(REF_PK)))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logit_PK.detach().softmax(dim=1).numpy()


@pytest.mark.parametrize("name", ["sigmoid", "pairwise", "regression", "listwise"])
def test_minimiser_is_the_optimum_of_the_constrained_problem(name: str) -> None:
    lam, optimum_PK = world.optimal_policy(REF_PK, [world.HARMLESS_PK], [0.6], BETA)
    score_PK = tensor(world.REWARD_PK + lam[0] * world.HARMLESS_PK)
    first, second = (torch.tensor(side) for side in zip(*combinations(range(64), 2), strict=True))

    def pairs(table_PK: torch.Tensor) -> torch.Tensor:
        return torch.stack([table_PK[:, first].flatten(), table_PK[:, second].flatten()], dim=1)

    gap_B = implicit_margin(pairs(score_PK), 1.0)
    target_BN, form = {
        "sigmoid": (torch.stack([gap_B.sigmoid(), 1 - gap_B.sigmoid()], 1), pairs),
        "pairwise": (score_PK, lambda ratio_PK: ratio_PK),
        "regression": (score_PK, lambda ratio_PK: ratio_PK),
        "listwise": ((score_PK / BETA).softmax(dim=1), lambda ratio_PK: ratio_PK),
    }[name]
    policy_PK = minimise(
        lambda ratio_PK: example_losses(name, form(ratio_PK), target_BN, all_real(target_BN), BETA).mean()
    )
    assert world.kl(REF_PK, optimum_PK) > 0.1
    assert world.kl(policy_PK, optimum_PK) < 1e-7
    assert world.gain(policy_PK, REF_PK, world.HARMLESS_PK) == pytest.approx(0.6, abs=1e-4)


def test_minimiser_of_sampled_labels_is_the_policy_of_the_rewards_that_fit_the_draws() -> None:
    """The paper's labels, one draw per pair: π* only as far as the draws tell the scores."""
    beta = 2.0  # score gaps of a few β: a draw per pair can tell them
    first, second = (np.array(side) for side in zip(*combinations(range(64), 2), strict=True))
    row_V = np.repeat(np.arange(3), len(first))
    a_V, b_V = np.tile(first, 3), np.tile(second, 3)
    gap_V = world.REWARD_PK[row_V, a_V] - world.REWARD_PK[row_V, b_V]
    drawn_V = (np.random.default_rng(0).random(len(gap_V)) < 1 / (1 + np.exp(-gap_V))).astype(float)
    target_V2 = tensor(np.stack([drawn_V, 1 - drawn_V], axis=1))

    def ratios(ratio_PK: torch.Tensor) -> torch.Tensor:
        return torch.stack([ratio_PK[row_V, a_V], ratio_PK[row_V, b_V]], dim=1)

    policy_PK = minimise(
        lambda ratio_PK: example_losses("sigmoid", ratios(ratio_PK), target_V2, all_real(target_V2), beta).mean()
    )
    own_PK = world.people_policy(REF_PK, row_V, a_V, b_V, drawn_V, beta)
    optimum_PK = REF_PK * np.exp(world.REWARD_PK / beta)
    optimum_PK /= optimum_PK.sum(axis=1, keepdims=True)
    assert world.kl(policy_PK, own_PK) < 1e-7
    assert 1e-3 < world.kl(own_PK, optimum_PK) < 0.1  # the noise of the draws
    assert world.kl(REF_PK, optimum_PK) > 0.1


def test_smoothed_labels_bound_the_margin() -> None:
    """People always prefer one of two responses: the minimiser is z = ln((1 − ε)/ε), not infinity."""
    smoothing = 0.1
    best = math.log((1 - smoothing) / smoothing)
    margin = tensor([best]).requires_grad_()
    sigmoid_loss(margin, tensor([1 - smoothing])).sum().backward()
    assert margin.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 2.0)])
def test_kto_moves_to_the_responses_that_are_more_often_desirable(weights: tuple[float, float]) -> None:
    """Its expected loss is linear in σ(z), so the minimiser holds what has λ_D P(desirable) > λ_U P(undesirable)."""
    desirable_PK = tensor(world.REWARD_PK).sigmoid()
    gain_PK, loss_PK = weights[0] * desirable_PK, weights[1] * (1 - desirable_PK)
    logit_PK = tensor(np.log(REF_PK)).requires_grad_()
    optimizer = torch.optim.Adam([logit_PK], lr=0.05)
    for _ in range(1500):
        logp_PK = logit_PK.log_softmax(dim=1)
        ratio_PK = logp_PK - tensor(np.log(REF_PK))
        baseline = (logp_PK.exp() * ratio_PK).sum(dim=1).mean().detach().clamp(min=0)
        ratio_B2 = torch.stack([ratio_PK.flatten(), baseline.expand(ratio_PK.numel())], dim=1)
        total = torch.zeros((), dtype=torch.float64)
        for target, weight_PK in (((1.0, 0.0), gain_PK), ((0.0, 1.0), loss_PK)):
            target_B2 = tensor([target]).expand(len(ratio_B2), 2)
            loss_B = example_losses("kto", ratio_B2, target_B2, all_real(ratio_B2), BETA)
            total = total + (loss_B * (weight_PK * tensor(REF_PK)).flatten()).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    policy_PK, wanted_PK = logit_PK.detach().softmax(dim=1), gain_PK > loss_PK
    assert 0.1 < (tensor(REF_PK) * wanted_PK).sum(dim=1).mean() < 0.7
    assert (policy_PK * wanted_PK).sum(dim=1).min() > 0.98


# ------------------------------------------------------------------------------------------------- of a micro-batch


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective.dist, "all_reduce", lambda tensor: None)


def model(pack: Pack) -> torch.Tensor:
    """A model whose log-probability of a response is its first token, less 100."""
    first_R = pack.num_targets_R.cumsum(0) - pack.num_targets_R
    return pack.targets_N[first_R].float() - 100


def slot(logp: list[int], ref: list[float], target: list[float], weight: float = 1.0, share: float = 1.0) -> Slot:
    return Slot(Example("e", [0], [[value + 100, 7] for value in logp], ref, target, weight), share)


def of(slots: list[Slot], only: int | None = None) -> Batch:
    kept = slots if only is None else [Slot(one.example.only(only), one.share) for one in slots]
    return collate(kept, "shared")


def metrics_of(sums: torch.Tensor) -> dict[str, float]:
    *totals, count = sums.tolist()
    return {name: total / count for name, total in zip(objective.METRIC_NAMES, totals, strict=True)}


def test_lists_of_different_lengths_share_a_pack_and_fillers_do_not_count() -> None:
    lists = [([-1, -2, -3], [-1.5, -2.0, -2.0], [0.5, 0.3, 0.2]), ([-4, -1], [-4.0, -2.0], [0.1, 0.9])]
    slots = [slot(*lists[0], weight=2.0), slot(*lists[1]), slot([-9, -1], [0.0, 0.0], [1.0, 0.0], share=0.0)]
    loss_B, sums = objective.pack_losses(model, of(slots), loss="listwise", beta=BETA, baseline=None)
    ratios = [[a - b for a, b in zip(logp, ref, strict=True)] for logp, ref, _ in lists]
    expected = [exact("listwise", ratio, target, BETA) for ratio, (_, _, target) in zip(ratios, lists, strict=True)]
    assert loss_B.tolist() == pytest.approx([2 * expected[0], expected[1], 0.0], rel=1e-5)
    assert sums[-1] == 2
    shown = metrics_of(sums)
    assert shown["loss"] == pytest.approx((2 * expected[0] + expected[1]) / 2, rel=1e-5)
    assert shown["reference_loss"] == pytest.approx((2 * math.log(3) + math.log(2)) / 2, rel=1e-5)
    kl = [np.mean([math.exp(x) - 1 - x for x in ratio]) for ratio in ratios]
    assert shown["fit_kl"] == pytest.approx(np.mean(kl), rel=1e-5)


def test_kto_compares_the_own_response_with_the_baseline_of_the_others() -> None:
    good = slot([-1, -5], [-2.0, -6.0], [1.0, 0.0], weight=1.5)
    bad = slot([-3, -7], [-3.5, -7.4], [0.0, 1.0], weight=0.5)
    filler = slot([0, 9], [0.0, 0.0], [1.0, 0.0], share=0.0)
    baseline = objective.kto_baseline(model, [of([good], 1), of([bad, filler], 1)], "cpu")
    assert baseline.item() == pytest.approx((1.0 + 0.4) / 2)
    loss_B, sums = objective.pack_losses(model, of([good, bad], 0), loss="kto", beta=BETA, baseline=baseline)
    z_good, z_bad = BETA * (1.0 - 0.7), BETA * (0.5 - 0.7)
    expected = [1.5 * (1 - 1 / (1 + math.exp(-z_good))), 0.5 * (1 - 1 / (1 + math.exp(z_bad)))]
    assert loss_B.tolist() == pytest.approx(expected, rel=1e-5)
    assert metrics_of(sums)["fit_accuracy"] == 1.0
    assert metrics_of(sums)["reference_loss"] == pytest.approx(0.5)
    assert metrics_of(sums)["fit_kl"] == pytest.approx((math.e - 2 + math.exp(0.5) - 1.5) / 2, rel=1e-5)


def test_kto_baseline_is_never_below_zero_and_has_no_gradient() -> None:
    baseline = objective.kto_baseline(model, [of([slot([0, -5], [0.0, -4.0], [1.0, 0.0])], 1)], "cpu")
    assert baseline.item() == 0.0
    assert not baseline.requires_grad
