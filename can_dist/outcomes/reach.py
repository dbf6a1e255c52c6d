"""A finished run → gain, reward and KL of every margin that it reaches without another training, and the dual's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from can_dist.dual import Demand
from can_dist.dual.strength import RayPoint
from can_dist.errors import InfeasibleConstraint
from can_dist.measuring.ray import columns_of
from can_dist.measuring.reach import basis_reach, ray_reach
from can_dist.outcomes.estimate import find_solution
from can_dist.outcomes.export import find_policy
from can_dist.outcomes.stretch import find_estimate, frontier_at
from can_dist.stages.estimate import load_estimate, trained_policy, without_strength
from can_dist.stages.mixture import MAIN, inputs_of, told_by
from can_dist.stages.solve import cvar_offset, demands, load_solution
from can_dist.tables.artifacts import Artifact

NUM_MARGINS = 31
REACH = 1.5
"""Margins are shown to so many times what was asked."""


def reach(path: Path) -> dict[str, Any]:
    """Return the curves of a run, JSON-safe: by constraint the margins, and of each the dual's, the ray's, the basis's.

    ``path`` is a run with one policy, or an artifact of the stages train, mixture, strength or evaluate. Constraints
    whose margin does not vary stay as the run has them. ``basis`` is None in a run without one.

    Raises:
        DataError: The run has no policy, several, no dual's solution or no estimate on validation prompts.
    """
    policy, _ = find_policy(path)
    mixed, solution = without_strength(policy), find_solution(policy)
    estimate = load_estimate(find_estimate(trained_policy(policy)))
    demanded, offset = demands(solution), cvar_offset(solution)
    curves = {}
    for demand in demanded:
        shift = offset.get(demand.name, 0.0)
        largest = REACH * (demand.margin - shift if demand.margin > shift else estimate.improvement[demand.name].mean)
        margins = np.linspace(0.0, max(largest, 0.0), NUM_MARGINS).tolist() if largest > 0 else []
        shifted = [margin + shift for margin in margins]
        curves[demand.name] = {
            "asked": demand.margin - shift,
            "margin": margins,
            "dual": _dual(solution, demanded, demand.name, shifted),
            "ray": columns_of(ray_reach(estimate, demand.name, shifted)),
            "basis": columns_of(_basis(mixed, solution, demanded, demand.name, shifted))
            if mixed.stage == "mixture"
            else None,
        }
    return {
        "format_version": 1,
        "run": str(policy.path.parent),
        "num_prompts": estimate.num_prompts,
        "constraints": curves,
    }


def _basis(
    mixed: Artifact, solution: Artifact, demanded: Sequence[Demand], name: str, margins: Sequence[float]
) -> list[RayPoint]:
    log_probs = {name or MAIN: scores for name, scores in inputs_of(mixed, "log_probs").items()}
    told, beta = told_by(mixed.input("validation"), log_probs, solution), load_solution(solution).beta
    return basis_reach(told.table, told.ref_N, told.policy_N, demanded, name, margins, beta=beta)


def _dual(solution: Artifact, demanded: Sequence[Demand], name: str, margins: Sequence[float]) -> Mapping[str, Any]:
    """Return reward and KL that the dual predicts at margins, as far as they are attainable."""
    columns: dict[str, list[float]] = {"reward_improvement": [], "kl": []}
    for margin in margins:
        at = [replace(demand, margin=margin) if demand.name == name else demand for demand in demanded]
        try:
            solved = frontier_at(solution, {demand.name: demand.margin for demand in at})
        except InfeasibleConstraint:
            break
        columns["reward_improvement"].append(float(solved.predicted["reward_improvement"]))
        columns["kl"].append(float(solved.predicted["kl"]))
    return columns
