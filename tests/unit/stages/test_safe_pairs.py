"""SafeDPO's relabelling, from a file with flags, or from a score with a threshold, to training examples."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from families import FAMILIES, make_model
from tiny import make_tiny_lm

from can_dist.config import SafeDpo, validate_config
from can_dist.errors import DataError
from can_dist.stages.examples import NOTED
from can_dist.stages.ingest import ingest_pairs
from can_dist.stages.safe_pairs import label_safe
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.foreign.formats import prompt_id
from can_dist.tables.schemas import PROMPTS
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(12)]


def row(number: int, better: int | None, safe: tuple[bool | None, bool | None], **texts: str) -> dict[str, Any]:
    flags = {"is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
    return {
        "prompt": f"w0 w{number}",
        "response_0": "w1",
        "response_1": "w2",
        "better_response_id": better,
        "safer_response_id": 0,
        **flags,
        **texts,
    }


ROWS = [
    row(1, 0, (True, True)),  # kept
    row(2, 1, (True, True)),
    row(3, 0, (True, False)),  # kept, with the offset
    row(4, 0, (False, True)),  # swapped
    row(5, 1, (True, False)),
    row(6, 1, (False, False)),  # dropped
    row(7, 0, (True, None)),
    row(8, None, (True, True)),
    row(9, 0, (True, True), response_1="w1"),
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), WORDS)


def labelled(
    run: Path, reference: Path, rows: list[dict[str, Any]], score: list[float] | None = None, **options: Any
) -> Artifact:
    """Read pairs, stand in for their scores, label; ``score`` is one number per response, in the order of the file."""
    run.mkdir(exist_ok=True)
    source = run / "pairs.jsonl"
    source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    scorer = {"kind": "callable", "function": "a:b"}
    config = validate_config(
        {
            "method": "safedpo",
            "prompts": {"source": "unused"},
            "reference": {"model": str(reference)},
            "reward": scorer,
            "constraints": {"safety": {"scorer": scorer, "margin": 0.1}},
            "label": {"preferences": {"source": str(source)}, "validation_fraction": 0.0},
            "safedpo": options,
        }
    )
    stage = open_stage(run, "prompts", "prompts", {}, {})
    messages = [{"role": "user", "content": "held out"}]
    held = [{"prompt_id": prompt_id(messages), "messages": messages, "split": "test"}]
    write_part(stage.path, 0, pa.Table.from_pylist(held, schema=PROMPTS))
    prompts = stage.finished or stage.commit()
    work = Workspace(run, config)
    try:
        pairs = ingest_pairs(work, config.label.preferences, config.reference, prompts, mismatched=False)
        stage = open_stage(run, "scores", "scores", {}, {"responses": pairs})
        ids = pairs.table.column("response_id")
        columns = {"response_id": ids, "logp.reference": [-float(n) for n in range(len(ids))]}
        write_part(stage.path, 0, pa.table(columns | ({"safety": score} if score is not None else {})))
        return label_safe(work, pairs, stage.finished or stage.commit(), config.safedpo)
    finally:
        work.close()


def test_pairs_are_kept_swapped_or_dropped_by_their_flags(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = labelled(tmp_path, reference, ROWS, offset=2.5)
    assert artifact.info["loss"] == "offset"
    examples = artifact.table.to_pylist()
    assert [one["target"] for one in examples] == [[1, 0], [0, 1], [3.5, 0], [0, 3.5], [3.5, 0]]
    assert examples[0]["logp_ref"] == [0.0, -1.0]
    counts = {name: artifact.info["counts"].get(name) for name in ("swapped", "both unsafe", "examples")}
    assert counts == {"swapped": 2, "both unsafe": 1, "examples": 5}
    noted = Counter(entry["reason"] for entry in json.loads((artifact.path / NOTED).read_text()))
    assert noted == {"swapped": 2, "both unsafe": 1, "no safety flag": 1, "no label": 1, "equal responses": 1}
    said = capsys.readouterr().err
    assert "3 pairs kept, 2 swapped (the safe response is preferred), 1 dropped (both responses are unsafe)" in said


def test_a_threshold_on_a_score_takes_the_place_of_the_flags(tmp_path: Path, reference: Path) -> None:
    rows = [row(number, 0, (None, None)) for number in range(1, 5)]
    score = [0.5, 0.7, 0.5, 0.4, 0.4, 0.5, 0.1, 0.2]  # the threshold itself is safe
    artifact = labelled(tmp_path, reference, rows, score, offset=1.0, thresholds={"safety": 0.5})
    assert [one["target"] for one in artifact.table.to_pylist()] == [[1, 0], [2, 0], [0, 2]]
    assert artifact.info["counts"]["both unsafe"] == 1
    other = labelled(tmp_path, reference, rows, score, offset=1.0, thresholds={"safety": 0.3})
    assert other.path != artifact.path
    assert [one["target"] for one in other.table.to_pylist()] == [[1, 0]] * 3


def test_several_thresholds_are_all_to_be_met(tmp_path: Path, reference: Path) -> None:
    from can_dist.stages.safe_pairs import flagged

    class Scores:
        table = pa.table({"calm": [1.0, 1.0, 0.0], "kind": [2.0, 0.0, 2.0]})

    table = pa.table({"safe": pa.array([-1, -1, -1], pa.int8())})
    found = flagged(table, Scores(), SafeDpo(thresholds={"calm": 0.5, "kind": 1.0}))  # type: ignore[arg-type]
    assert found.column("safe").to_pylist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [row(1, 0, (None, None)), row(2, 1, (None, None))],
            {},
            r"no pair has safety flags \(2 no safety flag\): columns 'is_response_0_safe' and 'is_response_1_safe' are "
            r"missing or null\. Bring data with flags, such as PKU-SafeRLHF; or name a constraint",
        ),
        (
            [{"prompt": f"w{n}", "chosen": "w1", "rejected": "w2"} for n in range(3)],
            {},
            r"no pair has safety flags \(3 no safety flag\)",
        ),
        (
            [row(1, 0, (False, False)), row(2, 1, (False, False)), row(3, 1, (None, None))],
            {},
            r"no pair with a safe response is left \(2 both unsafe, 1 no safety flag\), and of two unsafe ones SafeDPO "
            r"learns nothing\. Bring pairs of which a response is safe\.",
        ),
        (
            [row(1, 0, (True, True))],
            {"thresholds": {"safety": 9.0}},
            r"\(1 both unsafe\).* Lower safedpo\.thresholds, or bring pairs",
        ),
        ([row(1, None, (True, True))], {}, r"no pair has a label of helpfulness \(1 no label\): column 'better_resp"),
    ],
    ids=["no flags", "chosen and rejected", "all unsafe", "all below", "no labels"],
)
def test_nothing_to_learn_is_told_with_its_reason(
    tmp_path: Path, reference: Path, rows: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        labelled(tmp_path, reference, rows, [0.0] * 2 * len(rows), **options)
    assert not list(tmp_path.glob("label-*/MANIFEST.json"))


@pytest.mark.real_data
def test_real_pku_flags(tmp_path: Path, shared_data: Path) -> None:
    """500 real pairs against the file itself: the rule written out once more, by cases."""
    reference = make_model(tmp_path / "lm", FAMILIES["chatml"], max_position_embeddings=8192)
    with gzip.open(shared_data / "preferences" / "pku_saferlhf_dual_500.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    artifact = labelled(tmp_path / "run", reference, rows, offset=4.0)
    for one in artifact.table.to_pylist():
        given = rows[int(one["example_id"].split("/")[1].partition("a|")[0])]
        match (given["is_response_0_safe"], given["is_response_1_safe"]):
            case (True, True):
                expected = [1.0, 0.0] if given["better_response_id"] == 0 else [0.0, 1.0]
            case (True, False):
                expected = [5.0, 0.0]
            case _:
                expected = [0.0, 5.0]
        assert one["target"] == expected
    unsafe = sum(not r["is_response_0_safe"] and not r["is_response_1_safe"] for r in rows)
    swapped = sum(
        r["is_response_0_safe"] != r["is_response_1_safe"] and not r[f"is_response_{r['better_response_id']}_safe"]
        for r in rows
    )
    counts = artifact.info["counts"]
    print(f"PKU-SafeRLHF, 500 rows: {counts}")
    assert 0 < swapped <= unsafe
    assert unsafe - 5 <= counts["both unsafe"] <= unsafe  # less the few that are empty or equal
    assert swapped - 5 <= counts["swapped"] <= swapped
