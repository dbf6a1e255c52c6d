"""What must not change, and what must change in a known way (docs/dual.md, the mathematics), on generated tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from can_dist import dual
from can_dist.dual import DualSolution, Margin, ScoreTable, Status, evaluate, partial_sums, predict

solve_dual = partial(dual.solve_dual, estimator="empirical")  # the paper's, which has closed forms

FAST = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class World:
    reward: np.ndarray
    utility: np.ndarray
    prompt: np.ndarray
    beta: float
    margin: np.ndarray

    def solve(self, *, throw: bool = True) -> DualSolution:
        constraints = [Margin(f"c{j}", float(b)) for j, b in enumerate(self.margin)]
        return solve_dual(self.reward, self.utility, self.prompt, beta=self.beta, constraints=constraints, throw=throw)

    def table(self) -> ScoreTable:
        return ScoreTable.build(self.reward, self.utility, self.prompt)


@st.composite
def worlds(draw: st.DrawFn, max_constraints: int = 3, fraction: float = 0.8) -> World:
    """Draw ragged tables whose margins a random policy meets, so that λ* is finite and well determined."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_constraints = draw(st.integers(1, max_constraints))
    num_prompts = draw(st.integers(3, 12))
    counts = generator.integers(2, 8, size=num_prompts)
    prompt = np.repeat(np.arange(num_prompts), counts)
    mixing = generator.normal(size=(num_constraints + 1, num_constraints + 1))
    score = generator.normal(size=(prompt.size, num_constraints + 1)) @ mixing
    weight = generator.exponential(size=prompt.size)
    share = weight / np.bincount(prompt, weight)[prompt] - 1 / counts[prompt]
    gain = share @ score[:, 1:] / num_prompts
    margin = np.where(gain > 0, fraction * gain, gain - 0.1)
    return World(score[:, 0], score[:, 1:], prompt, draw(st.sampled_from([0.3, 1.0, 4.0])), margin)


def same(first: DualSolution, second: DualSolution, scale: float = 1.0) -> None:
    assert second.lam_vector == pytest.approx(first.lam_vector * scale, rel=1e-8, abs=1e-8 * max(scale, 1e-8))


