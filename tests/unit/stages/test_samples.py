"""Which held-out prompts the report shows, and how many crossed the border."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from can_dist.stages.samples import beginnings, chosen_samples, crossings
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import RESPONSES

BEFORE = {"a": [1.0, 1.0, 1.3], "b": [-1.0, -2.0, 0.0], "c": [0.5, 0.5, 0.5], "d": [0.2, 0.2, 0.2], "e": [-1, -1, -1]}
AFTER = {"a": [-0.5, 0.0, -1.0], "b": [2.0, 1.0, 0.0], "c": [0.5, 0.5, 0.6], "d": [0.4, 0.4, 0.4], "e": [-2, -2, -2]}
BORDER = {"safety": 0.0}


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Artifact]:
    """Responses that say their own prompt and number, and their scores, of both models."""
    made = {}
    for who, values in (("before", BEFORE), ("after", AFTER)):
        rows = [(p, k, value) for p, scores in values.items() for k, value in enumerate(scores)]
        responses = open_stage(tmp_path, "generate", who, {}, {})
        write_part(responses.path, 0, pa.Table.from_pylist([
            {"prompt_id": p, "response_id": f"{p}/{k}", "messages": [{"role": "user", "content": f"say\n  {p} " * 30}],
             "text": f"{who} {p}/{k}", "token_ids": [1], "num_tokens": 1, "finish_reason": "stop"} for p, k, _ in rows
        ], schema=RESPONSES))  # fmt: skip
        made[f"responses_{who}"] = responses.commit()
        scores = open_stage(tmp_path, "scores", who, {}, {"responses": made[f"responses_{who}"]})
        columns = [(p, f"{p}/{k}", value) for p, k, value in rows]
        prompt, response, value = zip(*columns, strict=True)
        table = {"prompt_id": prompt, "response_id": response, "safety": pa.array(value, pa.float64())}
        write_part(scores.path, 0, pa.table({**table, "reward": pa.array(value, pa.float64())}))
        made[f"scores_{who}"] = scores.commit(info={"quarantined": []})
    return made


def test_regressions_come_first_and_every_group_has_its_example(inputs: dict[str, Artifact]) -> None:
    """By means: a falls below 0, e falls and was unsafe, b rises above 0, d rises, c hardly moves."""
    samples = chosen_samples(inputs, ["reward", "safety"], BORDER, 5)
    assert [(s["group"], s["prompt"][-4:].strip()) for s in samples] == [
        ("most worsened", "a"),
        ("most worsened", "e"),
        ("most improved", "b"),
        ("most improved", "d"),
        ("least changed", "c"),
    ]
    assert samples[0]["means"]["safety"] == pytest.approx([1.1, -0.5])
    assert (samples[0]["reference"], samples[0]["policy"]) == ("before a/0", "after a/0")  # nearest to the means
    assert samples[2]["scores"] == {"reward": [-1.0, 1.0], "safety": [-1.0, 1.0]}


def test_no_more_prompts_are_shown_than_there_are_or_than_are_wanted(inputs: dict[str, Artifact]) -> None:
    assert len(chosen_samples(inputs, ["safety"], BORDER, 50)) == 5
    assert chosen_samples(inputs, ["safety"], BORDER, 0) == []
    first = chosen_samples(inputs, ["safety"], BORDER, 2)
    assert [s["group"] for s in first] == ["most worsened", "most improved"]


def test_crossings_count_prompts_by_their_mean(inputs: dict[str, Artifact]) -> None:
    assert crossings(inputs, BORDER) == {
        "safety": {
            "border": 0.0,
            "counts": {"stayed safe": 2, "unsafe to safe": 1, "safe to unsafe": 1, "stayed unsafe": 1},
        }
    }


def test_a_prompt_is_named_by_its_beginning(inputs: dict[str, Artifact]) -> None:
    found = beginnings(inputs["scores_before"], ["a", "absent"], length=10)
    assert found == {"a": "say a say…"}
    assert beginnings(inputs["responses_before"], ["a"]) == {}
