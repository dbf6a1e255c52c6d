"""Held-out prompts are held out by what they say: in the split, and in every data set that training reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny import make_tiny_lm

from can_dist.config import Config, DataSource, validate_config
from can_dist.config.methods import Step
from can_dist.run import Run
from can_dist.stages.ingest import READING, ingest_benign, ingest_pairs, ingest_prompts, source_identity
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.schemas import PROMPTS
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(12)]
SAID = [f"{a} {b}" for a in WORDS[:5] for b in WORDS[5:9]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), WORDS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(folder: Path, reference: Path, rows: list[dict[str, Any]], **changes: Any) -> Config:
    scorer = {"kind": "callable", "function": "scorers:num_words"}
    return validate_config(
        {
            "seed": 3,
            "prompts": {"source": str(write(folder / "prompts.jsonl", rows)), "num_test": 4, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(reference)},
            "reward": scorer,
            "constraints": {"calm": {"scorer": scorer, "margin": 0.1}},
            **changes,
        }
    )


@contextmanager
def opened(folder: Path, config: Config) -> Iterator[Workspace]:
    work = Workspace(folder / "run", config)
    try:
        yield work
    finally:
        work.close()


def split(artifact: Artifact) -> dict[str, str]:
    """Return the split of each prompt by what it says."""
    rows = artifact.table.to_pylist()
    assert len({row["messages"][-1]["content"] for row in rows}) == len(rows)
    return {row["messages"][-1]["content"]: row["split"] for row in rows}


def ingested(folder: Path, reference: Path, rows: list[dict[str, Any]], **changes: Any) -> Artifact:
    folder.mkdir(exist_ok=True)
    config = configure(folder, reference, rows, **changes)
    with opened(folder, config) as work:
        return ingest_prompts(work, config.prompts)


def held_out_by(seed: int, ids: dict[str, str], number: int) -> set[str]:
    """The rule of the split, written independently: the ids whose digest with the seed is smallest."""
    ranked = sorted(ids, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
    return {ids[key] for key in ranked[:number]}


# -------------------------------------------------------------------------------------------------------- the split


def test_split_of_prompts_without_repeats_is_the_one_it_was(tmp_path: Path, reference: Path) -> None:
    own = {f"a-{n}": text for n, text in enumerate(SAID)}
    artifact = ingested(tmp_path / "own", reference, [{"prompt_id": k, "prompt": t} for k, t in own.items()])
    assert {text for text, side in split(artifact).items() if side == "test"} == held_out_by(3, own, 4)
    assert "reading" not in artifact.manifest["identity"]
    computed = {prompt_id([{"role": "user", "content": text}]): text for text in SAID}
    artifact = ingested(tmp_path / "computed", reference, [{"prompt": text} for text in SAID])
    assert {text for text, side in split(artifact).items() if side == "test"} == held_out_by(3, computed, 4)
    assert set(artifact.manifest["identity"]) == {
        "stage", "label", "format_version", "source", "num_train", "num_test", "seed"
    }  # fmt: skip


@pytest.mark.parametrize("later", ["b", "c"])
def test_conversation_under_several_ids_is_one_prompt_on_one_side(tmp_path: Path, reference: Path, later: str) -> None:
    own = {f"a-{n}": text for n, text in enumerate(SAID)}
    rows = [{"prompt_id": key, "prompt": text} for key, text in own.items()]
    again = [{"prompt_id": f"{later}-{n}", "prompt": text} for n, text in enumerate(SAID)]
    artifact = ingested(tmp_path, reference, rows + again)
    sides = split(artifact)
    assert {text for text, side in sides.items() if side == "test"} == held_out_by(3, own, 4)  # repeats move nothing
    assert len(sides) == len(SAID)
    assert (artifact.info["counts"]["test"], artifact.info["counts"]["train"]) == (4, len(SAID) - 4)
    assert artifact.info["counts"]["same_messages"] == len(SAID)
    assert artifact.manifest["identity"]["reading"] == READING


def test_numbers_of_prompts_count_conversations(tmp_path: Path, reference: Path) -> None:
    rows = [{"prompt_id": f"{s}-{n}", "prompt": text} for n, text in enumerate(SAID) for s in "abc"]
    source = {"source": str(tmp_path / "prompts.jsonl")}
    artifact = ingested(
        tmp_path, reference, rows, prompts={**source, "num_test": 5, "num_train": 7, "num_validation": 0}
    )
    assert sorted(split(artifact).values()) == ["test"] * 5 + ["train"] * 7


def earlier_prompts(work: Workspace, rows: list[dict[str, Any]], same_messages: int) -> Artifact:
    """Commit what the version before wrote: every id a prompt, under the identity without rules."""
    prompts = work.config.prompts
    identity = {"source": source_identity(prompts), "num_train": None, "num_test": prompts.num_test, "seed": 3}
    stage = open_stage(work.directory, "prompts", "prompts", identity, {})
    table = [
        {"prompt_id": row["prompt_id"], "messages": [{"role": "user", "content": row["prompt"]}], "split": "train"}
        for row in rows
    ]
    write_part(stage.path, 0, pa.Table.from_pylist(table, schema=PROMPTS))
    counts = {"rows": len(rows), "same_messages": same_messages}
    return stage.commit(info={"format": "prompt", "counts": counts, "reasons": {}, "set_aside": []})


def test_finished_run_is_reused_unless_the_rules_changed_what_it_says(tmp_path: Path, reference: Path) -> None:
    rows = [{"prompt_id": f"a-{n}", "prompt": text} for n, text in enumerate(SAID)]
    config = configure(tmp_path, reference, rows)
    with opened(tmp_path, config) as work:
        before = earlier_prompts(work, rows, 0)
        assert ingest_prompts(work, config.prompts).path == before.path
    (tmp_path / "b").mkdir()
    for number, more in enumerate(
        (
            [{"prompt_id": "b-0", "prompt": SAID[0]}],
            [{"prompt_id": "b-0", "prompt": "w9 w9", "system": "w1"}],
        )
    ):
        folder = tmp_path / f"b{number}"
        folder.mkdir()
        config = configure(folder, reference, [*rows, *more])
        with opened(folder, config) as work:
            before = earlier_prompts(work, [*rows, *more], 1 - number)
            now = ingest_prompts(work, config.prompts)
            assert now.path != before.path
            assert now.table.num_rows == len(SAID) + number
            assert ingest_prompts(work, config.prompts).path == now.path


# ---------------------------------------------------------------------------------------------- pairs that people made


def pairs_of(texts: list[str], **more: Any) -> list[dict[str, Any]]:
    pair = {"response_0": "w9", "response_1": "w10", "better_response_id": 0, "safer_response_id": 1}
    ids = [{name: f"{value}{n}" for name, value in more.items()} for n in range(len(texts))]
    return [{"prompt": text, **pair, **own} for text, own in zip(texts, ids, strict=True)]


IDS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "none": ({}, {}),
    "of the prompts": ({"prompt_id": "a-"}, {}),
    "of the pairs": ({}, {"prompt_id": "p-"}),
    "others": ({"prompt_id": "a-"}, {"prompt_id": "p-"}),
    "the same": ({"prompt_id": "a-"}, {"prompt_id": "a-"}),
}


def given(folder: Path, reference: Path, prompts: list[dict[str, Any]], pairs: list[dict[str, Any]], **options: Any):
    label = {"preferences": {"source": str(write(folder / "pairs.jsonl", pairs))}}
    config = configure(folder, reference, prompts, method="dpo_s", label=label)
    with opened(folder, config) as work:
        table = ingest_prompts(work, config.prompts)
        assert config.label.preferences is not None
        return table, ingest_pairs(work, config.label.preferences, config.reference, table, **options)


@pytest.mark.parametrize("ids", list(IDS))
def test_pairs_of_held_out_prompts_are_left_out_whatever_their_ids(tmp_path: Path, reference: Path, ids: str) -> None:
    of_prompts, of_pairs = IDS[ids]
    rows = [
        {"prompt": text, **{name: f"{value}{n}" for name, value in of_prompts.items()}} for n, text in enumerate(SAID)
    ]
    prompts, pairs = given(tmp_path, reference, rows, pairs_of(SAID[::-1] if ids == "others" else SAID, **of_pairs))
    test = {text for text, side in split(prompts).items() if side == "test"}
    taught = {row["messages"][-1]["content"] for row in pairs.table.to_pylist()}
    assert len(test) == 4
    assert taught == set(SAID) - test
    assert pairs.info["counts"]["held_out"] == 4
    known_by_id = ids in ("none", "the same")
    assert ("reading" not in pairs.manifest["identity"]) == known_by_id  # as they were read before


def test_pair_with_the_id_of_a_held_out_prompt_and_another_text_is_kept(tmp_path: Path, reference: Path) -> None:
    rows = [{"prompt": text, "prompt_id": n} for n, text in enumerate(SAID)]
    others = [f"{text} w11" for text in SAID]
    _, pairs = given(tmp_path, reference, rows, [{**p, "prompt_id": n} for n, p in enumerate(pairs_of(others))])
    assert {row["messages"][-1]["content"] for row in pairs.table.to_pylist()} == set(others)
    assert pairs.info["counts"]["held_out"] == 0


@pytest.mark.parametrize("side", ["prompts", "pairs"])
def test_system_turn_makes_another_prompt_which_is_told(
    tmp_path: Path, reference: Path, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    system = {"system": "w11"}
    rows = [{"prompt": text, **(system if side == "prompts" else {})} for text in SAID]
    pairs = [{**row, **(system if side == "pairs" else {})} for row in pairs_of(SAID)]
    _, artifact = given(tmp_path, reference, rows, pairs)
    assert artifact.info["counts"]["held_out"] == 0
    told = "pairs.jsonl: 4 pair(s) have the turns of a held-out prompt with another system turn, or with none"
    assert told in capsys.readouterr().err
    _, artifact = given(tmp_path, reference, [{**row, **system} for row in rows], [{**row, **system} for row in pairs])
    assert artifact.info["counts"]["held_out"] == 4
    assert "with another system turn" not in capsys.readouterr().err


def test_response_to_another_prompt_is_not_one_to_the_same_under_another_id(tmp_path: Path, reference: Path) -> None:
    rows = [{"prompt": text} for text in SAID[:5]]
    twice = pairs_of([text for text in SAID[5:7] for _ in "ab"], prompt_id="p-")
    for number, row in enumerate(twice):
        row["response_0"], row["response_1"] = f"w{number // 2} w1", f"w{number // 2} w2"
    _, artifact = given(tmp_path, reference, rows, twice, mismatched=True)
    table = artifact.table.to_pylist()
    for own, other in zip(table[::2], table[1::2], strict=True):
        assert own["text"].split()[0] != other["text"].split()[0]  # another prompt's
    assert len({row["prompt_id"] for row in table}) == 2  # so that no prompt is on both sides of the validation split


def test_every_method_that_reads_pairs_leaves_the_same_ones_out(tmp_path: Path, reference: Path) -> None:
    """DPO, SACPO (a step's own data set), the response pairs of MoCAN and PeCAN, and a log-ratio's own preferences."""
    sources = {name: {"source": str(write(tmp_path / f"{name}.jsonl", pairs_of(SAID)))} for name in ("own", "step")}
    ratio = {"source": str(write(tmp_path / "ratio.jsonl", pairs_of(SAID)))}
    config = configure(
        tmp_path,
        reference,
        [{"prompt": text, "prompt_id": f"a-{n}"} for n, text in enumerate(SAID)],
        label={"preferences": sources["own"], "pairs": "preferences"},
    )
    with Run(tmp_path / "run", config) as run:
        prompts = run.prompts()
        test = {text for text, side in split(prompts).items() if side == "test"}
        step = Step.model_validate({"preferences": sources["step"], "loss": "kto"})
        artifacts = [
            run.human_pairs(config.reference, prompts),
            run.human_pairs(config.reference, prompts, step),
            run.pairs(config.reference, prompts),
            run._given_pairs(config.reference, prompts, DataSource.model_validate(ratio), mismatched=False),
        ]
    for artifact in artifacts:
        assert {row["messages"][-1]["content"] for row in artifact.table.to_pylist()} == set(SAID) - test
        assert artifact.info["counts"]["held_out"] == 4


def test_benign_prompts_that_are_trained_on_are_told(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, reference, [{"prompt": text, "prompt_id": f"a-{n}"} for n, text in enumerate(SAID)])
    source = write(tmp_path / "benign.jsonl", [{"prompt": text} for text in [*SAID, "w1"]])
    with opened(tmp_path, config) as work:
        prompts = ingest_prompts(work, config.prompts)
        for _ in range(2):  # also when it is read already
            benign = ingest_benign(work, DataSource(source=str(source)), prompts)
            assert (
                "benign.jsonl: 16 of 21 benign prompts are trained on too, so not held out" in capsys.readouterr().err
            )
    assert benign.table.column("split").to_pylist() == ["test"] * 21
