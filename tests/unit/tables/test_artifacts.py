"""Artifacts: committed whole or not at all, found by content, refused when touched, finished after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from can_dist.errors import DataError
from can_dist.tables.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    STAGE,
    Artifact,
    StageDirectory,
    atomic_directory,
    atomic_file,
    canonical_json,
    digest_of,
    load_artifact,
    open_stage,
    read_part,
    write_json,
    write_part,
)
from can_dist.tables.lineage import ancestor, ancestors
from can_dist.tables.verify import files_outside, verify_run


def table(part: int, rows: int = 50) -> pa.Table:
    return pa.table(
        {"prompt_id": [f"p{part}-{row}" for row in range(rows)], "reward": [part + row / 7 for row in range(rows)]}
    )


def make(
    run: Path,
    stage: str = "score",
    label: str = "reward",
    identity: dict[str, Any] | None = None,
    inputs: dict[str, Artifact] | None = None,
    num_parts: int = 2,
) -> Artifact:
    """Make and commit an artifact of a few parts and one JSON file."""
    place = open_stage(run, stage, label, identity or {"beta": 0.1}, inputs or {})
    for part in range(num_parts):
        write_part(place.path, part, table(part))
    write_json(place.path / "notes.json", {"made": "by hand"})
    return place.commit(["notes.json"], info={"num_prompts": 3})


def half_done(run: Path, num_parts: int = 3) -> StageDirectory:
    place = open_stage(run, "score", "reward", {"beta": 0.1}, {})
    for part in range(num_parts):
        write_part(place.path, part, table(part))
    return place


def rewrite_manifest(artifact: Artifact, change: Callable[[dict[str, Any]], None]) -> Artifact:
    """Change a manifest as someone who can write to the run directory could."""
    manifest = json.loads((artifact.path / MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    (artifact.path / MANIFEST).write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    return load_artifact(artifact.path)


def flip_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def truncate(path: Path, fraction: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])


# ---------------------------------------------------------------------------------------------- commit and read back


def test_committed_parts_read_back_in_order(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    assert load_artifact(artifact.path).table.equals(pa.concat_tables([table(0), table(1)]))


def test_committed_artifact_tells_stage_info_and_json(tmp_path: Path) -> None:
    artifact = load_artifact(make(tmp_path).path)
    assert (artifact.stage, artifact.info) == ("score", {"num_prompts": 3})
    assert artifact.read_json("notes.json") == {"made": "by hand"}


def test_manifest_lists_size_digest_and_rows_of_each_file(tmp_path: Path) -> None:
    files = make(tmp_path).manifest["files"]
    assert [(entry["file"], entry.get("rows")) for entry in files] == [
        ("part-00000.arrow", 50),
        ("part-00001.arrow", 50),
        ("notes.json", None),
    ]
    assert all(entry["bytes"] > 0 and len(entry["sha256"]) == 64 for entry in files)


def test_column_metadata_survives(tmp_path: Path) -> None:
    place = open_stage(tmp_path, "score", "reward", {}, {})
    schema = pa.schema([pa.field("reward", pa.float64(), metadata={"scorer": "x"})])
    write_part(place.path, 0, pa.table([pa.array([1.0])], schema=schema))
    assert place.commit().table.schema.field("reward").metadata == {b"scorer": b"x"}


def test_stage_is_unfinished_until_its_manifest(tmp_path: Path) -> None:
    place = half_done(tmp_path)
    assert place.finished is None
    place.commit()
    again = open_stage(tmp_path, "score", "reward", {"beta": 0.1}, {})
    assert again.finished is not None


def test_directory_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no MANIFEST\.json, so this is not a finished artifact"):
        load_artifact(half_done(tmp_path).path)


def test_same_content_gives_the_same_manifest_digest(tmp_path: Path) -> None:
    assert make(tmp_path / "a").digest == make(tmp_path / "b").digest


def test_json_file_that_is_not_listed_is_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    write_json(artifact.path / "later.json", {})
    with pytest.raises(DataError, match=r"does not list later\.json"):
        artifact.read_json("later.json")


@pytest.mark.parametrize("value", [{"b": 1, "a": [1, 2.5, None, "é"]}, {"a": [1, 2.5, None, "é"], "b": 1}])
def test_canonical_json_does_not_depend_on_key_order(value: dict[str, Any]) -> None:
    assert canonical_json(value) == '{"a":[1,2.5,null,"é"],"b":1}'


def test_not_a_number_has_no_canonical_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"beta": float("nan")})


# ------------------------------------------------------------------------------------------------------ atomic files


def test_atomic_file_replaces_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for content in ("old", "new"):
        with atomic_file(path) as temporary:
            temporary.write_text(content)
            assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def fail_after_writing(path: Path) -> None:
    path.write_text("half")
    raise OSError("no space")


@pytest.mark.parametrize("old", [None, "old"])
def test_atomic_file_leaves_nothing_after_an_exception(tmp_path: Path, old: str | None) -> None:
    path = tmp_path / "x.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(OSError, match="no space"), atomic_file(path) as temporary:
        fail_after_writing(temporary)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({} if old is None else {"x.txt": "old"})


def test_atomic_file_is_readable_by_others(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644


# --------------------------------------------------------------------------------------------------------------- key


@pytest.mark.parametrize(
    "other",
    [
        {"stage": "solve"},
        {"label": "cost"},
        {"identity": {"beta": 0.2, "options": {"k": 8, "stop": ["a"]}}},
        {"identity": {"beta": 0.1, "options": {"k": 9, "stop": ["a"]}}},
        {"identity": {"beta": 0.1, "options": {"k": 8, "stop": []}}},
        {"identity": {"beta": 0.1}},
        {"inputs": "another artifact"},
        {"inputs": "another role"},
        {"inputs": "none"},
    ],
)
def test_key_depends_on_stage_label_identity_and_inputs(tmp_path: Path, other: dict[str, Any]) -> None:
    first, second = make(tmp_path, "prompts", "a"), make(tmp_path, "prompts", "b")
    inputs = {"another artifact": {"given": second}, "another role": {"taken": first}, "none": {}}
    base: dict[str, Any] = {
        "stage": "score",
        "label": "reward",
        "identity": {"beta": 0.1, "options": {"k": 8, "stop": ["a"]}},
        "inputs": {"given": first},
    }
    changed = base | other
    if "inputs" in other:
        changed["inputs"] = inputs[other["inputs"]]
    assert (
        open_stage(tmp_path, **base).path.name.split("-")[1] != open_stage(tmp_path, **changed).path.name.split("-")[1]
    )


def test_key_does_not_depend_on_order(tmp_path: Path) -> None:
    first, second = make(tmp_path, "prompts", "a"), make(tmp_path, "prompts", "b")
    one = open_stage(tmp_path, "score", "r", {"a": 1, "b": {"c": 2, "d": 3}}, {"x": first, "y": second})
    two = open_stage(tmp_path, "score", "r", {"b": {"d": 3, "c": 2}, "a": 1}, {"y": second, "x": first})
    assert one.path == two.path


def test_key_does_not_depend_on_where_the_run_lies(tmp_path: Path) -> None:
    assert make(tmp_path / "a").path.name == make(tmp_path / "b").path.name


def test_open_stage_writes_what_the_directory_is_for(tmp_path: Path) -> None:
    prompts = make(tmp_path, "prompts")
    place = open_stage(tmp_path, "score", "reward", {"beta": 0.1}, {"given": prompts})
    assert json.loads((place.path / STAGE).read_text()) == {
        "identity": {"stage": "score", "label": "reward", "format_version": FORMAT_VERSION, "beta": 0.1},
        "inputs": {"given": prompts.digest},
    }


# -------------------------------------------------------------------------------------------------------- half done


def test_whole_parts_are_kept(tmp_path: Path) -> None:
    place = half_done(tmp_path)
    assert place.finished_parts() == {0, 1, 2}
    assert place.parts_table().num_rows == 150


@pytest.mark.parametrize(
    "tear",
    [
        pytest.param(lambda part: truncate(part, 0), id="empty"),
        pytest.param(lambda part: truncate(part, 0.5), id="half"),
        pytest.param(lambda part: truncate(part, 0.999), id="tail missing"),
        pytest.param(lambda part: flip_bit(part), id="flipped bit"),
        pytest.param(lambda part: part.with_suffix(".json").unlink(), id="no sidecar"),
        pytest.param(lambda part: truncate(part.with_suffix(".json"), 0.5), id="half a sidecar"),
        pytest.param(lambda part: part.with_suffix(".json").write_text("[]"), id="another sidecar"),
    ],
)
def test_f12_torn_part_is_removed_and_the_others_kept(tmp_path: Path, tear: Callable[[Path], Any]) -> None:
    place = half_done(tmp_path)
    torn = place.path / "part-00001.arrow"
    tear(torn)
    assert place.finished_parts() == {0, 2}
    assert not torn.exists()


def test_f12_part_made_again_after_tearing_gives_the_undisturbed_artifact(tmp_path: Path) -> None:
    place = half_done(tmp_path / "torn")
    truncate(place.path / "part-00001.arrow", 0.5)
    for part in {0, 1, 2} - place.finished_parts():
        write_part(place.path, part, table(part))
    assert place.commit().digest == half_done(tmp_path / "whole").commit().digest


def test_f16_sidecar_without_its_part_is_not_a_part(tmp_path: Path) -> None:
    place = half_done(tmp_path)
    (place.path / "part-00002.arrow").unlink()
    assert place.finished_parts() == {0, 1}
    assert [path.name for path in place.commit().parts] == ["part-00000.arrow", "part-00001.arrow"]


def test_f15_part_that_two_attempts_made_is_there_once(tmp_path: Path) -> None:
    place = half_done(tmp_path / "twice")
    write_part(place.path, 1, table(1))
    assert place.commit(parts=range(3)).digest == half_done(tmp_path / "once").commit().digest


def test_f16_part_that_lost_its_sidecar_is_not_committed(tmp_path: Path) -> None:
    place = half_done(tmp_path)
    sidecar = place.path / "part-00001.json"
    sidecar.unlink()
    with pytest.raises(DataError, match=re.escape(f"{sidecar}: gone since its part was committed. Run again")):
        place.commit(parts=range(3))
    assert place.finished is None
    assert place.finished_parts() == {0, 2}, "which is what running again makes"


def test_f16_parts_that_are_gone_or_strange_stop_the_commit(tmp_path: Path) -> None:
    place = half_done(tmp_path)
    with pytest.raises(DataError, match=r"2 of 5 parts are gone since they were committed: number 3, 4\. Run again"):
        place.commit(parts=range(5))
    with pytest.raises(DataError, match=r"has 1 part\(s\) that this stage did not make: number 2\. Remove them"):
        place.commit(parts=range(2))
    assert place.finished is None


STRAY = {
    ".tmp-abc123": b"half a part",
    "junk.bin": b"\x00\x01",
    "part-7.arrow": b"not numbered like a part",
    "part-00001.arrow.bak": b"a copy",
    "part-00003.json": b"{}",
}


@pytest.mark.parametrize("name", STRAY)
def test_f25_stray_file_enters_no_commit(tmp_path: Path, name: str) -> None:
    place = half_done(tmp_path / "stray")
    (place.path / name).write_bytes(STRAY[name])
    assert place.parts_table().num_rows == 150
    assert place.commit().digest == half_done(tmp_path / "clean").commit().digest


@pytest.mark.parametrize("name", [*STRAY, "part-00002.arrow"])
def test_f25_stray_file_is_not_read(tmp_path: Path, name: str) -> None:
    artifact = make(tmp_path)
    (artifact.path / name).write_bytes(STRAY.get(name, b"ARROW1"))
    assert load_artifact(artifact.path).table.num_rows == 100
    assert verify_run(tmp_path) == (1, [])


def test_f25_whole_part_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    write_part(artifact.path, 2, table(2))
    assert load_artifact(artifact.path).table.num_rows == 100


# ---------------------------------------------------------------------------------------------------------- damaged


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: truncate(path, 0), "0 bytes, the manifest says"),
    "30 %": (lambda path: truncate(path, 0.3), "bytes, the manifest says"),
    "50 %": (lambda path: truncate(path, 0.5), "bytes, the manifest says"),
    "99.9 %": (lambda path: truncate(path, 0.999), "bytes, the manifest says"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"\x00"), "bytes, the manifest says"),
    "flipped bit": (lambda path: flip_bit(path), "the content changed since it was committed"),
    "missing": (lambda path: path.unlink(), "listed in the manifest, but missing"),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "listed in the manifest, but missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_f12_f13_table_refuses_a_damaged_part(tmp_path: Path, damage: str) -> None:
    artifact = make(tmp_path)
    act, message = DAMAGE[damage]
    part = artifact.path / "part-00001.arrow"
    act(part)
    with pytest.raises(DataError) as caught:
        _ = load_artifact(artifact.path).table
    assert str(caught.value).startswith(f"{part}: ")
    assert message in str(caught.value)
    assert f"Delete {artifact.path} and run again." in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_f12_f13_verify_finds_a_damaged_part(tmp_path: Path, damage: str) -> None:
    artifact = make(tmp_path)
    act, message = DAMAGE[damage]
    act(artifact.path / "part-00001.arrow")
    count, (problem,) = verify_run(tmp_path)
    assert count == 1
    assert "part-00001.arrow" in problem
    assert message in problem


def test_f13_table_refuses_when_a_file_beside_the_parts_is_damaged(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    flip_bit(artifact.path / "notes.json")
    with pytest.raises(DataError, match=r"notes\.json: the content changed"):
        _ = load_artifact(artifact.path).table


def test_f13_json_refuses_when_damaged(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    flip_bit(artifact.path / "notes.json")
    with pytest.raises(DataError, match=r"notes\.json: the content changed"):
        artifact.read_json("notes.json")


@pytest.mark.parametrize("fraction", [0, 0.3, 0.5, 0.999])
def test_f12_part_cut_short_is_no_arrow_file(tmp_path: Path, fraction: float) -> None:
    write_part(tmp_path, 0, table(0))
    truncate(tmp_path / "part-00000.arrow", fraction)
    with pytest.raises(DataError, match=r"part-00000\.arrow: not a readable Arrow file"):
        read_part(tmp_path / "part-00000.arrow")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"stage": 1}', b"\xff\xfe", b"[" * 100_000])
def test_damaged_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    artifact = make(tmp_path)
    (artifact.path / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match=r"MANIFEST\.json: damaged, not a manifest of this program\. Delete"):
        load_artifact(artifact.path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", None),
        ("files", None),
        ("files", [{"file": "part-00000.arrow"}]),
        ("files", [{"file": 1, "bytes": 1, "sha256": ""}]),
        ("files", ["part-00000.arrow"]),
        ("inputs", []),
        ("inputs", {"given": {"artifact": 1, "digest": "x"}}),
        ("identity", "x"),
        ("info", None),
    ],
)
def test_manifest_with_a_field_of_another_kind_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    artifact = make(tmp_path)
    with pytest.raises(DataError, match="damaged, not a manifest of this program"):
        rewrite_manifest(artifact, lambda manifest: manifest.update({key: value}))


@pytest.mark.parametrize(
    "name", ["../outside.arrow", "../../outside.arrow", "/etc/hostname", ".", "", "sub/../../x", "link"]
)
def test_manifest_entry_outside_the_artifact_is_refused(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    artifact = make(run)
    for outside in (tmp_path / "outside.arrow", run / "outside.arrow", run / "x"):
        outside.write_bytes(b"secret")
    (artifact.path / "link").symlink_to(tmp_path / "outside.arrow")
    content = b"secret"
    entry = {"file": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    hostile = rewrite_manifest(artifact, lambda manifest: manifest["files"].append(entry))
    with pytest.raises(DataError, match="which lies outside the artifact"):
        _ = hostile.table
    assert any("lies outside the artifact" in problem for problem in verify_run(run)[1])


# --------------------------------------------------------------------------------------------------- why not reused


def reason(
    run: Path, identity: dict[str, Any], inputs: dict[str, Artifact] | None = None, label: str = "reward"
) -> str:
    return open_stage(run, "score", label, identity, inputs or {}).reason


def test_nothing_to_compare_gives_no_reason(tmp_path: Path) -> None:
    assert reason(tmp_path, {"beta": 0.1}) == ""


def test_finished_stage_gives_no_reason(tmp_path: Path) -> None:
    make(tmp_path)
    assert reason(tmp_path, {"beta": 0.1}) == ""


def test_reason_names_the_changed_key_with_both_values(tmp_path: Path) -> None:
    artifact = make(tmp_path, identity={"options": {"k": 8, "top_p": 1.0}})
    found = reason(tmp_path, {"options": {"k": 4, "top_p": 1.0}})
    assert found == f"{artifact.path.name} is not reused: options.k was 8, is 4"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({"a": None}, {}, "a was null, is absent"),
        ({}, {"a": None}, "a was absent, is null"),
        ({"a": 1}, {"a": 1.0}, "a was 1, is 1.0"),
        ({"a": True}, {"a": 1}, "a was true, is 1"),
        ({"a": {}}, {}, "a was {}, is absent"),
        ({"a": ["x"]}, {"a": ["x", "y"]}, 'a was ["x"], is ["x","y"]'),
        ({"a": {"b": 1}}, {"a": {"b": 2, "c": "é"}}, 'a.b was 1, is 2; a.c was absent, is "é"'),
    ],
)
def test_reason_tells_every_kind_of_change(tmp_path: Path, before: Any, after: Any, expected: str) -> None:
    make(tmp_path, identity={"x": 0, **before})
    assert reason(tmp_path, {"x": 0, **after}).endswith(f"is not reused: {expected}")


def test_reason_names_the_changed_input(tmp_path: Path) -> None:
    first, second = make(tmp_path, "prompts", "a"), make(tmp_path, "prompts", "b")
    make(tmp_path, inputs={"responses": first})
    assert reason(tmp_path, {"beta": 0.1}, {"responses": second}).endswith("is not reused: its input responses changed")


def test_reason_names_a_new_and_a_dropped_input(tmp_path: Path) -> None:
    first = make(tmp_path, "prompts", "a")
    make(tmp_path, inputs={"old": first})
    found = reason(tmp_path, {"beta": 0.1}, {"new": first})
    assert found.endswith("is not reused: new is a new input; old is no longer an input")


def test_reason_compares_with_the_most_similar_artifact(tmp_path: Path) -> None:
    one = make(tmp_path, identity={"a": 1, "b": 1, "c": 0})
    two = make(tmp_path, identity={"a": 2, "b": 2, "c": 0})
    assert reason(tmp_path, {"a": 1, "b": 1, "c": 1}) == f"{one.path.name} is not reused: c was 0, is 1"
    assert reason(tmp_path, {"a": 2, "b": 2, "c": 1}) == f"{two.path.name} is not reused: c was 0, is 1"


def test_reason_ignores_other_labels_and_unfinished_stages(tmp_path: Path) -> None:
    make(tmp_path, label="cost")
    half_done(tmp_path)
    assert reason(tmp_path, {"beta": 0.2}) == ""


def test_reason_passes_over_a_damaged_manifest(tmp_path: Path) -> None:
    damaged = make(tmp_path, identity={"beta": 0.2})
    (damaged.path / MANIFEST).write_text("{")
    assert reason(tmp_path, {"beta": 0.3}) == ""


# ----------------------------------------------------------------------------------------------------------- verify


@pytest.fixture
def lineage(tmp_path: Path) -> dict[str, Artifact]:
    """Prompts → responses → scores in one run."""
    prompts = make(tmp_path, "prompts")
    responses = make(tmp_path, "generate", inputs={"prompts": prompts})
    return {"prompts": prompts, "generate": responses, "score": make(tmp_path, inputs={"responses": responses})}


def test_each_ancestor_is_read_once_in_a_loop_of_many_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 40 rounds is made from the two before: 10⁸ ways back to the prompts."""
    first, second = make(tmp_path, "prompts"), make(tmp_path, "generate")
    rounds = [first, second]
    for number in range(40):
        rounds.append(make(tmp_path, identity={"number": number}, inputs={"a": rounds[-1], "b": rounds[-2]}))
    opened: list[str] = []
    read = Artifact.input
    monkeypatch.setattr(Artifact, "input", lambda self, name: opened.append(name) or read(self, name))
    assert {made.path.name for made in ancestors(rounds[-1])} == {made.path.name for made in rounds}
    assert len(opened) == 41
    assert ancestor(rounds[-1], "prompts").path == first.path
    with pytest.raises(DataError, match="not made from a 'train' artifact"):
        ancestor(rounds[-1], "train")


