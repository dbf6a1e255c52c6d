"""Least squares over the nonnegative orthant, and a check of the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.dual.table import FloatArray

_TOLERANCE = 1e-9


def nonnegative_least_squares(matrix_MJ: FloatArray, right_M: npt.NDArray[np.floating[Any]]) -> FloatArray:
    """Return argmin over x ≥ 0 of ‖Ax − b‖².

    Lawson and Hanson's method, and Stark and Parker's where the answer of the first is not optimal: that of SciPy 1.15
    ends with a wrong support where a column is 1e-4 of another.

    Args:
        matrix_MJ: A, of full column rank.
        right_M: b.
    """
    from scipy.optimize import lsq_linear, nnls  # 0.3 s of every start, needed by several constraints only

    solution_J = np.asarray(nnls(matrix_MJ, right_M)[0], dtype=np.float64)
    if _is_optimal(matrix_MJ, right_M, solution_J):
        return solution_J
    return np.asarray(lsq_linear(matrix_MJ, right_M, (0.0, np.inf), method="bvls", tol=1e-15).x, dtype=np.float64)


def _is_optimal(matrix_MJ: FloatArray, right_M: npt.NDArray[np.floating[Any]], solution_J: FloatArray) -> bool:
    """Whether the gradient vanishes where x > 0 and does not point inwards where x = 0, to rounding."""
    gradient_J = matrix_MJ.T @ (matrix_MJ @ solution_J - right_M)
    scale_J = np.linalg.norm(matrix_MJ, axis=0) * np.linalg.norm(right_M)
    wrong_J = np.where(solution_J > 0, np.abs(gradient_J), -gradient_J)
    return bool(np.all(wrong_J <= _TOLERANCE * scale_J))
