"""``constraints.NAME.of`` in a configuration: what is accepted, what is refused in which words, and no old identity."""

from __future__ import annotations

from typing import Any

import pytest

from can_dist.config import Config, validate_config
from can_dist.config.base import identity
from can_dist.config.walk import named_scorers
from can_dist.errors import ConfigError
from can_dist.stages.utilities import column_keys, columns_of

SCORER = {"kind": "callable", "function": "scorers:safety"}
OTHER = {"kind": "callable", "function": "scorers:other"}
COST = {"model": "cost"}
RATIO = {"kind": "log_ratio", "beta": 0.1, "model": {"model": "aligned"}}
TAIL = {"of": "cvar", "alpha": 0.1}
BY_SCORES = {"sacpo": {"labels_from": "scores"}}
PEOPLE = {"label": {"preferences": {"source": "people.jsonl"}}}


def configure(constraint: dict[str, Any], name: str = "safety", **sections: Any) -> Config:
    return validate_config(
        {
            "prompts": {"source": "prompts.jsonl"},
            "reference": {"model": "reference"},
            "reward": {"model": "reward"},
            "constraints": {name: {"scorer": SCORER, "margin": 0.1} | constraint},
        }
        | sections
    )


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"of": "cvar", "alpha": 0}, "alpha: expected greater than 0 (found 0)"),
        ({"of": "cvar", "alpha": 1}, "alpha: expected less than 1 (found 1)"),
        ({"of": "cvar", "alpha": -0.1}, "alpha: expected greater than 0 (found -0.1)"),
        ({"of": "cvar"}, "of: cvar needs alpha"),
        ({"of": "rectified"}, "of: rectified needs level"),
        ({"of": "worst_of"}, "of: worst_of needs others"),
        ({"alpha": 0.1}, "alpha belongs to of: cvar, and this is of: mean; leave out alpha"),
        ({"of": "cvar", "alpha": 0.1, "level": 0.0}, "level belongs to of: rectified, and this is of: cvar"),
        ({"others": {"second": OTHER}}, "others belongs to of: worst_of, and this is of: mean"),
        ({"of": "cvar", "alpha": 0.1, "equal": True}, "a CVaR is met at least, not exactly; leave out equal"),
        ({"of": "median"}, "of: expected 'mean', 'rectified', 'worst_of' or 'cvar' (found 'median')"),
        ({"of": "worst_of", "others": {"a.b": OTHER}}, "others: 'a.b' is no name"),
        ({"of": "worst_of", "others": {"b": {"kind": "callable"}}}, "others.b.function: required, not given"),
        ({"fall": 0.1}, "given both as margin and as fall; that a cost falls by B is margin: B of a constraint called"),
        ({"margin": None, "fall": 0.1}, "fall is no key; that a cost falls by B is margin: B of a constraint called"),
        ({"scorer": RATIO, "of": "rectified", "level": 0.0}, "a log_ratio is known only up to a number that each"),
        ({"of": "worst_of", "others": {"second": RATIO}}, "a log_ratio is known only up to a number that each"),
    ],
)
def test_what_cannot_be_meant_is_one_problem(constraint: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(constraint)
    assert words in str(caught.value)
    assert "1 problem." in str(caught.value)


@pytest.mark.parametrize(
    ("method", "sections", "words"),
    [
        ("cdpo", {}, "method cdpo moves λ by the mean of a score, and the tau of a CVaR would have to move with it"),
        ("caid", {}, "method caid moves λ by the mean of a score"),
        ("sacpo", BY_SCORES, "labels_from 'scores' labels by safety itself, which is of: cvar"),
        ("p_sacpo", BY_SCORES, "no dual is solved that would find its tau"),
        (
            "pecan",
            {"reward": RATIO, "constraints": {"safety": TAIL | {"scorer": RATIO, "margin": 1}}},
            "a log_ratio is",
        ),
    ],
)
def test_a_method_that_has_no_tau_refuses_a_cvar(method: str, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(TAIL, method=method, **sections)
    assert words in str(caught.value)
    assert "1 problem." in str(caught.value)


@pytest.mark.parametrize("method", ["dpo_h", "dpo_s", "sacpo"])
def test_a_method_that_learns_from_people_is_measured_by_any(method: str) -> None:
    config = configure({"of": "cvar", "alpha": 0.1}, method=method, **PEOPLE)
    assert config.constraints["safety"].alpha == 0.1


def test_worst_of_has_a_column_for_every_scorer_and_costs_turn_all_signs() -> None:
    constraint = {"of": "worst_of", "others": {"second": COST}, "scorer": {"model": "harm"}}
    config = configure(constraint, name="-harm")
    scorers = named_scorers(config.reward, config.constraints)
    assert list(scorers) == ["reward", "-harm", "-harm.second"]
    assert [scorer.sign for scorer in list(scorers.values())[1:]] == [-1, -1]  # type: ignore[union-attr]
    (column,) = columns_of(config.constraints)
    assert column.sources == ("-harm", "-harm.second")
    with pytest.raises(ConfigError, match="columns of log-probabilities begin so"):
        configure(constraint, name="logp")


def test_a_constraint_on_a_mean_has_the_identity_that_it_had() -> None:
    config = configure({})
    plain = identity(config.constraints["safety"])
    assert plain.keys() == {"scorer", "margin", "threshold", "equal"}
    assert column_keys(columns_of(config.constraints)) == {}
    tail = configure({"of": "cvar", "alpha": 0.1}).constraints
    assert identity(tail["safety"]) == plain | {"of": "cvar", "alpha": 0.1}
    assert column_keys(columns_of(tail))["columns"]["safety"]["alpha"] == 0.1
