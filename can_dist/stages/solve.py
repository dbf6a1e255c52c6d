"""scores → DualSolution: λ* = argmin_{λ≥0} D(λ), on the driver."""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.dual import DualSolution, Margin, ScoreTable, solve_table
from can_dist.dual.messages import lam_error, misread_hints
from can_dist.errors import InfeasibleConstraint
from can_dist.scoring.log_ratio import margins_in_nats
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.tables.scores import score_arrays
from can_dist.workspace import Workspace

SOLUTION = "solution.json"

AUTO = "jackknife"
"""What ``auto`` takes where it can: a part of the identity, since it once took another estimator."""


def solve(
    work: Workspace,
    scores: Artifact,
    *,
    reward: str,
    constraints: Mapping[str, Constraint],
    beta: float,
    log_weight: str | None = None,
) -> Artifact:
    """Return the artifact of the dual's solution (``solution.json``).

    ``log_weight`` names a column of log-weights, such as ``logp.reference`` over an enumerated set of responses;
    without it all responses weigh the same, as samples do.

    The estimator and the confidence are those of the configuration's ``solve`` section.

    Raises:
        InfeasibleConstraint: The margins cannot be met; the message names those that can. Nothing is trained.
    """
    margins = [Margin(name, c.margin, c.threshold, c.equal) for name, c in constraints.items()]
    options = work.config.solve
    identity_keys = {
        **identity(options),
        **({"auto": AUTO} if options.estimator == "auto" else {}),
        "reward": reward,
        "constraints": {m.name: {"margin": m.margin, "threshold": m.threshold, "equal": m.equal} for m in margins},
        "beta": beta,
        "log_weight": log_weight,
    }
    stage = work.open("solve", "dual", identity_keys, {"scores": scores})
    if stage.finished:
        return stage.finished
    with work.timed("solve", "dual"):
        table = scores.table
        arrays = score_arrays(table, reward, list(constraints), str(scores.path))
        weights = None if log_weight is None else table.column(log_weight).to_numpy()
        rows = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, weights, names=list(constraints))
        nats = margins_in_nats(rows, margins, scores.info.get("scorers", {}))
        try:
            solution = solve_table(
                rows, beta=beta, constraints=margins, estimator=options.estimator, confidence=options.confidence
            )
        except InfeasibleConstraint as error:
            raise InfeasibleConstraint("\n  ".join([str(error), *nats])) from None
        write_json(stage.path / SOLUTION, solution.to_dict())
        work.say(" ".join([describe(solution), *nats]))
        return stage.commit([SOLUTION], info={"lam": solution.to_dict()["lam"]})


def load_solution(artifact: Artifact) -> DualSolution:
    """Return the solution of a ``solve`` artifact."""
    return DualSolution.from_dict(artifact.read_json(SOLUTION))


def describe(solution: DualSolution) -> str:
    """Return a line for people: λ*, its estimator, the amount added to the margins, and the verdict."""
    lam = ", ".join(
        f"{name} {value:.4f}" + (f" ({', '.join(beside)})" if (beside := lam_error(solution, name)) else "")
        for name, value in solution.lam.items()
    )
    reason = f" ({solution.estimator_reason})" if solution.estimator_reason else ""
    parts = [f"λ* = {lam}", f"estimator {solution.estimator}{reason}"]
    if solution.confidence is not None:
        raised = ", ".join(f"{name} by {value:.4g}" for name, value in solution.safety_margin.items())
        parts.append(f"margins raised for confidence {solution.confidence:g}: {raised}")
    return " ".join(["; ".join([*parts, solution.diagnostics["verdict"]]), *misread_hints(solution)])
