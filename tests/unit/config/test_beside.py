"""A relative path in a YAML file means the working directory first, then the file's own; no identity notices."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from tiny import make_tiny_lm

from can_dist.config import Config, load_config
from can_dist.config.beside import FREE, PATHS, beside
from can_dist.config.describe import models_in
from can_dist.config.endpoints import GenerateEndpoint
from can_dist.config.scorers import HttpScorer, Model
from can_dist.config.sections import Train
from can_dist.config.sources import DataSource
from can_dist.modeling.loading import model_digest
from can_dist.stages.ingest import source_identity

YAML = """
prompts: {source: data/p.jsonl}
reference: {model: models/lm}
reward: {model: reward}
constraints: {safety: {scorer: {model: hub/cost}, margin: 1}}
train: {ds_config: mine.json}
methods:
  mocan:
    label: {pairs: preferences, preferences: {source: pairs.jsonl}}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration and what it names, seen from the folder beside it."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for folder in (project / "data", project / "models" / "lm", project / "reward", elsewhere):
        folder.mkdir(parents=True)
    for name in ("data/p.jsonl", "pairs.jsonl", "mine.json"):
        (project / name).write_text("{}")
    (project / "my.yaml").write_text(YAML)
    monkeypatch.chdir(elsewhere)
    return project


def test_paths_of_a_file_lead_to_what_is_beside_it(project: Path) -> None:
    for given, folder in ((str(project / "my.yaml"), str(project)), ("../project/my.yaml", "../project")):
        config = load_config(given)
        assert config.prompts.source == f"{folder}/data/p.jsonl"
        assert config.reference.model == f"{folder}/models/lm"
        assert config.train.ds_config == f"{folder}/mine.json"
        assert config.methods["mocan"]["label"]["preferences"]["source"] == f"{folder}/pairs.jsonl"
        assert config.constraints["safety"].scorer.model == "hub/cost"  # type: ignore[union-attr]


def test_what_the_working_directory_has_comes_first(project: Path) -> None:
    shutil.copytree(project / "data", Path("data"))
    config = load_config("../project/my.yaml")
    assert config.prompts.source == "data/p.jsonl"
    assert config.reference.model == "../project/models/lm"


def test_in_the_files_own_directory_nothing_changes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    assert load_config("my.yaml") == load_config(project / "my.yaml")
    assert load_config("my.yaml").prompts.source == "data/p.jsonl"


def test_overrides_are_of_the_command_line(project: Path) -> None:
    assert load_config("../project/my.yaml", ["reference.model=models/lm"]).reference.model == "models/lm"


@pytest.mark.parametrize(
    "group",
    [
        {"model": "models/lm", "revision": "0" * 40},  # pinned: one of the hub
        {"model": "models/lm", "base_url": "http://localhost:1/v1", "request": {"model": "reward"}},
        {"kind": "http", "url": "http://localhost:1/", "model": "reward", "request": {"model": "reward"}},
        {"scorer": {"request": {"model": "reward", "source": ["pairs.jsonl"]}}},
        {"model": "none/lm", "template_options": {"source": "pairs.jsonl", "model": "reward"}},
        {"model": "~/lm"},
        {"model": "/lm", "source": ""},
        {"function": "pairs.jsonl", "template": "reward"},
        {"model": {"model": "absent"}, "source": 3, "q": [0.25, "reward"]},
    ],
)
def test_other_names_stay(project: Path, group: dict[str, Any]) -> None:
    assert beside(group, project) == group


def test_lists_are_walked_and_the_given_data_stay_as_they_are(project: Path) -> None:
    data = {"groups": [{"source": "pairs.jsonl"}]}
    assert beside(data, project) == {"groups": [{"source": str(project / "pairs.jsonl")}]}
    assert data == {"groups": [{"source": "pairs.jsonl"}]}


def keys_of_any(model: type, seen: set[type]) -> Iterator[str]:
    """The keys under a configuration model whose content is anybody's."""
    seen.add(model)
    for name, field in model.model_fields.items():  # type: ignore[attr-defined]
        if get_origin(field.annotation) is dict and get_args(field.annotation)[1] is Any:
            yield name
        for inner in set(models_in(field.annotation)) - seen:
            yield from keys_of_any(inner, seen)


def test_every_key_of_free_content_is_left_alone_and_every_path_is_a_key() -> None:
    assert set(keys_of_any(Config, set())) | set(keys_of_any(HttpScorer, set())) == set(FREE)
    owners = {"model": Model, "source": DataSource, "ds_config": Train}
    assert set(owners) == set(PATHS)
    assert all(key in owner.model_fields for key, owner in owners.items())
    assert "url" in HttpScorer.model_fields
    assert "base_url" in GenerateEndpoint.model_fields


def test_identities_do_not_tell_from_which_directory_a_file_was_reached(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(project / "models" / "lm")
    make_tiny_lm(project / "models" / "lm", ["a", "b"])
    here = load_config("../project/my.yaml")
    digests = model_digest(here.reference), source_identity(here.prompts)
    monkeypatch.chdir(project)
    there = load_config("my.yaml")
    assert there.reference.model != here.reference.model
    assert digests == (model_digest(there.reference), source_identity(there.prompts))
