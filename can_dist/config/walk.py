"""One walk through a configuration: every scorer, model, data source and endpoint in it, by its key.

The run, its preflight, the doctor and the check of pins all ask here, so none of them can forget a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from can_dist.config.endpoints import Endpoint
from can_dist.config.root import Config
from can_dist.config.scorers import Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.config.sources import DataSource

ReadAs = Literal["prompts", "pairs", "responses", "profile"]
READ_AS: dict[str, ReadAs] = {
    "prompts": "prompts",
    "benign_prompts": "prompts",
    "profile": "profile",
    "preferences": "pairs",
    "responses": "responses",
}
"""What a data source is read as, by the name of its field."""

REWARD = "reward"
"""The name of the reward's score."""

Kind = TypeVar("Kind", bound=BaseModel)


def scorers(config: Config) -> dict[str, Scorer]:
    """Return the reward's and every constraint's scorer by its key."""
    named: dict[str, Scorer] = {"reward": config.reward}
    for name, constraint in config.constraints.items():
        named[f"constraints.{name}.scorer"] = constraint.scorer
        named |= {f"constraints.{name}.others.{other}": scorer for other, scorer in constraint.others.items()}
    return named


def named_scorers(reward: Scorer, constraints: Mapping[str, Constraint]) -> dict[str, Scorer]:
    """Return every scorer by the name of its score column."""
    named: dict[str, Scorer] = {REWARD: reward}
    for name, constraint in constraints.items():
        named |= constraint.scorers(name)
    return named


def models(config: Config) -> dict[str, Model]:
    """Return every model that is opened here, by its key: the reference, score models, the models of log-ratios."""
    return _all_of(config, Model)


def sources(config: Config) -> dict[str, DataSource]:
    """Return every data source by its key."""
    return _all_of(config, DataSource)


def read_as(key: str) -> ReadAs:
    """Return what the data source of this key is read as."""
    return READ_AS[key.rpartition(".")[2]]


def endpoints(config: Config) -> dict[str, Endpoint]:
    """Return every endpoint that the run sends requests to, by its key."""
    return _all_of(config, Endpoint)


def _all_of(config: Config, kind: type[Kind]) -> dict[str, Kind]:
    return {key: model for key, model in _walk(config, "") if isinstance(model, kind)}


def _walk(value: Any, key: str) -> Iterator[tuple[str, BaseModel]]:
    """Yield every model inside a value with its dotted key, outer before inner, in the order of the fields."""
    if isinstance(value, BaseModel):
        yield key, value
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, f"{key}.{name}" if key else name)
