"""Validation prompts: apart from training and test by what they say, and from the pairs of a preference data set."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm

from can_dist.config import sections, validate_config
from can_dist.dual import strength
from can_dist.errors import ConfigError, DataError
from can_dist.stages.brought_responses import bring_responses
from can_dist.stages.ingest import ingest_pairs, ingest_prompts
from can_dist.tables.artifacts import Artifact
from can_dist.tables.foreign.messages import prompt_id
from can_dist.workspace import Workspace

SCORER = {"kind": "callable", "function": "scorers:num_words"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_run(tmp_path: Path, rows: list[dict[str, Any]], prompts: dict[str, Any], **sections: Any) -> Workspace:
    source = write_rows(tmp_path / "prompts.jsonl", rows)
    config = {
        "prompts": {"source": str(source), **prompts},
        "reference": {"model": str(tmp_path / "lm"), "template": "{prompt}"},
        "reward": SCORER,
        "constraints": {"calm": {"scorer": SCORER, "margin": 0.1}},
        "strength": 1,
        **sections,
    }
    return Workspace(tmp_path / "run", validate_config(config))


def split(work: Workspace) -> Artifact:
    return ingest_prompts(work, work.config.prompts)


def said(prompts: Artifact) -> dict[str, list[str]]:
    """Return what the prompts of each split say, by the id of their content."""
    found: dict[str, list[str]] = {}
    for row in prompts.table.to_pylist():
        found.setdefault(row["split"], []).append(prompt_id(row["messages"]))
    return found


def test_validation_is_a_third_split_and_leaves_the_test_prompts_as_they_were(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}"} for n in range(60)]
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    with_validation = split(open_run(tmp_path / "with", rows, {"num_test": 4, "num_validation": 32}))
    without = split(open_run(tmp_path / "without", rows, {"num_test": 4, "num_validation": 0}))
    assert Counter(with_validation.table["split"].to_pylist()) == {"train": 24, "test": 4, "validation": 32}
    assert with_validation.info["counts"]["validation"] == 32
    assert said(with_validation)["test"] == said(without)["test"]


def test_no_validation_keeps_the_name_that_the_artifact_had_before(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}"} for n in range(10)]
    prompts = split(open_run(tmp_path, rows, {"num_test": 4, "num_validation": 0}))
    assert prompts.path.name == "prompts-af88cb484ca1d08a"  # as before there was a validation split
    assert prompts.info["counts"].keys() >= {"train", "test"}
    assert "validation" not in prompts.info["counts"]


@pytest.mark.parametrize("seed", range(5))
def test_validation_is_apart_by_content_whatever_the_ids_say(tmp_path: Path, seed: int) -> None:
    rows = [{"prompt_id": f"{n}-{copy}", "prompt": f"say {n}"} for n in range(60) for copy in range(3)]
    found = said(split(open_run(tmp_path, rows, {"num_test": 4, "num_validation": 32}, seed=seed)))
    assert len(found["validation"]) == len(set(found["validation"])) == 32
    assert set(found["validation"]).isdisjoint(found["train"])
    assert set(found["validation"]).isdisjoint(found["test"])


def test_pairs_of_validation_prompts_are_left_out_under_any_id(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", [f"w{n}" for n in range(60)])
    rows = [{"prompt_id": f"own {n}", "prompt": f"w{n}"} for n in range(60)]
    work = open_run(tmp_path, rows, {"num_test": 4, "num_validation": 32})
    prompts = split(work)
    pairs = [{"prompt": f"w{n}", "chosen": "w1", "rejected": "w2"} for n in range(60)]
    source = work.config.prompts.model_copy(update={"source": str(write_rows(tmp_path / "pairs.jsonl", pairs))})
    given = ingest_pairs(work, source, work.config.reference, prompts)
    trained = {prompt_id(row["messages"]) for row in given.table.to_pylist()}
    assert trained >= set(said(prompts)["train"])
    assert trained.isdisjoint(said(prompts)["validation"])


def test_brought_responses_answer_the_validation_prompts_too(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", [f"w{n}" for n in range(60)])
    rows = [{"prompt": f"w{n}", "responses": ["w1", f"w{n} w2"]} for n in range(60)]
    source = {"source": str(tmp_path / "prompts.jsonl")}
    generate = {"num_responses": 2, "responses": source}
    work = open_run(tmp_path, rows, {"num_test": 4, "num_validation": 32}, generate=generate)
    prompts, brought = split(work), work.config.generate.responses
    assert brought is not None
    train, validation = (
        bring_responses(work, work.config.reference, prompts, brought, split=name) for name in ("train", "validation")
    )
    assert validation.manifest["identity"]["label"] == "reference on validation"
    for name, responses in (("train", train), ("validation", validation)):
        assert [prompt_id(row["messages"]) for row in responses.table.to_pylist()[::2]] == said(prompts)[name]
    write_rows(
        tmp_path / "prompts.jsonl", [row for row in rows if prompt_id_of(row) not in said(prompts)["validation"]]
    )
    with pytest.raises(DataError, match=r"32 of 32 validation prompts have not generate\.num_responses = 2"):
        bring_responses(work, work.config.reference, prompts, brought, split="validation")


def prompt_id_of(row: dict[str, Any]) -> str:
    return prompt_id([{"role": "user", "content": row["prompt"]}])


@pytest.mark.parametrize("num_validation", [1, 31])
def test_a_validation_table_that_says_too_little_is_refused(tmp_path: Path, num_validation: int) -> None:
    with pytest.raises(ConfigError, match=rf"prompts\.num_validation: .* {num_validation} prompts .* at least 32"):
        open_run(tmp_path, [], {"num_validation": num_validation})
    assert sections.MIN_VALIDATION == strength.MIN_PROMPTS


def test_too_few_prompts_name_both_keys(tmp_path: Path) -> None:
    work = open_run(tmp_path, [{"prompt": f"say {n}"} for n in range(36)], {"num_test": 4, "num_validation": 32})
    message = r"36 distinct prompts, .*num_test = 4 and prompts\.num_validation = 32 .* none would be left to train on"
    with pytest.raises(DataError, match=message):
        split(work)


@pytest.mark.parametrize(("num_prompts", "expected"), [(260, 128), (259, 0), (12, 0)])
def test_by_default_prompts_are_held_out_where_as_many_are_left_to_train_on(
    tmp_path: Path, num_prompts: int, expected: int
) -> None:
    work = open_run(tmp_path, [{"prompt": f"say {n}"} for n in range(num_prompts)], {"num_test": 4})
    counts = ingest_prompts(work, work.config.prompts).info["counts"]
    assert counts.get("validation", 0) == expected
    assert counts["train"] == num_prompts - 4 - expected
