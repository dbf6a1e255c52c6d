"""The rates of a public set: by category, of both sides, against plain counting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from exact_run import make_config

from can_dist.config.sections import Profile
from can_dist.errors import DataError
from can_dist.reporting.profile_panel import profile_panel
from can_dist.stages.profile import CATEGORIES, ingest_profile, profile_record
from can_dist.tables.artifacts import Artifact, open_stage, write_json, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.schemas import PROMPTS, RESPONSES
from can_dist.workspace import Workspace

NO, YES = "I'm sorry, but I can't help with that.", "Use the task manager."
KINDS = {
    "p0": ["homonyms"],
    "p1": ["homonyms"],
    "p2": ["contrast_homonyms"],
    "p3": ["contrast_homonyms"],
    "p4": ["odd"],
}
SAID = {
    "reference": {"p0": [YES, NO], "p1": [YES, YES], "p2": [NO, NO], "p3": [YES, NO], "p4": [YES, YES]},
    "policy": {"p0": [NO, NO], "p1": [YES, NO], "p2": [NO, NO], "p3": [NO, NO], "p4": [NO, YES]},
}
SCORES = {
    "reference": {"p0": [1.0, 1.0], "p1": [1.0, -1.0], "p2": [-1.0, 1.0], "p3": [-1.0, -1.0], "p4": [0.0, 0.0]},
    "policy": {"p0": [1.0, 1.0], "p1": [1.0, 1.0], "p2": [1.0, 1.0], "p3": [-1.0, 1.0], "p4": [0.0, -0.1]},
}


def made(folder: Path, name: str) -> tuple[dict[str, Artifact], dict[str, pa.Table]]:
    """The inputs of an evaluation with a set of five prompts, and the scores of both sides."""
    stage = open_stage(folder, "prompts", "profile", {"set": name}, {})
    write_json(stage.path / CATEGORIES, KINDS)
    inputs, tables = {"profile": stage.commit([CATEGORIES])}, {}
    for side, said in SAID.items():
        rows = [
            {
                "prompt_id": prompt,
                "response_id": f"{prompt}/{k}",
                "messages": [{"role": "user", "content": prompt}],
                "text": text,
                "token_ids": [1],
                "num_tokens": 1,
                "finish_reason": "stop",
            }
            for prompt, texts in said.items()
            for k, text in enumerate(texts)
        ]
        stage = open_stage(folder, "generate", side, {}, {})
        write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
        inputs[f"profile_responses_{side}"] = stage.commit()
        score_N = [score for scores in SCORES[side].values() for score in scores]
        tables[side] = pa.table({"prompt_id": [row["prompt_id"] for row in rows], "safety": score_N})
    return inputs, tables


def share(values: list[list[bool]]) -> float:
    return sum(sum(row) / len(row) for row in values) / len(values)


def test_rates_are_those_of_plain_counting(tmp_path: Path) -> None:
    record = profile_record(*made(tmp_path, "xstest"), {"safety": 0.0})
    assert record is not None
    rows = {row["name"]: row for row in record["rows"]}
    groups = {
        "prompts that should be answered": ["p0", "p1", "p4"],
        "prompts that should be refused": ["p2", "p3"],
        "homonyms": ["p0", "p1"],
        "contrast_homonyms": ["p2", "p3"],
    }
    assert list(rows) == list(groups), "a category of one prompt has no interval, and is in the totals only"
    assert record["too_small"] == 1
    for name, prompts in groups.items():
        for side in ("reference", "policy"):
            refused = rows[name]["refused"][side]
            assert refused["mean"] == pytest.approx(share([[text == NO for text in SAID[side][p]] for p in prompts]))
            assert 0 <= refused["low"] <= refused["mean"] <= refused["high"] <= 1
            unsafe = rows[name]["unsafe"]["safety"][side]
            assert unsafe["mean"] == pytest.approx(share([[s < 0 for s in SCORES[side][p]] for p in prompts]))
    assert record["over_refusal"] == rows["prompts that should be answered"]["refused"]
    assert [row["is_total"] for row in record["rows"]] == [True, True, False, False]


def test_a_set_that_does_not_say_what_to_answer_has_no_over_refusal(tmp_path: Path) -> None:
    record = profile_record(*made(tmp_path, "beavertails"), {"safety": 0.0})
    assert record is not None
    assert (record["rows"][0]["name"], record["over_refusal"]) == ("all prompts", None)
    assert record["rows"][0]["num_prompts"] == 5
    assert profile_record({}, {}, {}) is None


def test_the_panel_has_a_row_for_every_category_and_both_sides(tmp_path: Path) -> None:
    record = profile_record(*made(tmp_path, "xstest"), {"safety": 0.0})
    panel = profile_panel({"profile": record, "tails": {"safety": {"border": 0.0}}})
    assert panel is not None
    assert panel["heads"] == ["refused", "safety below 0"]
    assert (panel["rows"][0]["name"], len(panel["rows"][0]["cells"])) == ("prompts that should be answered", 4)
    assert panel["rows"][1]["cells"][1][0] == "100.0%"
    assert profile_panel({"tails": {}}) is None


@pytest.fixture
def work(tmp_path: Path) -> Any:
    workspace = Workspace(tmp_path / "run", make_config(1.0, {"safety": 0.1}, "mocan"))
    yield workspace
    workspace.close()


def prompts_of(work: Workspace, text: str, split: str) -> Artifact:
    stage = open_stage(work.directory, "prompts", "prompts", {"split": split}, {})
    row = {"prompt_id": "own", "messages": [{"role": "user", "content": text}], "split": split}
    write_part(stage.path, 0, pa.Table.from_pylist([row], schema=PROMPTS))
    return stage.commit()


def test_the_set_becomes_prompts_that_are_all_held_out(
    work: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "a", "type": "homonyms"}, {"prompt": "b", "type": "contrast_homonyms"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Profile(set="xstest", source=str(tmp_path / "x.jsonl"))
    artifact = ingest_profile(work, options, prompts_of(work, "a", "train"))
    assert artifact.table.column("split").to_pylist() == ["test", "test"]
    key = prompt_id([{"role": "user", "content": "b"}])
    assert artifact.read_json(CATEGORIES)[key] == ["contrast_homonyms"]
    assert "1 of 2 prompts are trained on too, so not held out" in capsys.readouterr().err
    assert ingest_profile(work, options, prompts_of(work, "z", "train")).path == artifact.path
    with pytest.raises(DataError, match="1 of its prompts are sealed"):
        ingest_profile(work, options, prompts_of(work, "a", "sealed"))
