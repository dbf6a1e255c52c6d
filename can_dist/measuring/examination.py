"""The numbers of the diagnostics section: one JSON-safe record that holds everything the page shows.

P prompts, J constraints. Figures need curves where ``dual.diagnose`` gives single numbers: the dual along each λ, the
distribution of the weights, the frontier along each margin. A number that cannot be computed is null, with the reason
in words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from can_dist.dual import DualSolution, Margin, ScoreTable, cross_fit, diagnose, evaluate, frontier_table
from can_dist.dual.belief.level import Level, level_of, stated
from can_dist.dual.objective import tilt
from can_dist.dual.table import FloatArray
from can_dist.errors import CanDistError

KINDS: dict[Level, str] = {"trusted": "met", "roughly": "within", "not trusted": "unmet"}
"""How a page marks a level."""

NUM_FOLDS = 5
NUM_LAM = 81
NUM_MARGINS = 33
NUM_MARGINS_JOINT = 17  # fewer for several constraints: each then needs a search for a jointly feasible margin
MOST_BINS = 28
REACH = 0.95  # the frontier ends where the improvement has come this far from λ = 0 to the most attainable
WIDEST_SMALL_K = 12.0  # least end of the axis of effective sample sizes, so that the ten that are needed lie on it


def examine(table: ScoreTable, solution: DualSolution, *, reward_name: str = "reward") -> dict[str, Any]:
    """Examine a solution on the table that gave it; the same input always gives the same record.

    Args:
        table: scores of P prompts, in raw units.
        solution: of any estimator and status.
        reward_name: name of the reward in the summaries.

    Returns:
        ``headline`` (kind and sentence), ``refused`` (why there is no ``diagnosis``, else null), ``diagnosis``
        (:meth:`Diagnosis.to_dict`), ``cross_fit`` or ``cross_fit_refused``, ``weights``, ``dual_curves`` and
        ``frontier`` by constraint, ``weighted``. A number that is not finite is null.
    """
    refused = refusal(table, solution)
    known = bool(solution.lam) and bool(np.isfinite(solution.lam_vector).all())
    varied = bool((table.num_responses_P > 1).any())
    diagnosis = None if refused else diagnose(table, solution, reward_name=reward_name)
    predicted, unpredicted = cross_fitted(table, solution) if known and varied else (None, refused)
    headline = {"kind": KINDS[level_of(solution.diagnostics)], "text": stated(solution.diagnostics)}
    axes = list(enumerate(solution.lam))
    trade_off = bool(solution.lam) and varied and not (solution.lam_vector < 0).any()
    record = {
        "headline": headline,
        "refused": refused,
        "diagnosis": diagnosis.to_dict() if diagnosis else None,
        "cross_fit": predicted,
        "cross_fit_refused": unpredicted,
        "weighted": table.weighted,
        "weights": _weights(table, solution) if known and varied else None,
        "dual_curves": {name: _dual_curve(table, solution, axis, name) for axis, name in axes} if known else {},
        "frontier": {name: _frontier(table, solution, axis, name) for axis, name in axes} if trade_off else {},
    }
    safe: dict[str, Any] = json.loads(json.dumps(record), parse_constant=lambda _: None)  # NaN and ±∞ become null
    return safe


def influential(examination: Mapping[str, Any]) -> list[str]:
    """Return the ids of the prompts that move λ most, which the examination names."""
    return [row["prompt"] for row in (examination["diagnosis"] or {}).get("influence", [])]


def refusal(table: ScoreTable, solution: DualSolution) -> str | None:
    """Return why a solution cannot be examined, or None."""
    if not solution.lam:
        return "there is no constraint, so there is no multiplier to examine."
    if not np.isfinite(solution.lam_vector).all():
        return f"no finite λ was reached ({solution.status.value.rstrip('.')})."
    if not (table.num_responses_P > 1).any():
        return "every prompt has one response, so no response can be preferred to another."
    if (solution.lam_vector < 0).any():
        negative = ", ".join(name for name, lam in solution.lam.items() if lam < 0)
        return (
            f"a constraint met exactly has a negative multiplier ({negative}), and the examination covers multipliers "
            "of at least zero. Turn the sign of its score and solve again to have it."
        )
    return None


def cross_fitted(table: ScoreTable, solution: DualSolution) -> tuple[dict[str, Any] | None, str | None]:
    """Predict each prompt with a λ solved on the others; return the record, or None and the reason.

    Returns:
        ``improvement`` and ``level`` by constraint, ``reward_improvement`` and ``kl`` (mean, se, low, high; 95%
        t-intervals over prompts), ``lam`` of each fold, ``num_folds``, ``estimator``, ``num_prompts``.
    """
    if table.num_prompts < 2:
        return None, "one prompt cannot be held out from itself."
    folds = min(NUM_FOLDS, table.num_prompts)
    margins = as_solved(solution)
    try:
        prediction = cross_fit(
            table, beta=solution.beta, constraints=margins, num_folds=folds, estimator=solution.estimator
        )
    except CanDistError as error:
        return None, f"the prompts outside one of {folds} folds have no solution of their own ({error})"
    record = {
        "improvement": {name: asdict(value) for name, value in prediction.improvement.items()},
        "level": {name: asdict(value) for name, value in prediction.level.items()},
        "reward_improvement": asdict(prediction.reward_improvement),
        "kl": asdict(prediction.kl),
        "lam": dict(zip(solution.lam, prediction.lam_FJ.T.tolist(), strict=True)),
        "num_folds": folds,
        "num_prompts": table.num_prompts,
        "estimator": solution.estimator,
    }
    return record, None


def as_solved(solution: DualSolution) -> list[Margin]:
    """Return the constraints that a solution met: thresholds as thresholds, safety margins included.

    A negative multiplier is that of an equality.
    """
    margins = []
    for name, margin in solution.margin.items():
        level, equal = solution.threshold[name], solution.lam[name] < 0
        if level is None:
            margins.append(Margin(name, margin=margin, equal=equal))
        else:
            margins.append(Margin(name, threshold=level + solution.safety_margin.get(name, 0.0), equal=equal))
    return margins


def _weights(table: ScoreTable, solution: DualSolution) -> dict[str, Any]:
    """Return the histogram of the prompts' effective sample sizes and 101 quantiles of their largest weights."""
    several = table.num_responses_P > 1
    weight_N = tilt(table, solution.lam_vector, solution.beta).weight_N
    ess_P = np.maximum(1.0 / table.sum_rows(weight_N**2)[several], 1.0)
    num_bins = int(np.clip(2.0 * math.sqrt(ess_P.size), 8, MOST_BINS))
    edges = np.geomspace(1.0, max(float(table.num_responses_P.max()), WIDEST_SMALL_K), num_bins + 1)
    count, _ = np.histogram(np.minimum(ess_P, edges[-1]), edges)
    return {
        "ess_edges": edges.tolist(),
        "ess_count": count.tolist(),
        "largest_weight": np.quantile(table.max_rows(weight_N)[several], np.linspace(0.0, 1.0, 101)).tolist(),
        "even_weight": float(np.median(1.0 / table.num_responses_P[several])),
        "share_one_response": float(np.mean(table.max_rows(weight_N)[several] > 0.5)),
    }


