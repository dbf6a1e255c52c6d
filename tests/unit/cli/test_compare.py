"""Several methods in one configuration, and what the commands compare, judge and run --methods refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

from can_dist.algorithms import RUN
from can_dist.cli import cli
from can_dist.config import METHODS, dump_yaml, for_method, load_config, validate_config
from can_dist.config.methods import MethodName
from can_dist.config.yaml_files import merge
from can_dist.errors import CanDistError, ConfigError, EnvironmentProblem
from can_dist.stages.report import method_title

LEN = {"kind": "callable", "function": "builtins:len"}
PEOPLE = {"label": {"preferences": {"source": "pairs.jsonl"}}}


def raw(**changes: Any) -> dict[str, Any]:
    base = {
        "prompts": {"source": "prompts.jsonl", "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": LEN,
        "constraints": {"safety": {"scorer": LEN, "margin": 1.0}},
        "train": {"learning_rate": 1e-3},
    }
    return base | changes


# ----------------------------------------------------------------------------------------------------- configuration


def test_a_method_differs_from_the_configuration_only_by_its_own_keys() -> None:
    own = PEOPLE | {"beta": 0.5, "train": {"num_epochs": 3}}
    config = validate_config(raw(methods={"dpo_h": own}))
    dpo = for_method(config, "dpo_h")
    assert (dpo.method, dpo.beta, dpo.methods) == ("dpo_h", 0.5, {})
    assert (dpo.train.num_epochs, dpo.train.learning_rate) == (3, 1e-3)
    assert dpo.label.preferences is not None
    mocan = for_method(config, "mocan")
    assert mocan == validate_config(raw())
    assert config.method == "mocan"


def test_sections_of_other_methods_are_left_out() -> None:
    config = validate_config(raw(method="cdpo", cdpo={"rounds": 2}))
    assert for_method(config, "mocan") == validate_config(raw())
    assert for_method(config, "cdpo").cdpo.rounds == 2


def test_a_scorer_of_another_kind_replaces_the_whole_group() -> None:
    classifier = {"kind": "sequence_classifier", "model": "rm", "sign": -1}
    merged = merge({"reward": classifier, "beta": 1}, {"reward": LEN})
    assert merged == {"reward": LEN, "beta": 1}
    assert merge({"reward": LEN}, {"reward": {"batch_size": 8}}) == {"reward": LEN | {"batch_size": 8}}
    assert merge({"train": {"lora": {"r": 8}}}, {"train": {"lora": None}}) == {"train": {"lora": None}}


def test_methods_survive_being_written_and_read(tmp_path: Path) -> None:
    config = validate_config(raw(methods={"dpo_s": PEOPLE}))
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"dpo_h": {}},
            r"configuration, methods\.dpo_h: 1 problem\.\n  .*method dpo_h learns from a data set's own",
        ),
        (
            {"dpoh": PEOPLE},
            r"configuration, methods\.dpoh: .*\n  method: unknown .*Did you mean 'dpo_h'",
        ),
        ({"mocan": {"trian": {}}}, r"methods\.mocan: 1 problem\.\n  trian: unknown key\. Did you mean 'train'\?"),
        ({"mocan": {"beta": -1}}, r"methods\.mocan: 1 problem\.\n  beta: expected greater than 0"),
        ({"mocan": {"method": "dpo_h"}}, r"methods\.mocan: method cannot be set for one method\. Leave it out\."),
        ({"mocan": 3}, r"methods\.mocan: expected a group of keys \(found 3\)"),
    ],
)
def test_every_named_method_is_checked_when_the_file_is_read(methods: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_config(raw(methods=methods))


def test_every_method_has_stages_that_end_with_an_evaluation_and_a_title() -> None:
    assert tuple(RUN) == tuple(METHODS) == get_args(MethodName)
    assert {row.stages[-1] for row in METHODS.values()} == {"evaluate"}
    assert method_title("p_sacpo", "q = 0.25") == "P-SACPO (q = 0.25)"


# ---------------------------------------------------------------------------------------------------------- commands


def refused(*arguments: str) -> tuple[str, CanDistError]:
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, CanDistError), result.output
    return str(result.exception), result.exception


@pytest.mark.parametrize("names", ["mocan,mocan", "mocan,", ""])
def test_methods_that_are_not_different_names_are_refused(tmp_path: Path, names: str) -> None:
    (tmp_path / "my.yaml").write_text(dump_yaml(validate_config(raw())))
    message, error = refused("run", str(tmp_path / "my.yaml"), "--run", str(tmp_path / "run"), "--methods", names)
    assert message == f"--methods {names}: expected one or more different names, such as mocan,dpo_h,dpo_s."
    assert isinstance(error, ConfigError)


def test_a_method_that_cannot_run_is_refused_before_the_first_one_starts(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(dump_yaml(validate_config(raw())))
    run = ("run", str(tmp_path / "my.yaml"), "--run", str(tmp_path / "run"), "--methods", "mocan,dpo_h")
    message, _ = refused(*run)
    assert "methods.dpo_h: 1 problem." in message
    assert "method dpo_h learns from a data set's own labels" in message
    assert not (tmp_path / "run").exists()


JUDGE = ("--model", "m", "--criterion", "safety")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--endpoint", "localhost:8000"), "--endpoint localhost:8000: expected an address such as http://localhost"),
        (("--endpoint", "http://u:pw@h/v1"), "expected no user, password or query in the address"),
        (("--endpoint", "http://h/v1", "--concurrency", "0"), "--concurrency 0: Input should be greater than or equal"),
    ],
)
def test_a_judge_that_cannot_be_reached_so_is_refused(arguments: tuple[str, ...], message: str) -> None:
    text, error = refused("judge", "nowhere", *JUDGE, *arguments)
    assert re.search(re.escape(message), text), text
    assert isinstance(error, ConfigError)


def test_judging_nothing_is_refused(tmp_path: Path) -> None:
    message, error = refused("judge", str(tmp_path), *JUDGE, "--endpoint", "http://127.0.0.1:1/v1")
    assert "no evaluation. Give run directories, or evaluate-... directories in them" in message
    assert not isinstance(error, ConfigError | EnvironmentProblem)
