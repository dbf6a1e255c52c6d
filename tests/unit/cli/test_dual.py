"""``can-dist solve`` with estimators, confidence, equalities and the published rules; ``can-dist frontier``."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from command import HEAVY, Result, assert_refused, can_dist

from can_dist import frontier
from can_dist.cli import cli
from can_dist.cli import frontier as cli_frontier
from can_dist.cli import options as cli_run
from can_dist.cli import solve as cli_dual
from can_dist.config.sections import Solve
from can_dist.dual import ESTIMATORS, Margin, solve_dual
from can_dist.dual.belief.level import stated
from can_dist.errors import ConfigError, DataError
from can_dist.reporting.figures.frontier import draw_frontier
from can_dist.tables.artifacts import open_stage, write_part

BETA = 0.8
NUM_PROMPTS, NUM_RESPONSES = 30, 8


def columns(seed: int = 0) -> dict[str, np.ndarray]:
    first, second, third = np.random.default_rng(seed).normal(size=(3, NUM_PROMPTS * NUM_RESPONSES))
    return {
        "prompt_id": np.repeat(np.arange(NUM_PROMPTS), NUM_RESPONSES),
        "reward": first,
        "safety": second - 0.4 * first - 1.6,
        "honesty": 0.8 * third - 0.4 * second,
        "constant": np.full(first.size, 3.0),
    }


TABLE = columns()


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    pq.write_table(pa.table(TABLE), path)
    return path


def run(verb: str, scores: Path, tmp_path: Path, *arguments: object, beta: object = BETA) -> Result:
    """Run a command in a process of its own, as its users do."""
    return can_dist(verb, "--scores", scores, "--reward", "reward", "--beta", beta, *arguments, cwd=tmp_path)


def here(verb: str, scores: Path, *arguments: object, beta: object = BETA) -> str:
    """Run a command in this process, which is quicker; return its standard output or raise its error."""
    options = ["--scores", scores, "--reward", "reward", "--beta", beta, *arguments]
    result = CliRunner().invoke(cli, [verb, *map(str, options)], standalone_mode=False)
    if result.exception is not None:
        assert result.stdout == ""
        raise result.exception
    return result.stdout


def solution(scores: Path, *arguments: object) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(here("solve", scores, *arguments, "--json", "-"))
    return record


def expected(*constraints: Margin, **options: Any) -> dict[str, Any]:
    utility = np.stack([TABLE[constraint.name] for constraint in constraints], axis=1)
    found = solve_dual(
        TABLE["reward"], utility, TABLE["prompt_id"], beta=BETA, constraints=constraints, **options
    ).to_dict()
    return dict(json.loads(json.dumps(found)))


# ----------------------------------------------------------------------------------------------------------- solve


def test_estimators_of_the_command_are_those_of_the_configuration_and_of_the_dual() -> None:
    assert cli_dual.ESTIMATORS == ESTIMATORS == get_args(Solve.model_fields["estimator"].annotation)


@pytest.mark.parametrize("estimator", ["empirical", "jackknife", "gaussian", "auto"])
def test_estimator_is_passed_on(scores: Path, estimator: str) -> None:
    found = solution(scores, "--constraint", "safety:margin=0.3", "--estimator", estimator)
    assert found == expected(Margin("safety", 0.3), estimator=estimator)


def test_a_cost_is_asked_to_fall_by_its_name_with_a_minus(scores: Path, tmp_path: Path) -> None:
    """-cost:margin=0.3 is a margin of 0.3 on minus the column; cost:margin=-0.3 is told what it allows."""
    costs = pq.read_table(scores)
    costs = costs.append_column("cost", pc.negate(costs.column("safety")))
    path = tmp_path / "costs.parquet"
    pq.write_table(costs, path)
    found = solution(path, "--constraint", "-cost:margin=0.3")
    assert found["lam"]["-cost"] == expected(Margin("safety", 0.3))["lam"]["safety"]
    assert "-cost" in here("frontier", path, "--constraint", "-cost")
    text = here("solve", path, "--constraint", "cost:margin=-2")
    assert "If cost is a cost that should fall by 2, write -cost:margin=2." in text


def test_estimators_differ_here() -> None:
    lam = {name: expected(Margin("safety", 0.3), estimator=name)["lam"]["safety"] for name in ESTIMATORS[:3]}
    assert len({round(value, 3) for value in lam.values()}) == 3


def test_text_tells_the_estimator_and_why(scores: Path) -> None:
    plain = here("solve", scores, "--constraint", "safety:margin=0.3")
    papers = here("solve", scores, "--constraint", "safety:margin=0.3", "--estimator", "empirical")
    record, paper = (expected(Margin("safety", 0.3), estimator=name) for name in ("auto", "empirical"))
    assert record["estimator"] == "jackknife"
    assert "\nestimator jackknife\n" in plain
    assert f", paper's {paper['lam']['safety']:.4g})" in plain
    assert f"\nverdict   {stated(record['diagnostics'])}" in plain
    assert "\nestimator empirical\n" in papers
    assert "paper's" not in papers


def test_confidence_raises_the_margin_and_the_text_says_by_how_much(scores: Path) -> None:
    options = ("--constraint", "safety:margin=0.3", "--confidence", "0.9")
    found = solution(scores, *options)
    assert found == expected(Margin("safety", 0.3), confidence=0.9)
    added = found["safety_margin"]["safety"]
    assert added > 0.01
    out = here("solve", scores, *options)
    assert f"margin {0.3 + added:.4g} ({added:+.4g} of it safety margin) over the reference mean" in out
    assert "\nmargins   the margin is met with confidence 0.9 over the draw of the prompts\n" in out


def test_equality_is_met_exactly_with_a_negative_multiplier(scores: Path) -> None:
    """The unconstrained policy loses safety; an exact loss beyond that needs λ < 0, which a margin never gets."""
    found = solution(scores, "--constraint", "safety:equals=-0.9")
    assert found == expected(Margin("safety", -0.9, equal=True))
    assert found["lam"]["safety"] < -0.1
    assert found["predicted"]["improvement"]["safety"]["mean"] == pytest.approx(-0.9, abs=1e-7)
    assert solution(scores, "--constraint", "safety:margin=-0.9")["lam"]["safety"] == 0.0


def test_a_level_given_as_a_margin_is_pointed_out(scores: Path) -> None:
    out = here("solve", scores, "--constraint", "safety:margin=-1.3")
    assert "\nnote      safety: margin=-1.3 allows the mean to fall by 1.3 below the reference mean" in out
    assert "note" not in here("solve", scores, "--constraint", "safety:threshold=-1.3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--constraint", "safety:margin=0.3", "--confidence", "0.4"], "confidence = 0.4: expected at least 0.5"),
        (
            ["--constraint", "safety:margin=0.3", "--confidence", "1"],
            "confidence = 1.0: expected at least 0.5 and below",
        ),
        (["--constraint", "safety:margin=0.3", "--confidence", "nan"], "confidence = nan: expected at least 0.5"),
        (["--constraint", "safety:equals=0.3", "--confidence", "0.9"], "an equality has no safe side to move to"),
        (["--constraint", "safety:margin=0.3", "--json", "."], "--json .: is a directory. Give the path of a file."),
        (["--constraint", "safety:margin=0.3", "--json", "/proc/s.json"], "--json /proc/s.json: cannot be written ("),
    ],
)
def test_options_that_do_not_fit_are_refused(scores: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        here("solve", scores, *arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("beta", [0, -1, "nan", "inf"])
@pytest.mark.parametrize("more", [[], ["--estimator", "auto"], ["--confidence", "0.9"]])
def test_beta_must_be_positive_and_finite(scores: Path, beta: object, more: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"beta: found .*, expected a positive finite number"):
        here("solve", scores, "--constraint", "safety:threshold=-1.2", *more, beta=beta)


def test_unknown_estimator_is_a_usage_error(scores: Path, tmp_path: Path) -> None:
    result = run("solve", scores, tmp_path, "--constraint", "safety:margin=0.3", "--estimator", "best")
    assert (result.code, result.out) == (2, "")
    assert "'best' is not one of 'empirical', 'jackknife', 'gaussian', 'auto'" in result.err


@pytest.mark.parametrize(
    ("verb", "extra"),
    [
        ("solve", ["--reward", "reward", "--beta", "1", "--estimator", "auto", "--engine", "stream"]),
        ("solve", ["--constraint", "safety:margin=1", "--confidence", "0.9"]),
        ("frontier", ["--reward", "reward", "--beta", "1"]),
    ],
)
def test_options_of_a_table_are_refused_for_a_run(tmp_path: Path, verb: str, extra: list[str]) -> None:
    result = can_dist(verb, "config.yaml", "--run", "r", *extra, cwd=tmp_path)
    assert_refused(result, 2, "ConfigError")
    left_out = ", ".join(name for name in extra if name.startswith("--"))
    assert set(re.findall(r"--[a-z-]+", result.err.split("Leave out")[1])) == {*left_out.split(", "), "--scores"}
    assert not (tmp_path / "r").exists()


# --------------------------------------------------------------------------------------------------------- frontier


def curve(**options: Any) -> dict[str, Any]:
    found = frontier(
        TABLE["reward"], TABLE["safety"], TABLE["prompt_id"], beta=BETA, names=["safety"], **options
    ).to_dict()
    return dict(json.loads(json.dumps(found)))


def test_frontier_writes_json_csv_and_a_table(scores: Path, tmp_path: Path) -> None:
    options = ("--constraint", "safety", "--points", 9, "--json", "f.json", "--csv", "f.csv")
    result = run("frontier", scores, tmp_path, *options)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "f.json").read_text())
    assert record == curve(num_points=9)
    with (tmp_path / "f.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lam.safety"]) for row in rows] == [point["lam.safety"] for point in record["points"]]
    assert set(rows[0]) == set(record["points"][0])
    heading, header, *lines = result.out.splitlines()
    most = record["attainable"]["safety"]
    assert heading.startswith(
        "frontier of safety: 9 points, beta 0.8; margins are improvements over the reference mean"
    )
    assert f"at most safety {most:.4g} attainable; [..] are 95 % bands" in heading
    assert re.split(r"\s{2,}", header.strip())[:4] == ["margin safety", "lambda* safety", "SE", "reward gain"]
    assert len(lines) == 9
    point = record["points"][4]
    cells = re.split(r"\s{2,}", lines[4].strip())
    assert cells == [
        f"{point['margin.safety']:.4g}",
        f"{point['lam.safety']:.4g}",
        f"{point['lam.safety_se']:.2g}",
        f"{point['reward_improvement']:.4g}",
        f"[{point['reward_improvement_low']:.4g}, {point['reward_improvement_high']:.4g}]",
        f"{point['kl']:.4g}",
        f"[{point['kl_low']:.4g}, {point['kl_high']:.4g}]",
        f"{point['ess']:.3g}",
    ]
    assert len({len(line) for line in (header, *lines)}) == 1
    assert not result.imported & (HEAVY - {"pandas"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.csv", "f.json"]


def test_frontier_prints_nothing_but_json_to_standard_output(scores: Path, tmp_path: Path) -> None:
    result = run("frontier", scores, tmp_path, "--constraint", "safety", "--json", "-")
    assert json.loads(result.out) == curve(num_points=50)


def test_frontier_ends_at_the_largest_lambda_asked_for(scores: Path) -> None:
    out = here("frontier", scores, "--constraint", "safety", "--lam-max", 1.5, "--points", 7, "--json", "-")
    points = json.loads(out)["points"]
    lam = [point["lam.safety"] for point in points]
    margin = np.array([point["margin.safety"] for point in points])
    assert lam[0] == pytest.approx(0.0, abs=1e-7)
    assert lam[-1] == pytest.approx(1.5, rel=1e-6)
    assert np.diff(margin) == pytest.approx(np.full(6, np.ptp(margin) / 6))
    for point in points[1:]:
        exact = expected(Margin("safety", point["margin.safety"]), estimator="empirical")
        assert point["lam.safety"] == pytest.approx(exact["lam"]["safety"], rel=1e-6)


def test_frontier_of_two_constraints_is_a_map(scores: Path, tmp_path: Path) -> None:
    options = ("--constraint", "safety", "--constraint", "honesty", "--points", 81, "--json", tmp_path / "f.json")
    out = here("frontier", scores, *options)
    record = json.loads((tmp_path / "f.json").read_text())
    assert (record["names"], record["shape"]) == (["safety", "honesty"], [9, 9])
    lines = out.splitlines()
    assert lines[1] == "36 of the 81 points; --csv or --json writes all."
    assert len(lines) == 3 + 36
    last = re.split(r"\s{2,}", lines[-1].strip())
    assert last[1] == f"{record['points'][-1]['lam.safety']:.4g}"
    point = record["points"][4 * 9 + 3]
    demands = Margin("safety", point["margin.safety"]), Margin("honesty", point["margin.honesty"])
    exact = expected(*demands, estimator="empirical")
    assert point["lam.safety"] == pytest.approx(exact["lam"]["safety"], rel=1e-5)
    assert point["lam.honesty"] == pytest.approx(exact["lam"]["honesty"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "beta", "message"),
    [
        ([], BETA, "frontier --scores also needs --constraint."),
        (
            ["--constraint", "safety:margin=1"],
            BETA,
            "goes through every margin and needs none. Give --constraint safety;",
        ),
        (["--constraint", "safety:threshold=1"], BETA, "the frontier goes through every margin and needs none."),
        (["--constraint", "safety"], 0, "beta: found 0.0, expected a positive finite number"),
        (["--constraint", "safety"], -1, "beta: found -1.0, expected a positive finite number"),
        (["--constraint", "safety", "--lam-max", "1"], -1, "beta: found -1.0, expected a positive finite number"),
        (
            ["--constraint", "safety", "--lam-max", "0"],
            BETA,
            "--lam-max: found 0.0, expected a positive finite number.",
        ),
        (["--constraint", "safety", "--lam-max", "inf"], BETA, "--lam-max: found inf, expected a positive finite"),
        (["--constraint", "safety", "--lam-max", "nan"], BETA, "--lam-max: found nan, expected a positive finite"),
        (
            ["--constraint", "safety", "--constraint", "honesty", "--lam-max", "1"],
            BETA,
            "--lam-max ends the curve of one constraint; leave it out for two.",
        ),
        (
            ["--constraint", "safety", "--constraint", "honesty", "--constraint", "constant"],
            BETA,
            "--constraint: 3 given, safety, honesty, constant; a frontier is that of one or two.",
        ),
        (["--constraint", "safety", "--constraint", "safety"], BETA, "--constraint safety is given twice."),
        (["--constraint", "safety", "--run", "r"], BETA, "frontier takes either --scores and its options, or CONFIG"),
        (["--constraint", "safety", "--plot", "f.gif"], BETA, "--plot f.gif: unknown kind of picture '.gif'. Expected"),
        (["--constraint", "safety", "--plot", "f"], BETA, "--plot f: unknown kind of picture ''. Expected .svg, .pdf"),
        (["--constraint", "safety", "--csv", "no/f.csv"], BETA, "--csv no/f.csv: no such directory no. Make it first."),
        (["--constraint", "safety", "--plot", "no/f.svg"], BETA, "--plot no/f.svg: no such directory no."),
        (["--constraint", "safety", "--json", "no/f.json"], BETA, "--json no/f.json: no such directory no."),
        (["--constraint", "safety", "--csv", "/proc/f.csv"], BETA, "--csv /proc/f.csv: cannot be written ("),
        (["--constraint", "safety", "--csv", "."], BETA, "--csv .: is a directory."),
        (
            ["--constraint", "safety", "--constraint", "constant", "--plot", "f.svg"],
            BETA,
            "--plot: constant never varies within a prompt, so there is no map. Draw the other one alone.",
        ),
    ],
)
def test_frontier_with_options_missing_or_wrong_exits_2(
    scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], beta: float, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        here("frontier", scores, *arguments, beta=beta)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_frontier_exits_2_without_a_heavy_import(scores: Path, tmp_path: Path) -> None:
    result = run("frontier", scores, tmp_path, "--constraint", "safety:margin=1")
    assert_refused(result, 2, "ConfigError")
    assert not result.imported & HEAVY


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("saftey", "no column 'saftey'. Did you mean 'safety'? Columns found: prompt_id, reward, safety"),
        ("reward", "column 'reward' is both the reward and a constraint. Name two different columns."),
    ],
)
def test_frontier_of_a_wrong_column_exits_3(scores: Path, constraint: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        here("frontier", scores, "--constraint", constraint)
    assert message in str(caught.value)


def test_one_point_is_no_frontier(scores: Path, tmp_path: Path) -> None:
    result = run("frontier", scores, tmp_path, "--constraint", "safety", "--points", 1)
    assert (result.code, result.out) == (2, "")
    assert "1 is not in the range x>=2" in result.err


# --------------------------------------------------------------------------------------------------- of a run

CONFIG = """\
prompts: {source: prompts.jsonl, num_test: 2, num_validation: 0}
strength: 1
reference: {model: lm}
reward: {kind: callable, function: "builtins:len"}
beta: 0.8
constraints:
  safety: {scorer: {kind: callable, function: "builtins:len"}, margin: 1.0}
