"""A run as a small HTML table, for notebooks: its last solution beside its last evaluation."""

from __future__ import annotations

from pathlib import Path

from can_dist.dual.belief.level import stated
from can_dist.dual.face import HEADER, html_table, solution_rows
from can_dist.errors import DataError
from can_dist.measuring.verdicts import verdict_line
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact
from can_dist.workspace import SOLUTION


def run_html(directory: Path) -> str:
    """Return λ*, margins, what was predicted and what was measured of the last policy, and both verdicts."""
    solved, evaluated = last_artifact(directory, "solve"), last_artifact(directory, "evaluate")
    if solved is None and evaluated is None:
        return html_table([str(directory)], [], ["Nothing is solved or measured yet."])
    solution = None if solved is None else solved.read_json(SOLUTION)
    rows = [] if solution is None else solution_rows(solution)
    sentences = [str(directory)] if solution is None else [str(directory), stated(solution["diagnostics"])]
    if evaluated is not None:
        sentences += [f"{verdict_line(row)}." for row in evaluated.info["constraints"]]
    return html_table(HEADER, rows, sentences)


def last_artifact(directory: Path, stage: str) -> Artifact | None:
    """Return the newest finished artifact of a stage in a run directory, or None."""
    for manifest in sorted(
        directory.glob(f"{stage}-*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        try:
            return load_artifact(manifest.parent)
        except DataError:  # `verify` reports it
            continue
    return None
