"""``can-dist solve`` on a table in memory, streamed and on Ray: one answer, and what an engine cannot do is said."""

from __future__ import annotations

import html
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.errors import CanDistError, ConfigError, DataError

PROMPTS = [f"p{i:03d}" for i in range(80)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of 40 prompts with 8 responses each, and the prompts that were asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(4)
    (tmp_path / "scores").mkdir()
    for number in range(2):
        ids = np.repeat(PROMPTS[40 * number : 40 * number + 40], 8)
        columns = {"prompt_id": ids, "reward": rng.standard_normal(320), "safety": rng.standard_normal(320)}
        pq.write_table(pa.table(columns), tmp_path / "scores" / f"part-{number}.parquet")
    pq.write_table(pa.table({"prompt_id": PROMPTS}), tmp_path / "prompts.parquet")
    return tmp_path


def solve(folder: Path, *options: str) -> dict:
    arguments = ["solve", "--scores", str(folder / "scores"), "--reward", "reward", "--beta", "1"]
    arguments += ["--constraint", "safety:margin=0.4", "--json", "-", *options]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if done.exception:
        raise done.exception
    found: dict = json.loads(done.stdout)
    return found


def refusal(folder: Path, kind: type[CanDistError], *options: str) -> str:
    with pytest.raises(kind) as caught:
        solve(folder, *options)
    return str(caught.value)


def test_engines_agree(folder: Path) -> None:
    expected = solve(folder)
    for engine in ("memory", "stream", "ray"):
        found = solve(folder, "--engine", engine, "--prompts", str(folder / "prompts.parquet"))
        assert found["lam"]["safety"] == pytest.approx(expected["lam"]["safety"], rel=1e-8), engine
        assert found["lam_se"]["safety"] == pytest.approx(expected["lam_se"]["safety"], rel=1e-8), engine


def test_large_table_is_streamed_unless_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed: NumPy's table is never built. What needs the table gets it, small or large."""
    expected = solve(folder)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("in memory")

    monkeypatch.setattr("can_dist.cli.solve.MEMORY_BYTES", 100)
    with monkeypatch.context() as patched:
        patched.setattr("can_dist.dual.ScoreTable.build", refuse)
        assert solve(folder)["lam"]["safety"] == pytest.approx(expected["lam"]["safety"], rel=1e-8)
        with pytest.raises(AssertionError, match="in memory"):
            solve(folder, "--engine", "memory")
    assert solve(folder, "--estimator", "gaussian")["estimator"] == "gaussian"
    assert solve(folder, "--report", str(folder / "page.html"))["estimator"] == "jackknife"
    assert "needs the table in memory" in refusal(folder, ConfigError, "--engine", "stream", "--estimator", "gaussian")


def test_large_json_is_read_into_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "scores").iterdir())]).to_pylist()
    expected = solve(folder)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("can_dist.cli.solve.MEMORY_BYTES", 100)
    arguments = ["solve", "--scores", str(folder / "scores.jsonl"), "--reward", "reward", "--beta", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--constraint", "safety:margin=0.4", "--json", "-"])
    assert json.loads(done.stdout)["lam"] == expected["lam"]


@pytest.mark.parametrize("engine", ["memory", "stream", "ray"])
def test_a_cost_is_asked_to_fall_in_every_engine(folder: Path, engine: str) -> None:
    """The same numbers as for the utility that is minus the cost; a reward may be a cost too."""
    expected = solve(folder)
    for path in (folder / "scores").iterdir():
        table = pq.read_table(path)
        columns = {"cost": pc.negate(table["safety"]), "loss": pc.negate(table["reward"])}
        pq.write_table(pa.table({"prompt_id": table["prompt_id"], **columns}), path)
    asked = ("--constraint", "-cost:margin=0.4", "--reward", "-loss", "--engine", engine)
    arguments = ["solve", "--scores", str(folder / "scores"), "--beta", "1", *asked, "--json", "-"]
    done = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert done.exception is None
    found = json.loads(done.stdout)
    assert found["lam"]["-cost"] == pytest.approx(expected["lam"]["safety"], rel=1e-8)
    assert found["predicted"]["reward"] == pytest.approx(expected["predicted"]["reward"], rel=1e-8)


@pytest.mark.parametrize("engine", ["memory", "stream"])
def test_responses_may_be_numbered_within_each_prompt(folder: Path, engine: str) -> None:
    expected = solve(folder)
    for path in (folder / "scores").iterdir():
        table = pq.read_table(path)
        pq.write_table(table.append_column("response_id", pa.array([row % 8 for row in range(len(table))])), path)
    assert solve(folder, "--engine", engine)["lam"] == pytest.approx(expected["lam"], rel=1e-8)


@pytest.mark.parametrize("engine", ["memory", "stream"])
def test_missing_shard_is_found_by_the_prompts(folder: Path, engine: str) -> None:
    (folder / "scores" / "part-1.parquet").unlink()
    said = refusal(folder, DataError, "--engine", engine, "--prompts", str(folder / "prompts.parquet"))
    assert said.startswith(f"{folder / 'scores'}: 40 of 80 expected prompts have no scores, and 0 prompts with scores")


@pytest.mark.parametrize("engine", ["memory", "stream"])
def test_shard_counted_twice_is_refused(folder: Path, engine: str) -> None:
    (folder / "scores" / "part-2.parquet").write_bytes((folder / "scores" / "part-0.parquet").read_bytes())
    said = refusal(folder, DataError, "--engine", engine)
    assert "part-2.parquet" in said
    assert "a shard counted twice" in said


@pytest.mark.parametrize("engine", ["memory", "stream"])
def test_reward_named_as_a_constraint_is_refused(folder: Path, engine: str) -> None:
    assert "both the reward and a constraint" in refusal(
        folder, DataError, "--engine", engine, "--constraint", "reward:margin=0.1"
    )


def test_page_needs_the_table_in_memory(folder: Path) -> None:
    page = folder / "page.html"
    said = refusal(folder, ConfigError, "--engine", "stream", "--report", str(page))
    assert said == "--report: the table must be in memory for it; give --engine memory."
    assert not page.exists()


def test_page_of_diagnostics_is_written(folder: Path) -> None:
    page = folder / "page.html"
    verdict = solve(folder, "--report", str(page))["diagnostics"]["verdict"]
    assert verdict.split(" (")[0] in html.unescape(page.read_text(encoding="utf-8"))


def test_run_takes_no_engine(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["solve", "c.yaml", "--run", str(folder), "--engine", "ray"], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert "--engine" in str(done.exception)
