"""The dual against closed forms (docs/dual.md, the mathematics) and against an independent solver."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy.optimize import linprog, minimize
from scipy.special import logsumexp, ndtri

from can_dist import dual
from can_dist.dual import (
    DualSolution,
    Evaluation,
    Margin,
    ScoreTable,
    Status,
    dual_curve,
    evaluate,
    predict,
)
from can_dist.dual.newton import _line_search

solve_dual = partial(dual.solve_dual, estimator="empirical")  # the paper's, which has closed forms

REF = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
REWARD = np.array([[1, 0.2, -0.5, 0.7], [0, 1.5, -1, 0.5]])
UTILITY = np.array([[-1, 0.5, 2, -0.3], [1, -2, 0.8, 0.1]])
PROMPT = np.repeat(["a", "b"], 4)


def solve_categorical(beta: float, margin: float) -> DualSolution:
    return solve_dual(
        REWARD.ravel(),
        UTILITY.ravel(),
        PROMPT,
        beta=beta,
        constraints=[Margin("safety", margin)],
        log_weight_N=np.log(REF).ravel(),
    )


class TestGaussian:
    """Oracle 8.1: one prompt whose responses are the nodes of a Gaussian quadrature, K → ∞ in effect."""

    @staticmethod
    def table(covariance: np.ndarray, nodes: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return reward, utility and log weights of a Gaussian with this covariance, first coordinate the reward."""
        point, weight = np.polynomial.hermite_e.hermegauss(nodes)
        size = covariance.shape[0]
        mesh = np.stack(np.meshgrid(*[point] * size, indexing="ij"), axis=-1).reshape(-1, size)
        mass = np.stack(np.meshgrid(*[weight] * size, indexing="ij"), axis=-1).reshape(-1, size).prod(axis=1)
        keep = mass > 1e-300
        score = mesh[keep] @ np.linalg.cholesky(covariance).T
        return score[:, 0], score[:, 1:], np.log(mass[keep])

    @pytest.mark.parametrize(("cross", "margin"), [(-0.3, 0.4), (0.2, 0.9), (0.0, 0.5)])
    def test_one_constraint(self, cross: float, margin: float) -> None:
        sigma_r, sigma_g, beta = 1.1, 0.8, 0.9
        reward, utility, log_weight = self.table(np.array([[sigma_r**2, cross], [cross, sigma_g**2]]))
        solution = solve_dual(
            reward,
            utility,
            np.zeros(reward.size, int),
            beta=beta,
            constraints=[Margin("g", margin)],
            log_weight_N=log_weight,
        )
        lam = max(0.0, (beta * margin - cross) / sigma_g**2)
        assert solution.lam["g"] == pytest.approx(lam, abs=1e-7)
        predicted = solution.predicted
        assert predicted["improvement"]["g"]["mean"] == pytest.approx((cross + lam * sigma_g**2) / beta, abs=1e-7)
        assert predicted["reward_improvement"] == pytest.approx((sigma_r**2 + lam * cross) / beta, abs=1e-7)
        kl = (sigma_r**2 + 2 * cross * lam + lam**2 * sigma_g**2) / (2 * beta**2)
        assert predicted["kl"] == pytest.approx(kl, abs=1e-7)

    def test_correlated_constraints_are_not_clipped(self) -> None:
        """The unconstrained minimiser is (.670732, −.902439): clipping it gives .67, the answer is .4."""
        covariance = np.array([[2.0, -0.2, 0.4], [-0.2, 1.0, 0.3], [0.4, 0.3, 0.5]])
        reward, utility, log_weight = self.table(covariance, nodes=44)
        sigma, cross = covariance[1:, 1:], covariance[1:, 0]
        beta, margin = 0.5, np.array([0.4, 0.3])
        free = np.linalg.solve(sigma, beta * margin - cross)
        assert free == pytest.approx([0.670732, -0.902439], abs=1e-6)
        solution = solve_dual(
            reward,
            utility,
            np.zeros(reward.size, int),
            beta=beta,
            constraints=[Margin("a", 0.4), Margin("b", 0.3)],
            log_weight_N=log_weight,
        )
        assert solution.lam_vector == pytest.approx([0.4, 0.0], abs=1e-6)
        assert solution.lam["b"] == 0.0
        assert solution.slack["a"] == pytest.approx(0.0, abs=1e-9)
        assert solution.slack["b"] == pytest.approx((0.4 + 0.4 * 0.3) / 0.5 - 0.3, abs=1e-5)

    def test_sampled_table_approaches_the_population(self) -> None:
        """Uniform weights, large K: within-prompt normal quantiles in a random pairing."""
        generator = np.random.default_rng(0)
        num_prompts, k = 50, 4000
        grid = ndtri((np.arange(k) + 0.5) / k)
        first = np.concatenate([generator.permutation(grid) for _ in range(num_prompts)])
        second = np.concatenate([generator.permutation(grid) for _ in range(num_prompts)])
        solution = solve_dual(
            first, second, np.repeat(np.arange(num_prompts), k), beta=1.0, constraints=[Margin("g", 0.5)]
        )
        assert solution.lam["g"] == pytest.approx(0.5, abs=0.01)
        assert abs(solution.lam["g"] - 0.5) < 5 * solution.lam_se["g"]