@FAST
@given(worlds(), st.integers(0, 2**32 - 1))
def test_permuting_rows(world: World, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(world.prompt.size)
    moved = replace(world, reward=world.reward[order], utility=world.utility[order], prompt=world.prompt[order])
    same(world.solve(), moved.solve())
    table = moved.table()
    assert np.array_equal(world.prompt[order][table.order_N], np.sort(world.prompt))
    assert table.reward_N + table.mean_reward_P[table.row_prompt_N] == pytest.approx(moved.reward[table.order_N])


@FAST
@given(worlds(), st.integers(0, 2**32 - 1))
def test_renaming_prompts(world: World, seed: int) -> None:
    names = np.random.default_rng(seed).permutation(world.prompt.max() + 1)
    renamed = replace(world, prompt=np.array([f"p{names[i]}" for i in world.prompt]))
    same(world.solve(), renamed.solve())


@FAST
@given(worlds())
def test_duplicating_every_row(world: World) -> None:
    doubled = replace(
        world,
        reward=np.tile(world.reward, 2),
        utility=np.tile(world.utility, (2, 1)),
        prompt=np.tile(world.prompt, 2),
    )
    first, second = world.solve(), doubled.solve()
    same(first, second)
    assert second.value == pytest.approx(first.value, abs=1e-10)
    assert second.predicted["kl"] == pytest.approx(first.predicted["kl"], abs=1e-8)


@FAST
@given(worlds())
def test_repeating_every_prompt(world: World) -> None:
    again = replace(
        world,
        reward=np.tile(world.reward, 2),
        utility=np.tile(world.utility, (2, 1)),
        prompt=np.concatenate([world.prompt, world.prompt + 1000]),
    )
    same(world.solve(), again.solve())


@FAST
@given(worlds(), st.integers(0, 2**32 - 1))
def test_shifting_by_a_function_of_the_prompt(world: World, seed: int) -> None:
    generator = np.random.default_rng(seed)
    shift_r = generator.normal(scale=100, size=world.prompt.max() + 1)[world.prompt]
    shift_g = generator.normal(scale=100, size=(world.prompt.max() + 1, world.margin.size))[world.prompt]
    shifted = replace(world, reward=world.reward + shift_r, utility=world.utility + shift_g)
    same(world.solve(), shifted.solve())


@FAST
@given(worlds(), st.floats(1e-6, 1e6))
def test_scaling_everything(world: World, scale: float) -> None:
    scaled = replace(
        world,
        reward=world.reward * scale,
        utility=world.utility * scale,
        margin=world.margin * scale,
        beta=world.beta * scale,
    )
    same(world.solve(), scaled.solve())


@FAST
@given(worlds(), st.floats(1e-6, 1e6))
def test_scaling_the_utilities(world: World, scale: float) -> None:
    scaled = replace(world, utility=world.utility * scale, margin=world.margin * scale)
    first, second = world.solve(), scaled.solve()
    assert second.lam_vector * scale == pytest.approx(first.lam_vector, rel=1e-8, abs=1e-8)
    assert np.array(list(second.lam_se.values())) * scale == pytest.approx(
        np.array(list(first.lam_se.values())), rel=1e-6, nan_ok=True
    )


@FAST
@given(worlds(max_constraints=3), st.integers(-20, 20))
def test_scaling_one_utility_of_several(world: World, power: int) -> None:
    scale_J = np.append(2.0**power, np.ones(world.margin.size - 1))
    scaled = replace(world, utility=world.utility * scale_J, margin=world.margin * scale_J)
    assert scaled.solve().lam_vector * scale_J == pytest.approx(world.solve().lam_vector, rel=1e-8, abs=1e-8)


@FAST
@given(worlds(), st.integers(0, 2**32 - 1))
def test_convexity(world: World, seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.exponential(size=(2, world.margin.size))
    share = generator.uniform()
    table = world.table()
    value = [
        evaluate(table, lam, world.beta, world.margin).value
        for lam in (first, second, share * first + (1 - share) * second)
    ]
    assert value[2] <= share * value[0] + (1 - share) * value[1] + 1e-12 * (1 + abs(value[0]) + abs(value[1]))
    hessian = evaluate(table, first, world.beta, world.margin).hessian_JJ
    assert np.linalg.eigvalsh(hessian).min() >= -1e-12 * np.trace(hessian)


@FAST
@given(worlds(max_constraints=1))
def test_improvement_grows_with_lambda(world: World) -> None:
    table = world.table()
    improvement = [predict(table, [lam], world.beta, [0.0]).improvement_J[0] for lam in np.linspace(0, 10, 25)]
    assert (np.diff(improvement) >= -1e-12).all()
    assert improvement[-1] > improvement[0]


@FAST
@given(worlds(max_constraints=1))
def test_lambda_grows_and_the_primal_value_is_concave_in_the_margin(world: World) -> None:
    # a reward that opposes the utility, so that the constraint binds within the range of margins
    world = replace(world, reward=world.reward - 5 * world.utility[:, 0] * np.std(world.reward) / np.std(world.utility))
    attainable = world.solve().feasibility["attainable"]["c0"]
    margins = np.linspace(-0.5 * attainable, 0.95 * attainable, 12)
    solutions = [replace(world, margin=np.array([b])).solve() for b in margins]
    lam = np.array([solution.lam["c0"] for solution in solutions])
    value = np.array([solution.predicted["objective"] for solution in solutions])
    assert (np.diff(lam) >= -1e-9).all()
    assert lam[-1] > 0
    slope = np.diff(value) / np.diff(margins)
    assert (slope <= -lam[:-1] + 1e-7).all()
    assert (slope >= -lam[1:] - 1e-7).all()


@FAST
@given(worlds(max_constraints=2))
def test_shadow_price(world: World) -> None:
    """dP*/db_j = −λ*_j, by central differences."""
    step, lam = 1e-5, world.solve().lam_vector
    for j in range(world.margin.size):
        shift = step * np.eye(world.margin.size)[j]
        up = replace(world, margin=world.margin + shift).solve().predicted["objective"]
        down = replace(world, margin=world.margin - shift).solve().predicted["objective"]
        assert (up - down) / (2 * step) == pytest.approx(-lam[j], abs=2e-4 * (1 + lam[j]))


@FAST
@given(worlds())
def test_no_duality_gap_and_complementarity(world: World) -> None:
    solution = world.solve()
    slack = np.array(list(solution.slack.values()))
    assert solution.predicted["objective"] == pytest.approx(solution.value, abs=1e-8)
    assert (slack >= -1e-8).all()
    assert solution.lam_vector @ slack == pytest.approx(0.0, abs=1e-8)
    assert (solution.lam_vector >= 0).all()
    assert solution.kkt_residual <= 1e-8
    zero = solution.lam_vector == 0
    errors = np.array(list(solution.lam_se.values()))
    assert np.isnan(errors[zero]).all()
    assert (errors[~zero] > 0).all()


@FAST
@given(worlds(), st.floats(1e-3, 1e3))
def test_bounds_of_ess_and_kl(world: World, beta: float) -> None:
    table = world.table()
    lam = np.ones(world.margin.size)
    prediction = predict(table, lam, beta, world.margin)
    assert (prediction.ess_P >= 1 - 1e-12).all()
    assert (prediction.ess_P <= table.num_responses_P * (1 + 1e-12)).all()
    assert (prediction.kl_P >= 0).all()
    assert (prediction.kl_P <= np.log(table.num_responses_P) + 1e-12).all()


@FAST
@given(worlds(), st.integers(0, 2**32 - 1))
def test_partial_sums_add(world: World, seed: int) -> None:
    """Sums over two sets of prompts are the sums over both: what streaming and Ray tasks rely on."""
    chosen = np.random.default_rng(seed).permutation(world.prompt.max() + 1) < 2
    rows = chosen[world.prompt]
    parts = [
        partial_sums(ScoreTable.build(world.reward[mask], world.utility[mask], world.prompt[mask]), world.margin, 0.7)
        for mask in (rows, ~rows)
    ]
    total = (parts[0] + parts[1]).evaluation(world.margin, 0.7, world.margin)
    whole = evaluate(world.table(), world.margin, 0.7, world.margin)
    assert total.value == pytest.approx(whole.value, abs=1e-12)
    assert total.gradient_J == pytest.approx(whole.gradient_J, abs=1e-12)
    assert total.hessian_JJ == pytest.approx(whole.hessian_JJ, abs=1e-12)


@FAST
@given(worlds(), st.sampled_from([1e2, 1e4, 1e6]))
def test_f30_frozen_scores_converge(world: World, size: float) -> None:
    """|score|/β up to 1e6: the dual is nearly piecewise linear, yet the KKT residual is met without overflow."""
    cold = replace(world, beta=1.0 / size)
    with np.errstate(all="raise", under="ignore"):
        solution = cold.solve()
    assert solution.status is Status.OPTIMAL
    assert solution.kkt_residual <= 1e-8
    assert all(slack >= -1e-7 for slack in solution.slack.values())
    assert math.isfinite(solution.predicted["kl"])


def test_frozen_scores_take_few_steps() -> None:
    """Cooling the softmax to β keeps Newton fast where the dual is nearly piecewise linear: 37 steps, 66 without."""
    steps = 0
    for seed in (0, 1):
        score = np.random.default_rng(seed).normal(size=(200 * 16, 6))
        constraints = [Margin(f"c{j}", float(b)) for j, b in enumerate(np.linspace(0.5, 1, 5) / math.sqrt(5))]
        prompt = np.repeat(np.arange(200), 16)
        steps += solve_dual(score[:, 0], score[:, 1:], prompt, beta=1e-6, constraints=constraints).num_steps
    assert steps <= 50


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0])
@pytest.mark.parametrize(
    ("margin", "status"), [(-0.2, Status.OPTIMAL), (0.0, Status.OPTIMAL), (0.2, Status.INFEASIBLE)]
)
@pytest.mark.parametrize("single", [False, True])
def test_no_information(constant: float, margin: float, status: Status, single: bool) -> None:
    """K = 1, or a utility that never varies within a prompt."""
    prompt = np.arange(6) if single else np.repeat([0, 1], 3)
    utility = np.arange(6) + 0.1 if single else np.full(6, constant)
    solution = solve_dual(np.arange(6.0), utility, prompt, beta=0.5, constraints=[Margin("g", margin)], throw=False)
    assert solution.status is status
    assert solution.feasibility["attainable"]["g"] == 0.0
    if status is Status.OPTIMAL:
        assert solution.lam == {"g": 0.0}
        assert solution.slack["g"] == -margin


