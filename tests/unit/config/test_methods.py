"""The sections of the methods: what is accepted, and one clear message for what is not."""

from __future__ import annotations

from typing import Any

import pytest
from exact_run import SCORER, make_config

from can_dist.config import Config
from can_dist.config.describe import describe_keys
from can_dist.config.methods import OWN_SECTIONS
from can_dist.errors import ConfigError
from can_dist.pipeline import run_pipeline

PEOPLE = {"label": {"preferences": {"source": "pairs.jsonl"}}}
NEEDS_PEOPLE = ("sacpo", "p_sacpo", "safedpo")


def config(method: str, **sections: Any) -> Any:
    return make_config(0.1, {"safety": 0.5}, method, **sections)


def test_defaults_are_the_papers() -> None:
    sacpo = config("sacpo", **PEOPLE).sacpo
    assert (sacpo.order, sacpo.labels_from, sacpo.beta_over_lambda) == ("helpful_first", "people", 0.025)
    assert (sacpo.first.loss, sacpo.second.loss) == ("dpo", "dpo")
    assert config("p_sacpo", **PEOPLE).p_sacpo.q == (0.25, 0.5, 0.75)
    assert (config("caid").caid.rounds, config("caid").caid.step_size) == (1, "1/H")
    assert config("cdpo").cdpo.warm_start is False


