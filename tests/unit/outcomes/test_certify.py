"""A policy and its certificate: looks, answers, what an export asks, and every refusal. Real stages, without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from sealed_run import NUM_SEALED, change, sealed_config, without_ray
from small_run import write_config

from can_dist.cli import cli
from can_dist.config import load_config
from can_dist.errors import ConfigError, DataError
from can_dist.measuring.certificate import CERTIFIED, NOT_CERTIFIED
from can_dist.outcomes.certify import run_certificate
from can_dist.outcomes.export import export_policy, find_policy
from can_dist.pipeline import run_pipeline
from can_dist.stages.certify import CERTIFICATE, CERTIFICATE_PAGE
from can_dist.stages.sealed import LEDGER, check_unread, error_of, read_looks
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact, open_stage, write_part
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.lineage import ancestor
from can_dist.tables.schemas import PREFERENCES
from can_dist.tables.verify import verify_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of MoCAN with sealed prompts, trained and evaluated, that nobody certified."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        folder = tmp_path_factory.mktemp("sealed")
        config = load_config(write_config(folder / "small.yaml", sealed_config(folder)))
        run_pipeline(folder / "run", config)
        yield folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def can_dist(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def sealed_rows(run: Path) -> list[dict[str, Any]]:
    prompts = ancestor(find_policy(run)[0], "prompts")
    return [row for row in prompts.table.to_pylist() if row["split"] == "sealed"]


def margin(run: Path, value: float) -> None:
    change(run, "constraints.calm.margin", value)


def test_no_stage_of_a_run_reads_a_sealed_prompt(run: Path) -> None:
    rows = sealed_rows(run)
    assert len({row["prompt_id"] for row in rows}) == len({prompt_id(row["messages"]) for row in rows}) == NUM_SEALED
    ids, texts = {row["prompt_id"] for row in rows}, {row["messages"][-1]["content"] for row in rows}
    num_read = 0
    for manifest in run.glob(f"*/{MANIFEST}"):
        artifact = load_artifact(manifest.parent)
        if artifact.stage == "prompts" or not artifact.parts:
            continue
        num_read += 1
        assert ids.isdisjoint(artifact.table.column("prompt_id").to_pylist()), artifact.path
        if "messages" in artifact.table.column_names:
            said = {messages[-1]["content"] for messages in artifact.table.column("messages").to_pylist()}
            assert texts.isdisjoint(said), artifact.path
    assert num_read > 8
    assert not (run / LEDGER).exists()
    check_unread(run, ancestor(find_policy(run)[0], "prompts"))


def test_certified_not_certified_and_the_same_look(run: Path) -> None:
    margin(run, -5.0)
    done = can_dist("certify", run, "--delta", "0.1")
    assert done.exit_code == 0, done.output
    certificate = load_artifact(Path(done.stdout.splitlines()[-1]).parent)
    record = certificate.read_json(CERTIFICATE)
    assert record["answer"] == CERTIFIED
    assert record["num_prompts"] == NUM_SEALED
    assert record["look"]["error"] == pytest.approx(0.1 * 0.6079271)
    assert f"(3 in {NUM_SEALED}) may be unseen" in done.stdout
    (row,) = record["constraints"]
    assert row["low"] < row["mean"] < row["high"]
    page = (certificate.path / CERTIFICATE_PAGE).read_text(encoding="utf-8")
    assert "Certificate: certified" in page
    assert f"{NUM_SEALED} sealed prompts" in page
    assert certificate.input("scores_policy").num_rows == 2 * NUM_SEALED
    ledger = (run / LEDGER).read_bytes()
    again = run_certificate(run)
    assert again.digest == certificate.digest, "the same policy: the same answer"
    margin(run, 5.0)
    missed = can_dist("certify", run)
    assert missed.exit_code == 4, missed.output
    assert missed.stdout.startswith("NOT CERTIFIED at a joint error of 0.0608")
    assert (run / LEDGER).read_bytes() == ledger, "another margin is no new look: the bounds hold for all of them"
    margin(run, row["mean"] - 1e-3)
    undecided = can_dist("certify", run)
    assert undecided.exit_code == 7, undecided.output
    needed = round(NUM_SEALED * ((row["mean"] - row["low"]) / 1e-3) ** 2)
    assert f"By the measured spread {needed}" in undecided.stdout or f"{needed + 1} prompts" in undecided.stdout
    assert verify_run(run)[1] == []


def test_another_policy_is_a_second_look_at_a_smaller_error(run: Path) -> None:
    margin(run, -5.0)
    first = run_certificate(run)
    config = change(run, "train.learning_rate", 2e-3)
    evaluation = run_pipeline(run, config)
    with pytest.raises(DataError, match="expected one policy, found"):
        run_certificate(run)
    second = run_certificate(evaluation.path)
    record = second.read_json(CERTIFICATE)
    assert record["look"]["number"] == second.info["look"] == 2
    assert record["look"]["error"] == pytest.approx(0.05 * 0.6079271 / 4)
    assert "This is look 2 at the sealed prompts" in " ".join(record["sentences"])
    assert [look.policy for look in read_looks(run)] == [
        first.input("policy").path.name,
        second.input("policy").path.name,
    ]
    again = run_certificate(first.input("policy").path)
    assert again.digest == first.digest, "the first look stays the first"
    change(run, "seed", 77)
    run_certificate(evaluation.path)
    assert len(read_looks(run)) == 3, "other responses of the same policy are another try"


def test_errors_of_all_looks_sum_to_delta() -> None:
    spent = [error_of(0.05, number) for number in range(1, 200_001)]
    assert 0.0499 < sum(spent) < 0.05
    assert spent[0] == pytest.approx(0.05 * 0.60793, rel=1e-4)


def test_export_asks_for_the_certificate_of_exactly_this_policy_and_these_constraints(
    run: Path, tmp_path: Path
) -> None:
    margin(run, -5.0)
    refused = can_dist("export", "policy", run, "--out", tmp_path / "out", "--require-certificate")
    assert isinstance(refused.exception, DataError)
    assert "has no certificate for the constraints of" in str(refused.exception)
    assert not (tmp_path / "out").exists()
    run_certificate(run)
    margin(run, -4.0)
    with pytest.raises(DataError, match="has no certificate for the constraints"):
        export_policy(run, tmp_path / "out", adapter=False, certified=True)
    margin(run, -5.0)
    done = can_dist("export", "policy", run, "--out", tmp_path / "out", "--require-certificate")
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "## Certificate\n\n**CERTIFIED at a joint error of 0.0304" in card
    assert "calm: the improvement over the reference is at least" in card
    policy, _ = find_policy(run)
    shutil.copytree(policy.path, other := policy.path.parent / "train-0000000000000000")
    manifest = json.loads((other / MANIFEST).read_text()) | {"info": {"summary": {"num_steps": 2}}}
    (other / MANIFEST).write_text(json.dumps({name: value for name, value in manifest.items() if name != "digest"}))
    with pytest.raises(DataError, match=r"train-0000000000000000: has no certificate"):
        export_policy(other, tmp_path / "other", adapter=False, certified=True)
    margin(run, 5.0)
    run_certificate(run)
    with pytest.raises(DataError, match="NOT CERTIFIED at a joint error"):
        export_policy(run, tmp_path / "third", adapter=False, certified=True)
    plain = export_policy(run, tmp_path / "plain", adapter=False) / "README.md"
    assert "**NOT CERTIFIED" in plain.read_text(encoding="utf-8"), "the card tells what is known"


def test_another_strength_has_no_certificate(run: Path, tmp_path: Path) -> None:
    done = can_dist("export", "policy", run, "--out", tmp_path / "o", "--require-certificate", "--strength", "2")
    assert isinstance(done.exception, ConfigError)
    assert "another strength is another policy" in str(done.exception)


@pytest.mark.parametrize("delta", ["0", "1", "-0.1", "1.5", "nan"])
def test_delta_is_a_probability(run: Path, delta: str) -> None:
    done = can_dist("certify", run, "--delta", delta)
    assert isinstance(done.exception, ConfigError)
    assert "expected between 0 and 1" in str(done.exception)


def test_delta_cannot_be_chosen_after_a_look(run: Path) -> None:
    margin(run, -5.0)
    run_certificate(run, delta=0.02)
    with pytest.raises(
        ConfigError, match=r"--delta 0\.1: the first look at the sealed prompts of .* was taken at 0\.02"
    ):
        run_certificate(run, delta=0.1)
    assert run_certificate(run, delta=0.02).digest == run_certificate(run).digest


def test_equality_needs_a_tolerance_and_has_two_bounds(run: Path) -> None:
    margin(run, 0.0)
    change(run, "constraints.calm.equal", True)
    with pytest.raises(ConfigError, match=r"no number of prompts shows .* Give --tolerance T"):
        run_certificate(run)
    assert not (run / LEDGER).exists(), "refused before the look"
    record = run_certificate(run, tolerance=9.0).read_json(CERTIFICATE)
    assert record["answer"] == CERTIFIED
    assert record["constraints"][0]["error"] == pytest.approx(record["look"]["error"] / 2)
    narrow = run_certificate(run, tolerance=1e-6)
    assert narrow.info["answer"] != CERTIFIED
    assert narrow.info["look"] == 1


def test_threshold_needs_no_responses_of_the_reference(run: Path) -> None:
    change(
        run,
        "constraints.calm",
        {**load_config(run / "config.yaml").model_dump()["constraints"]["calm"], "margin": None, "threshold": -9.0},
    )
    certificate = run_certificate(run)
    assert certificate.info["answer"] == CERTIFIED
    assert "scores_reference" not in certificate.manifest["inputs"]
    change(run, "constraints.calm.threshold", 9.0)
    assert run_certificate(run).info["answer"] == NOT_CERTIFIED


def plant(run: Path, rows: list[dict[str, Any]]) -> Artifact:
    stage = open_stage(run, "label", "planted", {}, {})
    example = {name: None for name in PREFERENCES.names} | {"split": "train", "weight": 1.0}
    write_part(stage.path, 0, pa.Table.from_pylist([example | row for row in rows], schema=PREFERENCES))
    return stage.commit()


@pytest.mark.parametrize("how", ["by what they say", "by their id"])
def test_sealed_prompts_that_also_stand_in_training_are_refused(run: Path, how: str) -> None:
    row = sealed_rows(run)[0]
    other = [{"role": "user", "content": "another"}]
    by_text = {"prompt_id": "mine", "messages": row["messages"]}
    planted = plant(run, [by_text if how == "by what they say" else {"prompt_id": row["prompt_id"], "messages": other}])
    with pytest.raises(DataError, match=rf"sealed prompts were used by {planted.path.name} \(1 {how} of 64\)"):
        run_certificate(run)
    assert not (run / LEDGER).exists()


def test_choice_by_the_sealed_responses_is_refused(run: Path) -> None:
    margin(run, -5.0)
    certificate = run_certificate(run)
    chosen = open_stage(run, "strength", "by a look", {}, {"scores": certificate.input("scores_policy")}).commit()
    with pytest.raises(DataError, match=rf"used by {chosen.path.name} \(by the responses to them\)"):
        run_certificate(certificate.input("policy").path)


@pytest.mark.parametrize("damage", ["lost", "changed", "cut"])
def test_ledger_that_is_not_as_written_is_refused(run: Path, damage: str) -> None:
    margin(run, -5.0)
    run_certificate(run)
    ledger = run / LEDGER
    if damage == "lost":
        ledger.unlink()
    elif damage == "changed":
        change(run, "seed", 5)
        run_certificate(run)
        ledger.write_text(ledger.read_text().replace('"delta": 0.05', '"delta": 0.5', 1))
    else:
        ledger.write_text(ledger.read_text()[:40])
    with pytest.raises(DataError, match="nobody knows how often the sealed prompts were looked at"):
        run_certificate(run)


def test_run_without_sealed_prompts_and_run_without_policy(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected one policy, found none"):
        run_certificate(tmp_path)
    config = change(run, "prompts.num_sealed", 0)
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        evaluation = run_pipeline(run, config)
    with pytest.raises(DataError, match=r"no prompts are sealed.*Set prompts\.num_sealed"):
        run_certificate(evaluation.path)


def test_prompts_sealed_after_a_run_had_read_them_are_refused(run: Path) -> None:
    config = change(run, "prompts.num_sealed", 70)
    evaluation = run_pipeline(run, config)
    with pytest.raises(DataError, match=r"sealed prompts were used by .* \(\d+ by what they say of 70\)"):
        run_certificate(evaluation.path)


def test_reference_that_is_another_now_is_refused(run: Path, tmp_path: Path) -> None:
    from small_run import WORDS
    from tiny import make_tiny_lm

    change(run, "reference.model", str(make_tiny_lm(tmp_path / "lm2", WORDS, seed=9)))
    with pytest.raises(DataError, match="its weights are not those that"):
        run_certificate(run)
