"""The small tables of a notebook: numbers of the solution, its verdict, nothing of a name as HTML."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from solved_run import solved_run

from can_dist.dual import Margin, solve_dual
from can_dist.dual.belief.level import stated
from can_dist.run import Run
from can_dist.stages.face import run_html
from can_dist.stages.solve import load_solution
from can_dist.tables.artifacts import open_stage


def cells(html: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [[unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


@pytest.fixture(scope="module")
def table() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    safety = rng.normal(size=(200, 16))
    reward = rng.normal(size=(200, 16)) - 0.5 * safety
    return {"prompt_id": np.repeat(np.arange(200), 16), "reward": reward.ravel(), "<b>safe": safety.ravel()}


def test_solution_shows_its_numbers_and_verdict_and_escapes_names(table: dict[str, np.ndarray]) -> None:
    solution = solve_dual(table, beta=2.0, constraints=[Margin("<b>safe", margin=0.3)])
    html = solution._repr_html_()
    header, constraint, reward = cells(html)
    gain = solution.predicted["improvement"]["<b>safe"]
    assert header == ["constraint", "λ*", "margin", "predicted improvement"]
    assert constraint[0] == "<b>safe"
    assert "<b>" not in html
    assert constraint[1] == f"{solution.lam['<b>safe']:.4g} ± {solution.lam_se['<b>safe']:.2g}"
    assert constraint[2:] == ["+0.3", f"{gain['mean']:+.4g} ± {gain['se']:.2g}"]
    assert reward[3].startswith(f"{solution.predicted['reward_improvement']:+.4g} ± ")
    assert unescape(html).endswith(f"<p>{stated(solution.diagnostics)}</p>")


def test_numbers_that_do_not_exist_are_left_out(table: dict[str, np.ndarray]) -> None:
    solution = solve_dual(table, beta=2.0, constraints=[Margin("<b>safe", margin=0.3)])
    absent = replace(solution, lam={"<b>safe": float("nan")}, lam_se={"<b>safe": float("nan")})
    assert cells(absent._repr_html_())[1][1] == ""
    at_the_bound = replace(solution, lam={"<b>safe": 0.0}, lam_se={"<b>safe": float("nan")})
    assert cells(at_the_bound._repr_html_())[1][1] == "0"


def test_run_shows_its_last_solution_beside_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    assert "Nothing is solved or measured yet." in run_html(tmp_path / "new")
    directory, solved, config = solved_run(tmp_path)
    row = {"name": "calm", "verdict": "met", "margin": 0.1, "realised": {"mean": 0.3, "low": 0.2, "high": 0.4}}
    open_stage(directory, "evaluate", "policy", {}, {}).commit(info={"constraints": [row]})
    with Run(directory, config) as run:
        html = unescape(run._repr_html_())
    assert cells(html)[1][1].startswith(f"{next(iter(load_solution(solved).lam.values())):.4g}")
    assert html.endswith("<p>calm met: +0.3 [+0.2, +0.4] against a margin of +0.1.</p>")