class TestTwoResponses:
    """Oracle 8.2."""

    @pytest.mark.parametrize(("margin", "lam"), [(0.1, 0.7209163761), (0.2, 0.9236489302)])
    def test_lambda(self, margin: float, lam: float) -> None:
        solution = solve_dual(
            [0.0, -0.5],
            [0.0, 1.0],
            ["x", "x"],
            beta=0.5,
            constraints=[Margin("g", margin)],
            log_weight_N=np.log([0.7, 0.3]),
        )
        assert solution.lam["g"] == pytest.approx(lam, abs=5e-11)
        closed = 0.5 * (math.log((0.3 + margin) / (0.7 - margin)) - math.log(0.3 / 0.7)) + 0.5
        assert solution.lam["g"] == pytest.approx(closed, abs=1e-12)

    @pytest.mark.parametrize(
        ("margin", "status"),
        [(0.69, Status.OPTIMAL), (0.7, Status.BOUNDARY), (0.71, Status.INFEASIBLE), (1.0, Status.INFEASIBLE)],
    )
    def test_feasible_up_to_one_minus_p(self, margin: float, status: Status) -> None:
        solution = solve_dual(
            [0.0, -0.5],
            [0.0, 1.0],
            ["x", "x"],
            beta=0.5,
            constraints=[Margin("g", margin)],
            log_weight_N=np.log([0.7, 0.3]),
            throw=False,
        )
        assert solution.status is status
        assert math.isfinite(solution.lam["g"]) is (status is Status.OPTIMAL)


class TestCategorical:
    """Oracle 8.3, to the digits shown."""

    def test_solution(self) -> None:
        solution = solve_categorical(0.5, 1.0)
        assert solution.status is Status.OPTIMAL
        assert solution.centre["safety"] == pytest.approx(0.0475, abs=1e-15)
        assert solution.feasibility["attainable"]["safety"] == pytest.approx(1.4525, abs=1e-14)
        assert solution.lam["safety"] == pytest.approx(1.0232216096, abs=5e-11)
        assert solution.value == pytest.approx(-0.336627, abs=5e-7)
        assert solution.predicted["reward"] == pytest.approx(-0.052566, abs=5e-7)
        assert solution.predicted["kl"] == pytest.approx(0.568121, abs=5e-7)
        assert solution.predicted["objective"] == pytest.approx(solution.value, abs=1e-12)
        assert solve_categorical(0.1, 0.5).lam["safety"] == pytest.approx(0.5506337981, abs=5e-11)

    def test_curvature_and_policy(self) -> None:
        table = ScoreTable.build(REWARD.ravel(), UTILITY.ravel(), PROMPT, np.log(REF).ravel())
        lam = solve_categorical(0.5, 1.0).lam_vector
        assert evaluate(table, lam, 0.5, np.ones(1)).hessian_JJ[0, 0] == pytest.approx(1.223985, abs=5e-7)
        score = (REWARD + lam[0] * UTILITY) / 0.5
        policy = REF * np.exp(score)
        policy /= policy.sum(axis=1, keepdims=True)
        expected = [[0.061051, 0.199077, 0.704782, 0.035090], [0.639335, 0.027691, 0.057463, 0.275512]]
        assert policy == pytest.approx(np.array(expected), abs=5e-7)
        gap = np.log(policy[0, 1] / REF[0, 1]) - np.log(policy[0, 0] / REF[0, 0])
        assert gap == pytest.approx(1.4696648289, abs=5e-11)
        assert 1 / (1 + math.exp(-0.5 * gap)) == pytest.approx(0.6758648156, abs=5e-11)
        ess = predict(table, lam, 0.5, [1.0]).ess_P
        assert ess == pytest.approx(1 / (policy**2).sum(axis=1), rel=1e-12)

    @pytest.mark.parametrize("beta_g", [0.5, 0.2])
    def test_exact_log_ratios_give_the_same_lambda(self, beta_g: float) -> None:
        """PeCAN: r and g replaced by β ln π/π_ref of exactly aligned models; ln Z(x) cancels."""
        reward = REWARD - 0.5 * logsumexp(REWARD / 0.5, b=REF, axis=1, keepdims=True)
        utility = UTILITY - beta_g * logsumexp(UTILITY / beta_g, b=REF, axis=1, keepdims=True)
        solution = solve_dual(
            reward.ravel(),
            utility.ravel(),
            PROMPT,
            beta=0.5,
            constraints=[Margin("safety", 1.0)],
            log_weight_N=np.log(REF).ravel(),
        )
        assert solution.lam["safety"] == pytest.approx(1.0232216096, abs=5e-11)


