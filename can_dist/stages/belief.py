"""A solution's own page, written before anything is trained, and the gate that ``solve.require`` sets on it."""

from __future__ import annotations

from pathlib import Path

from can_dist.dual.belief.level import LEVELS, level_of, stated
from can_dist.errors import NotBelieved
from can_dist.stages.solve import load_solution, solved_table, write_belief
from can_dist.tables.artifacts import Artifact, write_text
from can_dist.workspace import BELIEF, Workspace


def belief_page(solution: Artifact) -> Path:
    """Return the page of a finished solution; one that older code left without is given it."""
    if not (solution.path / BELIEF).is_file():
        reward = solution.manifest["identity"]["reward"]
        table, scores = solved_table(solution), solution.input("scores")
        write_belief(table, load_solution(solution), solution.path, scores, reward=reward)
    return solution.path / BELIEF


def believed(work: Workspace, solution: Artifact) -> Artifact:
    """Return a solution that is believed as far as ``solve.require`` asks; the run's page becomes that of it.

    Raises:
        NotBelieved: its table cannot vouch for the prediction as far. Nothing is trained.
    """
    page, required = work.directory / BELIEF, work.config.solve.require
    diagnostics = load_solution(solution).diagnostics
    level = level_of(diagnostics)
    passes = required == "none" or LEVELS.index(level) >= LEVELS.index(required)
    if not work.rank:
        page.unlink(missing_ok=True)  # it may be that of another solution, and older code left none to this one
        if not passes or (solution.path / BELIEF).is_file():
            write_text(page, belief_page(solution).read_text(encoding="utf-8"))
    if not passes:
        raise NotBelieved(
            f"solve.require is {required}, and the prediction of {solution.path.name} is {level}. "
            f"{stated(diagnostics)} The page: {page}. Nothing was trained.",
            "Do what it says, ask for a smaller margin, or lower solve.require.",
        )
    return solution
