"""What ``solve`` says of a score table: causes that are true, remedies that help, rates that hold."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from can_dist.cli import cli
from can_dist.dual import DualSolution
from can_dist.dual.messages import lam_error
from can_dist.dual.weights import percent
from can_dist.errors import CanDistError, ConfigError, DataError, InfeasibleConstraint


def table(num_prompts: int = 200, num_responses: int = 32, centre: float = 0.0, columns: int = 1) -> pa.Table:
    rng = np.random.default_rng(4)
    num_rows = num_prompts * num_responses
    scores = {"safety": centre + rng.normal(size=num_rows), "calm": rng.normal(size=num_rows)}
    ids = [f"p{row // num_responses}" for row in range(num_rows)]
    return pa.table({"prompt_id": ids, "reward": rng.normal(size=num_rows), **scores})


def solve(path: Path, *options: str, beta: str = "1") -> str:
    done = CliRunner().invoke(
        cli, ["solve", "--scores", str(path), "--reward", "reward", "--beta", beta, *options], standalone_mode=False
    )
    if done.exception:
        raise done.exception
    return done.stdout


def refusal(kind: type[CanDistError], path: Path, *options: str) -> str:
    with pytest.raises(kind) as caught:
        solve(path, *options)
    return str(caught.value)


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    pq.write_table(table(), tmp_path / "scores.parquet")
    return tmp_path / "scores.parquet"


def test_bias_stands_beside_the_standard_error(scores: Path) -> None:
    """Of λ and of the improvement, where the table can bound it; else it is said to be unknown."""
    record = json.loads(solve(scores, "--constraint", "safety:margin=0.3", "--json", "-", beta="2"))
    judgement, lam_se = record["diagnostics"]["judgement"], record["lam_se"]["safety"]
    text = solve(scores, "--constraint", "safety:margin=0.3", beta="2")
    line = next(line for line in text.splitlines() if line.startswith("safety"))
    paper = f"paper's {record['lam_paper']['safety']:.4g}"
    assert f"(SE {lam_se:.2g}, bias {judgement['lam_bias']['safety']:.2g} allowed for, {paper})" in line
    assert line.endswith(f", bias {judgement['delivered']['safety']['bias']:.2g} allowed for)")
    text = solve(scores, "--constraint", "safety:margin=0.3", beta="0.1")
    assert "Do not trust" in text
    assert ", bias unknown, paper's" in text


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_what_has_no_error_is_told_without(tmp_path: Path, num_prompts: int) -> None:
    """One prompt has no spread between prompts: no "(SE nan)", of a solve and of a frontier."""
    path = tmp_path / "few.parquet"
    pq.write_table(table(num_prompts=num_prompts), path)
    options = ["--scores", str(path), "--reward", "reward", "--beta", "1"]
    curve = CliRunner().invoke(cli, ["frontier", *options, "--constraint", "safety", "--points", "3"])
    assert curve.exit_code == 0
    for text in (solve(path, "--constraint", "safety:margin=0.3"), curve.stdout):
        assert not re.search(r"\b(nan|inf)\b|\de[+-]\d+ ?%", text), text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (3e-9, "less than 0.01%"),
        (2e-4, "0.02%"),
        (0.173, "17%"),
        (0.9949, "99%"),
        (1.0, "100%"),
        (2.8, "280%"),
    ],
)
def test_a_percentage_has_no_exponent(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_solution_older_than_the_bias_of_lambda_is_told_without_it(scores: Path) -> None:
    """Finished work of older code is reused, so a run that goes on reads such solutions."""
    record = json.loads(solve(scores, "--constraint", "safety:margin=0.3", "--json", "-", beta="2"))
    del record["diagnostics"]["judgement"]["lam_bias"]
    said = lam_error(DualSolution.from_dict(record), "safety")
    assert said == [f"SE {record['lam_se']['safety']:.2g}", f"paper's {record['lam_paper']['safety']:.4g}"]


def test_without_confidence_it_is_said_how_often_margins_hold(scores: Path) -> None:
    both = ["--constraint", "safety:margin=0.2", "--constraint", "calm:margin=0.2"]
    assert "safety holds about every second time; --confidence" in solve(scores, *both[:2])
    assert "safety, calm holds about every second time, all 2 of them together less often" in solve(scores, *both)
    assert "second time" not in solve(scores, *both[:2], "--confidence", "0.9")
    assert "second time" not in solve(scores, "--constraint", "safety:margin=-1"), "it costs nothing and holds"
    assert "second time" not in solve(scores, "--constraint", "safety:equals=0.2")


def test_unreachable_with_confidence_shows_what_was_asked_and_what_was_added(scores: Path) -> None:
    said = refusal(InfeasibleConstraint, scores, "--constraint", "safety:margin=1.96", "--confidence", "0.95")
    assert "(1.96 and " in said
    assert "for the confidence)" in said
    assert "lower confidence; lower constraints.safety.margin" in said


def test_a_table_whose_weights_are_even_is_not_told_to_raise_beta(tmp_path: Path) -> None:
    pq.write_table(table(num_prompts=200, num_responses=2), tmp_path / "two.parquet")
    text = solve(tmp_path / "two.parquet", "--constraint", "safety:margin=0.01", beta="5")
    assert "of 2 responses carry" in text
    assert "; raise the number of responses." in text


def test_a_level_that_the_reference_has_already_is_no_advice(tmp_path: Path) -> None:
    """margin=5 over a reference mean of 5.5: as a threshold it would ask for nothing."""
    pq.write_table(table(centre=5.5), tmp_path / "high.parquet")
    assert "write threshold" not in refusal(
        InfeasibleConstraint, tmp_path / "high.parquet", "--constraint", "safety:margin=5"
    )
    said = refusal(InfeasibleConstraint, tmp_path / "high.parquet", "--constraint", "safety:margin=6")
    assert "if you meant the absolute level 6, write threshold=6" in said


def test_json_beside_the_parts_of_a_table_is_not_passed_over(scores: Path) -> None:
    (scores.parent / "more.jsonl").write_text("{}\n")
    said = refusal(DataError, scores.parent, "--constraint", "safety:margin=0.2")
    assert said.startswith(f"{scores.parent}: more.jsonl beside scores.parquet")


@pytest.mark.parametrize("num_files", [1, 2, 3])
def test_a_pattern_that_the_shell_replaced_is_named(scores: Path, num_files: int) -> None:
    others = [str(scores.with_name(f"part-{number}.parquet")) for number in range(num_files)]
    said = refusal(ConfigError, scores, *others, "--constraint", "safety:margin=0.2")
    assert "--scores names one table" in said
    assert "Give the directory that holds the parts" in said


@pytest.mark.parametrize(
    ("values", "remedy"),
    [
        (lambda column: column.to_numpy() > 0, "Write 1 for true and 0 for false."),
        (lambda column: [str(value) for value in column.to_pylist()], "Write it as numbers."),
    ],
    ids=["truth values", "texts"],
)
def test_a_column_of_another_type_is_told_how_to_write_it(scores: Path, values: Any, remedy: str) -> None:
    old = pq.read_table(scores)
    pq.write_table(old.set_column(2, "safety", pa.array(values(old["safety"]))), scores)
    assert remedy in refusal(DataError, scores, "--constraint", "safety:margin=0.2")


def test_decimals_are_numbers(scores: Path) -> None:
    old = pq.read_table(scores)
    rounded = pa.array(np.round(old["safety"].to_numpy(), 3))
    pq.write_table(old.set_column(2, "safety", rounded), scores)
    expected = solve(scores, "--constraint", "safety:margin=0.2")
    pq.write_table(old.set_column(2, "safety", rounded.cast(pa.decimal128(8, 3))), scores)
    assert solve(scores, "--constraint", "safety:margin=0.2") == expected


def test_streamed_json_is_told_apart_from_a_cut_file(tmp_path: Path) -> None:
    rows = table(num_prompts=2).to_pylist()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        said = refusal(DataError, tmp_path / name, "--constraint", "safety:margin=0.2", "--engine", "stream")
        assert "a JSON file cannot be read block by block" in said
        assert "truncated" not in said
