"""The measured slack, the step on it, and the record of the steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from exact_run import make_config

from can_dist.algorithms.ascent import next_lam, settled
from can_dist.errors import DataError
from can_dist.stages.slack import _inverse_curvature, measure, step_sizes
from can_dist.stages.solve import solve
from can_dist.stages.trajectory import trajectory
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.workspace import Workspace

RANDOM = np.random.default_rng(5)
NUM_PROMPTS, BETA = 7, 0.8
MARGINS = {"safe": 0.3, "calm": 0.1}


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Workspace]:
    work = Workspace(tmp_path, make_config(BETA, MARGINS, "cdpo"))
    yield work
    work.close()


def scored(work: Workspace, shift: float = 0.0, num_responses: int = 4, num_prompts: int = NUM_PROMPTS) -> Artifact:
    shape = num_prompts * num_responses
    first = RANDOM.normal(size=shape)
    columns = {
        "prompt_id": np.repeat(np.arange(num_prompts), num_responses),
        "num_tokens": np.arange(shape),
        "reward": first,
        "safe": RANDOM.normal(size=shape) - 0.5 * first + shift,
        "calm": RANDOM.normal(size=shape),
    }
    stage = open_stage(work.directory, "scores", "made up", {"draw": float(first[0])}, {})
    write_part(stage.path, 0, pa.table(columns))
    return stage.commit()


def by_prompt(scores: Artifact, name: str) -> np.ndarray:
    """Plain means of each prompt's responses."""
    prompt, value = (scores.table.column(column).to_numpy() for column in ("prompt_id", name))
    return np.array([value[prompt == p].mean() for p in range(NUM_PROMPTS)])


def test_margin_is_measured_by_pairs_of_prompts_and_threshold_alone(work: Workspace) -> None:
    before, after = scored(work, num_responses=3), scored(work, shift=0.5)
    safe, calm = work.config.constraints["safe"], work.config.constraints["calm"]
    constraints = {"safe": safe, "calm": calm.model_copy(update={"margin": None, "threshold": 0.2, "equal": True})}
    found = measure(work, after, before, constraints, reward="reward").read_json("measurement.json")

    gain = by_prompt(after, "safe") - by_prompt(before, "safe")
    root = np.sqrt(NUM_PROMPTS)
    assert found["constraints"]["safe"]["improvement"] == pytest.approx(gain.mean(), abs=1e-12)
    assert found["constraints"]["safe"]["slack"] == pytest.approx(gain.mean() - 0.3, abs=1e-12)
    assert found["constraints"]["safe"]["se"] == pytest.approx(gain.std(ddof=1) / root, abs=1e-12)
    level = by_prompt(after, "calm")
    assert found["constraints"]["calm"]["slack"] == pytest.approx(level.mean() - 0.2, abs=1e-12)
    assert found["constraints"]["calm"]["se"] == pytest.approx(level.std(ddof=1) / root, abs=1e-12)
    assert [found["constraints"][name]["equal"] for name in MARGINS] == [False, True]
    reward = by_prompt(after, "reward") - by_prompt(before, "reward")
    assert found["reward"]["improvement"] == pytest.approx(reward.mean(), abs=1e-12)
    assert (found["num_prompts"], found["num_responses"], found["num_tokens"]) == (7, 28, 27 * 14)


@pytest.mark.parametrize("num_prompts", [NUM_PROMPTS + 1, 1])
def test_other_prompts_or_one_alone_are_refused(work: Workspace, num_prompts: int) -> None:
    before = scored(work, num_prompts=1 if num_prompts == 1 else NUM_PROMPTS)
    with pytest.raises(DataError, match="expected the same ones, and two at least for a standard error"):
        measure(work, scored(work, num_prompts=num_prompts), before, work.config.constraints, reward="reward")


def a_round(lam: float, slack: float, se: float = 0.1, equal: bool = False, number: int = 0) -> Any:
    measured = {"safe": {"slack": slack, "se": se, "equal": equal, "mean": 0.0, "improvement": 0.0}}
    return SimpleNamespace(lam={"safe": lam}, constraints=measured, number=number)


