"""The estimators against closed forms and leave-one-out loops; ``auto`` against worlds whose λ* is known."""

from __future__ import annotations

import json
import math
from itertools import product

import numpy as np
import pytest
from dual_worlds import LAWS, World
from scipy.optimize import minimize
from scipy.special import logsumexp

from can_dist.dual import DualSolution, Margin, ScoreTable, solve_dual, solve_table
from can_dist.dual.estimators import (
    estimate,
    estimator_moments,
    gaussian_moments,
    orthant_minimum,
)
from can_dist.dual.jackknife import gain_and_slope, jackknife_moments
from can_dist.dual.moments import prompt_moments
from can_dist.errors import ConfigError, InfeasibleConstraint, NumericalError


def ragged(seed: int, num_constraints: int = 2, num_prompts: int = 30) -> ScoreTable:
    generator = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(num_prompts), generator.integers(1, 9, size=num_prompts))
    score = generator.normal(size=(prompt.size, num_constraints + 1))
    return ScoreTable.build(score[:, 0], score[:, 1:] + 5, prompt)


def world_table(world: World, seed: int = 0) -> ScoreTable:
    return ScoreTable.build(*world.sample(seed))


def quadrature(covariance: np.ndarray, nodes: int = 30) -> ScoreTable:
    """One prompt that enumerates a Gaussian (r, g...) with this covariance."""
    point, weight = np.polynomial.hermite_e.hermegauss(nodes)
    size = covariance.shape[0]
    mesh = np.array(list(product(point, repeat=size)))
    mass = np.array(list(product(weight, repeat=size))).prod(axis=1)
    score = mesh @ np.linalg.cholesky(covariance).T
    keep = mass > 1e-300
    return ScoreTable.build(score[keep, 0], score[keep, 1:], np.zeros(keep.sum(), int), np.log(mass[keep]))


class TestGaussian:
    def test_correlated_constraints(self) -> None:
        """Oracle 8.1: the clipped unconstrained minimiser would be (.67, 0)."""
        table = quadrature(np.array([[2.0, -0.2, 0.4], [-0.2, 1.0, 0.3], [0.4, 0.3, 0.5]]), nodes=12)
        found = estimate(table, 0.5, np.array([0.4, 0.3]), "gaussian", np.zeros(2))
        assert found.lam_J == pytest.approx([0.4, 0.0], abs=1e-9)
        gain = found.moments.gain_PJ[0]
        assert gain == pytest.approx([0.4, (0.4 + 0.4 * 0.3) / 0.5], abs=1e-9)
        assert found.moments.kl_P[0] == pytest.approx((2 - 2 * 0.4 * 0.2 + 0.4**2) / (2 * 0.25), abs=1e-9)
        assert found.moments.reward_gain_P[0] == pytest.approx((2 - 0.4 * 0.2) / 0.5, abs=1e-9)

    def test_it_is_unbiased_where_the_empirical_one_is_not(self) -> None:
        """A known value: K = 8, sd/β = 1, λ* = 1, empirical about 1.17."""
        world = World("gaussian", 1.0, num_responses=8, num_prompts=4000)
        table = world_table(world)
        found = {
            name: solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator=name)
            for name in ("empirical", "jackknife", "gaussian")
        }
        assert found["empirical"].lam["g"] == pytest.approx(1.17, abs=0.03)
        assert found["jackknife"].lam["g"] == pytest.approx(1.03, abs=0.03)
        assert found["gaussian"].lam["g"] == pytest.approx(1.0, abs=4 * found["gaussian"].lam_se["g"])
        assert found["gaussian"].predicted["improvement"]["g"]["mean"] == pytest.approx(0.5, abs=1e-12)

    def test_value_and_slope(self) -> None:
        """D_G(λ) = mean[m + v/(2β)]: the moments are its derivatives."""
        table = ragged(0)
        lam, step = np.array([0.4, 0.3]), 1e-5

        def value(at: np.ndarray) -> float:
            return float(0.7 * gaussian_moments(table, at, 0.7).log_norm_P.mean())

        gain = gaussian_moments(table, lam, 0.7).gain_PJ.mean(axis=0)
        for j in range(2):
            shift = step * np.eye(2)[j]
            assert gain[j] == pytest.approx((value(lam + shift) - value(lam - shift)) / (2 * step), rel=1e-7)


