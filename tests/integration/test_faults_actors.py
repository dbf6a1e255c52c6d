"""Actors that crash, hang or eat the memory: what the driver makes of it, on real Ray with real kills."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from scored_world import configured, events, make_responses, scored
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist import errors
from can_dist.cluster.actors import cause_of
from can_dist.cluster.connection import connect
from can_dist.config import PythonCallable, SequenceClassifier
from can_dist.errors import CanDistError, DataError, EnvironmentProblem
from can_dist.stages.label import label
from can_dist.stages.samples import chosen_samples
from can_dist.stages.score import score
from can_dist.stages.solve import solve
from can_dist.tables.artifacts import Artifact
from can_dist.tables.quarantine import without
from can_dist.tables.verify import verify_run
from can_dist.workspace import Workspace


def values(artifact: Artifact) -> pa.ChunkedArray:
    return artifact.table.column("r")


# ---------------------------------------------------------------------------------------------------- F02 poison rows


@pytest.mark.slow
def test_f02_row_that_ends_every_actor_is_named_exactly(tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=3, prompts=1, poison="p1/2")
    named = r"shard 1 ended its actor 2 times; response 'p1/2' \(row 2 of the shard\) does so by itself: .* died"
    with pytest.raises(EnvironmentProblem, match=named):
        scored(tmp_path, responses, "ends_at_poison", num_actors=1, shard_attempts=2)
    died = events(tmp_path, "actor died")
    assert [(event["shard"], event["attempt"]) for event in died] == [(1, 1), (1, 2)]
    assert "worker process has died" in died[0]["message"]


@pytest.mark.slow
def test_f02_quarantined_row_is_recorded_and_left_out_by_every_reader(tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=3, prompts=1, poison="p1/0")
    scorers = {
        "reward": PythonCallable(function="scorers:ends_at_poison"),
        "calm": PythonCallable(function="scorers:num_calm"),
        "logp.reference": PythonCallable(function="scorers:constant"),
    }
    options = {"num_actors": 1, "shard_attempts": 1}
    work = Workspace(tmp_path, configured(**options, max_quarantine=1))
    constraints = work.config.constraints
    try:
        scores = score(work, responses, scorers, role="reference on train")
        solution = solve(work, scores, reward="reward", constraints=constraints, beta=1.0)
        preferences = label(work, responses, scores, solution, reward="reward", beta=1.0)
    finally:
        work.close()
    ids = [name for name in responses.table.column("response_id").to_pylist() if name != "p1/0"]
    assert scores.table.column("response_id").to_pylist() == ids
    assert list(scores.info["quarantined"]) == ["p1/0"]
    assert scores.info["quarantined"]["p1/0"].startswith("reward: The actor is dead because")
    column = scores.input("reward")
    assert column.read_json("quarantined-00001.json") == column.info["quarantined"] == scores.info["quarantined"]
    assert verify_run(tmp_path) == (7, [])
    assert events(tmp_path, "quarantined")[0]["row"] == "response 'p1/0'"
    texts = dict(zip(ids, without(responses.table, {"p1/0"}).column("text").to_pylist(), strict=True))
    for row in preferences.table.to_pylist():
        assert row["texts"] == [texts[name] for name in row["response_ids"]]
    num_responses = {row["prompt_id"]: len(row["response_ids"]) for row in preferences.table.to_pylist()}
    assert num_responses == {"p0": 3, "p1": 3, "p2": 4}  # one of p0's is empty
    both = {
        "responses_before": responses,
        "scores_before": scores,
        "responses_after": responses,
        "scores_after": scores,
    }
    shown = chosen_samples(both, ["reward"], {"reward": 0.0}, 3)
    assert len({sample["prompt"] for sample in shown}) == 3
    assert {sample["reference"] for sample in shown} <= set(texts.values())
    work = Workspace(tmp_path, configured(**options))
    try:
        with pytest.raises(DataError, match=r"1 response\(s\) have no score: p1/0; cluster.max_quarantine is 0"):
            score(work, responses, scorers, role="reference on train")
    finally:
        work.close()


@pytest.mark.slow
def test_f17_p4_every_response_has_a_score_or_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    """The same rows, whether the policy was there from the start or the command was given again with it."""
    responses = make_responses(tmp_path, parts=3, prompts=1, poison="p1/0")
    with pytest.raises(DataError, match=r"1 score\(s\) are not finite numbers: p1/0 \(nan\).*on_nonfinite: quarantine"):
        scored(tmp_path, responses, "not_a_number_at_poison", num_actors=1)
    allowed = {"num_actors": 1, "on_nonfinite": "quarantine", "max_quarantine": 1}
    scores = scored(tmp_path, responses, "not_a_number_at_poison", **allowed)
    assert scores.info["quarantined"] == {"p1/0": "r: its score is nan"}
    assert scores.num_rows + len(scores.info["quarantined"]) == responses.num_rows == 12
    assert np.isfinite(values(scores).to_numpy()).all()
    assert any("1 of 12 responses are quarantined" in line for line in (tmp_path / "log.jsonl").read_text().split("\n"))
    other = tmp_path / "other"
    again = scored(other, make_responses(other, parts=3, prompts=1, poison="p1/0"), "not_a_number_at_poison", **allowed)
    assert again.digest == scores.digest


@pytest.mark.slow
def test_f02_row_that_hangs_is_named_too(tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=2, prompts=1, poison="p1/2")
    limits = {"shard_attempts": 1, "min_deadline_s": 10}
    with pytest.raises(EnvironmentProblem, match=r"response 'p1/2' \(row 2 of the shard\) .* hung for \d+ s"):
        scored(tmp_path, responses, "hangs_at_poison", num_actors=1, **limits)


@pytest.mark.slow
def test_f02_shard_whose_halves_go_through_is_a_matter_of_memory(tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=1, prompts=1)
    with pytest.raises(EnvironmentProblem, match=r"shard 0 ended its actor 1 times, its halves end none.*memory"):
        scored(tmp_path, responses, "ends_at_four", num_actors=1, shard_attempts=1)
    assert list(tmp_path.glob("score-*/part-*")) == [], "what was tried to find the row is not kept"


# ------------------------------------------------------------------------------------------------------- F06 hanging


@pytest.mark.slow
def test_f06_actor_that_hangs_is_killed_and_its_shard_done_by_another(tmp_path: Path, monkeypatch) -> None:
    import ray

    ray.shutdown()  # the next actors must see the variable
    monkeypatch.setenv("CAN_DIST_TEST_FOLDER", str(tmp_path))
    responses = make_responses(tmp_path)
    try:
        after = scored(tmp_path / "hung", responses, "stops_its_actor_once", num_actors=1, min_deadline_s=5)
    finally:
        ray.shutdown()
    stopped = int((tmp_path / "stopped").read_text())
    hung = [event for event in events(tmp_path / "hung", "actor died") if "hung for" in event["message"]]
    assert (hung[0]["shard"], hung[0]["attempt"]) == (1, 1)
    assert not psutil.pid_exists(stopped), "the actor that hung was killed"
    assert values(after).equals(values(scored(tmp_path / "calm", responses, "num_words", num_actors=1)))


# -------------------------------------------------------------------------------------------------------- F04 memory


@pytest.mark.slow
def test_f04_actor_killed_by_the_memory_monitor_is_replaced_and_the_reason_told(tmp_path: Path, monkeypatch) -> None:
    import ray

    ray.shutdown()
    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - memory.available / memory.total + 0.08:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    monkeypatch.setenv("CAN_DIST_TEST_FOLDER", str(tmp_path))
    responses = make_responses(tmp_path, parts=2)
    try:
        killed = scored(tmp_path / "killed", responses, "takes_memory_once", num_actors=1, shard_attempts=10)
    finally:
        ray.shutdown()
    assert (tmp_path / "taken").exists()
    told = [event["message"] for event in events(tmp_path / "killed", "actor died")]
    assert any("killed by Ray's memory monitor when it used" in message for message in told), told
    assert any("exceeded threshold" in message for message in told)
    assert values(killed).equals(values(scored(tmp_path / "calm", responses, "num_words", num_actors=1)))


@pytest.mark.slow
def test_f04_successor_of_an_actor_that_took_too_much_memory_makes_smaller_passes(tmp_path: Path, monkeypatch) -> None:
    import ray

    ray.shutdown()
    memory = psutil.virtual_memory()
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - memory.available / memory.total + 0.08:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    responses = make_responses(tmp_path, parts=2)
    try:
        killed = scored(
            tmp_path / "killed", responses, "takes_memory_by_batch", batch_size=4, num_actors=1, shard_attempts=3
        )
    finally:
        ray.shutdown()
    told = [event["message"] for event in events(tmp_path / "killed", "actor died")]
    assert len(told) == 1, told
    assert told[0].endswith("Its successor makes passes of half the size.")
    assert values(killed).equals(values(scored(tmp_path / "calm", responses, "num_words", num_actors=1)))


# --------------------------------------------------------------------------------------------------- F09 wrong models


def with_model(run: Path, responses: Artifact, model: Path, before: Callable[[], object]) -> None:
    """Score with a classifier; ``before`` happens after the driver looked at the model and before the actors do."""

    class Late(Workspace):
        def run_shards(self, *args: Any) -> None:
            before()
            super().run_shards(*args)

    work = Late(run, configured(num_actors=1))
    try:
        score(work, responses, {"r": SequenceClassifier(model=str(model))}, role="reference on train")
    finally:
        work.close()


@pytest.mark.slow
def test_f09_wrong_model_is_named_whether_the_driver_or_the_actor_sees_it(tmp_path: Path) -> None:
    responses = make_responses(tmp_path)
    with pytest.raises(DataError, match=rf"model '{tmp_path}/absent'"):
        with_model(tmp_path / "a", responses, tmp_path / "absent", lambda: None)
    words = ["w1", *(f"p{n}" for n in range(8))]
    causal = make_tiny_lm(tmp_path / "lm", words)
    with pytest.raises(DataError, match=r"lm': its checkpoint is a LlamaForCausalLM, not a sequence classifier"):
        with_model(tmp_path / "b", responses, causal, lambda: None)
    classifier = make_tiny_classifier(tmp_path / "classifier", words)
    with pytest.raises(DataError, match=r"model '.*/classifier': no such directory"):
        with_model(tmp_path / "c", responses, classifier, lambda: shutil.rmtree(classifier))
    assert events(tmp_path / "c", "actor died") == [], "a model that does not open is no reason to replace actors"


# --------------------------------------------------------------------------------------------------------- F10 errors

ERRORS = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, CanDistError)]


@pytest.mark.slow
def test_f10_every_error_arrives_from_an_actor_as_itself(tmp_path: Path) -> None:
    import ray
    from ray.exceptions import RayTaskError

    connect(configured().cluster)

    @ray.remote
    def fail(kind: type[CanDistError]) -> None:
        raise kind("what is wrong, where, and what to do")

    assert len(ERRORS) >= 6
    for kind in ERRORS:
        with pytest.raises(RayTaskError) as caught:
            ray.get(fail.remote(kind))
        arrived = cause_of(caught.value)
        assert type(arrived) is kind
        assert str(arrived) == "what is wrong, where, and what to do"
        assert arrived.exit_code == kind.exit_code