@pytest.mark.parametrize(
    ("lam", "slack", "equal", "expected"),
    [
        (1.0, -0.5, False, 1.2),
        (1.0, 0.5, False, 0.8),
        (0.1, 0.5, False, 0.0),
        (0.1, 0.5, True, -0.1),
    ],
)
def test_lambda_falls_with_the_slack_and_stays_above_zero(
    lam: float, slack: float, equal: bool, expected: float
) -> None:
    assert next_lam(a_round(lam, slack, equal=equal), {"safe": 0.4})["safe"] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("one", "tolerance", "standard_errors", "expected"),
    [
        (a_round(1.0, 0.15), 0.0, 1.0, False),
        (a_round(1.0, -0.15), 0.0, 1.0, False),
        (a_round(1.0, -0.15), 0.0, 2.0, True),
        (a_round(1.0, 0.15), 0.2, 0.0, True),
        (a_round(0.0, 0.9), 0.0, 1.0, True),
        (a_round(0.0, 0.9, equal=True), 0.0, 1.0, False),
        (a_round(0.0, -0.9), 0.0, 1.0, False),
    ],
)
def test_settled(one: Any, tolerance: float, standard_errors: float, expected: bool) -> None:
    assert settled(one, tolerance, standard_errors) is expected


def test_step_size_is_the_inverse_of_the_tables_curvature(work: Workspace) -> None:
    """Against a second difference of ln Σ exp, for one constraint."""
    scores = scored(work, shift=1.0, num_responses=30)
    constraints = {"safe": work.config.constraints["safe"]}
    solution = solve(work, scores, reward="reward", constraints=constraints, beta=BETA)
    lam, step = solution.info["lam"]["safe"], 1e-3
    reward, safe = (scores.table.column(name).to_numpy().reshape(NUM_PROMPTS, -1) for name in ("reward", "safe"))

    def dual(at: float) -> float:
        return float(BETA * np.log(np.exp((reward + at * safe) / BETA).sum(axis=1)).mean())

    curvature = (dual(lam + step) - 2 * dual(lam) + dual(lam - step)) / step**2
    assert lam > 0.1
    assert step_sizes(scores, solution, "1/H", reward="reward")["safe"] == pytest.approx(1 / curvature, rel=1e-4)
    assert step_sizes(scores, solution, 0.25, reward="reward") == {"safe": 0.25}


def test_steps_of_several_constraints_never_overshoot_in_any_units() -> None:
    hessian = np.array([[2.0, 1.2, 0.0], [1.2, 1.0, 0.0], [0.0, 0.0, 0.0]])
    eta = _inverse_curvature(hessian)
    assert eta[2] == 0  # no λ changes a score that never varies
    overshoot = np.linalg.eigvals(np.diag(eta) @ hessian).real.max()
    assert overshoot == pytest.approx(1.0)
    units = np.array([10.0, 0.1, 1.0])
    np.testing.assert_allclose(_inverse_curvature(hessian * np.outer(units, units)), eta / units**2)


def test_trajectory_holds_every_round_and_warns_when_not_settled(
    work: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds = []
    for number, lam in enumerate((0.0, 0.7)):
        policy = open_stage(work.directory, "train", "policy", {"number": number}, {}).commit()
        measurement = measure(work, scored(work), scored(work), work.config.constraints, reward="reward")
        rounds.append(
            SimpleNamespace(
                lam={"safe": lam, "calm": 0.0},
                policy=policy,
                measurement=measurement,
                constraints=measurement.info["constraints"],
            )
        )
    found = trajectory(work, rounds, is_settled=False)
    record = json.loads((found.path / "trajectory.json").read_text())
    assert (record["method"], record["settled"]) == ("cdpo", False)
    assert [one["lam"] for one in record["rounds"]] == [one.lam for one in rounds]
    assert [one["policy"] for one in record["rounds"]] == [one.policy.path.name for one in rounds]
    assert record["rounds"][1]["constraints"] == rounds[1].measurement.info["constraints"]
    picture = (found.path / "trajectory.svg").read_text()
    assert all(text in picture for text in ("measured slack", "safe", "calm"))
    told = capsys.readouterr().err
    assert "cdpo: warning: after 2 round(s) the safety has not settled: slack of safe" in told
    assert "Allow more rounds, or lower the step size" in told
    trajectory(work, rounds, is_settled=True)
    assert "warning" not in capsys.readouterr().err