def random_problem(seed: int, num_constraints: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ragged prompts, correlated utilities, margins that a policy tilted towards a mixture of them meets with room."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 9, size=25)
    prompt = np.repeat(np.arange(25), counts)
    mixing = generator.normal(size=(num_constraints + 1, num_constraints + 1)) + 0.5 * generator.normal()
    score = generator.normal(size=(prompt.size, num_constraints + 1)) @ mixing
    utility = score[:, 1:]
    weight = np.exp((utility / utility.std(axis=0)) @ generator.uniform(0, 1.2, size=num_constraints))
    share = weight / np.bincount(prompt, weight)[prompt] - 1 / counts[prompt]
    gain = share @ utility / 25
    return score[:, 0], utility, prompt, gain - 0.02 * np.abs(gain)


def reference_dual(
    lam: np.ndarray, reward: np.ndarray, utility: np.ndarray, prompt: np.ndarray, beta: float, margin: np.ndarray
) -> tuple[float, np.ndarray]:
    """D(λ) and its gradient by loops, straight from section 1."""
    ids = np.unique(prompt)
    centre = np.mean([utility[prompt == i].mean(axis=0) for i in ids], axis=0)
    shifted = utility - centre - margin
    value, gradient = 0.0, np.zeros(lam.size)
    for i in ids:
        score = (reward[prompt == i] + shifted[prompt == i] @ lam) / beta
        total = logsumexp(score)
        value += beta * (total - math.log(score.size)) / ids.size
        gradient += np.exp(score - total) @ shifted[prompt == i] / ids.size
    return value, gradient


@pytest.mark.parametrize("num_constraints", [1, 2, 3])
@pytest.mark.parametrize("seed", range(8))
def test_against_scipy(seed: int, num_constraints: int) -> None:
    reward, utility, prompt, margin = random_problem(seed, num_constraints)
    beta = [0.3, 1.0, 3.0][seed % 3]
    arguments = (reward, utility, prompt, beta, margin)
    solution = solve_dual(
        reward, utility, prompt, beta=beta, constraints=[Margin(f"c{j}", b) for j, b in enumerate(margin)]
    )
    assert solution.kkt_residual <= 1e-8
    assert solution.value == pytest.approx(reference_dual(solution.lam_vector, *arguments)[0], abs=1e-10)
    best = minimize(
        reference_dual,
        np.full(num_constraints, 0.1),
        args=arguments,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None)] * num_constraints,
        options={"ftol": 1e-16, "gtol": 1e-10, "maxiter": 2000},
    )
    assert solution.value == pytest.approx(best.fun, abs=1e-10)
    assert solution.lam_vector == pytest.approx(best.x, abs=2e-5 * (1 + np.abs(best.x).max()))


