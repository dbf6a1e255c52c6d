"""``train.stop: flat``: refused before anything starts where nothing tells when a training is flat."""

from __future__ import annotations

from typing import Any

import pytest

from can_dist.config import validate_config
from can_dist.config.base import identity
from can_dist.errors import ConfigError

SCORER = {"kind": "callable", "function": "builtins:len"}
PEOPLE = {"preferences": {"source": "pairs.jsonl"}}
LEARNED = {"kind": "log_ratio", "beta": 0.1, "criterion": "helpful"}


def configured(**sections: Any) -> Any:
    base = {
        "prompts": {"source": "p.jsonl"},
        "reference": {"model": "lm"},
        "reward": SCORER,
        "constraints": {"a": {"scorer": SCORER, "margin": 1}},
        "train": {"stop": "flat"},
    }
    return validate_config({**base, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"prompts": {"source": "p.jsonl", "num_validation": 0}},
            "train: stop 'flat' is by validation prompts, and prompts.num_validation is 0",
        ),
        ({"generate": {"num_responses": 1}}, "generate.num_responses is 1; give at least 2"),
        ({"method": "dpo_s", "label": PEOPLE}, "of r + ⟨λ, g⟩, and method dpo_s has no λ"),
        ({"method": "dpo_h", "label": PEOPLE}, "of r + ⟨λ, g⟩, and method dpo_h has no λ"),
        ({"method": "safedpo", "label": PEOPLE}, "of r + ⟨λ, g⟩, and method safedpo has no λ"),
        ({"method": "sacpo", "sacpo": {"labels_from": "scores"}}, "and method sacpo has no λ"),
        ({"method": "primal_dual"}, "method primal_dual trains on samples of each round's own"),
        ({"train": {"stop": "flat", "feedback": "validation"}}, "feedback moves λ between them"),
        ({"method": "caid", "caid": {"slack": "estimate", "within": True}}, "caid.within moves λ between them"),
        ({"basis": True}, "basis trains on each constraint's score alone"),
        (
            {"method": "pecan", "reward": LEARNED, "label": PEOPLE},
            "a log_ratio without a model is first trained on people's labels",
        ),
        ({"train": {"stop": "never"}}, "train.stop: expected 'epochs' or 'flat'"),
    ],
)
def test_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**sections)
    assert message in str(caught.value)


@pytest.mark.parametrize("method", ["mocan", "cdpo", "caid"])
def test_accepted(method: str) -> None:
    assert configured(method=method).train.stop == "flat"


def test_runs_of_before_keep_their_names() -> None:
    assert "stop" not in identity(configured(train={}).train)
    assert identity(configured().train)["stop"] == "flat"