@pytest.mark.parametrize(
    ("method", "sections", "message"),
    [
        ("mocan", {"cdpo": {"rounds": 3}}, "method mocan does not use this section; leave out, or set method to cdpo"),
        ("cdpo", {"caid": {"rounds": 3}}, "method cdpo does not use this section; leave out, or set method to caid"),
        (
            "dpo_h",
            {"sacpo": {"order": "safe_first"}, **PEOPLE},
            "method dpo_h does not use this section; leave out, or set method to sacpo or p_sacpo",
        ),
        ("sacpo", {"p_sacpo": {"q": [0.5]}, **PEOPLE}, "leave out, or set method to p_sacpo"),
        ("sacpo", {}, "method sacpo learns from a data set's own labels; name it in label.preferences"),
        ("p_sacpo", {}, "method p_sacpo learns from a data set's own labels; name it in label.preferences"),
        (
            "sacpo",
            {"label": {"preferences": {"source": "p.jsonl"}, "human": {"loss": "kto"}}},
            "method sacpo does not use label.human; leave out",
        ),
        (
            "sacpo",
            {"sacpo": {"labels_from": "scores", "second": {"loss": "kto"}}},
            "labels_from 'scores' does not use second; leave out",
        ),
        (
            "p_sacpo",
            {"sacpo": {"order": "safe_first"}, **PEOPLE},
            "method p_sacpo mixes with the helpful policy; order must be 'helpful_first'",
        ),
        ("safedpo", {}, "method safedpo learns from a data set's own labels; name it in label.preferences"),
        (
            "safedpo",
            {"label": {"preferences": {"source": "p.jsonl"}, "human": {"smoothing": 0.1}}},
            "method safedpo does not use label.human; leave out",
        ),
        (
            "safedpo",
            {"safedpo": {"thresholds": {"calm": 0.0}}, **PEOPLE},
            "thresholds names calm, which constraints does not have; its names: safety",
        ),
        ("safedpo", {"safedpo": {"thresholds": {}}, **PEOPLE}, "thresholds names no constraint; name one, or leave"),
        (
            "dpo_h",
            {"safedpo": {"offset": 1}, **PEOPLE},
            "does not use this section; leave out, or set method to safedpo",
        ),
        (
            "primal_dual",
            {"primal_dual": {"form": "log"}},
            "form 'log' multiplies λ, and 0 stays 0; give a start above 0",
        ),
        (
            "primal_dual",
            {"generate": {"temperature": 0.7}},
            "learns from samples of the policy itself; generate.temperature and generate.top_p must be 1",
        ),
        ("primal_dual", {"generate": {"num_responses": 1}}, "generate.num_responses is 1; give at least 2"),
        (
            "primal_dual",
            {
                "primal_dual": {"form": "log", "start": 1},
                "constraints": {"calm": {"scorer": SCORER, "margin": 0.1, "equal": True}},
            },
            "form 'log' keeps λ above 0, and that of calm, an equality, may be below; use linear",
        ),
        ("primal_dual", {"label": {"labels": "listwise"}}, "method primal_dual does not use label.labels; leave out"),
        ("p_sacpo", {"p_sacpo": {"q": [0.5, 0.5]}, **PEOPLE}, "q names a weight twice"),
        ("p_sacpo", {"p_sacpo": {"q": [1.5]}, **PEOPLE}, "q.0"),
        ("cdpo", {"cdpo": {"step_size": 0}}, "cdpo.step_size"),
        ("cdpo", {"cdpo": {"step_size": "1/h"}}, "or expected '1/H' (found '1/h')"),
        ("cdpo", {"label": {"preferences": {"source": "p.jsonl"}}}, "when label.pairs is 'preferences', and only then"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(method, **sections)
    assert message in str(caught.value)


# key, below the bound, on or just inside it, inside, above
BOUNDS: list[tuple[str, Any, Any, Any, Any]] = [
    ("sacpo.beta_over_lambda", 0, 1e-9, 1e9, None),
    *((f"sacpo.{step}.smoothing", -0.001, 0, 0.499, 0.5) for step in ("first", "second")),
    *((f"sacpo.{step}.desirable_weight", 0, 1e-9, 1e9, None) for step in ("first", "second")),
    *((f"sacpo.{step}.undesirable_weight", 0, 1e-9, 1e9, None) for step in ("first", "second")),
    ("p_sacpo.q", [-0.001], [0.0], [0.5, 1.0], [1.001]),
    ("safedpo.offset", -0.001, 0, 1e9, None),
    ("cdpo.rounds", 0, 1, 10**6, None),
    ("cdpo.step_size", 0, 1e-9, 1e9, None),
    ("cdpo.tolerance", -0.001, 0, 1e9, None),
    ("cdpo.standard_errors", -0.001, 0, 1e9, None),
    ("caid.rounds", 0, 1, 10**6, None),
    ("caid.step_size", 0, 1e-9, 1e9, None),
    ("caid.epochs", 0, 1, 10**6, None),
    ("primal_dual.rounds", 0, 1, 10**6, None),
    ("primal_dual.step_size", 0, 1e-9, 1e9, None),
    ("primal_dual.start", -0.001, 0, 1e9, None),
    ("primal_dual.epochs", 0, 1, 10**6, None),
]


def with_value(key: str, value: Any) -> Any:
    """A configuration with one key set, of the method that has it."""
    section, *between, last = key.split(".")
    options = {last: value}
    if last.endswith("desirable_weight"):
        options["loss"] = "kto"
    for name in reversed(between):
        options = {name: options}
    return config(section, **{section: options}, **(PEOPLE if section in NEEDS_PEOPLE else {}))


def test_every_number_of_the_methods_is_in_the_table_of_bounds() -> None:
    numbers = {key.name for key in describe_keys(Config) if "number" in key.type and "by name" not in key.type}
    assert {name for name in numbers if name.split(".")[0] in OWN_SECTIONS} == {key for key, *_ in BOUNDS}


@pytest.mark.parametrize(("key", "below", "on", "inside", "above"), BOUNDS)
def test_bounds(key: str, below: Any, on: Any, inside: Any, above: Any) -> None:
    for value in (on, inside):
        found = with_value(key, value)
        for name in key.split("."):
            found = getattr(found, name)
        assert found == (tuple(value) if isinstance(value, list) else value)
    for value in (below, above):
        if value is not None:
            with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
                with_value(key, value)


def test_section_given_as_its_default_is_no_mistake() -> None:
    assert config("mocan", cdpo={"rounds": 5}).cdpo.rounds == 5


def test_scores_of_two_constraints_are_too_many_for_sacpo() -> None:
    two = {name: {"scorer": SCORER, "margin": 0.1} for name in ("toxic", "private")}
    with pytest.raises(ConfigError, match="labels_from 'scores' follows one safety score, but constraints has toxic"):
        config("sacpo", sacpo={"labels_from": "scores"}, constraints=two)


@pytest.mark.parametrize("method", ["sacpo", "p_sacpo", "cdpo", "caid", "primal_dual"])
def test_a_launcher_is_told_that_there_are_several_trainings(tmp_path: Any, method: str) -> None:
    sections = PEOPLE if method.endswith("sacpo") else {}
    with pytest.raises(ConfigError, match=f"method {method} trains several times.*Start it with 'can-dist run'"):
        run_pipeline(tmp_path, config(method, **sections), "train", only_stage="train")
