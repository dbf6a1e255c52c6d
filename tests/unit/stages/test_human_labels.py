"""A data set's own labels, from its file to training examples."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from families import FAMILIES, make_model
from tiny import make_tiny_lm

from can_dist.config import validate_config
from can_dist.errors import ConfigError, DataError
from can_dist.run import Run
from can_dist.stages.examples import NOTED
from can_dist.stages.human_labels import CONFLICT, Criterion, label_human
from can_dist.stages.ingest import ingest_pairs
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import GIVEN_RESPONSES, PROMPTS, check_schema
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(12)]


def row(prompt: str, a: str, b: str, better: int | None, safer: int | None, safe: tuple = (None, None)) -> dict:
    return {
        "prompt": prompt,
        "response_0": a,
        "response_1": b,
        "better_response_id": better,
        "safer_response_id": safer,
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
    }


ROWS = [
    row("w0", "w1", "w2", 0, 1, (False, True)),
    row("w0", "w3", "w4", 1, 1, (False, False)),
    row("w5", "w6", "w6", 0, 0, (True, True)),  # equal
    row("w5", "w7", "", 0, 0, (True, True)),  # empty
    row("w5", "w7", "w8", None, 0, (False, True)),  # not labelled better; the safer one is unsafe
    row("w9", "w1", "w10", 1, 0, (True, True)),
    row("held out", "w1", "w2", 0, 0, (True, True)),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), WORDS)


@contextmanager
def workspace(run: Path, reference: Path, rows: list[dict], **human: Any) -> Iterator[tuple[Workspace, Artifact]]:
    """A run whose data set is ``rows``, and its prompts, of which 'held out' is held out."""
    run.mkdir(exist_ok=True)
    source = run / "pairs.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    scorer = {"kind": "callable", "function": "a:b"}
    config = validate_config(
        {
            "method": "dpo_s",
            "prompts": {"source": "unused"},
            "reference": {"model": str(reference)},
            "reward": scorer,
            "constraints": {"safety": {"scorer": scorer, "margin": 0.1}},
            "label": {"preferences": {"source": str(source)}, "human": human, "validation_fraction": 0.0},
        }
    )
    stage = open_stage(run, "prompts", "prompts", {}, {})
    if not stage.finished:
        from can_dist.tables.foreign.formats import prompt_id

        messages = [{"role": "user", "content": "held out"}]
        held = [{"prompt_id": prompt_id(messages), "messages": messages, "split": "test"}]
        write_part(stage.path, 0, pa.Table.from_pylist(held, schema=PROMPTS))
        stage.commit()
    work = Workspace(run, config)
    try:
        yield work, open_stage(run, "prompts", "prompts", {}, {}).finished
    finally:
        work.close()


def read_pairs(work: Workspace, prompts: Artifact) -> Artifact:
    config = work.config
    mismatched = config.label.human.loss == "kto"
    return ingest_pairs(work, config.label.preferences, config.reference, prompts, mismatched=mismatched)


def labelled(
    run: Path, reference: Path, criterion: Criterion, rows: list[dict] | None = None, **human: Any
) -> Artifact:
    """Read pairs, stand in for their scores, label."""
    with workspace(run, reference, ROWS if rows is None else rows, **human) as (work, prompts):
        pairs = read_pairs(work, prompts)
        stage = open_stage(run, "scores", "log-probs", {}, {"responses": pairs})
        ids = pairs.table.column("response_id")
        write_part(
            stage.path, 0, pa.table({"response_id": ids, "logp.reference": [-float(n) for n in range(len(ids))]})
        )
        return label_human(work, pairs, stage.finished or stage.commit(), criterion=criterion)


def examples(artifact: Artifact) -> list[tuple[list[str], list[float]]]:
    return [(one["texts"], one["target"]) for one in artifact.table.to_pylist()]


def noted(artifact: Artifact) -> dict[str, int]:
    return {name: n for name, n in artifact.info["counts"].items() if name != "examples"}


# ------------------------------------------------------------------------------------------------------------ reading


def test_given_responses_keep_peoples_labels(tmp_path: Path, reference: Path) -> None:
    with workspace(tmp_path, reference, ROWS) as (work, prompts):
        pairs = read_pairs(work, prompts)
    table = check_schema(pairs.table, GIVEN_RESPONSES, "pairs")
    assert pairs.info["counts"]["held_out"] == 1
    assert table.num_rows == 2 * (len(ROWS) - 1)
    labels = [tuple(one[name] for name in ("text", "better", "safer", "safe")) for one in table.to_pylist()]
    assert labels[:2] == [("w1", 1, 0, 0), ("w2", 0, 1, 1)]
    assert labels[8:10] == [("w7", -1, 1, 0), ("w8", -1, 0, 1)]


def test_mismatched_responses_are_those_of_the_next_other_prompt(tmp_path: Path, reference: Path) -> None:
    with workspace(tmp_path, reference, ROWS, loss="kto") as (work, prompts):
        rows = read_pairs(work, prompts).table.to_pylist()
    own, others = rows[::2], rows[1::2]
    assert [f"{one['response_id']}-other" for one in own] == [one["response_id"] for one in others]
    assert all(a["messages"] == b["messages"] for a, b in zip(own, others, strict=True))
    assert [one["text"] for one in others] == ["w6", "w6", "w6", "w6", *["w1", "w10"] * 3, "w1", "w2"]
    assert {one[name] for one in others for name in ("better", "safer", "safe")} == {-1}


def test_mismatched_responses_need_two_prompts(tmp_path: Path, reference: Path) -> None:
    with (
        workspace(tmp_path, reference, ROWS[:2], loss="kto") as (work, prompts),
        pytest.raises(DataError, match=r"all pairs that are not held out share one prompt\. Bring pairs of several"),
    ):
        read_pairs(work, prompts)


def test_pairs_need_a_data_set(tmp_path: Path) -> None:
    scorer = {"kind": "callable", "function": "a:b"}
    config = validate_config(
        {
            "prompts": {"source": "unused"},
            "reference": {"model": "unused"},
            "reward": scorer,
            "constraints": {"safety": {"scorer": scorer, "margin": 0.1}},
        }
    )
    with Run(tmp_path, config) as run, pytest.raises(ConfigError, match=r"label\.preferences: required, not given"):
        run.human_pairs(config.reference, open_stage(tmp_path, "prompts", "prompts", {}, {}))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------- labelling


def test_helpful_labels_of_pairs(tmp_path: Path, reference: Path) -> None:
    artifact = labelled(tmp_path, reference, "helpful", smoothing=0.1)
    assert artifact.info["loss"] == "sigmoid"
    assert examples(artifact) == [
        (["w1", "w2"], [0.9, pytest.approx(0.1)]),
        (["w3", "w4"], [0.1, 0.9]),
        (["w1", "w10"], [0.1, 0.9]),
    ]
    assert noted(artifact) == {"equal responses": 1, "empty response": 1, "no label": 1}
    first = artifact.table.to_pylist()[0]
    assert (first["logp_ref"], first["scores"], first["weight"]) == ([0.0, -1.0], [], 1.0)
    assert first["example_id"].endswith("/0a|0b")


@pytest.mark.parametrize(("on_conflict", "texts"), [("keep", ["w1", "w3", "w7", "w1"]), ("drop", ["w1", "w3", "w1"])])
def test_conflicts_with_the_safety_flags_are_counted_and_kept_or_dropped(
    tmp_path: Path, reference: Path, on_conflict: str, texts: list[str]
) -> None:
    artifact = labelled(tmp_path, reference, "safe", on_conflict=on_conflict)
    assert [one[0][0] for one in examples(artifact)] == texts
    assert noted(artifact) == {"equal responses": 1, "empty response": 1, CONFLICT: 1}
    listed = json.loads((artifact.path / NOTED).read_text())
    assert [entry["kept"] for entry in listed if entry["reason"] == CONFLICT] == [on_conflict == "keep"]


def test_conflicts_are_refused_on_request(tmp_path: Path, reference: Path) -> None:
    message = r"1 pair\(s\) whose safer_response_id contradicts is_response_i_safe: .*/4a\|4b\. Correct them, or set"
    with pytest.raises(DataError, match=message):
        labelled(tmp_path, reference, "safe", on_conflict="fail")
    assert labelled(tmp_path / "helpful", reference, "helpful", on_conflict="fail").info["counts"]["examples"] == 3


def test_missing_labels_are_named(tmp_path: Path, reference: Path) -> None:
    rows = [{k: v for k, v in one.items() if k != "better_response_id"} for one in ROWS]
    with pytest.raises(DataError, match=r"no pair has a label for criterion 'helpful' .*: column 'better_response_id'"):
        labelled(tmp_path, reference, "helpful", rows)


def test_chosen_and_rejected_serve_either_criterion(tmp_path: Path, reference: Path) -> None:
    rows = [{"prompt": f"w{n}", "chosen": "w1 w2", "rejected": "w3"} for n in range(4)]
    for criterion in ("helpful", "safe"):
        artifact = labelled(tmp_path / criterion, reference, criterion, rows)
        assert examples(artifact) == [(["w1 w2", "w3"], [1.0, 0.0])] * 4


def test_kto_takes_each_response_and_balances_the_two_kinds(tmp_path: Path, reference: Path) -> None:
    artifact = labelled(tmp_path, reference, "safe", loss="kto")
    assert artifact.info["loss"] == "kto"
    rows = artifact.table.to_pylist()
    # by the flags: of the second pair neither is safe, of the last both are
    assert [(one["texts"][0], one["target"][0]) for one in rows] == [
        ("w1", 0.0), ("w2", 1.0), ("w3", 0.0), ("w4", 0.0), ("w7", 0.0), ("w8", 1.0), ("w1", 1.0), ("w10", 1.0)
    ]  # fmt: skip
    assert {one["weight"] for one in rows} == {1.0}  # as many of either kind
    assert rows[1]["texts"] == ["w2", "w6"]
    assert rows[1]["logp_ref"] == [-2.0, -3.0]
    assert rows[1]["response_ids"][1] == f"{rows[1]['response_ids'][0]}-other"
    assert rows[1]["example_id"] == rows[1]["response_ids"][0]


def test_kto_weights(tmp_path: Path, reference: Path) -> None:
    def weights(name: str, rows: list[dict], **human: Any) -> dict[float, float]:
        table = labelled(tmp_path / name, reference, "safe", rows, loss="kto", **human).table
        return {one["target"][0]: one["weight"] for one in table.to_pylist()}

    three_of_four = [ROWS[0], ROWS[5]]
    assert weights("default", three_of_four) == {1.0: 1.0, 0.0: 3.0}
    assert weights("desirable", three_of_four, desirable_weight=2.0) == {1.0: 2.0, 0.0: 6.0}
    assert weights("both", three_of_four, undesirable_weight=1.5) == {1.0: 1.0, 0.0: 1.5}
    assert weights("preferred", three_of_four, safe_flags=False) == {1.0: 1.0, 0.0: 1.0}


def test_kto_needs_flags_of_both_kinds(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(DataError, match="KTO needs desirable and undesirable responses, found 4 and 0 by the label"):
        labelled(tmp_path, reference, "safe", [ROWS[5], {**ROWS[5], "prompt": "w3"}], loss="kto")
    some = labelled(tmp_path / "some", reference, "safe", [ROWS[0], row("w3", "w4", "w5", 0, 0)], loss="kto")
    assert noted(some) == {"no safety flag": 2}


@pytest.mark.real_data
def test_real_pku_labels(tmp_path: Path, shared_data: Path) -> None:
    """500 real pairs by both criteria, and their 1,000 responses by their flags, against the file itself."""
    reference = make_model(tmp_path / "lm", FAMILIES["chatml"], max_position_embeddings=8192)
    with gzip.open(shared_data / "preferences" / "pku_saferlhf_dual_500.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    for criterion, column in (("helpful", "better_response_id"), ("safe", "safer_response_id")):
        artifact = labelled(tmp_path / criterion, reference, criterion, rows)
        assert artifact.info["counts"]["examples"] >= 490
        for one in artifact.table.to_pylist():
            row = rows[int(one["example_id"].split("/")[1].partition("a|")[0])]
            assert one["texts"] == [row["response_0"].strip(), row["response_1"].strip()]
            assert one["target"].index(1.0) == row[column]
    kto = labelled(tmp_path / "kto", reference, "safe", rows, loss="kto").table.to_pylist()
    number = {"a": 0, "b": 1}
    for one in kto:
        place = one["example_id"].split("/")[1]
        assert one["target"][0] == float(rows[int(place[:-1])][f"is_response_{number[place[-1]]}_safe"])
    num_good = sum(one["target"][0] for one in kto)
    assert 0 < num_good < len(kto)
    weight = {one["target"][0]: one["weight"] for one in kto}
    assert weight == {1.0: 1.0, 0.0: pytest.approx(num_good / (len(kto) - num_good))}


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_pairs_longer_than_the_context_are_left_out_whole_and_told(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture, loss: str
) -> None:
    long = " ".join(["w1"] * 80)  # the context is 64
    rows = [row("w0", "w1", "w2", 0, 1), row("w5", "w3", long, 0, 0), row("w9", "w3", "w4", 1, 1)]
    with workspace(tmp_path / "run", reference, rows, loss=loss) as (work, prompts):
        pairs = read_pairs(work, prompts)
    said = capsys.readouterr().err
    if loss == "dpo":
        assert f"pairs.jsonl: 1 of 3 pair(s) longer than {reference}'s context of 64 tokens: row 1 (8" in said
        assert "; left out" in said
        assert pairs.info["counts"]["too_long"] == 1
        ids = [name.rpartition("/")[2] for name in pairs.table.column("response_id").to_pylist()]
        assert ids == [f"{number}{side}" for number in (0, 2) for side in "ab"]
    else:  # the long response stands in for one of the first prompt too
        assert pairs.info["counts"]["too_long"] == 2
        assert pairs.table.num_rows == 4


def test_no_pair_within_the_context_is_an_error(tmp_path: Path, reference: Path) -> None:
    rows = [row("w0", "w1", " ".join(["w1"] * 80), 0, 1)]
    with (
        workspace(tmp_path / "run", reference, rows) as (work, prompts),
        pytest.raises(DataError, match=r"1 of 1 pair\(s\) longer than .* None is left; use a reference with a longer"),
    ):
        read_pairs(work, prompts)