class TestJackknife:
    @pytest.mark.parametrize("seed", range(3))
    def test_against_leaving_each_response_out(self, seed: int) -> None:
        table, beta = ragged(seed), 0.8
        lam = np.array([0.3, 0.5])
        found = jackknife_moments(table, lam, beta, prompt_moments(table, lam, beta))
        for i in range(table.num_prompts):
            rows = table.row_prompt_N == i
            reward, utility = table.reward_N[rows], table.utility_JN[:, rows]

            def statistics(keep: np.ndarray, reward=reward, utility=utility) -> np.ndarray:
                score = (reward[keep] + lam @ utility[:, keep]) / beta
                log_norm = logsumexp(score) - math.log(keep.size)
                weight = np.exp(score - logsumexp(score))
                mean = [weight @ utility[0, keep], weight @ utility[1, keep], weight @ reward[keep], log_norm]
                return np.array([*mean, weight @ score - log_norm])

            count = reward.size
            expected = statistics(np.arange(count))
            if count > 1:
                left = [statistics(np.delete(np.arange(count), k)) for k in range(count)]
                expected = count * expected - (count - 1) * np.mean(left, axis=0)
            actual = [*found.gain_PJ[i], found.reward_gain_P[i], found.log_norm_P[i], found.kl_P[i]]
            assert actual == pytest.approx(expected, abs=1e-10)

    def test_lambda_is_a_root(self) -> None:
        table = world_table(World("gaussian", 1.0, num_responses=32, num_prompts=100))
        solution = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="jackknife")
        moments = estimator_moments(table, solution.lam_vector, 1.0, "jackknife")
        assert moments.gain_PJ.mean() == pytest.approx(0.5, abs=1e-8)
        assert solution.slack["g"] == pytest.approx(0.0, abs=1e-8)
        assert solution.kkt_residual < 1e-8
        empirical = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="empirical")
        assert solution.lam["g"] < empirical.lam["g"]
        assert solution.lam_paper == empirical.lam

    @pytest.mark.parametrize("num_responses", [2, 16])
    def test_slope_is_the_derivative_of_the_gain(self, num_responses: int) -> None:
        generator = np.random.default_rng(1)
        score = generator.normal(size=(30 * num_responses, 3))
        table = ScoreTable.build(score[:, 0], score[:, 1:], np.repeat(np.arange(30), num_responses))
        lam, step = np.array([0.7, 0.3]), 1e-6
        gain, slope = gain_and_slope(table, lam, 0.8)
        empirical = prompt_moments(table, lam, 0.8)
        np.testing.assert_allclose(gain, jackknife_moments(table, lam, 0.8, empirical).gain_PJ.mean(axis=0), rtol=1e-12)
        for j, unit in enumerate(np.eye(2)):
            ends = [gain_and_slope(table, lam + sign * step * unit, 0.8)[0] for sign in (-1, 1)]
            np.testing.assert_allclose(slope[:, j], (ends[1] - ends[0]) / (2 * step), rtol=1e-6)

    def test_two_constraints_one_inactive(self) -> None:
        generator = np.random.default_rng(0)
        score = generator.normal(size=(100 * 40, 3))
        table = ScoreTable.build(score[:, 0], score[:, 1:], np.repeat(np.arange(100), 40))
        solution = solve_table(
            table, beta=1.0, constraints=[Margin("a", 0.3), Margin("b", -0.2)], estimator="jackknife"
        )
        assert solution.lam["b"] == 0.0
        assert solution.slack["b"] > 0
        assert solution.slack["a"] == pytest.approx(0.0, abs=1e-8)

    def test_collapsed_weights_have_no_solution(self) -> None:
        world = World("lognormal", 50.0, num_responses=8, num_prompts=50)
        table = world_table(world, 1)
        constraints = [
            Margin(
                "g",
                0.9
                * solve_table(table, beta=world.beta, constraints=[Margin("g", 0.1)]).feasibility["attainable"]["g"],
            )
        ]
        arguments = {"beta": world.beta, "constraints": constraints, "estimator": "jackknife"}
        with pytest.raises(NumericalError, match="no solution near the empirical lambda"):
            solve_table(table, **arguments)
        assert math.isnan(solve_table(table, throw=False, **arguments).lam["g"])


