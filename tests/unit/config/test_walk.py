"""One walk through the configuration: it yields every model, data source and endpoint, and three commands agree."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from tiny import make_tiny_lm

from can_dist.cli import cli
from can_dist.config import METHODS, Config, DataSource, Model, validate_config
from can_dist.config.describe import models_in
from can_dist.config.endpoints import Endpoint
from can_dist.config.walk import READ_AS, endpoints, models, read_as, scorers, sources
from can_dist.doctor.inputs import check_inputs
from can_dist.doctor.preflight import check_sources
from can_dist.errors import ConfigError, DataError
from can_dist.pipeline import run_pipeline

HTTP = {"kind": "http", "url": "http://h:1/x", "model": "m", "request": {"input": "{response}"}, "value": "s"}
GUARD = {"kind": "guard", "model": "guard"}
RATIO = {"kind": "log_ratio", "beta": 0.1, "model": {"model": "aligned"}}
LEARNED = {"kind": "log_ratio", "beta": 0.1, "criterion": "safe", "preferences": {"source": "learned.jsonl"}}
PEOPLE = {"label": {"preferences": {"source": "people.jsonl"}}}
STEPS = {"first": {"preferences": {"source": "first.jsonl"}}, "second": {"preferences": {"source": "second.jsonl"}}}
OF_METHOD: dict[str, dict[str, Any]] = {
    "mocan": {
        "reward": HTTP,
        "generate": {"endpoint": {"base_url": "http://h:1/v1", "model": "lm"}},
        "constraints": {
            "safety": {"scorer": GUARD, "others": {"second": {"model": "other"}}, "of": "worst_of", "margin": 0.1}
        },
    },
    "pecan": {"reward": RATIO, "constraints": {"safety": {"scorer": LEARNED, "margin": 0.1}}},
    "dpo_h": PEOPLE,
    "dpo_s": PEOPLE,
    "safedpo": PEOPLE,
    "sacpo": {"sacpo": STEPS},
    "p_sacpo": {"sacpo": STEPS},
    "cdpo": {"generate": {"responses": {"source": "responses.jsonl"}}},
    "primal_dual": {},
    "caid": {"label": {"pairs": "preferences", "preferences": {"source": "people.jsonl"}}},
}


def configure(method: str, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "method": method,
        "prompts": {"source": "prompts.jsonl"},
        "reference": {"model": "reference"},
        "reward": {"model": "reward"},
        "constraints": {"safety": {"scorer": GUARD, "margin": 0.1}},
        "evaluate": {
            "benign_prompts": {"source": "benign.jsonl"},
            "profile": {"set": "xstest", "source": "xstest.jsonl"},
        },
    }
    return validate_config(raw | OF_METHOD[method] | changes)


def declared(kind: type[BaseModel], annotation: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every field of a kind that the configuration's types declare, by name; names given by users are '*'."""
    for name, field in annotation.model_fields.items():
        for inner in models_in(field.annotation):
            star = ".*" if "dict" in str(field.annotation) else ""
            if issubclass(inner, kind):
                yield f"{prefix}{name}{star}"
            yield from declared(kind, inner, f"{prefix}{name}{star}.")


@pytest.mark.parametrize(("kind", "walk"), [(Model, models), (DataSource, sources), (Endpoint, endpoints)])
def test_every_declared_field_of_the_kind_is_yielded_for_some_method(kind: type[BaseModel], walk: Any) -> None:
    named = {"constraints.safety.others.second": "constraints.*.others.*", "constraints.safety": "constraints.*"}
    yielded = set()
    for key in (key for method in METHODS for key in walk(configure(method))):
        given, star = next(((name, star) for name, star in named.items() if key.startswith(name)), ("", ""))
        yielded.add(star + key.removeprefix(given))
    expected = {key for key in declared(kind)}
    assert {_anywhere(key) for key in expected} == {_anywhere(key) for key in yielded}
    assert yielded <= expected


