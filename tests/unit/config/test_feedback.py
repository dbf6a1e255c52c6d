"""``train.feedback``: refused before anything starts where λ cannot be steered or labels cannot be recomputed."""

from __future__ import annotations

from typing import Any

import pytest

from can_dist.config import validate_config
from can_dist.errors import ConfigError

SCORER = {"kind": "callable", "function": "builtins:len"}
PEOPLE = {"preferences": {"source": "pairs.jsonl"}}
RATIO = {"kind": "log_ratio", "beta": 0.1, "model": {"model": "aligned"}}


def configured(**sections: Any) -> Any:
    base = {
        "prompts": {"source": "p.jsonl"},
        "reference": {"model": "lm"},
        "reward": SCORER,
        "constraints": {"a": {"scorer": SCORER, "margin": 1}},
        "train": {"feedback": "validation"},
    }
    return validate_config({**base, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"prompts": {"source": "p.jsonl", "num_validation": 0}},
            "by validation prompts, and prompts.num_validation is 0",
        ),
        ({"prompts": {"source": "p.jsonl", "num_validation": 31}}, "31 prompts says too little of a policy"),
        ({"generate": {"num_responses": 1}}, "generate.num_responses is 1; give at least 2"),
        ({"label": {"labels": "sampled"}}, "which label.labels 'sampled' does not allow"),
        ({"method": "dpo_s", "label": PEOPLE}, "method dpo_s learns labels that hold for none"),
        ({"method": "dpo_h", "label": PEOPLE}, "method dpo_h learns labels that hold for none"),
        ({"method": "sacpo", "label": PEOPLE}, "method sacpo learns labels that hold for none"),
        ({"method": "sacpo", "sacpo": {"labels_from": "scores"}}, "method sacpo learns labels that hold for none"),
        ({"method": "cdpo"}, "and method cdpo between its trainings; leave out"),
        ({"method": "caid"}, "and method caid between its trainings; leave out"),
        (
            {
                "method": "pecan",
                "reward": RATIO,
                "constraints": {"a": {"scorer": RATIO, "margin": 1}},
                "label": {"as_published": True},
            },
            "which label.as_published does not allow",
        ),
        ({"train": {"feedback": "test"}}, "train.feedback: expected 'validation'"),
        ({"train": {"feedback": True}}, "train.feedback: "),
    ],
)
def test_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**sections)
    assert message in str(caught.value)
    assert "train" in str(caught.value) or "prompts" in str(caught.value)


@pytest.mark.parametrize("labels", ["soft", "regression", "listwise"])
def test_labels_from_scores_are_steered(labels: str) -> None:
    assert configured(label={"labels": labels}).train.feedback == "validation"
    ratios = {"reward": RATIO, "constraints": {"a": {"scorer": RATIO, "margin": 1}}}
    assert configured(method="pecan", label={"labels": labels}, **ratios).train.feedback == "validation"
    pairs = {"labels": labels, "pairs": "preferences", **PEOPLE}
    assert configured(label=pairs).train.feedback == "validation"


CAID = {"method": "caid", "train": {}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"caid": {"within": True}}, "caid: within one training nothing is generated; give slack 'estimate'"),
        (
            {"caid": {"slack": "estimate"}, "prompts": {"source": "p.jsonl", "num_validation": 0}, "strength": 1},
            "caid: slack 'estimate' is by validation prompts, and prompts.num_validation is 0",
        ),
        (
            {"caid": {"slack": "estimate"}, "generate": {"num_responses": 1}, "strength": 1},
            "generate.num_responses is 1; give at least 2",
        ),
        (
            {"caid": {"slack": "estimate", "within": True}, "label": {"labels": "sampled"}},
            "caid.within recomputes the labels for each λ, which label.labels 'sampled' does not allow",
        ),
        ({"method": "mocan", "caid": {"slack": "estimate"}}, "method mocan does not use this section"),
    ],
)
def test_caid_is_refused_what_it_cannot_estimate(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**{**CAID, **sections})
    assert message in str(caught.value)


def test_caid_within_is_accepted_without_a_section_of_training() -> None:
    raw = {"slack": "estimate", "within": True}
    assert configured(**CAID, caid=raw).caid.within