def test_f19_constant_utility_beside_an_informative_one() -> None:
    generator = np.random.default_rng(0)
    prompt = np.repeat(np.arange(10), 5)
    reward, utility = generator.normal(size=(2, 50))
    alone = solve_dual(reward, utility, prompt, beta=1.0, constraints=[Margin("g", 0.4)])
    both = np.stack([np.full(50, 7.0), utility], axis=1)
    beside = solve_dual(reward, both, prompt, beta=1.0, constraints=[Margin("flat", -1.0), Margin("g", 0.4)])
    assert beside.lam["flat"] == 0.0
    assert beside.lam["g"] == pytest.approx(alone.lam["g"], rel=1e-12)
    assert beside.feasibility["t_star"] == pytest.approx(min(alone.feasibility["t_star"], 1.0))
    blocked = solve_dual(
        reward, both, prompt, beta=1.0, constraints=[Margin("flat", 0.5), Margin("g", 0.4)], throw=False
    )
    assert blocked.status is Status.INFEASIBLE
    assert blocked.feasibility["certificate"] == {"flat": 1.0, "g": 0.0}
    assert blocked.feasibility["t_star"] == -0.5


def test_equality_as_two_inequalities() -> None:
    """g ≥ b and −g ≥ −b: no interior point, and λ only up to a common shift, but the policy is the exact one."""
    generator = np.random.default_rng(1)
    prompt = np.repeat(np.arange(10), 5)
    reward, utility = generator.normal(size=(2, 50))
    reward = reward + 2 * utility
    constraints = [Margin("up", 0.2), Margin("down", -0.2)]
    solution = solve_dual(reward, np.stack([utility, -utility], axis=1), prompt, beta=1.0, constraints=constraints)
    assert solution.status is Status.OPTIMAL
    assert solution.predicted["improvement"]["up"]["mean"] == pytest.approx(0.2, abs=1e-8)
    assert solution.lam["down"] > solution.lam["up"]


