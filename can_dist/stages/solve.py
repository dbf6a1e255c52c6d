"""scores → DualSolution: λ* = argmin_{λ≥0} D(λ), on the driver."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pyarrow as pa

from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.dual import Demand, DualSolution, Margin, ScoreTable, demands_of, solve_table
from can_dist.dual.belief.level import stated
from can_dist.dual.messages import lam_error, misread_hints
from can_dist.errors import InfeasibleConstraint
from can_dist.scoring.log_ratio import margins_in_nats
from can_dist.stages.samples import beginnings
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.tables.scores import score_arrays
from can_dist.workspace import Workspace

SOLUTION = "solution.json"

BELIEF = "belief.html"
"""The page of a solution: beside it, and in no manifest, since it decides nothing."""

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
    """Return the artifact of the dual's solution (``solution.json``), with its page (``belief.html``) beside.

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
        rows = score_table(scores.table, reward, list(constraints), log_weight, str(scores.path))
        nats = margins_in_nats(rows, margins, scores.info.get("scorers", {}))
        try:
            solution = solve_table(
                rows, beta=beta, constraints=margins, estimator=options.estimator, confidence=options.confidence
            )
        except InfeasibleConstraint as error:
            raise InfeasibleConstraint("\n  ".join([str(error), *nats])) from None
        write_json(stage.path / SOLUTION, solution.to_dict())
        write_belief(rows, solution, stage.path, scores, reward=reward)
        work.say(" ".join([describe(solution), *nats]))
        return stage.commit([SOLUTION], info={"lam": solution.to_dict()["lam"]})


def write_belief(table: ScoreTable, solution: DualSolution, directory: Path, scores: Artifact, *, reward: str) -> None:
    """Write the page of a solution into its directory: can its prediction be believed?"""
    from can_dist.reporting.belief_page import write_diagnostics

    texts = partial(beginnings, scores)
    write_diagnostics(table, solution, directory / BELIEF, reward_name=reward, texts=texts)


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
    return " ".join(["; ".join([*parts, stated(solution.diagnostics)]), *misread_hints(solution)])


def demands(solution: Artifact) -> tuple[Demand, ...]:
    """Return what a solution's constraints ask of a policy; a threshold is an improvement over its table's mean."""
    margins = [Margin(name, **demand) for name, demand in solution.manifest["identity"]["constraints"].items()]
    return demands_of(solved_table(solution), margins)


def solved_table(solution: Artifact) -> ScoreTable:
    """Return the table of scores that a solution was solved on."""
    identity, scores = solution.manifest["identity"], solution.input("scores")
    names = list(identity["constraints"])
    return score_table(scores.table, identity["reward"], names, identity["log_weight"], str(scores.path))


def labelled_lam(preferences: Artifact, solution: Artifact) -> Mapping[str, float]:
    """Return λ that examples were labelled by: the one that was given, or that of the solution."""
    given: Mapping[str, float] | None = preferences.manifest["identity"].get("lam")
    return load_solution(solution).lam if given is None else given


def score_table(rows: pa.Table, reward: str, names: list[str], log_weight: str | None, source: str) -> ScoreTable:
    """Return the reward and the utilities ``names`` of a table of scores, as the dual reads them."""
    arrays = score_arrays(rows, reward, names, source)
    weights = None if log_weight is None else rows.column(log_weight).to_numpy()
    return ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, weights, names=names)