"""
MORE = '  %s: {scorer: {kind: callable, function: "builtins:len"}, margin: 1.0}\n'


def frontier_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str
) -> tuple[list[str], dict[str, Any]]:
    """Run the command in this process, with a finished score artifact in the place of the pipeline."""
    (tmp_path / "config.yaml").write_text(text)
    asked: list[str] = []

    def scored(run_dir: Path, settings: Any, until: str) -> Any:
        asked.append(until)
        stage = open_stage(run_dir, "scores", "reference", {"seed": settings.seed}, {})
        write_part(stage.path, 0, pa.table(TABLE))
        return stage.commit()

    monkeypatch.setattr(cli_frontier, "run_until", scored)
    run_dir, config, out = tmp_path / "run", tmp_path / "config.yaml", tmp_path / "f.json"
    cli.main(
        ["frontier", str(config), "--run", str(run_dir), "--json", str(out), "--points", "9", *arguments],
        standalone_mode=False,
    )
    return asked, json.loads(out.read_text())


def test_frontier_of_a_run_uses_its_scores_beta_and_constraint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, record = frontier_of_run(tmp_path, monkeypatch, CONFIG)
    assert asked == ["score"]
    assert record == curve(num_points=9)


def test_frontier_of_a_run_takes_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = frontier_of_run(tmp_path, monkeypatch, CONFIG, "--set", "beta=2")
    assert record["beta"] == 2.0


def test_frontier_of_a_run_with_two_constraints_is_their_map_or_that_of_the_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CONFIG + MORE % "honesty"
    assert frontier_of_run(tmp_path, monkeypatch, text)[1]["names"] == ["safety", "honesty"]
    assert frontier_of_run(tmp_path, monkeypatch, text, "--constraint", "honesty")[1]["names"] == ["honesty"]


def test_frontier_of_a_run_with_three_constraints_asks_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIG + MORE % "honesty" + MORE % "constant"
    with pytest.raises(ConfigError, match=r"has 3 constraints \(safety, honesty, constant\); choose one or two"):
        frontier_of_run(tmp_path, monkeypatch, text)
    with pytest.raises(ConfigError, match=r"--constraint honest: not in the configuration\. Did you mean 'honesty'\?"):
        frontier_of_run(tmp_path, monkeypatch, text, "--constraint", "honest")
    assert not (tmp_path / "run").exists()


def test_largest_lambda_is_refused_for_two_constraints_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--lam-max ends the curve of one constraint; choose one with --constraint"):
        frontier_of_run(tmp_path, monkeypatch, CONFIG + MORE % "honesty", "--lam-max", "1")


def test_what_libraries_print_during_a_run_does_not_reach_standard_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(run_dir: Path, settings: Any, until: str) -> str:
        print("setting accelerator")
        return until

    monkeypatch.setattr("can_dist.pipeline.run_pipeline", noisy)
    assert cli_run.run_until(tmp_path, None, "score") == "score"  # type: ignore[arg-type, comparison-overlap]
    assert capsys.readouterr() == ("", "setting accelerator\n")


# ---------------------------------------------------------------------------------------------------------- pictures

HEADS = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("names", [["safety"], ["safety", "honesty"]])
def test_picture_is_of_its_kind_and_the_same_every_time(tmp_path: Path, kind: str, names: list[str]) -> None:
    utility = np.stack([TABLE[name] for name in names], axis=1)
    found = frontier(TABLE["reward"], utility, TABLE["prompt_id"], beta=BETA, names=names, num_points=25)
    for name in ("a", "b"):
        draw_frontier(found, tmp_path / name, kind)
    assert (tmp_path / "a").read_bytes().startswith(HEADS[kind])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def picture(scores: Path, tmp_path: Path, *constraints: str) -> str:
    options = [item for name in constraints for item in ("--constraint", name)]
    result = run("frontier", scores, tmp_path, *options, "--points", 25, "--plot", "f.svg")
    assert result.code == 0, result.err
    assert "matplotlib" in result.imported
    assert [path.name for path in tmp_path.iterdir()] == ["f.svg"]
    return (tmp_path / "f.svg").read_text()


def test_curve_names_its_axes_with_units_its_band_and_the_most_attainable(scores: Path, tmp_path: Path) -> None:
    svg = picture(scores, tmp_path, "safety")
    for text in (
        "margin of safety: improvement of its mean over the reference (score units)",
        "reward gain (reward units)",
        "λ* (reward units per score unit)",
        "KL from the reference (nats)",
        "95 % band over the prompts",
        f"most attainable, {curve()['attainable']['safety']:.3g}",
        "median ESS below 10: biased by finite K",
    ):
        assert f">{text}</text>" in svg


def test_map_names_its_axes_with_units(scores: Path, tmp_path: Path) -> None:
    svg = picture(scores, tmp_path, "safety", "honesty")
    for text in (
        "margin of safety over the reference mean (score units)",
        "margin of honesty over the reference mean (score units)",
        "reward gain (reward units)",
        "lines: KL from the reference (nats)",
        "dotted: most attainable alone",
        "λ = 0",
    ):
        assert f">{text}</text>" in svg


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path: Path) -> None:
    found = frontier(TABLE["reward"], TABLE["safety"], TABLE["prompt_id"], beta=BETA, names=["$x_{$"], num_points=5)
    draw_frontier(found, tmp_path / "f", "svg")
    assert "margin of $x_{$: improvement" in (tmp_path / "f").read_text()


@pytest.mark.parametrize("name", ["constant", "reward"])
def test_degenerate_curves_are_drawn(tmp_path: Path, name: str) -> None:
    """A utility that never varies has one point; one that is the reward has a frontier without a trade-off."""
    found = frontier(TABLE["reward"], TABLE[name], TABLE["prompt_id"], beta=BETA, names=[name], num_points=9)
    draw_frontier(found, tmp_path / "f", "png")
    assert (tmp_path / "f").stat().st_size > 1000


@pytest.mark.parametrize("sign", [2.0, -1.0])
def test_a_map_of_two_constraints_on_one_line_is_drawn(tmp_path: Path, sign: float) -> None:
    utility = np.stack([TABLE["safety"], sign * TABLE["safety"]], axis=1)
    found = frontier(TABLE["reward"], utility, TABLE["prompt_id"], beta=BETA, names=["a", "b"], num_points=25)
    draw_frontier(found, tmp_path / "f", "png")
    assert (tmp_path / "f").stat().st_size > 1000


def test_a_failed_picture_leaves_the_older_one(scores: Path, tmp_path: Path) -> None:
    (tmp_path / "f.svg").write_text("old")
    result = run("frontier", scores, tmp_path, "--constraint", "safety", "--constraint", "constant", "--plot", "f.svg")
    assert result.code == 2
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f.svg": "old"}
