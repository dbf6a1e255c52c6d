"""The command line as its users meet it: real processes, their exit codes, standard output and standard error."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command import HEAVY, Result, assert_refused, can_dist
from scipy.special import logsumexp, softmax
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist.cli import cli
from can_dist.config import SequenceClassifier
from can_dist.errors import DataError
from can_dist.tables.artifacts import open_stage, write_part

WORDS = ("hello", "world", "yes", "no")
CONFIG = """\
prompts: {source: prompts.jsonl, num_test: 2, num_validation: 0}
strength: 1
reference: {model: lm}
reward: {kind: callable, function: "builtins:len"}
constraints: {safety: {scorer: {kind: callable, function: "builtins:len"}, margin: 1.0}}
generate: {num_responses: 2, max_new_tokens: 4}
"""


# ------------------------------------------------------------------------------------------- help and configuration


@pytest.mark.parametrize("verb", ["", *cli.commands])
def test_help_answers_without_heavy_imports(tmp_path: Path, verb: str) -> None:
    result = can_dist(*verb.split(), "--help", cwd=tmp_path)
    assert result.code == 0
    assert result.out.startswith(f"Usage: can-dist {verb}".rstrip())
    assert not result.imported & HEAVY


def test_help_tells_the_exit_codes(tmp_path: Path) -> None:
    assert "75 interrupted (run again)" in can_dist("--help", cwd=tmp_path).out


@pytest.mark.parametrize("module", ["can_dist", "can_dist.cli"])
@pytest.mark.parametrize("arguments", ["--version", "--help", "solve --help", "solve", "verify absent", "nonsense"])
def test_module_behaves_as_the_script(tmp_path: Path, module: str, arguments: str) -> None:
    script, started = (
        subprocess.run([*program, *arguments.split()], cwd=tmp_path, capture_output=True, text=True, check=False)
        for program in ([str(Path(sys.executable).parent / "can-dist")], [sys.executable, "-m", module])
    )
    assert (started.returncode, started.stdout, started.stderr) == (script.returncode, script.stdout, script.stderr)
    assert script.stdout or script.returncode


VERBS = "run generate score solve frontier label train evaluate compare judge config verify demo"


@pytest.mark.parametrize("verb", VERBS.split())
def test_verb_exists(verb: str) -> None:
    assert verb in cli.commands


def test_version_is_told(tmp_path: Path) -> None:
    result = can_dist("--version", cwd=tmp_path)
    assert (result.code, result.imported & HEAVY) == (0, set())
    assert re.search(r"\d+\.\d+\.\d+", result.out)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with a configuration and five prompts; the reference model is not there."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "hello {i}"}}\n' for i in range(5)))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "absent.yaml", "--run", "r"], "absent.yaml: no such configuration file"),
        (["run", "config.yaml", "--run", "r", "--set", "sed=1"], "sed: unknown key. Did you mean 'seed'?"),
        (["run", "config.yaml", "--run", "r", "--set", "beta=-1"], "beta: expected greater than 0 (found -1)"),
        (["run", "config.yaml", "--run", "r", "--set", "beta"], "--set beta: expected key=value"),
        (["run", "--run", "r"], "give the configuration file once"),
        (["run", "config.yaml", "--config", "config.yaml", "--run", "r"], "give the configuration file once"),
        (["run", "config.yaml", "--run", "r", "--until", "solv"], "has no stage 'solv'"),
        (["run", "config.yaml", "--run", "r", "--until", "solve", "--methods", "mocan,sacpo"], "Leave out one of them"),
        (["run", "config.yaml", "--run", "r", "--set", "solve.require=yes"], "solve.require"),
        (["solve", "config.yaml", "--run", "r", "--report", "absent/p.html"], "no such directory absent"),
        (["solve"], "solve needs --scores FILE"),
        (["frontier"], "frontier needs --scores FILE"),
        (["config"], "config needs a FILE to check, or --schema"),
    ],
)
def test_configuration_error_exits_2_at_once(project: Path, arguments: list[str], message: str) -> None:
    result = can_dist(*arguments, cwd=project)
    assert_refused(result, 2, "ConfigError")
    assert message in result.err
    assert not result.imported & HEAVY
    assert not (project / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: can-dist"),
        (["ru"], "No such command 'ru'"),
        (["run", "config.yaml"], "Missing option '--run'"),
        (["run", "config.yaml", "--run", "r", "--sett", "x=1"], "No such option"),
        (["solve", "--scores", "s.parquet", "--beta", "x"], "'x' is not a valid float"),
    ],
)
def test_usage_error_exits_2(project: Path, arguments: list[str], message: str) -> None:
    result = can_dist(*arguments, cwd=project)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_config_prints_the_resolved_configuration(project: Path) -> None:
    result = can_dist("config", "config.yaml", "--set", "seed=7", cwd=project)
    (project / "resolved.yaml").write_text(result.out)
    again = can_dist("config", "resolved.yaml", cwd=project)
    assert (result.code, again.code) == (0, 0)
    assert "seed: 7\n" in result.out
    assert again.out == result.out


def test_config_schema_prints_every_key(tmp_path: Path) -> None:
    result = can_dist("config", "--schema", cwd=tmp_path)
    assert result.code == 0
    assert "\nbeta: number > 0; default 0.1\n    KL weight" in result.out
    assert not result.imported & HEAVY


# ----------------------------------------------------------------------------------------------------------- solve

SCORES: dict[str, Any] = {
    "prompt_id": ["a", "a", "a", "b", "b", "b"],
    "response_id": [f"r{i}" for i in range(6)],
    "reward": [1.0, 0.5, 0.0, 2.0, 0.3, 0.1],
    "safety": [0.0, 1.0, 1.2, 0.1, 1.5, 0.7],
    "honesty": [0.2, 0.1, 0.9, 0.3, 0.2, 0.8],
    "constant": [3.0] * 6,
}
BETA = 0.5


def scores_file(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({**SCORES, **changes}), path)
    return path


def solve(tmp_path: Path, *constraints: str, scores: Path | None = None, more: tuple[object, ...] = ()) -> Result:
    options = [item for constraint in constraints for item in ("--constraint", constraint)]
    path = scores or scores_file(tmp_path)
    return can_dist("solve", "--scores", path, "--reward", "reward", *options, "--beta", BETA,
                    "--estimator", "empirical", *more, cwd=tmp_path)  # fmt: skip


def mean_under_policy(name: str, lam: dict[str, float]) -> float:
    """Mean of a column under π_λ ∝ exp((r + ⟨λ,g⟩)/β) on the table, computed here from the definition."""
    column = {key: np.array(SCORES[key]).reshape(2, 3) for key in ("reward", name, *lam)}
    weights = softmax((column["reward"] + sum(lam[key] * column[key] for key in lam)) / BETA, axis=1)
    return float((weights * column[name]).sum(axis=1).mean())


def dual_value(lam: dict[str, float], margin: dict[str, float]) -> float:
    """D(λ) = mean_i β ln mean_k exp((r + ⟨λ, g − ḡ − b⟩)/β), from the definition."""
    exponent = np.array(SCORES["reward"]).reshape(2, 3)
    for key, value in lam.items():
        utility = np.array(SCORES[key]).reshape(2, 3)
        exponent = exponent + value * (utility - utility.mean() - margin[key])
    return float((BETA * (logsumexp(exponent / BETA, axis=1) - np.log(3))).mean())


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, dict[str, Any]]:
    """One solve with a margin of 0.2, and the JSON it wrote."""
    directory = tmp_path_factory.mktemp("solved")
    result = solve(directory, "safety:margin=0.2", more=("--json", "solution.json"))
    assert result.code == 0, result.err
    return result, json.loads((directory / "solution.json").read_text())


def test_solve_writes_the_solution_as_json(solved: tuple[Result, dict[str, Any]]) -> None:
    solution = solved[1]
    lam = solution["lam"]
    assert list(lam) == ["safety"]
    assert solution["status"].upper() == "OPTIMAL"
    assert lam["safety"] > 0.01
    assert mean_under_policy("safety", lam) == pytest.approx(np.mean(SCORES["safety"]) + 0.2, abs=1e-6)
    assert solution["slack"]["safety"] == pytest.approx(0, abs=1e-6)
    assert solution["value"] == pytest.approx(dual_value(lam, {"safety": 0.2}), abs=1e-9)
    assert solution["predicted"]["improvement"]["safety"]["mean"] == pytest.approx(0.2, abs=1e-6)


def test_solve_tells_people_the_solution(solved: tuple[Result, dict[str, Any]]) -> None:
    result, solution = solved
    assert result.out.startswith("status    OPTIMAL: solved")
    assert f"safety    lambda* {solution['lam']['safety']:.6g} (SE " in result.out


def test_solve_imports_nothing_heavy(solved: tuple[Result, dict[str, Any]]) -> None:
    # pyarrow itself looks for pandas when it makes NumPy arrays
    assert not solved[0].imported & (HEAVY - {"pandas"})


def test_solve_prints_nothing_but_json_to_standard_output(
    tmp_path: Path, solved: tuple[Result, dict[str, Any]]
) -> None:
    result = solve(tmp_path, "safety:margin=0.2", more=("--json", "-"))
    assert result.code == 0
    assert json.loads(result.out) == solved[1]


def test_solve_with_two_constraints(tmp_path: Path) -> None:
    result = solve(tmp_path, "safety:margin=0.1", "honesty:margin=0.15", more=("--json", "-"))
    solution = json.loads(result.out)
    lam = solution["lam"]
    assert list(lam) == ["safety", "honesty"]
    for name, margin in (("safety", 0.1), ("honesty", 0.15)):
        slack = mean_under_policy(name, lam) - np.mean(SCORES[name]) - margin
        assert solution["slack"][name] == pytest.approx(slack, abs=1e-6)
        assert slack > -1e-6
        assert lam[name] * slack == pytest.approx(0, abs=1e-6)
    assert max(lam.values()) > 0.01


def test_solve_with_a_threshold_is_solve_with_its_margin(tmp_path: Path, solved: tuple[Result, dict[str, Any]]) -> None:
    threshold = float(np.mean(SCORES["safety"])) + 0.2
    by_threshold = json.loads(solve(tmp_path, f"safety:threshold={threshold!r}", more=("--json", "-")).out)
    assert by_threshold["lam"]["safety"] == pytest.approx(solved[1]["lam"]["safety"], rel=1e-6)


def test_home_is_filled_in_where_the_shell_leaves_it(
    tmp_path: Path, solved: tuple[Result, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    scores = f"--scores=~/{scores_file(tmp_path).name}"
    options = ["--reward", "reward", "--constraint", "safety:margin=0.2", "--beta", BETA, "--json", "~/solution.json",
               "--estimator", "empirical"]  # fmt: skip
    result = can_dist("solve", scores, *options, cwd=work)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "solution.json").read_text()) == solved[1]
    assert list(work.iterdir()) == []


def test_solve_reads_a_directory_of_shards(tmp_path: Path, solved: tuple[Result, dict[str, Any]]) -> None:
    table = pa.table(SCORES)
    (tmp_path / "shards").mkdir()
    for part in range(3):
        pq.write_table(table.slice(2 * part, 2), tmp_path / "shards" / f"{part}.parquet")
    result = solve(tmp_path, "safety:margin=0.2", scores=tmp_path / "shards", more=("--json", "-"))
    assert json.loads(result.out) == solved[1]


def test_f26_infeasible_margin_exits_4_with_the_attainable_one_and_no_file(tmp_path: Path) -> None:
    result = solve(tmp_path, "safety:margin=3", more=("--json", "solution.json"))
    assert_refused(result, 4, "InfeasibleConstraint")
    assert result.err.splitlines()[-3:] == [
        "InfeasibleConstraint: no policy supported on this table meets the constraints.",
        "  safety: margin 3.00 requested, at most 0.60 attainable "
        "(mean over prompts of the best of K = 3, minus the reference mean).",
        "  Do one of: lower constraints.safety.margin; raise generate.num_responses; add prompts with safer responses.",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_infeasible_margin_leaves_an_older_solution_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "solution.json").write_text("old")
    solve(tmp_path, "safety:margin=3", more=("--json", "solution.json"))
    assert (tmp_path / "solution.json").read_text() == "old"


def test_constant_safety_column_cannot_be_improved(tmp_path: Path) -> None:
    result = solve(tmp_path, "constant:margin=0.1")
    assert_refused(result, 4, "InfeasibleConstraint")
    assert "constant: margin 0.10 requested, at most 0.00 attainable" in result.err


def test_constant_safety_column_that_need_not_improve_costs_nothing(tmp_path: Path) -> None:
    solution = json.loads(solve(tmp_path, "constant:margin=-0.1", more=("--json", "-")).out)
    assert solution["lam"] == {"constant": 0.0}
    assert solution["slack"]["constant"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("safety", "Expected COLUMN:margin=NUMBER"),
        ("safety:equal=1", "Expected COLUMN:margin=NUMBER"),
        ("safety:equals=some", "'some' is not a number"),
        ("safety:bound=1", "Expected COLUMN:margin=NUMBER"),
        (":margin=1", "Expected COLUMN:margin=NUMBER"),
        ("safety:margin=one", "'one' is not a number"),
        ("safety:margin=nan", "expected a finite number"),
    ],
)
def test_bad_constraint_exits_2(tmp_path: Path, constraint: str, message: str) -> None:
    result = solve(tmp_path, constraint)
    assert_refused(result, 2, "ConfigError")
    assert message in result.err


def test_constraint_given_twice_exits_2(tmp_path: Path) -> None:
    assert_refused(solve(tmp_path, "safety:margin=0.1", "safety:margin=0.2"), 2, "ConfigError")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "solve --scores also needs --reward, --constraint, --beta."),
        (["--reward", "reward", "--beta", "1"], "solve --scores also needs --constraint."),
        (["--reward", "reward", "--constraint", "safety:margin=0"], "solve --scores also needs --beta."),
        (["--run", "r"], "solve takes either --scores and its options, or CONFIG --run DIR, not both."),
        (["--reward", "reward", "--constraint", "safety:margin=0", "--beta", "0"], "beta"),
        (["--reward", "reward", "--constraint", "safety:margin=0", "--beta", "nan"], "beta"),
        (
            ["--reward", "reward", "--constraint", "safety:margin=0", "--beta", "1", "--json", "no/where.json"],
            "--json no/where.json: no such directory no. Make it first.",
        ),
    ],
)
def test_solve_with_options_missing_or_wrong_exits_2(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = can_dist("solve", "--scores", scores_file(tmp_path), *arguments, cwd=tmp_path)
    assert_refused(result, 2, "ConfigError")
    assert message in result.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": [1.0, float("nan"), 0.0, 2.0, 0.3, 0.1]}, "row 1 (r1): nan"),
        ({"safety": [None, 1.0, 1.2, 0.1, 1.5, 0.7]}, "row 0 (r0): None"),
        ({"response_id": ["r0"] * 6}, "(prompt_id, response_id) must be unique"),
        ({"prompt_id": list("abcdef")}, "every prompt has one response (K = 1)"),
        ({"safety": ["x"] * 6}, "column 'safety' is string, expected numbers"),
    ],
)
def test_bad_scores_exit_3(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    result = solve(tmp_path, "safety:margin=0.1", scores=scores_file(tmp_path, **changes), more=("--json", "s.json"))
    assert_refused(result, 3, "DataError")
    assert message in result.err
    assert not (tmp_path / "s.json").exists()


def test_unknown_column_exits_3(tmp_path: Path) -> None:
    result = solve(tmp_path, "saftey:margin=0.1")
    assert_refused(result, 3, "DataError")
    assert (
        "no column 'saftey'. Did you mean 'safety'? Columns found: prompt_id, response_id, reward, safety" in result.err
    )


@pytest.mark.parametrize(
    ("name", "message"), [("absent.parquet", "no such file"), ("empty.parquet", "the file is empty")]
)
def test_missing_or_empty_score_table_exits_3(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty.parquet").touch()
    result = solve(tmp_path, "safety:margin=0.1", scores=tmp_path / name)
    assert_refused(result, 3, "DataError")
    assert message in result.err


# ---------------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A run directory of two artifacts, the second made from the first."""
    run = tmp_path / "run"
    first = open_stage(run, "prompts", "prompts", {"seed": 0}, {})
    write_part(first.path, 0, pa.table({"prompt_id": ["a", "b"]}))
    second = open_stage(run, "scores", "reference", {"beta": 0.1}, {"prompts": first.commit()})
    write_part(second.path, 0, pa.table(SCORES))
    second.commit()
    return run


