"""Sealed prompts: a split of their own, apart from all others, and a ledger of who looked. No model is opened."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny import make_tiny_lm

from can_dist.config import validate_config
from can_dist.errors import ConfigError, DataError
from can_dist.stages.held_out import HeldOut
from can_dist.stages.ingest import ingest_benign, ingest_pairs, ingest_prompts
from can_dist.stages.sealed import LEDGER, check_unread, read_looks, record_look
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.schemas import SCORE_KEYS
from can_dist.workspace import Workspace

SCORER = {"kind": "callable", "function": "scorers:num_words"}
ROWS = [{"prompt_id": f"own {n}", "prompt": f"w{n}"} for n in range(150)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def open_run(folder: Path, rows: list[dict[str, Any]] = ROWS, seed: int = 0, **prompts: Any) -> Workspace:
    folder.mkdir(exist_ok=True)
    config = {
        "seed": seed,
        "prompts": {"source": str(write(folder / "prompts.jsonl", rows)), "num_test": 4, "num_validation": 0} | prompts,
        "reference": {"model": str(folder / "lm"), "template": "{prompt}"},
        "reward": SCORER,
        "constraints": {"calm": {"scorer": SCORER, "margin": 0.1}},
        "strength": 1,
    }
    return Workspace(folder / "run", validate_config(config))


def split(work: Workspace) -> Artifact:
    return ingest_prompts(work, work.config.prompts)


def said(prompts: Artifact) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for row in prompts.table.to_pylist():
        texts.setdefault(row["split"], []).append(prompt_id(row["messages"]))
    return texts


def test_none_is_sealed_by_default_and_the_artifact_keeps_its_name(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}"} for n in range(10)]
    prompts = split(open_run(tmp_path, rows))
    assert prompts.path.name == "prompts-af88cb484ca1d08a", "as before there were sealed prompts"
    assert "sealed" not in prompts.info["counts"]


@pytest.mark.parametrize("seed", range(3))
def test_sealed_prompts_are_apart_by_what_they_say_and_by_their_id(tmp_path: Path, seed: int) -> None:
    rows = [{"prompt_id": f"{n}-{copy}", "prompt": f"say {n}"} for n in range(160) for copy in range(2)]
    prompts = split(open_run(tmp_path, rows, seed, num_sealed=64, num_validation=32))
    assert Counter(prompts.table["split"].to_pylist()) == {"train": 60, "test": 4, "validation": 32, "sealed": 64}
    assert prompts.info["counts"]["sealed"] == 64
    texts = said(prompts)
    assert len(set(texts["sealed"])) == 64
    for name in ("train", "test", "validation"):
        assert set(texts["sealed"]).isdisjoint(texts[name])
    ids = prompts.table["prompt_id"].to_pylist()
    assert len(ids) == len(set(ids))


def test_no_other_number_unseals_a_prompt_and_sealing_moves_no_test_prompt(tmp_path: Path) -> None:
    plain = said(split(open_run(tmp_path / "plain")))
    first = said(split(open_run(tmp_path / "first", num_sealed=64)))
    other = said(split(open_run(tmp_path / "other", num_sealed=64, num_test=20, num_validation=32, num_train=10)))
    assert set(first["sealed"]) == set(other["sealed"])
    assert first["test"] == plain["test"]
    assert set(first["train"]) | set(first["sealed"]) == set(plain["train"])


def test_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.num_sealed.*63 sealed prompts certify nothing; give at least 64"):
        open_run(tmp_path, num_sealed=63)
    with pytest.raises(DataError, match=r"num_test = 4 and prompts\.num_sealed = 150 .*or prompts\.num_sealed"):
        split(open_run(tmp_path / "all", num_sealed=150))
    with pytest.raises(DataError, match="none would be left to train on"):
        split(open_run(tmp_path / "more", num_sealed=151))


def test_pairs_of_sealed_prompts_are_left_out_by_text_and_by_id(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", [f"w{n}" for n in range(150)])
    work = open_run(tmp_path, num_sealed=64)
    prompts = split(work)
    sealed = [row["prompt_id"] for row in prompts.table.to_pylist() if row["split"] == "sealed"]
    pairs = [{"prompt_id": f"other {n}", "prompt": f"w{n}", "chosen": "w1", "rejected": "w2"} for n in range(150)] + [
        {"prompt_id": sealed[0], "prompt": "w1 w1 w1", "chosen": "w1", "rejected": "w2"}
    ]
    source = work.config.prompts.model_copy(update={"source": str(write(tmp_path / "pairs.jsonl", pairs))})
    given = ingest_pairs(work, source, work.config.reference, prompts)
    assert given.info["counts"]["held_out"] == 4 + 64 + 1
    held_out = HeldOut.of(prompts)
    assert not any(held_out.leaves_out(row) for row in given.table.to_pylist())
    assert set(sealed).isdisjoint(given.table["prompt_id"].to_pylist())


def test_benign_prompts_that_are_sealed_are_refused(tmp_path: Path) -> None:
    work = open_run(tmp_path, num_sealed=64)
    prompts = split(work)
    row = next(row for row in prompts.table.to_pylist() if row["split"] == "sealed")
    rows = [{"prompt": "benign"}, {"prompt": row["messages"][0]["content"]}]
    source = work.config.prompts.model_copy(update={"source": str(write(tmp_path / "benign.jsonl", rows))})
    with pytest.raises(DataError, match=r"benign\.jsonl: 1 of its prompts are sealed.*Remove them from this file"):
        ingest_benign(work, source, prompts)


@pytest.fixture
def policy(tmp_path: Path) -> Artifact:
    return open_stage(tmp_path, "train", "policy", {}, {}).commit()


def look(policy: Artifact, number: int, delta: float | None = None) -> Any:
    return record_look(policy.path.parent, policy, [f"model {number}", "reference"], {"seed": number}, delta)


def test_ledger_counts_looks_and_knows_the_ones_it_has(policy: Artifact) -> None:
    run = policy.path.parent
    looks = [look(policy, number, delta) for number, delta in enumerate([0.1, None, 0.1, None])]
    assert [made.number for made in looks] == [1, 2, 3, 4]
    assert [made.error for made in looks] == pytest.approx([0.1 * 0.6079271 / i**2 for i in (1, 2, 3, 4)])
    assert read_looks(run) == looks
    before = (run / LEDGER).read_bytes()
    assert look(policy, 1) == looks[1]
    assert (run / LEDGER).read_bytes() == before
    assert before.startswith((run / LEDGER).read_bytes()[: len(before) // 2])
    with pytest.raises(ConfigError, match=r"--delta 0\.05: .*chosen after a look it would be none.*Leave --delta out"):
        look(policy, 9, 0.05)


@pytest.mark.parametrize("damage", ["first line gone", "last word", "two lines swapped", "delta", "not JSON"])
def test_a_ledger_that_somebody_changed_is_refused(policy: Artifact, damage: str) -> None:
    path = policy.path.parent / LEDGER
    for number in range(3):
        look(policy, number)
    lines = path.read_text().splitlines(keepends=True)
    damaged = {
        "first line gone": lines[1:],
        "last word": [*lines[:2], lines[2][:-5] + "\n"],
        "two lines swapped": [lines[1], lines[0], lines[2]],
        "delta": [lines[0].replace("0.05", "0.5"), *lines[1:]],
        "not JSON": ["no\n", *lines[1:]],
    }
    path.write_text("".join(damaged[damage]))
    with pytest.raises(DataError, match=r"sealed\.jsonl, line \d: not as it was written"):
        look(policy, 7)


def test_every_table_of_the_run_is_looked_at_by_id(tmp_path: Path) -> None:
    work = open_run(tmp_path, num_sealed=64)
    prompts, run = split(work), tmp_path / "run"
    check_unread(run, prompts)
    rows = {row["split"]: row["prompt_id"] for row in prompts.table.to_pylist()}
    for name in ("train", "sealed"):
        stage = open_stage(run, "scores", name, {}, {})
        table = pa.table({"prompt_id": [rows[name]] * 3, "response_id": ["a", "b", "c"]}, schema=SCORE_KEYS)
        write_part(stage.path, 0, table)
        stage.commit()
    with pytest.raises(DataError, match=r"were used by scores-\w+ \(1 by their id of 64\)") as caught:
        check_unread(run, prompts)
    assert "Run again in a directory of its own" in caught.value.remedy


def test_responses_of_no_look_are_refused_even_unfinished(tmp_path: Path, policy: Artifact) -> None:
    work = open_run(tmp_path, num_sealed=64)
    prompts, run = split(work), tmp_path / "run"
    open_stage(run, "generate", "policy on sealed", {"split": "sealed", "model": "model 1"}, {"prompts": prompts})
    with pytest.raises(DataError, match=r"does not name the look that made generate-"):
        check_unread(run, prompts)
    record_look(run, policy, ["model 1"], {}, None)
    check_unread(run, prompts)
