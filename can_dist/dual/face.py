"""A solution as a small HTML table, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from can_dist.dual.belief.level import stated
from can_dist.dual.solution import DualSolution

HEADER = ("constraint", "λ*", "margin", "predicted improvement")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str]) -> str:
    """Return a table and the sentences below it as HTML; every text is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{said}"


def solution_html(solution: DualSolution) -> str:
    """Return λ*, the margin and the predicted improvement ± its standard error by constraint, and the verdict."""
    return html_table(HEADER, solution_rows(solution), [stated(solution.diagnostics)])


def solution_rows(solution: DualSolution) -> list[list[str]]:
    """Return a row of texts for each constraint, and one for the reward, which has neither λ nor margin."""
    predicted = solution.predicted
    rows = [
        [
            name,
            with_error(lam, solution.lam_se[name], ".4g"),
            f"{solution.margin[name]:+.4g}",
            with_error(predicted["improvement"][name]["mean"], predicted["improvement"][name]["se"], "+.4g"),
        ]
        for name, lam in solution.lam.items()
    ]
    gain, error = predicted["reward_improvement"], predicted["reward_improvement_se"]
    return [*rows, ["reward", "", "", with_error(gain, error, "+.4g")]]


def with_error(value: float, error: float, form: str) -> str:
    """Return a number with its standard error, where it has one; '' for a number that does not exist."""
    if value != value:  # NaN
        return ""
    return f"{value:{form}} ± {error:.2g}" if error == error and error > 0 else f"{value:{form}}"
