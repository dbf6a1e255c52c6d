"""λ steered by estimated gains: the formula, its fixed points, and a constrained least squares by other code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from can_dist.dual import Demand, Margin, ScoreTable, solve_table, steer
from can_dist.dual.moments import prompt_moments
from can_dist.errors import ConfigError, NumericalError


def margins(*value_J: float, equal: tuple[bool, ...] = ()) -> list[Demand]:
    flags = equal or (False,) * len(value_J)
    return [Demand(name, b, equal=flag) for name, b, flag in zip("abcdef", value_J, flags, strict=False)]


def hessian_of(seed: int, size: int) -> np.ndarray:
    root = np.random.default_rng(seed).normal(size=(size, 2 * size))
    return root @ root.T / size


class TestOneConstraint:
    @pytest.mark.parametrize(("lam", "gain"), [(0.7, 0.3), (0.7, 0.9), (0.05, 0.9), (0.0, 0.2)])
    def test_the_formula(self, lam: float, gain: float) -> None:
        expected = max(0.0, lam + 0.5 * (0.5 - gain) / 1.6)
        assert steer([lam], [gain], margins(0.5), [[1.6]]) == pytest.approx([expected], abs=1e-14)

    def test_an_equality_is_not_clipped(self) -> None:
        result = steer([0.05], [0.9], margins(0.5, equal=(True,)), [[1.6]])
        assert result == pytest.approx([0.05 - 0.5 * 0.4 / 1.6], abs=1e-14)

    def test_the_step(self) -> None:
        assert steer([0.7], [0.3], margins(0.5), [[1.6]], step=1.0) == pytest.approx([0.7 + 0.2 / 1.6], abs=1e-14)


class TestSeveral:
    def test_the_formula_where_nothing_is_clipped(self) -> None:
        hessian, margin, gain = hessian_of(1, 3), np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.5, 0.3])
        lam = np.array([2.0, 3.0, 1.5])
        expected = lam + 0.5 * np.linalg.inv(hessian) @ (margin - gain)
        assert (expected > 0).all()
        assert steer(lam, gain, margins(*margin), hessian) == pytest.approx(expected, abs=1e-12)

    def test_it_rests_where_the_margins_are_met_or_exceeded_at_zero(self) -> None:
        """The maximum of each λ_j with 0 would move the first for the second, which is met and at its bound."""
        hessian = np.array([[1.0, 0.6], [0.6, 1.0]])
        lam, gain = np.array([0.8, 0.0]), np.array([0.5, 0.9])
        assert steer(lam, gain, margins(0.5, 0.4), hessian) == pytest.approx(lam, abs=1e-14)
        each = np.maximum(lam + 0.5 * np.linalg.solve(hessian, np.array([0.0, -0.5])), 0.0)
        assert each[0] > 1.0

    @pytest.mark.parametrize("seed", range(20))
    def test_against_a_quasi_newton_search(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        hessian = hessian_of(seed + 100, 4) * np.outer(scale := 10.0 ** generator.uniform(-1, 1, 4), scale)
        equal = (False, True, False, True)
        lam = np.where(
            equal, generator.normal(size=4), np.abs(generator.normal(size=4)) * (generator.uniform(size=4) < 0.6)
        )
        margin, gain = generator.normal(size=(2, 4)) * scale

        def objective(following: np.ndarray) -> float:
            move = following - lam
            return float(0.5 * move @ hessian @ move - 0.5 * (margin - gain) @ move)

        def slope(following: np.ndarray) -> np.ndarray:
            return hessian @ (following - lam) - 0.5 * (margin - gain)

        result = steer(lam, gain, margins(*margin, equal=equal), hessian)
        bounds = [(None if flag else 0.0, None) for flag in equal]
        best = minimize(
            objective, lam, jac=slope, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-12}
        )
        assert objective(result) <= best.fun + 1e-9 * max(1.0, abs(best.fun))
        assert result == pytest.approx(best.x, abs=1e-4 * np.abs(best.x).max())
        assert (result[[0, 2]] >= 0).all()

    def test_a_training_that_goes_part_of_the_way_arrives(self) -> None:
        """A learner that realises 60 % of what λ asks for ends at its margins, with λ above λ*."""
        generator = np.random.default_rng(0)
        score = generator.normal(size=(3, 1600)) @ np.diag(np.ones(1600))
        table = ScoreTable.build(score[0], (score[1:] - 0.4 * score[0]).T, np.repeat(np.arange(200), 8))
        solution = solve_table(table, beta=1.0, constraints=[Margin("a", 0.3), Margin("b", 0.2)])
        hessian = prompt_moments(table, solution.lam_vector, 1.0).hessian(1.0)
        lam = solution.lam_vector
        for _ in range(40):
            lam = steer(lam, 0.6 * prompt_moments(table, lam, 1.0).gain_PJ.mean(axis=0), margins(0.3, 0.2), hessian)
        realised = 0.6 * prompt_moments(table, lam, 1.0).gain_PJ.mean(axis=0)
        assert realised == pytest.approx([0.3, 0.2], abs=1e-6)
        assert (lam > solution.lam_vector).all()


class TestRefusals:
    def test_a_singular_hessian_names_the_constraints(self) -> None:
        hessian = np.array([[1.0, 0.2, 2.0], [0.2, 1.0, 0.4], [2.0, 0.4, 4.0]])
        with pytest.raises(NumericalError, match=r"^a and c say the same \(correlation 1\.000000\), so lambda cannot"):
            steer([1.0] * 3, [0.0] * 3, margins(0.5, 0.5, 0.5), hessian)
        with pytest.raises(NumericalError, match=r"^b: no variance within prompts"):
            steer([1.0] * 2, [0.0] * 2, margins(0.5, 0.5), [[1.0, 0.0], [0.0, 0.0]])

    def test_units_do_not_matter(self) -> None:
        scale = np.array([1e-6, 1e6])
        hessian = hessian_of(3, 2)
        plain = steer([1.0, 2.0], [0.1, 0.2], margins(0.5, 0.3), hessian)
        gain, margin = np.array([0.1, 0.2]) * scale, np.array([0.5, 0.3]) * scale
        result = steer(np.array([1.0, 2.0]) / scale, gain, margins(*margin), hessian * np.outer(scale, scale))
        assert result * scale == pytest.approx(plain, rel=1e-12)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"gain_J": [0.1, 0.2]}, ConfigError, "of shapes"),
            ({"step": 0.0}, ConfigError, "step = 0.0"),
            ({"lam_J": [-0.1]}, ConfigError, "expected at least 0 for an inequality"),
            ({"gain_J": [math.nan]}, NumericalError, r"the estimated gain is not finite: \[nan\]"),
        ],
    )
    def test_arguments(self, change: dict, error: type[Exception], message: str) -> None:
        values = {"lam_J": [1.0], "gain_J": [0.1], "demands": margins(0.5), "hessian_JJ": [[1.0]]} | change
        with pytest.raises(error, match=message):
            steer(**values)


def test_without_constraints() -> None:
    assert steer(np.zeros(0), np.zeros(0), [], np.zeros((0, 0))).size == 0
