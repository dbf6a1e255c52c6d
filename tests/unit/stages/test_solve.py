"""The solve stage: what of the configuration reaches the dual, what makes a stage a new one, what people are told."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from can_dist.config import validate_config
from can_dist.config.base import identity
from can_dist.dual import Column, DualSolution, Margin, solve_dual
from can_dist.dual.belief.level import level_of, stated
from can_dist.errors import NotBelieved
from can_dist.stages.belief import belief_page, believed
from can_dist.stages.solve import describe, load_solution, score_table, solve
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.workspace import BELIEF, Workspace

BETA = 0.8
SCORER = {"kind": "callable", "function": "builtins:len"}
FIRST, SECOND = np.random.default_rng(0).normal(size=(2, 240))
PROMPT = np.repeat(np.arange(30), 8)
SAFETY = SECOND - 0.4 * FIRST - 1.6


@pytest.fixture
def without_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the page, which costs a dozen solves, of tests that solve several times for another reason."""
    monkeypatch.setattr("can_dist.stages.solve.write_belief", lambda *_, **__: None)


def config(constraint: dict[str, Any], options: dict[str, Any]) -> Any:
    return validate_config(
        {
            "prompts": {"source": "prompts.jsonl", "num_validation": 0},
            "strength": 1,
            "reference": {"model": "lm"},
            "reward": SCORER,
            "constraints": {"safety": {"scorer": SCORER, **constraint}},
            "beta": BETA,
            "solve": options,
        }
    )


@contextmanager
def workspace(directory: Path, settings: Any, num_prompts: int = 30) -> Iterator[tuple[Workspace, Artifact]]:
    """A run directory with finished scores."""
    work = Workspace(directory, settings)
    stage = open_stage(directory, "scores", "reference", {}, {})
    if not stage.finished:
        reward, other = (
            (FIRST, SECOND) if num_prompts == 30 else np.random.default_rng(0).normal(size=(2, num_prompts * 8))
        )
        ids = np.repeat(np.arange(num_prompts), 8)
        write_part(stage.path, 0, pa.table({"prompt_id": ids, "reward": reward, "safety": other - 0.4 * reward - 1.6}))
    yield work, stage.finished or stage.commit()
    work.close()


def solved(directory: Path, constraint: dict[str, Any], **options: Any) -> Artifact:
    settings = config(constraint, options)
    with workspace(directory, settings) as (work, scores):
        return solve(work, scores, reward="reward", constraints=settings.constraints, beta=BETA)


def expected(constraint: Margin, **options: Any) -> DualSolution:
    return solve_dual(FIRST, SAFETY, PROMPT, beta=BETA, constraints=[constraint], **options)


@pytest.mark.usefixtures("without_page")
@pytest.mark.parametrize(
    ("constraint", "options"),
    [
        ({"margin": 0.3}, {}),
        ({"threshold": -1.2}, {}),
        ({"margin": 0.3}, {"estimator": "jackknife"}),
        ({"margin": 0.3}, {"estimator": "auto"}),
        ({"margin": 0.3}, {"confidence": 0.9}),
        ({"threshold": -1.2}, {"estimator": "gaussian", "confidence": 0.9}),
        ({"margin": -0.9, "equal": True}, {}),
    ],
)
def test_the_configuration_reaches_the_solver(
    tmp_path: Path, constraint: dict[str, Any], options: dict[str, Any]
) -> None:
    found = load_solution(solved(tmp_path, constraint, **options))
    assert found.to_dict() == expected(Margin("safety", **constraint), **options).to_dict()


@pytest.mark.usefixtures("without_page")
def test_what_changes_the_solution_is_a_new_artifact(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"margin": 0.3}, {}),
        ({"margin": 0.3}, {"estimator": "gaussian"}),
        ({"margin": 0.3}, {"confidence": 0.9}),
        ({"margin": 0.3}, {"confidence": 0.95}),
        ({"margin": 0.3, "equal": True}, {}),
    ]
    paths = [solved(tmp_path, constraint, **options).path for constraint, options in cases]
    assert len(set(paths)) == len(cases)


@pytest.mark.usefixtures("without_page")
def test_the_same_configuration_is_solved_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = solved(tmp_path, {"margin": 0.3}, confidence=0.9)
    capsys.readouterr()
    assert solved(tmp_path, {"margin": 0.3}, confidence=0.9).digest == first.digest
    assert f"solve (dual): reusing {first.path.name}" in capsys.readouterr().err