def test_verify_accepts_a_whole_run(finished_run: Path) -> None:
    result = can_dist("verify", finished_run, cwd=finished_run.parent)
    assert result.code == 0
    first, second = result.out.splitlines()
    assert first == f"{finished_run}: 2 artifacts, every digest and every input as recorded."
    assert second == "Listed in no manifest, so not checked: 2 × STAGE.json, 2 × part-*.json."
    assert not result.imported & HEAVY


def test_verify_of_a_damaged_run_exits_3(finished_run: Path) -> None:
    part = next(finished_run.glob("prompts-*/part-00000.arrow"))
    part.write_bytes(part.read_bytes()[:-1])
    result = can_dist("verify", finished_run, cwd=finished_run.parent)
    assert_refused(result, 3, "DataError")
    assert f"{finished_run}: 1 problem(s) in 2 artifacts.\n  {part}: " in result.err


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "no such run directory"), ("empty", "holds no finished artifact")]
)
def test_verify_of_what_is_no_run_exits_3(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    result = can_dist("verify", name, cwd=tmp_path)
    assert_refused(result, 3, "DataError")
    assert f"{name}: {message}" in result.err


# ------------------------------------------------------------------------------- bad input to a run, before Ray starts


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("models") / "lm", WORDS, context=64)


def generate(project: Path, *settings: str) -> Result:
    overrides = [item for setting in settings for item in ("--set", setting)]
    result = can_dist("generate", "config.yaml", "--run", "runs/x", *overrides, cwd=project)
    assert "ray" not in result.imported
    return result