def test_a_margin_close_to_the_attainable_still_converges() -> None:
    generator = np.random.default_rng(2)
    prompt = np.repeat(np.arange(10), 5)
    reward, first, second = generator.normal(size=(3, 50))
    for columns in (first[:, None], np.stack([first, second], axis=1)):
        constraints = [Margin("a", 0.0), Margin("b", -5.0)][: columns.shape[1]]
        attainable = solve_dual(reward, columns, prompt, beta=0.1, constraints=constraints).feasibility["attainable"]
        for gap in (1e-2, 1e-4, 1e-6):
            close = [Margin("a", attainable["a"] - gap), *constraints[1:]]
            solution = solve_dual(reward, columns, prompt, beta=0.1, constraints=close)
            assert solution.status is Status.OPTIMAL
            assert solution.kkt_residual <= 1e-8


def test_no_constraint() -> None:
    solution = solve_dual([0.0, 1.0], np.zeros((2, 0)), ["a", "a"], beta=1.0, constraints=[])
    assert solution.lam == {}
    assert solution.status is Status.OPTIMAL
    assert solution.predicted["reward"] == pytest.approx(math.e / (1 + math.e))
    assert solution.value == pytest.approx(math.log((1 + math.e) / 2))
    assert solution.to_dict()["feasibility"]["t_star"] is None