def test_random_problems_have_active_bounds() -> None:
    """The comparison above covers λ_j = 0 with a negative unconstrained minimiser, not only interior solutions."""
    at_bound = interior = 0
    for seed in range(8):
        for num_constraints in (2, 3):
            reward, utility, prompt, margin = random_problem(seed, num_constraints)
            constraints = [Margin(f"c{j}", b) for j, b in enumerate(margin)]
            lam = solve_dual(reward, utility, prompt, beta=1.0, constraints=constraints).lam_vector
            at_bound += int((lam == 0).any() and (lam > 0).any())
            interior += int((lam > 0).all())
    assert at_bound >= 3
    assert interior >= 3


@pytest.mark.parametrize("num_constraints", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_t_star_against_the_primal_programme(seed: int, num_constraints: int) -> None:
    """t* = max_w min_j slack_j, a linear programme over policies: solved directly, it is the other side of ours."""
    reward, utility, prompt, margin = random_problem(seed, num_constraints)
    margin = margin * (3.0 if seed % 2 else 1.0) * np.array([1, 50, 0.1, 1])[:num_constraints]
    utility = utility * np.array([1, 50, 0.1, 1])[:num_constraints]
    ids, counts = np.unique(prompt, return_counts=True)
    mean = np.array([utility[prompt == i].mean(axis=0) for i in ids])[prompt]
    gain_NJ = (utility - mean) / ids.size
    size = prompt.size
    result = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.hstack([-gain_NJ.T, np.ones((num_constraints, 1))]),
        b_ub=-margin,
        A_eq=np.hstack([(prompt == ids[:, None]).astype(float), np.zeros((ids.size, 1))]),
        b_eq=np.ones(ids.size),
        bounds=[(0, None)] * size + [(None, None)],
    )
    assert counts.sum() == size
    solution = solve_dual(
        reward,
        utility,
        prompt,
        beta=1.0,
        constraints=[Margin(f"c{j}", b) for j, b in enumerate(margin)],
        throw=False,
    )
    t_star = solution.feasibility["t_star"]
    assert t_star == pytest.approx(-result.fun, abs=1e-7)
    assert solution.status is (Status.OPTIMAL if t_star > 0 else Status.INFEASIBLE)
    certificate = np.array(list(solution.feasibility["certificate"].values()))
    assert certificate.sum() == pytest.approx(1.0)
    assert (certificate >= 0).all()
    support = np.array([((utility - mean)[prompt == i] @ certificate).max() for i in ids]).mean()
    assert support - certificate @ margin == pytest.approx(t_star, abs=1e-9)


def test_line_search_never_raises_the_objective() -> None:
    """A kink near the start: at length 1 the slope has halved, yet the value is above where the search began."""

    def at(lam_J: np.ndarray) -> Evaluation:
        x = (float(lam_J[0]) - 0.05) / 0.01
        value = -float(lam_J[0]) + 1.4 * 0.01 * (np.logaddexp(0, x) - np.logaddexp(0, -5.0))
        share = 1 / (1 + math.exp(-x))
        return Evaluation(value, np.array([1.4 * share - 1]), np.array([[140 * share * (1 - share)]]))

    start, far = at(np.zeros(1)), at(np.ones(1))
    assert abs(far.gradient_J[0]) < 0.5 * abs(start.gradient_J[0])
    assert far.value > start.value
    length, there = _line_search(at, np.zeros(1), np.ones(1), start)
    assert 0 < length < 1
    assert there.value < start.value
    assert abs(there.gradient_J[0]) <= 0.5 * abs(start.gradient_J[0])


def test_standard_error_matches_the_spread_over_tables() -> None:
    """The sandwich SE against the standard deviation of λ̂ over 200 independent tables."""
    generator = np.random.default_rng(1)
    prompt = np.repeat(np.arange(60), 6)
    lams, errors = [], []
    for _ in range(200):
        scale = np.repeat(generator.uniform(0.5, 1.5, size=60), 6)
        reward, utility = generator.normal(size=prompt.size), scale * generator.normal(size=prompt.size)
        solution = solve_dual(reward, utility, prompt, beta=1.5, constraints=[Margin("g", 0.3)])
        lams.append(solution.lam["g"])
        errors.append(solution.lam_se["g"])
    assert np.mean(errors) == pytest.approx(np.std(lams), rel=0.15)


