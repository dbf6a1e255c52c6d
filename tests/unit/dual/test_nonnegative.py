"""Least squares over x ≥ 0: against a search of all supports, and with a solver that answers wrongly."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import scipy.optimize

from can_dist.dual.nonnegative import nonnegative_least_squares

# of a Newton step at |score|/β = 500, where nnls of SciPy 1.15.3 answers (0.187, 0, 0.258)
MATRIX = np.array(
    [
        [6.302031528396779, 2.927240934765995, 2.970829878573812],
        [0, 1.7460009112001322, 6.241054016422845],
        [0, 0, 0.0005823014691427024],
    ]
)
RIGHT = np.array([1.9002451975142745, 1.684448928818515, -536.0810293933245])
LEAST = (0.0, 0.55976564, 0.10210586)


def by_all_supports(matrix: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    best, least = np.zeros(matrix.shape[1]), float(right @ right)
    for size in range(1, matrix.shape[1] + 1):
        for support in map(list, combinations(range(matrix.shape[1]), size)):
            part = np.linalg.lstsq(matrix[:, support], right, rcond=None)[0]
            error = float(((matrix[:, support] @ part - right) ** 2).sum())
            if np.all(part >= 0) and error < least:
                best, least = np.zeros(matrix.shape[1]), error
                best[support] = part
    return best


def test_is_the_best_of_all_supports() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 4) * 10:
        matrix, right = generator.normal(size=(size, size)), generator.normal(size=size)
        assert nonnegative_least_squares(matrix, right) == pytest.approx(by_all_supports(matrix, right), abs=1e-9)


def test_step_of_a_frozen_dual() -> None:
    assert by_all_supports(MATRIX, RIGHT) == pytest.approx(LEAST, abs=1e-6)
    assert nonnegative_least_squares(MATRIX, RIGHT) == pytest.approx(LEAST, abs=1e-6)


@pytest.mark.parametrize("answer", [(0.18686476, 0.0, 0.25843935), (0.0, 0.0, 0.0), (0.1, 0.5, 0.1)])
def test_answer_that_is_not_optimal_is_not_taken(
    answer: tuple[float, float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scipy.optimize, "nnls", lambda *_: (np.array(answer), 0.0))
    assert nonnegative_least_squares(MATRIX, RIGHT) == pytest.approx(LEAST, abs=1e-6)
