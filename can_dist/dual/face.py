"""A solution as a small HTML table, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from can_dist.dual.belief.level import stated

HEADER = ("constraint", "λ*", "margin", "predicted improvement")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str]) -> str:
    """Return a table and the sentences below it as HTML; every text is escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{said}"


def solution_html(solution: Mapping[str, Any]) -> str:
    """Return λ*, the margin and the predicted improvement ± its standard error by constraint, and the verdict.

    Args:
        solution: ``DualSolution.to_dict()``.
    """
    return html_table(HEADER, solution_rows(solution), [stated(solution["diagnostics"])])


def solution_rows(solution: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of texts for each constraint, and one for the reward, which has neither λ nor margin."""
    predicted = solution["predicted"]
    rows = [
        [
            name,
            with_error(lam, solution["lam_se"][name], ".4g"),
            with_error(solution["margin"][name], None, "+.4g"),
            with_error(predicted["improvement"][name]["mean"], predicted["improvement"][name]["se"], "+.4g"),
        ]
        for name, lam in solution["lam"].items()
    ]
    gain, error = predicted["reward_improvement"], predicted["reward_improvement_se"]
    return [*rows, ["reward", "", "", with_error(gain, error, "+.4g")]]


def with_error(value: float | None, error: float | None, form: str) -> str:
    """Return a number with its standard error, where it has one; '' for a number that does not exist."""
    if value is None:
        return ""
    return f"{value:{form}} ± {error:.2g}" if error else f"{value:{form}}"