def test_prediction_standard_error_is_paired() -> None:
    generator = np.random.default_rng(2)
    counts = generator.integers(2, 6, size=30)
    prompt = np.repeat(np.arange(30), counts)
    reward, utility = generator.normal(size=(2, prompt.size))
    table = ScoreTable.build(reward, utility, prompt)
    prediction = predict(table, [0.4], 0.7, [0.1])
    gains, rewards, kls = [], [], []
    for i in range(30):
        rows = prompt == i
        score = (reward[rows] + 0.4 * utility[rows]) / 0.7
        weight = np.exp(score - logsumexp(score))
        gains.append(weight @ utility[rows] - utility[rows].mean())
        rewards.append(weight @ reward[rows])
        kls.append(weight @ np.log(weight * rows.sum()))
    assert prediction.slack_PJ[:, 0] == pytest.approx(np.array(gains) - 0.1, abs=1e-12)
    assert prediction.improvement_se_J[0] == pytest.approx(np.std(gains, ddof=1) / math.sqrt(30), rel=1e-10)
    assert prediction.reward == pytest.approx(np.mean(rewards), abs=1e-12)
    assert prediction.kl_P == pytest.approx(np.array(kls), abs=1e-12)
    assert prediction.objective == pytest.approx(np.mean(rewards) - 0.7 * np.mean(kls), abs=1e-12)


def test_held_out_prediction_uses_the_other_table_only() -> None:
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(2, 80))
    prompt = np.repeat(np.arange(20), 4)
    train, test = slice(0, 40), slice(40, 80)
    solution = solve_dual(scores[0, train], scores[1, train], prompt[train], beta=1.0, constraints=[Margin("g", 0.3)])
    held_out = predict(
        ScoreTable.build(scores[0, test], scores[1, test], prompt[test]), solution.lam_vector, 1.0, [0.3]
    )
    in_sample = predict(
        ScoreTable.build(scores[0, train], scores[1, train], prompt[train]), solution.lam_vector, 1.0, [0.3]
    )
    assert in_sample.slack_J[0] == pytest.approx(0.0, abs=1e-9)
    assert abs(held_out.slack_J[0]) > 1e-3
    assert held_out.prompt_P.tolist() == list(range(10, 20))


def test_dual_curve_is_the_objective_with_its_minimum_at_lambda() -> None:
    reward, utility, prompt, margin = random_problem(0, 2)
    table = ScoreTable.build(reward, utility, prompt)
    constraints = [Margin(f"c{j}", b) for j, b in enumerate(margin)]
    lam = solve_dual(reward, utility, prompt, beta=1.0, constraints=constraints).lam_vector
    for axis in range(2):
        grid = np.sort(np.append(np.linspace(0, 2 * lam[axis] + 1, 21), lam[axis]))
        curve = dual_curve(table, beta=1.0, margin_J=margin, lam_J=lam, axis=axis, lam_grid=grid)
        assert grid[np.argmin(curve)] == lam[axis]
        for value, point in zip(curve, grid, strict=True):
            at = np.where(np.arange(2) == axis, point, lam)
            assert value == pytest.approx(reference_dual(at, reward, utility, prompt, 1.0, margin)[0], abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_derivatives_match_finite_differences(seed: int) -> None:
    reward, utility, prompt, margin = random_problem(seed, 2)
    table = ScoreTable.build(reward, utility, prompt)
    lam, step = np.array([0.3, 0.2]), 1e-5
    here = evaluate(table, lam, 2.0, margin)
    for j in range(2):
        shift = step * np.eye(2)[j]
        up, down = evaluate(table, lam + shift, 2.0, margin), evaluate(table, lam - shift, 2.0, margin)
        assert here.gradient_J[j] == pytest.approx((up.value - down.value) / (2 * step), abs=1e-6)
        assert here.hessian_JJ[j] == pytest.approx((up.gradient_J - down.gradient_J) / (2 * step), abs=1e-5)
