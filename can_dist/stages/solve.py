"""scores → DualSolution: λ* = argmin_{λ≥0} D(λ), on the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.dual import (
    Column,
    Demand,
    DualSolution,
    Margin,
    ScoreTable,
    Settled,
    columns_from,
    demands_of,
    settle,
    solve_table,
)
from can_dist.dual.belief.level import stated
from can_dist.dual.messages import lam_error, misread_hints
from can_dist.errors import InfeasibleConstraint
from can_dist.scoring.log_ratio import margins_in_nats
from can_dist.stages.samples import beginnings
from can_dist.stages.utilities import column_keys, columns_of
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.tables.scores import score_arrays
from can_dist.tables.utilities import with_utilities
from can_dist.workspace import BELIEF, SOLUTION, Workspace

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
    options, columns = work.config.solve, columns_of(constraints)
    identity_keys = {
        **identity(options),
        **({"auto": AUTO} if options.estimator == "auto" else {}),
        "reward": reward,
        "constraints": {m.name: {"margin": m.margin, "threshold": m.threshold, "equal": m.equal} for m in margins},
        "beta": beta,
        "log_weight": log_weight,
        **column_keys(columns),
    }
    stage = work.open("solve", "dual", identity_keys, {"scores": scores})
    if stage.finished:
        return stage.finished
    with work.timed("solve", "dual"):
        settled = _settled(scores, reward, columns, margins, beta, log_weight)
        rows = score_table(scores.table, reward, settled.columns, log_weight, str(scores.path))
        nats = margins_in_nats(rows, margins, scores.info.get("scorers", {}))
        try:
            solution = solve_table(
                rows,
                beta=beta,
                constraints=settled.constraints,
                estimator=options.estimator,
                confidence=options.confidence,
            )
        except InfeasibleConstraint as error:
            raise InfeasibleConstraint("\n  ".join([str(error), *nats])) from None
        derived = {"columns": settled.to_dict()} if settled.is_derived else {}
        write_json(stage.path / SOLUTION, solution.to_dict() | derived)
        write_belief(rows, solution, stage.path, scores, reward=reward)
        work.say(" ".join([describe(solution), *nats, *(f"{line}." for line in settled.lines())]))
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


def _settled(
    scores: Artifact,
    reward: str,
    columns: Sequence[Column],
    margins: Sequence[Margin],
    beta: float,
    log_weight: str | None,
) -> Settled:
    """Return the columns with the τ of every CVaR; the table is read for it only where there is one."""
    if all(column.of != "cvar" for column in columns):
        return Settled(tuple(columns), tuple(margins), {})
    place = str(scores.path)
    table = with_utilities(scores.table, columns, place)
    arrays = score_arrays(table, reward, [column.name for column in columns], place)
    weight_N = None if log_weight is None else table.column(log_weight).to_numpy()
    return settle(
        columns, margins, arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, beta=beta, log_weight_N=weight_N
    )


def solved_columns(solution: Artifact) -> tuple[Column, ...]:
    """Return what the constraints of a solution are on, a CVaR with the τ that it was solved at."""
    record = solution.read_json(SOLUTION)
    if derived := record.get("columns"):
        return columns_from(derived)
    return tuple(Column(name, (name,)) for name in record["lam"])


def demands(solution: Artifact) -> tuple[Demand, ...]:
    """Return what a solution's constraints ask of a policy; a threshold is an improvement over its table's mean.

    A CVaR is demanded of the mean of its column at the τ that it was solved at, which is never larger.
    """
    levels = {name: row["demanded"] for name, row in (solution.read_json(SOLUTION).get("columns") or {}).items()}
    margins = [
        Margin(name, **demand) if levels.get(name) is None else Margin(name, threshold=levels[name])
        for name, demand in solution.manifest["identity"]["constraints"].items()
    ]
    return demands_of(solved_table(solution), margins)


def cvar_offset(solution: Artifact) -> dict[str, float]:
    """Return, for every constraint on a CVaR, by how much the reference's CVaR is above the mean of its column.

    A gain of the CVaR is one of that mean, less this: it is 0 where the column is at the reference's own τ.
    """
    record, solved = solution.read_json(SOLUTION), load_solution(solution)
    rows: dict[str, dict[str, float]] = record.get("columns") or {}
    return {name: row["reference_cvar"] - solved.centre[name] for name, row in rows.items() if row["tau"] is not None}


def solved_table(solution: Artifact) -> ScoreTable:
    """Return the table of scores that a solution was solved on."""
    identity, scores = solution.manifest["identity"], solution.input("scores")
    columns = solved_columns(solution)
    return score_table(scores.table, identity["reward"], columns, identity["log_weight"], str(scores.path))


def labelled_lam(preferences: Artifact, solution: Artifact) -> Mapping[str, float]:
    """Return λ that examples were labelled by: the one that was given, or that of the solution."""
    given: Mapping[str, float] | None = preferences.manifest["identity"].get("lam")
    return load_solution(solution).lam if given is None else given


def score_table(
    rows: pa.Table, reward: str, columns: Sequence[Column], log_weight: str | None, source: str
) -> ScoreTable:
    """Return the reward and the constraints' utilities of a table of scores, as the dual reads them."""
    names = [column.name for column in columns]
    arrays = score_arrays(with_utilities(rows, columns, source), reward, names, source)
    weights = None if log_weight is None else rows.column(log_weight).to_numpy()
    return ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, weights, names=names)