def _dual_curve(table: ScoreTable, solution: DualSolution, axis: int, name: str) -> dict[str, Any] | None:
    """Return D through λ along one axis, and its minimisers for the demanded margin and up to four others.

    D of another margin b' is D − λ_j (b' − b), so one pass over the table serves every margin (docs/dual.md).
    """
    lam_J, margin_J, beta = solution.lam_vector, solution.margin_vector, solution.beta
    lam, margin, error = float(lam_J[axis]), float(margin_J[axis]), solution.lam_se[name]
    spread = table.within_sd(table.utility_JN[axis])
    if spread == 0.0:
        return None
    unit = max(table.within_sd(table.reward_N), beta) / spread
    reach = lam + 4.0 * error if math.isfinite(error) else 0.0
    grid = np.linspace(min(0.0, 2.2 * lam), max(2.2 * lam, reach, 0.25 * unit if lam else unit), NUM_LAM)
    point_J, value, improvement = lam_J.copy(), np.empty(NUM_LAM), np.empty(NUM_LAM)
    for index, coordinate in enumerate(grid):
        point_J[axis] = coordinate
        at = evaluate(table, point_J, beta, margin_J)
        value[index], improvement[index] = at.value, at.gradient_J[axis] + margin
    if not (np.isfinite(value).all() and np.isfinite(improvement).all()):
        return None
    improvement = np.maximum.accumulate(improvement)
    margins = _neighbours(margin, lam, grid, improvement)
    return {
        "lam": grid.tolist(),
        "value": value.tolist(),
        "margins": margins,
        "minima": np.interp(margins, improvement, grid).tolist(),
    }


def _neighbours(margin: float, lam: float, grid: FloatArray, improvement: FloatArray) -> list[float]:
    """Return the demanded margin and up to four others, increasing by round steps, whose minimisers lie on the grid."""
    if lam < 0.0:
        return [margin]
    most = float(np.interp(grid[0] + 0.85 * (grid[-1] - grid[0]), grid, improvement))
    least = float(np.interp(0.4 * lam, grid, improvement))
    room = min(most - margin, margin - least) / 2 if lam > 0.0 else (most - least) / 5
    if not room > 1e-9 * max(1.0, abs(margin)):
        return [margin]
    power = 10.0 ** math.floor(math.log10(room))
    step = power * max(digit for digit in (1, 2, 5) if digit * power <= room * (1 + 1e-12))
    if lam > 0.0:
        return [margin + count * step for count in range(-2, 3)]
    first = max(least, margin) // step + 1  # what lies below costs as little as the margin asked
    return [margin, *(step * (first + count) for count in range(4))]


def _frontier(table: ScoreTable, solution: DualSolution, axis: int, name: str) -> dict[str, Any] | None:
    """Return reward gain, KL, λ and ESS (empirical, 95% bands) over one margin, the others as demanded."""
    lam_J = np.where(np.isfinite(solution.lam_vector), solution.lam_vector, 0.0)
    lam_J[axis] = 0.0
    target, zero_J = float(solution.margin_vector[axis]), np.zeros(lam_J.size)
    start = float(evaluate(table, lam_J, solution.beta, zero_J).gradient_J[axis])
    most = solution.feasibility["attainable"][name]
    end = start + REACH * (most - start)
    if not (math.isfinite(end) and end > start):
        return None
    grid = np.linspace(min(start, target), end, NUM_MARGINS if lam_J.size == 1 else NUM_MARGINS_JOINT)
    if target < most:
        grid = np.union1d(grid, [target])
    margins = [grid if j == axis else np.array([value]) for j, value in enumerate(solution.margin_vector)]
    rows = frontier_table(table, beta=solution.beta, names=list(solution.lam), margins=margins).rows()
    ends = ("", "_low", "_high")
    keys = {quantity + suffix: quantity + suffix for quantity in ("reward_improvement", "kl") for suffix in ends}
    keys |= {f"lam{suffix}": f"lam.{name}{suffix}" for suffix in ends} | {"ess": "ess"}
    columns: dict[str, Any] = {short: [row[key] for row in rows] for short, key in keys.items()}
    return {"margin": grid.tolist(), **columns, "asked": target, "attainable": most}
