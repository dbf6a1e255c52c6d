"""Constraints on tails through the stages: each reads the utility that the dual was solved for, made from scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from can_dist.config import Config, validate_config
from can_dist.dual import Column, Margin, settle, solve_table
from can_dist.errors import DataError
from can_dist.measuring.certificate import Demand
from can_dist.measuring.gains import by_prompt, column, constraint_row
from can_dist.outcomes.stretch import _replaced
from can_dist.stages import certify
from can_dist.stages.label import label
from can_dist.stages.slack import measure
from can_dist.stages.solve import cvar_offset, demands, load_solution, score_table, solve, solved_columns, solved_table
from can_dist.stages.utilities import columns_of, measured
from can_dist.stages.watch import Watched, watch_spec
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import LOGP_REFERENCE, RESPONSES
from can_dist.tables.utilities import with_utilities
from can_dist.workspace import Workspace

BETA, NUM_PROMPTS, NUM_RESPONSES, ALPHA = 0.8, 60, 6, 0.2
RNG = np.random.default_rng(5)
REWARD, SECOND, NOISE = RNG.normal(size=(3, NUM_PROMPTS * NUM_RESPONSES))
FIRST = NOISE - 0.5 * REWARD
PROMPTS = [f"p{number // NUM_RESPONSES:02}" for number in range(REWARD.size)]
SCORER, OTHER = ({"kind": "callable", "function": f"scorers:{name}"} for name in ("num_calm", "num_words"))
OF: dict[str, dict[str, Any]] = {
    "rectified": {"of": "rectified", "level": 0.3},
    "worst_of": {"of": "worst_of", "others": {"second": OTHER}},
    "cvar": {"of": "cvar", "alpha": ALPHA},
}


def configure(constraint: dict[str, Any]) -> Config:
    return validate_config(
        {
            "prompts": {"source": "prompts.jsonl"},
            "reference": {"model": "lm"},
            "reward": SCORER,
            "constraints": {"safety": {"scorer": SCORER, "margin": 0.2} | constraint},
            "beta": BETA,
        }
    )


def scores_of(reward: np.ndarray = REWARD, first: np.ndarray = FIRST, second: np.ndarray = SECOND) -> pa.Table:
    ids = [f"{prompt}/{number}" for number, prompt in enumerate(PROMPTS)]
    columns = {"reward": reward, "safety": first, "safety.second": second, LOGP_REFERENCE: -np.ones(reward.size)}
    finish = {"num_tokens": [3] * reward.size, "finish_reason": ["stop"] * reward.size}
    return pa.table({"prompt_id": PROMPTS, "response_id": ids, **columns, **finish})


def artifacts(work: Workspace) -> tuple[Artifact, Artifact]:
    """Finished responses and scores of the reference."""
    table = scores_of()
    rows = [
        {
            "prompt_id": row["prompt_id"], "response_id": row["response_id"],
            "messages": [{"role": "user", "content": row["prompt_id"]}], "text": f"answer {number}",
            "token_ids": [number, 1, 2], "num_tokens": 3, "finish_reason": "stop",
        }
        for number, row in enumerate(table.to_pylist())
    ]  # fmt: skip
    stage = open_stage(work.directory, "generate", "reference", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
    responses = stage.commit()
    stage = open_stage(work.directory, "scores", "reference", {}, {"responses": responses})
    write_part(stage.path, 0, table)
    scorers = {name: {"kind": "callable", "sign": 1} for name in ("reward", "safety", "safety.second")}
    return responses, stage.commit(info={"scorers": scorers})


def solved(work: Workspace, scores: Artifact) -> Artifact:
    return solve(work, scores, reward="reward", constraints=work.config.constraints, beta=BETA)


def by_hand(of: str, tau: float = 0.0) -> np.ndarray:
    if of == "cvar":
        return tau - np.maximum(tau - FIRST, 0) / ALPHA
    return np.minimum(FIRST - 0.3, 0) if of == "rectified" else np.minimum(FIRST, SECOND)


def tail_mean(score: np.ndarray, weight: np.ndarray) -> float:
    """Fill the worst share α from below."""
    order = np.argsort(score)
    share = np.diff(np.minimum(np.cumsum(weight[order] / weight.sum()), ALPHA), prepend=0.0)
    return float(share @ score[order] / ALPHA)


@pytest.mark.parametrize("of", OF)
def test_every_stage_reads_the_utility_that_was_solved_for(of: str, tmp_path: Path) -> None:
    work = Workspace(tmp_path, configure(OF[of]))
    responses, scores = artifacts(work)
    solution = solved(work, scores)
    (made,) = solved_columns(solution)
    utility, lam = by_hand(of, made.tau or 0.0), load_solution(solution).lam["safety"]
    assert lam > 0
    expected = solve_table(
        score_table(scores_of().set_column(3, "safety", pa.array(utility)), "reward", [Column("safety", ("safety",))],
                    None, "here"),
        beta=BETA, constraints=_demanded(solution),
    )  # fmt: skip
    assert lam == expected.lam["safety"]
    np.testing.assert_allclose(solved_table(solution).mean_utility_JP[0], utility.reshape(NUM_PROMPTS, -1).mean(1))
    # labels: r + λg', less the best of the prompt
    table = label(work, responses, scores, solution, reward="reward", beta=BETA).table.to_pylist()
    total = dict(zip(scores_of()["response_id"].to_pylist(), REWARD + lam * utility, strict=True))
    for row in table[:50]:
        score = np.array([total[name] for name in row["response_ids"]])
        np.testing.assert_allclose(row["target"], score - score.max(), atol=1e-6)
    # what the ranks are told, and what is demanded of a policy
    spec = watch_spec(Watched(solution, scores), label(work, responses, scores, solution, reward="reward", beta=BETA),
                      work.config.train, 10)  # fmt: skip
    assert spec is not None
    assert spec.columns == (made,)
    assert type(spec).model_validate_json(spec.model_dump_json()).columns == (made,)
    (demand,) = demands(solution)
    asked = 0.2 if of != "cvar" else tail_mean(FIRST, np.ones(FIRST.size)) + 0.2 - utility.mean()
    assert demand.margin == pytest.approx(asked)
    work.close()


def _demanded(solution: Artifact) -> list[Margin]:
    level = solution.read_json("solution.json")["columns"]["safety"]["demanded"]
    return [Margin("safety", margin=0.2) if level is None else Margin("safety", threshold=level)]


def test_the_policy_of_a_cvar_has_it_by_sorting_and_its_lambda_is_the_duals(tmp_path: Path) -> None:
    config = configure(OF["cvar"] | {"margin": 0.3})
    config = config.model_copy(update={"solve": config.solve.model_copy(update={"estimator": "empirical"})})
    work = Workspace(tmp_path, config)
    _, scores = artifacts(work)
    solution = solved(work, scores)
    (made,) = solved_columns(solution)
    columns, demanded = columns_of(config.constraints), [Margin("safety", margin=0.3)]
    settled = settle(columns, demanded, REWARD, FIRST[:, None], np.array(PROMPTS), beta=BETA)
    assert made == settled.columns[0]
    lam = load_solution(solution).lam["safety"]
    score = (REWARD + lam * made.values([FIRST])).reshape(NUM_PROMPTS, -1) / BETA
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    weight /= weight.sum(axis=1, keepdims=True)
    before = tail_mean(FIRST, np.ones(FIRST.size))
    assert tail_mean(FIRST, weight.ravel()) == pytest.approx(before + 0.3, abs=1e-6)
    assert cvar_offset(solution)["safety"] == pytest.approx(before - made.values([FIRST]).mean())
    (asked,) = _replaced(demands(solution), {"": 0.5}, cvar_offset(solution))
    assert asked.margin == pytest.approx(before + 0.5 - made.values([FIRST]).mean()), "a margin of the CVaR"
    work.close()


def test_the_solution_of_a_mean_is_named_and_written_as_before(tmp_path: Path) -> None:
    work = Workspace(tmp_path, configure({}))
    solution = solved(work, artifacts(work)[1])
    assert "columns" not in solution.manifest["identity"]
    assert "columns" not in solution.read_json("solution.json")
    assert solved_columns(solution) == (Column("safety", ("safety",)),)
    other = solved(Workspace(tmp_path / "other", configure(OF["cvar"])), artifacts(work)[1])
    assert other.manifest["identity"]["columns"]["safety"]["alpha"] == ALPHA
    work.close()


@pytest.mark.parametrize("of", ["rectified", "worst_of"])
def test_slack_is_measured_of_the_same_utility(of: str, tmp_path: Path) -> None:
    work = Workspace(tmp_path, configure(OF[of]))
    _, scores = artifacts(work)
    stage = open_stage(tmp_path, "scores", "policy", {}, {})
    write_part(stage.path, 0, scores_of(first=FIRST + 0.4, second=SECOND + 0.4))
    after = stage.commit()
    measurement = measure(work, after, scores, work.config.constraints, reward="reward").info["constraints"]["safety"]
    moved = np.minimum(FIRST + 0.1, 0) if of == "rectified" else by_hand(of) + 0.4
    assert measurement["improvement"] == pytest.approx((moved - by_hand(of)).mean())
    work.close()


@pytest.mark.parametrize("of", OF)
def test_fresh_responses_are_measured_by_their_own_tail(of: str) -> None:
    (made,) = columns_of(configure(OF[of]).constraints)
    value = column(measured(scores_of(), [made], "here"), "safety")
    expected = tail_mean(FIRST, np.ones(FIRST.size)) if of == "cvar" else by_hand(of).mean()
    assert value.mean() == pytest.approx(expected)
    before, after = (measured(scores_of(first=FIRST + up, second=SECOND + up), [made], "here") for up in (0.0, 0.4))
    row = constraint_row("safety", configure(OF[of]).constraints["safety"], before, after)
    if of == "cvar":
        assert row["realised"]["mean"] == pytest.approx(0.4)
    assert row["centre"] == pytest.approx(expected)


@pytest.mark.parametrize("is_margin", [True, False])
def test_a_certificate_promises_no_more_than_the_tail(is_margin: bool) -> None:
    (made,) = columns_of(configure(OF["cvar"]).constraints)
    tables = {"policy": scores_of(first=FIRST[::-1] + 0.4), "reference": scores_of()}
    value_P = certify._values(tables, made, Demand(0.1, is_margin))
    own = tail_mean(FIRST[::-1] + 0.4, np.ones(FIRST.size))
    reference = tail_mean(FIRST, np.ones(FIRST.size)) if is_margin else 0.0
    assert value_P.shape == (NUM_PROMPTS,)
    assert value_P.mean() <= own - reference + 1e-12
    assert value_P.mean() == pytest.approx(own - reference, abs=0.05), "another half's tau is near the best"
    prompts, _ = by_prompt(tables["policy"], FIRST)
    halves = np.isin(np.array(PROMPTS), prompts[::2])
    policy = FIRST[::-1] + 0.4
    tau = np.sort(policy[~halves])[int(np.ceil(ALPHA * (~halves).sum())) - 1]
    expected = (tau - np.maximum(tau - policy, 0) / ALPHA).reshape(NUM_PROMPTS, -1).mean(axis=1)[::2]
    reference_tau = np.sort(FIRST)[int(np.ceil(ALPHA * FIRST.size)) - 1]
    less = (reference_tau - np.maximum(reference_tau - FIRST, 0) / ALPHA).reshape(NUM_PROMPTS, -1).mean(axis=1)[::2]
    np.testing.assert_allclose(value_P[::2], expected - (less if is_margin else 0.0))


def test_a_source_that_is_missing_is_named() -> None:
    (made,) = columns_of(configure(OF["worst_of"]).constraints)
    with pytest.raises(DataError, match=r"here: no column 'safety.second', of which constraint 'safety' \(worst_of\)"):
        with_utilities(scores_of().drop_columns(["safety.second"]), [made], "here")