class TestSolve:
    def test_the_default_is_auto_which_is_the_jackknife(self) -> None:
        table = ragged(3)
        constraints = [Margin("a", 0.1), Margin("b", 0.2)]
        first = solve_table(table, beta=1.0, constraints=constraints)
        assert (first.estimator, first.estimator_reason) == ("jackknife", "")
        for name in ("auto", "jackknife"):
            assert solve_table(table, beta=1.0, constraints=constraints, estimator=name).lam == first.lam

    def test_without_constraints_nothing_is_solved(self) -> None:
        reward = np.random.default_rng(0).normal(size=40)
        solution = solve_dual(reward, np.empty((40, 0)), np.arange(40) // 8, beta=1.0, constraints=[])
        assert (solution.lam, solution.estimator) == ({}, "jackknife")

    @pytest.mark.parametrize("estimator", ["jackknife", "gaussian", "auto"])
    def test_scaling_and_permuting(self, estimator: str) -> None:
        world = World("bimodal", 1.0, num_responses=32, num_prompts=50)
        reward, utility, prompt = world.sample(0)
        arguments = {"constraints": [Margin("g", 0.5)], "estimator": estimator}
        first = solve_dual(reward, utility, prompt, beta=1.0, **arguments)
        order = np.random.default_rng(0).permutation(prompt.size)
        moved = solve_dual(reward[order], utility[order], prompt[order], beta=1.0, **arguments)
        assert moved.lam["g"] == pytest.approx(first.lam["g"], rel=1e-8)
        scaled = solve_dual(
            1e4 * reward, 1e4 * utility, prompt, beta=1e4, constraints=[Margin("g", 5e3)], estimator=estimator
        )
        assert scaled.lam["g"] == pytest.approx(first.lam["g"], rel=1e-7)
        assert scaled.lam_se["g"] == pytest.approx(first.lam_se["g"], rel=1e-4)
        assert scaled.estimator == first.estimator

    def test_auto_reports_its_choice(self) -> None:
        table = world_table(World("gaussian", 1.0))
        solution = solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="auto")
        assert (solution.estimator, solution.estimator_reason) == ("jackknife", "")
        assert solution.lam == solve_table(table, beta=1.0, constraints=[Margin("g", 0.5)], estimator="jackknife").lam
        record = json.loads(json.dumps(solution.to_dict(), allow_nan=False))
        again = DualSolution.from_dict(record)
        assert again.estimator == "jackknife"
        assert again.diagnostics == solution.diagnostics
        assert again.confidence is None
        for key in ("estimator", "estimator_reason", "lam_paper", "confidence", "safety_margin"):
            del record[key]
        assert DualSolution.from_dict(record).estimator == "empirical"

    def test_arguments(self) -> None:
        table = ragged(4)
        with pytest.raises(ConfigError, match="estimator: found 'best'"):
            solve_table(table, beta=1.0, constraints=[Margin("a", 0), Margin("b", 0)], estimator="best")
        enumerated = quadrature(np.eye(2), nodes=5)
        with pytest.raises(ConfigError, match="takes the responses as samples"):
            solve_table(enumerated, beta=1.0, constraints=[Margin("g", 0.1)], estimator="jackknife")
        auto = solve_table(enumerated, beta=1.0, constraints=[Margin("g", 0.1)], estimator="auto")
        assert auto.estimator == "empirical"
        with pytest.raises(InfeasibleConstraint):
            solve_table(table, beta=1.0, constraints=[Margin("a", 99.0), Margin("b", 0.0)], estimator="gaussian")


def test_orthant_minimum_against_scipy() -> None:
    generator = np.random.default_rng(0)
    at_bound = 0
    for _ in range(50):
        size = int(generator.integers(1, 5))
        factor = generator.normal(size=(size, size + 1))
        hessian, linear = factor @ factor.T, generator.normal(size=size)
        found = orthant_minimum(hessian, linear)
        best = minimize(
            lambda x, hessian=hessian, linear=linear: 0.5 * x @ hessian @ x + linear @ x,
            np.ones(size),
            jac=lambda x, hessian=hessian, linear=linear: hessian @ x + linear,
            bounds=[(0, None)] * size,
            options={"ftol": 1e-15, "gtol": 1e-12},
        )
        assert 0.5 * found @ hessian @ found + linear @ found == pytest.approx(best.fun, abs=1e-9)
        at_bound += int((found == 0).any())
    assert at_bound >= 10
    assert orthant_minimum(np.zeros((2, 2)), -np.ones(2)) == pytest.approx([0, 0])


class TestAuto:
    def test_worlds_know_their_population(self) -> None:
        """The quadrature against the closed Gaussian form, and against one prompt of 300,000 responses."""
        assert World("gaussian", 4.0).population_lam() == pytest.approx(0.625, abs=1e-6)
        assert World("gaussian", 0.5, correlation=0.0, margin=0.3).population_lam() == pytest.approx(0.6, abs=1e-6)
        for law in LAWS:
            world = World(law, 0.5, num_prompts=1, num_responses=300_000)
            solution = solve_table(world_table(world), beta=world.beta, constraints=[Margin("g", 0.5)])
            assert solution.lam["g"] == pytest.approx(world.population_lam(), rel=0.04), law

    def test_the_papers_estimator_where_the_jackknife_has_no_solution(self) -> None:
        world = World("t3", 50.0, num_responses=8, num_prompts=60)
        table = world_table(world)
        margins = [Margin("g", 0.5)]
        with pytest.raises(NumericalError, match="the jackknife estimator has no solution near the empirical lambda"):
            solve_table(table, beta=world.beta, constraints=margins, estimator="jackknife")
        solution = solve_table(table, beta=world.beta, constraints=margins, estimator="auto")
        assert solution.estimator == "empirical"
        assert solution.estimator_reason.startswith("the jackknife has no solution")
        assert solution.lam == solve_table(table, beta=world.beta, constraints=margins).lam
        assert solution.diagnostics["verdict"].startswith("Do not trust the prediction or lambda: ")
