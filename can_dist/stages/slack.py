"""policy samples → slack, and the step on it: the dual's gradient at λ, measured instead of predicted.

For π_θ = π_λ the slack E_π g − E_{π_ref} g − b is ∇D(λ) (CAN, arXiv 2405.19544), so λ ← [λ − η·slack]_+ descends the
dual (C-DPO, arXiv 2403.02475; CAID, arXiv 2505.19387). The measured slack includes all errors of a training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from can_dist.config.sections import Constraint
from can_dist.dual import evaluate
from can_dist.dual.table import FloatArray
from can_dist.errors import DataError
from can_dist.stages.estimate import load_estimate
from can_dist.stages.solve import demands, load_solution, score_table, solved_columns
from can_dist.stages.utilities import column_keys, columns_of
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.workspace import Workspace

MEASUREMENT = "measurement.json"

StepSize = float | Literal["1/H"]


def measure(
    work: Workspace,
    scores: Artifact,
    reference_scores: Artifact,
    constraints: Mapping[str, Constraint],
    *,
    reward: str,
    log_weight: str | None = None,
) -> Artifact:
    """Return the artifact of a policy's measured slack (``measurement.json``), from scores of its fresh samples.

    Means are over prompts of the prompts' means, in score units, and so are the standard errors: a prompt's responses
    are averaged first, because prompts are the sampled unit. A margin is measured against the reference's
    responses to the same prompts, paired by prompt; a threshold against the policy's mean alone. ``log_weight`` names
    a column of both tables with log-weights over an enumerated set of responses, as in ``solve``. Where ``scores`` has
    ln π of the policy beside ln π_ref, its KL to the reference is measured too, in nats per response.

    Raises:
        DataError: The tables are not over the same prompts, or over fewer than two.
    """
    columns = columns_of(constraints)
    identity_keys = {
        "reward": reward,
        "constraints": {
            name: {"margin": c.margin, "threshold": c.threshold, "equal": c.equal} for name, c in constraints.items()
        },
        "log_weight": log_weight,
        **column_keys(columns),
    }
    stage = work.open("measure", "slack", identity_keys, {"scores": scores, "reference_scores": reference_scores})
    if stage.finished:
        return stage.finished
    with work.timed("measure", "slack"):
        after = score_table(scores.table, reward, columns, log_weight, str(scores.path))
        before = score_table(reference_scores.table, reward, columns, log_weight, str(reference_scores.path))
        if not np.array_equal(after.prompt_P, before.prompt_P) or after.num_prompts < 2:
            raise DataError(
                f"{scores.path}: {after.num_prompts} prompt(s) beside {before.num_prompts} of {reference_scores.path}; "
                "expected the same ones, and two at least for a standard error. Measure on the training prompts."
            )
        rows = zip(constraints.items(), after.mean_utility_JP, before.mean_utility_JP, strict=True)
        measured = {
            "num_prompts": after.num_prompts,
            "num_responses": after.num_rows,
            "num_tokens": pc.sum(scores.table.column("num_tokens")).as_py(),
            "reward": dict(zip(("improvement", "se"), _mean(after.mean_reward_P - before.mean_reward_P), strict=True)),
            "constraints": {name: _slack(constraint, mean_P, ref_P) for (name, constraint), mean_P, ref_P in rows},
        }
        if LOGP_POLICY in scores.table.column_names:
            measured["kl"] = dict(zip(("mean", "se"), _mean(_kl(scores)), strict=True))
        write_json(stage.path / MEASUREMENT, measured)
        work.say("measure: " + describe_slack(measured["constraints"]))
        return stage.commit([MEASUREMENT], info=measured)


def estimated(work: Workspace, estimate: Artifact) -> Artifact:
    """Return the artifact of a policy's slack, as :func:`measure` does, from its estimate without generating."""
    stage = work.open("measure", "slack by estimate", {}, {"estimate": estimate})
    if stage.finished:
        return stage.finished
    policy = load_estimate(estimate)
    rows = ((demand, policy.improvement[demand.name]) for demand in demands(estimate.input("solution")))
    measured: dict[str, Any] = {
        "num_prompts": policy.num_prompts,
        "reward": {"improvement": policy.reward_improvement.mean, "se": policy.reward_improvement.se},
        "constraints": {
            demand.name: {
                "improvement": gain.mean,
                "slack": gain.mean - demand.margin,
                "se": math.hypot(gain.se, demand.error),
                "equal": demand.equal,
            }
            for demand, gain in rows
        },
    }
    write_json(stage.path / MEASUREMENT, measured)
    work.say("measure: " + describe_slack(measured["constraints"]))
    return stage.commit([MEASUREMENT], info=measured)