def test_verify_accepts_a_whole_run(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    assert verify_run(tmp_path) == (3, [])


def test_what_no_manifest_lists_is_named(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    before = files_outside(tmp_path)
    assert before == {STAGE: 3, "part-*.json": sum(len(artifact.parts) for artifact in lineage.values())}
    artifact = next(iter(lineage.values()))
    (artifact.path / "metrics.jsonl").write_text("{}")
    (tmp_path / "log.jsonl").write_text("{}")
    assert files_outside(tmp_path) - before == {"metrics.jsonl": 1, "log.jsonl": 1}
    (artifact.path / MANIFEST).write_text("{")  # then nothing lists what it listed
    assert files_outside(tmp_path)[MANIFEST] == 1


def test_verify_finds_nothing_in_an_empty_directory(tmp_path: Path) -> None:
    assert verify_run(tmp_path) == (0, [])


@pytest.mark.parametrize("name", ["score-0000000000000000", "renamed"])
def test_verify_finds_a_renamed_directory(tmp_path: Path, lineage: dict[str, Artifact], name: str) -> None:
    lineage["score"].path.rename(tmp_path / name)
    _, (problem,) = verify_run(tmp_path)
    assert f"the directory is named {name}" in problem


def test_verify_finds_a_missing_input(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    shutil.rmtree(lineage["prompts"].path)
    _, (problem,) = verify_run(tmp_path)
    assert problem == (
        f"{lineage['generate'].path}: made from prompts = {lineage['prompts'].path.name}, which is not in the run."
    )


def test_verify_finds_a_replaced_input(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    shutil.rmtree(lineage["prompts"].path)
    make(tmp_path, "prompts", num_parts=1)  # the same name, other rows
    _, (problem,) = verify_run(tmp_path)
    assert f"made from another {lineage['prompts'].path.name} than the one in the run" in problem


def test_verify_finds_a_changed_identity(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    rewrite_manifest(lineage["score"], lambda manifest: manifest["identity"].update(beta=0.2))
    _, (problem,) = verify_run(tmp_path)
    assert "its identity has key" in problem


def test_verify_finds_changed_info_through_what_was_made_from_it(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    rewrite_manifest(lineage["prompts"], lambda manifest: manifest["info"].update(num_prompts=4))
    _, (problem,) = verify_run(tmp_path)
    assert problem.startswith(f"{lineage['generate'].path}: made from another")


def test_verify_finds_any_flipped_bit_of_the_last_manifest(tmp_path: Path) -> None:
    """No artifact was made from it, so its own digest alone can tell."""
    artifact = make(tmp_path)
    whole = (artifact.path / MANIFEST).read_bytes()
    missed = []
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        (artifact.path / MANIFEST).write_bytes(flipped)
        try:
            same = load_artifact(artifact.path).manifest == artifact.manifest
        except DataError:
            continue
        if not same:
            missed.append(place)
    assert missed == []


def test_verify_tells_of_a_damaged_manifest_and_goes_on(tmp_path: Path, lineage: dict[str, Artifact]) -> None:
    (lineage["generate"].path / MANIFEST).write_text("{")
    flip_bit(lineage["prompts"].path / "part-00000.arrow")
    count, problems = verify_run(tmp_path)
    assert count == 2
    assert [problem.split(": ")[1].split(",")[0] for problem in problems] == [
        "damaged",
        "the content changed since it was committed. Delete " + f"{lineage['prompts'].path} and run again.",
        f"made from responses = {lineage['generate'].path.name}",
    ]


# ---------------------------------------------------------------------------------------------------------- kill -9

WORKER = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import pyarrow as pa
    from can_dist.tables.artifacts import open_stage, write_json, write_part

    run, num_parts, die_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    calls = 0

    def dying(function):
        def call(*arguments, **options):
            global calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    os.fsync, Path.replace, Path.unlink = dying(os.fsync), dying(Path.replace), dying(Path.unlink)
    place = open_stage(run, "score", "reward", {"beta": 0.1}, {})
    done = place.finished_parts()
    for part in range(num_parts):
        if part not in done:
            write_part(place.path, part, pa.table({"row": range(part * 1000, (part + 1) * 1000)}))
    write_json(place.path / "notes.json", {"parts": num_parts})
    print(place.commit(["notes.json"]).digest)
    """
)


def start_worker(run: Path, num_parts: int, die_at: int = 0) -> subprocess.Popen[str]:
    """Start the stage in a process of its own, which kills itself before its ``die_at``-th step on the disk."""
    arguments = [sys.executable, "-c", WORKER, str(run), str(num_parts), str(die_at)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def finish_worker(run: Path, num_parts: int) -> str:
    """Run the stage to its end; return the digest of its manifest."""
    process = start_worker(run, num_parts)
    digest = process.communicate(timeout=60)[0].strip()
    assert process.returncode == 0
    return digest


def test_stage_killed_before_a_random_step_on_the_disk_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = finish_worker(tmp_path / "undisturbed", 4)
    steps = random.Random(0)
    for trial in range(3):
        run = tmp_path / f"killed-{trial}"
        for die_at in (steps.randint(1, 44), steps.randint(1, 8)):  # 44 steps in all, the last 8 after the parts
            process = start_worker(run, 4, die_at)
            process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL
        assert finish_worker(run, 4) == undisturbed
        assert verify_run(run) == (1, [])


def test_stage_killed_from_outside_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, run = finish_worker(tmp_path / "undisturbed", 60), tmp_path / "killed"
    for target in (5, 20, 35):
        process = start_worker(run, 60)
        while len(list(run.glob("*/part-*.arrow"))) < target and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert not list(run.glob(f"*/{MANIFEST}"))
    assert finish_worker(run, 60) == undisturbed
    assert verify_run(run) == (1, [])


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_files_have_the_rights_that_the_umask_leaves(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        with atomic_directory(tmp_path / "b") as built:
            private = built / "weights"
            os.close(os.open(private, os.O_CREAT, 0o600))  # as libraries do that write to a temporary file first
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "b" / "weights").stat().st_mode) == mode