def _anywhere(key: str) -> str:
    """One type stands at three places: a key inside of it, wherever it stands."""
    for place in ("reward", "constraints.*.scorer", "constraints.*.others.*"):
        if key == place or key.startswith(f"{place}."):
            return "(a scorer)" + key.removeprefix(place)
    return key


def test_scorers_are_the_reward_and_every_constraint() -> None:
    assert list(scorers(configure("cdpo"))) == ["reward", "constraints.safety.scorer"]
    several = ["reward", "constraints.safety.scorer", "constraints.safety.others.second"]
    assert list(scorers(configure("mocan"))) == several
    assert "constraints.safety.others.second" in models(configure("mocan"))


def test_every_source_is_read_as_something() -> None:
    keys = {key for method in METHODS for key in sources(configure(method))}
    assert {read_as(key) for key in keys} == set(READ_AS.values())


@pytest.mark.parametrize("method", list(METHODS))
def test_the_doctor_names_every_missing_file_model_and_endpoint(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = configure(method)
    looked_at = {finding.subject for finding in check_inputs(config)}
    assert looked_at >= {*sources(config), *models(config), *endpoints(config)}
    missing = {key: str(source.source) for key, source in sources(config).items()}
    found = {finding.subject: finding.state for finding in check_inputs(config)}
    assert all(f"{name}: no such file" in found[key] for key, name in missing.items())


def test_run_doctor_and_plan_give_one_message_on_a_missing_source(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", ["w1", "w2"])
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w1 w{n}"}) + "\n" for n in range(9)))
    raw = {
        "method": "sacpo",
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(tmp_path / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "sacpo": {
            "first": {"preferences": {"source": "missing1.jsonl"}},
            "second": {"preferences": {"source": "missing2.jsonl"}},
        },
    }
    (tmp_path / "sacpo.json").write_text(json.dumps(raw))
    sentences = [
        f"sacpo.{step}.preferences: {name}: no such file. Give a JSONL, Parquet or Arrow file, or a hub data set id."
        for step, name in (("first", "missing1.jsonl"), ("second", "missing2.jsonl"))
    ]
    with pytest.raises(DataError) as refused:
        run_pipeline(tmp_path / "run", validate_config(raw))
    planned = CliRunner().invoke(cli, ["plan", str(tmp_path / "sacpo.json")])
    assert isinstance(planned.exception, DataError)
    assert str(planned.exception) == str(refused.value)
    assert all(sentence in str(refused.value) for sentence in sentences)
    findings = {
        f"{finding.subject}: {finding.state}. {finding.remedy}" for finding in check_inputs(validate_config(raw))
    }
    assert findings >= set(sentences)
    with pytest.raises(DataError) as direct:
        check_sources(validate_config(raw))
    assert str(direct.value) == str(refused.value)


def test_a_plan_from_a_shape_asks_no_commit_of_the_data(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", [f"w{n}" for n in range(5000)])  # of few words long packs are counted, for seconds
    raw = configure("mocan").model_dump(mode="json", exclude_unset=True) | {
        "prompts": {"source": "owner/data", "num_train": 9, "num_test": 2, "num_validation": 0},
        "reference": {"model": "owner/model"},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "evaluate": {},
        "strength": 1,
        "train": {"tokens_per_pack": 512},
    }
    (tmp_path / "hub.json").write_text(json.dumps(raw))
    command = ["plan", str(tmp_path / "hub.json"), "--memory", "24GB"]
    refused = CliRunner().invoke(cli, command)
    assert isinstance(refused.exception, ConfigError)
    assert "give its revision" in str(refused.exception)
    planned = CliRunner().invoke(cli, [*command, "--shape", str(tmp_path / "lm" / "config.json")])
    assert planned.exit_code == 0, planned.output
    (tmp_path / "hub.json").write_text(json.dumps(raw | {"prompts": {"source": "none.jsonl", "num_test": 2}}))
    missing = CliRunner().invoke(cli, [*command, "--shape", str(tmp_path / "lm" / "config.json")])
    assert isinstance(missing.exception, DataError)