def test_model_path_that_does_not_exist_exits_3(project: Path) -> None:
    result = generate(project, "reference.model=./nowhere")
    assert_refused(result, 3, "DataError")
    assert "model './nowhere': no such directory. Give a model directory or a hub id 'owner/name'." in result.err


@pytest.mark.parametrize(
    ("kept", "message"),
    [((), "no config.json in the directory"), (("config.json",), "no *.safetensors in the directory")],
)
def test_directory_that_holds_no_model_exits_3(project: Path, kept: tuple[str, ...], message: str) -> None:
    (project / "lm").mkdir()
    for name in kept:
        (project / "lm" / name).write_text("{}")
    result = generate(project, "reference.model=./lm")
    assert_refused(result, 3, "DataError")
    assert message in result.err


def test_prompt_longer_than_the_context_exits_3_with_its_id_and_length(project: Path, tiny_lm: Path) -> None:
    with (project / "prompts.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": "hello " * (100 + i)}) + "\n" for i in range(3))
    result = generate(project, f"reference.model={tiny_lm}")
    assert_refused(result, 3, "DataError")
    listed = re.search(r"model '.*': \d prompt\(s\) longer than its context allows: (.*)\. At most", result.err)
    assert listed
    assert re.fullmatch(r"([0-9a-f]{16} \(10[234] tokens\)(, |$))+", listed[1])
    assert "At most 60 tokens leave room for generate.max_new_tokens = 4 in a context of 64." in result.err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl: no such file"),
        ("empty.jsonl", "", "empty.jsonl: the file is empty"),
        ("torn.jsonl", '{"prompt": "hello"}\n{"prom', "torn.jsonl, line 2: malformed JSON"),
        (
            "two.jsonl",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            "2 distinct prompts, of which prompts.num_test = 2 are to be",
        ),
    ],
)
def test_bad_prompt_file_exits_3(project: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (project / name).write_text(content)
    result = generate(project, f"prompts.source={name}")
    assert_refused(result, 3, "DataError")
    assert message in result.err


def test_resolved_configuration_is_written_before_any_work(project: Path) -> None:
    generate(project, "prompts.source=absent.jsonl", "seed=11")
    assert "seed: 11\n" in (project / "runs" / "x" / "config.yaml").read_text()


# --------------------------------------------------------------------------------------- a run directory in use

HOLDER = """
import sys
from pathlib import Path
from can_dist.config import load_config
from can_dist.workspace import Workspace
held = Workspace(Path("runs/x"), load_config("config.yaml"))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(project: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the run directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=project, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate(timeout=30)


def test_f08_run_directory_in_use_exits_6_and_names_the_holder(project: Path, holder: subprocess.Popen[str]) -> None:
    result = generate(project, "seed=5")
    assert_refused(result, 6, "EnvironmentProblem")
    who = rf"process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(
        rf"run directory runs/x is in use by {who}\. Wait for it, stop it, or give another --run\.", result.err
    )
    assert "seed: 5" not in (project / "runs" / "x" / "config.yaml").read_text()


def test_f08_run_directory_of_a_killed_process_is_free(project: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait(timeout=30)
    assert_refused(generate(project, "prompts.source=absent.jsonl"), 3, "DataError")


# ----------------------------------------------------------------------------------------------- models as scorers


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Score models: ``good``; ``two``, with two outputs; ``headless``, saved without its head's weights."""
    from safetensors.torch import load_file, save_file

    directory = tmp_path_factory.mktemp("classifiers")
    for name, num_labels in (("good", 1), ("two", 2), ("headless", 1)):
        make_tiny_classifier(directory / name, WORDS, num_labels=num_labels)
    weights = directory / "headless" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory


def scorer_refusal(model: Path) -> str:
    from can_dist.modeling.classifiers import load_sequence_classifier

    with pytest.raises(DataError) as caught:
        load_sequence_classifier(SequenceClassifier(model=str(model)), "fp32")
    return str(caught.value)


def test_sequence_classifier_with_one_output_is_loaded(classifiers: Path) -> None:
    from can_dist.modeling.classifiers import load_sequence_classifier

    model = load_sequence_classifier(SequenceClassifier(model=str(classifiers / "good")), "fp32")
    assert (model.config.num_labels, model.training) == (1, False)


def test_causal_language_model_given_as_reward_model_is_refused(tiny_lm: Path) -> None:
    assert scorer_refusal(tiny_lm) == (
        f"scorer model '{tiny_lm}': its checkpoint is a LlamaForCausalLM, not a sequence classifier; "
        "its score head would be random. Give a trained reward or cost model."
    )


def test_classifier_with_two_outputs_is_refused(classifiers: Path) -> None:
    message = scorer_refusal(classifiers / "two")
    assert message.endswith("has 2 outputs, expected 1 score per response. Choose one with 'kind: multi_head'.")


def test_classifier_without_its_head_in_the_checkpoint_is_refused(classifiers: Path) -> None:
    message = scorer_refusal(classifiers / "headless")
    assert "weights missing from the checkpoint: score.weight; they would be random." in message