@pytest.mark.parametrize(("beta", "level"), [(0.8, "not trusted"), (20.0, "trusted")])
def test_the_gate_lets_through_what_is_believed_as_far(tmp_path: Path, beta: float, level: str) -> None:
    """30 prompts of 8 responses vouch for nothing; 220 with a large β do."""
    settings = config({"margin": 0.05}, {})
    with workspace(tmp_path, settings, num_prompts=220 if level == "trusted" else 30) as (work, scores):
        solution = solve(work, scores, reward="reward", constraints=settings.constraints, beta=beta)
        diagnostics = load_solution(solution).diagnostics
        assert level_of(diagnostics) == level
        for required in ("none", "roughly", "trusted"):
            work.config = config({"margin": 0.05}, {"require": required})
            if required == "none" or level == "trusted":
                assert believed(work, solution) is solution
                continue
            with pytest.raises(
                NotBelieved, match=r"the prediction of solve-\w+ is not trusted. Do not trust "
            ) as refused:
                believed(work, solution)
            assert f"The page: {tmp_path / BELIEF}. Nothing was trained." in str(refused.value)
            assert refused.value.exit_code == 8
        page = (tmp_path / BELIEF).read_text(encoding="utf-8")
        assert stated(diagnostics) in html.unescape(page)


def test_the_page_is_there_before_the_solution_is_and_is_given_to_older_ones(tmp_path: Path) -> None:
    solution = solved(tmp_path, {"margin": 0.3})
    page = solution.path / BELIEF
    assert BELIEF not in {entry["file"] for entry in solution.manifest["files"]}
    text = page.read_text(encoding="utf-8")
    page.unlink()
    with workspace(tmp_path, config({"margin": 0.3}, {})) as (work, _):
        (tmp_path / BELIEF).write_text("of another solution")
        believed(work, solution)  # one that older code solved is not examined unasked
        assert not page.exists()
        assert not (tmp_path / BELIEF).exists()
    assert belief_page(solution).read_text(encoding="utf-8") == text


@pytest.mark.usefixtures("without_page")
def test_what_is_required_changes_no_solution(tmp_path: Path) -> None:
    assert solved(tmp_path, {"margin": 0.3}).path == solved(tmp_path, {"margin": 0.3}, require="none").path
    assert identity(config({"margin": 0.3}, {"require": "trusted"}).solve) == identity(
        config({"margin": 0.3}, {}).solve
    )


def test_description_of_a_plain_solution() -> None:
    solution = expected(Margin("safety", 0.3))
    lam, error, paper = (values["safety"] for values in (solution.lam, solution.lam_se, solution.lam_paper))
    beside = f"SE {error:.2g}, bias unknown, paper's {paper:.4g}"  # a table that vouches for nothing bounds no bias
    assert describe(solution) == (
        f"λ* = safety {lam:.4f} ({beside}); estimator jackknife; {solution.diagnostics['verdict']}"
    )


def test_description_tells_the_estimator_its_reason_and_the_safety_margin() -> None:
    solution = expected(Margin("safety", 0.3), estimator="auto", confidence=0.9)
    assert (solution.estimator, solution.estimator_reason) == ("jackknife", "")
    text = describe(solution)
    assert "; estimator jackknife; " in text
    reason = replace(solution, estimator_reason="why")
    assert "; estimator jackknife (why); " in describe(reason)
    assert f"; margins raised for confidence 0.9: safety by {solution.safety_margin['safety']:.4g}; " in text
    assert "; estimator gaussian; " in describe(expected(Margin("safety", 0.3), estimator="gaussian"))


def test_description_points_out_a_level_given_as_a_margin() -> None:
    text = describe(expected(Margin("safety", -1.3)))
    assert text.startswith("λ* = safety 0.0000 (paper's 0); ")
    assert "write threshold=-1.3, a margin of" in text


def test_a_table_carries_the_weights_it_was_solved_with() -> None:
    rows = pa.table({"prompt_id": ["a", "a"], "reward": [0.0, 1.0], "safety": [1.0, 0.0], "logp": np.log([0.9, 0.1])})
    columns = [Column("safety", ("safety",))]
    weighted = score_table(rows, "reward", columns, "logp", "here")
    assert weighted.weighted
    np.testing.assert_allclose(np.exp(weighted.log_weight_N), [0.9, 0.1])
    assert not score_table(rows, "reward", columns, None, "here").weighted
