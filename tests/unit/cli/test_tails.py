"""``can-dist solve`` and ``frontier`` with constraints on tails: one spelling, one answer in every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.errors import ConfigError, DataError

NUM_PROMPTS, NUM_RESPONSES = 120, 16


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(2)
    harm, toxic, noise = rng.normal(size=(3, NUM_PROMPTS * NUM_RESPONSES))
    columns = {"reward": noise - 0.4 * harm, "harm": harm, "toxic": toxic, "cost": -harm}
    ids = np.repeat([f"p{number}" for number in range(NUM_PROMPTS)], NUM_RESPONSES)
    pq.write_table(pa.table({"prompt_id": ids, **columns}), tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def run(path: Path, constraint: str, *options: str, verb: str = "solve") -> str:
    arguments = [verb, "--scores", str(path), "--reward", "reward", "--beta", "1", "--constraint", constraint]
    done = CliRunner().invoke(cli, [*arguments, *options], standalone_mode=False)
    if done.exception:
        raise done.exception
    return done.stdout


def record(path: Path, constraint: str, *options: str) -> dict[str, Any]:
    solution: dict[str, Any] = json.loads(run(path, constraint, "--json", "-", *options))
    return solution


def with_column(path: Path, values: np.ndarray) -> Path:
    """Write the table with one more column, the utility written out."""
    other = path.with_name("written.parquet")
    pq.write_table(pq.read_table(path).append_column("written", pa.array(values)), other)
    return other


@pytest.mark.parametrize("engine", ["memory", "stream", "ray"])
@pytest.mark.parametrize("of", ["rectified", "worst_of"])
def test_a_derived_column_is_the_column_written_out(scores: Path, of: str, engine: str) -> None:
    table = pq.read_table(scores)
    harm, toxic = table["harm"].to_numpy(), table["toxic"].to_numpy()
    if of == "rectified":
        constraint, name = "harm:margin=0.1,of=rectified,level=0.5", "rectified(harm)"
        utility = np.minimum(harm - 0.5, 0)
    else:
        constraint, name = "-cost,toxic:margin=0.1,of=worst_of", "worst_of(-cost,toxic)"
        utility = np.minimum(harm, toxic)
    expected = record(with_column(scores, utility), "written:margin=0.1")
    solution = record(scores, constraint, "--engine", engine)
    assert solution["lam"][name] == pytest.approx(expected["lam"]["written"], rel=1e-8)
    assert solution["lam_se"][name] == pytest.approx(expected["lam_se"]["written"], rel=1e-8)


def test_cvar_improves_the_worst_responses_by_the_margin(scores: Path) -> None:
    """The policy's own CVaR, from its weights by sorting, is the reference's and the margin."""
    constraint = "harm:margin=0.4,of=cvar,alpha=0.1"
    solution = record(scores, constraint, "--estimator", "empirical")
    column, lam = solution["columns"]["cvar(harm)"], solution["lam"]["cvar(harm)"]
    table = pq.read_table(scores)
    harm, reward = table["harm"].to_numpy(), table["reward"].to_numpy()
    worst = np.sort(harm)[: harm.size // 10].mean()
    assert column["reference_cvar"] == pytest.approx(worst)
    score = (reward + lam * (column["tau"] - np.maximum(column["tau"] - harm, 0) / 0.1)).reshape(NUM_PROMPTS, -1)
    weight = np.exp(score - score.max(axis=1, keepdims=True))
    weight = (weight / weight.sum(axis=1, keepdims=True)).ravel() / NUM_PROMPTS
    order = np.argsort(harm)
    share = np.diff(np.minimum(np.cumsum(weight[order]), 0.1), prepend=0.0)
    assert share @ harm[order] / 0.1 == pytest.approx(worst + 0.4, abs=1e-6)
    text = run(scores, constraint)
    assert "tail      cvar(harm): the worst 10 % of responses have mean" in text
    assert "in the reference and are to have" in text


def test_frontier_goes_through_a_derived_column(scores: Path) -> None:
    table = pq.read_table(scores)
    utility = np.minimum(table["harm"].to_numpy(), table["toxic"].to_numpy())
    curve = json.loads(run(scores, "harm,toxic:of=worst_of", "--json", "-", "--points", "5", verb="frontier"))
    plain = json.loads(run(with_column(scores, utility), "written", "--json", "-", "--points", "5", verb="frontier"))
    assert curve["names"] == ["worst_of(harm,toxic)"]
    for point, other in zip(curve["points"], plain["points"], strict=True):
        assert list(point.values()) == list(other.values())


def test_the_frontier_of_a_cvar_is_what_solve_answers_at_each_margin(scores: Path) -> None:
    text = "harm:of=cvar,alpha=0.1"
    curve = json.loads(run(scores, text, "--json", "-", "--points", "4", verb="frontier"))
    assert curve["names"] == ["cvar(harm)"]
    points = curve["points"]
    assert points[0]["lam.cvar(harm)"] == pytest.approx(0.0, abs=1e-6), "the curve begins where the price is 0"
    point = points[2]
    solution = record(scores, f"harm:margin={point['margin.cvar(harm)']!r},of=cvar,alpha=0.1")
    assert point["lam.cvar(harm)"] == pytest.approx(solution["lam_paper"]["cvar(harm)"], rel=1e-6)
    assert point["improvement.cvar(harm)"] == pytest.approx(point["margin.cvar(harm)"], abs=1e-6)
    margins = [point["margin.cvar(harm)"] for point in points]
    assert margins == sorted(margins)
    assert margins[-1] < curve["attainable"]["cvar(harm)"]
    gains = [point["reward_improvement"] - point["kl"] for point in points]  # beta is 1
    assert gains == sorted(gains, reverse=True), "more of the tail costs more"
    said = run(scores, text, "--points", "2", verb="frontier")
    assert "tail      cvar(harm): the mean is that of the worst 10% of all responses (CVaR)" in said


@pytest.mark.parametrize(
    ("constraint", "error", "message"),
    [
        ("harm:margin=0.1,of=cvar,alpha=1", ConfigError, "alpha: 1, expected above 0 and below 1"),
        ("harm:margin=0.1,of=cvar,alpha=-0.1", ConfigError, "alpha: -0.1, expected above 0 and below 1"),
        ("harm:margin=0.1,of=cvar", ConfigError, "alpha is missing"),
        ("harm:margin=0.1,of=rectified", ConfigError, "level is missing"),
        ("harm:margin=0.1,of=worst_of", ConfigError, "worst_of of one score"),
        ("harm,absent:margin=0.1,of=worst_of", DataError, "no column 'absent'"),
        ("absent:margin=0.1,of=cvar,alpha=0.1", DataError, "no column 'absent'"),
        ("harm:margin=0.1,threshold=0", ConfigError, "given both as margin and as threshold"),
        ("harm:margin=0.1,equals=0", ConfigError, "given both as margin and as equals"),
        ("harm:of=cvar,alpha=0.1", ConfigError, "no demand"),
        ("harm:margin=0.1,of=median", ConfigError, "not understood"),
        ("cost:fall=1", ConfigError, "fall is no demand"),
        ("cost:margin=1,fall=1", ConfigError, "given both as margin and as fall"),
        ("harm:margin=0.1,margin=0.2", ConfigError, "not understood"),
        ("harm:margin=much", ConfigError, "margin 'much' is not a number"),
        ("reward,harm:margin=0.1,of=worst_of", DataError, "both the reward and a constraint"),
    ],
)
def test_what_cannot_be_meant_is_refused(scores: Path, constraint: str, error: Any, message: str) -> None:
    for options in ([],) if "cvar" in constraint else ([], ["--engine", "stream"]):
        with pytest.raises(error, match=message) as caught:
            run(scores, constraint, *options)
        assert caught.value.exit_code in (2, 3)


def test_what_a_cvar_needs_is_said(scores: Path) -> None:
    constraint = "harm:margin=0.1,of=cvar,alpha=0.1"
    with pytest.raises(ConfigError, match="must be in memory"):
        run(scores, constraint, "--engine", "stream")
    with pytest.raises(ConfigError, match="every margin of a CVaR has its own tau, so a map of two"):
        run(scores, "harm:of=cvar,alpha=0.1", "--constraint", "toxic", verb="frontier")
    with pytest.raises(ConfigError, match="--lam-max: the curve of a CVaR"):
        run(scores, "harm:of=cvar,alpha=0.1", "--lam-max", "2", verb="frontier")
    with pytest.raises(ConfigError, match="every margin and needs none"):
        run(scores, constraint, verb="frontier")