def _slack(constraint: Constraint, mean_P: FloatArray, reference_P: FloatArray) -> dict[str, float | bool]:
    """Return the slack of one constraint and its standard error, (P,) means of policy and reference."""
    if constraint.margin is not None:
        slack, error = _mean(mean_P - reference_P - constraint.margin)
    else:
        assert constraint.threshold is not None  # Constraint demands one of both
        slack, error = _mean(mean_P - constraint.threshold)
    improvement = float(np.mean(mean_P - reference_P))
    means = {"mean": float(mean_P.mean()), "improvement": improvement}
    return {**means, "slack": slack, "se": error, "equal": constraint.equal}


def _kl(scores: Artifact) -> FloatArray:
    """Return the mean of ln π/π_ref over the policy's own responses to each prompt, (P,) nats."""
    table = scores.table
    ratio_N = table.column(LOGP_POLICY).to_numpy() - table.column(LOGP_REFERENCE).to_numpy()
    _, index_N = np.unique(table.column("prompt_id").to_numpy(zero_copy_only=False), return_inverse=True)
    mean_P: FloatArray = np.bincount(index_N, weights=ratio_N) / np.bincount(index_N)
    return mean_P


def _mean(value_P: FloatArray) -> tuple[float, float]:
    """Return the mean over prompts and its standard error."""
    return float(value_P.mean()), float(value_P.std(ddof=1) / np.sqrt(value_P.shape[0]))


def describe_slack(constraints: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the slack and standard error of each constraint, for messages."""
    return ", ".join(f"slack of {name} {row['slack']:+.4g} ± {row['se']:.2g}" for name, row in constraints.items())


def step_sizes(scores: Artifact, solution: Artifact, step_size: StepSize, *, reward: str) -> dict[str, float]:
    """Return η of each constraint: the given number, or for '1/H' from the Hessian of the table's dual at its λ*.

    For one constraint η = 1/H. For several, η_j = 1/(ρ H_jj) with ρ the largest eigenvalue of H scaled to a unit
    diagonal: the largest steps in this proportion that cannot overshoot the quadratic model, in any units.
    """
    solved = load_solution(solution)
    if step_size != "1/H":
        return dict.fromkeys(solved.lam, step_size)
    eta_J = _inverse_curvature(_hessian(scores, solution, reward))
    return dict(zip(solved.lam, eta_J.tolist(), strict=True))


def largest_step(scores: Artifact, solution: Artifact, *, reward: str, of_logarithm: bool = False) -> float:
    """Return 2/L, L the largest eigenvalue of the table's dual at its λ*: from there on gradient steps swing for ever.

    With ``of_logarithm`` the steps are on ln λ, whose Hessian of the dual at λ* is diag(λ*) H diag(λ*). Infinite where
    no score varies within a prompt. Units as η's: reward units per squared score unit, divided by λ's squared.
    """
    hessian_JJ, lam_J = _hessian(scores, solution, reward), load_solution(solution).lam_vector
    scaled_JJ = hessian_JJ * np.outer(lam_J, lam_J) if of_logarithm else hessian_JJ
    largest = float(np.linalg.eigvalsh(scaled_JJ)[-1])
    return 2 / largest if largest > 0 else math.inf


def _hessian(scores: Artifact, solution: Artifact, reward: str) -> FloatArray:
    solved = load_solution(solution)
    log_weight = solution.manifest["identity"]["log_weight"]
    table = score_table(scores.table, reward, solved_columns(solution), log_weight, str(scores.path))
    return evaluate(table, solved.lam_vector, solved.beta, solved.margin_vector).hessian_JJ


def _inverse_curvature(hessian_JJ: FloatArray) -> FloatArray:
    """Return η_J; zero for a utility that never varies within a prompt, which no λ can change."""
    varies_J = np.diag(hessian_JJ) > 0
    scale_J = np.sqrt(np.where(varies_J, np.diag(hessian_JJ), 1.0))
    largest = np.linalg.eigvalsh(hessian_JJ / np.outer(scale_J, scale_J))[-1]
    eta_J: FloatArray = np.where(varies_J, 1 / (scale_J**2 * np.where(varies_J.any(), largest, 1.0)), 0.0)
    return eta_J
