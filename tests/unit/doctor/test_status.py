"""``can-dist status``: what it reads from runs that go on, ended, failed, or were killed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from can_dist.cli.look import status as status_command
from can_dist.config import Config, validate_config
from can_dist.doctor.status import format_status, read_status
from can_dist.errors import DataError
from can_dist.run import Run
from can_dist.tables.artifacts import open_stage, write_json
from can_dist.workspace import Workspace, read_events, read_owner

NOW = 1_000_000.0


def configuration(folder: Path) -> Config:
    return validate_config(
        {
            "prompts": {"source": str(folder / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(folder / "lm")},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory as its process leaves it, without any stage."""
    work = Workspace(tmp_path / "run", configuration(tmp_path))
    work.close()
    (tmp_path / "run" / "log.jsonl").unlink()
    return tmp_path / "run"


def write_log(run: Path, *events: dict[str, Any]) -> None:
    with (run / "log.jsonl").open("a") as log:
        for event in events:
            log.write(json.dumps({"time": NOW - 100, **event}) + "\n")


def make_stage(run: Path, name: str, *, parts: int = 0, finished: bool = False) -> Path:
    directory = run / name
    directory.mkdir()
    (directory / "STAGE.json").write_text("{}")
    for part in range(parts):
        (directory / f"part-{part:05d}.arrow").touch()
    if finished:
        (directory / "MANIFEST.json").write_text("{}")
    for path in [*directory.iterdir(), directory]:
        os.utime(path, (NOW - 7, NOW - 7))
    return directory


def own(run: Path, process: int, host: str | None = None) -> None:
    (run / ".owner").write_text(f"process {process} on {host or socket.gethostname()} since 2100-01-01 10:00:00\n")


def dead_process() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def opened(stage: str, label: str = "x", event: str = "opened", **more: Any) -> dict[str, Any]:
    return {"event": event, "stage": stage.rpartition("-")[0], "label": label, "artifact": stage, **more}


BEGAN = {"event": "began", "process": 1, "host": "h", "only_stage": None}
SHARDS = {"event": "shards", "work": "generate (reference on train)", "artifact": "generate-1", "done": 2, "waiting": 8}


def sharded_run(run: Path) -> None:
    """2 shards were there, 3 more were made within 100 s, 5 are left; one actor died."""
    make_stage(run, "prompts-1", finished=True)
    make_stage(run, "generate-1", parts=5)
    write_log(run, BEGAN, opened("prompts-1", "prompts"), opened("generate-1", "reference on train"),
              SHARDS, {"event": "actor died", "work": SHARDS["work"], "shard": 3, "attempt": 1})  # fmt: skip


def test_sharded_stage_in_progress_tells_shards_rate_and_remaining_time(run: Path) -> None:
    sharded_run(run)
    own(run, os.getpid())
    status = read_status(run, NOW)
    prompts, generate, *rest = status["stages"]
    assert prompts == {"stage": "prompts", "label": "prompts", "artifact": "prompts-1", "state": "finished"}
    assert generate == {
        "stage": "generate", "label": "reference on train", "artifact": "generate-1", "state": "in progress",
        "shards_done": 5, "shards_total": 10, "actor_deaths": 1, "starts": 1, "shards_per_minute": 1.8,
        "eta_s": 167, "heartbeat_s": 7.0, "quarantined": 0,
    }  # fmt: skip
    assert [(stage["stage"], stage["state"]) for stage in rest] == [
        (name, "not started") for name in ("score", "solve", "label", "train", "evaluate")
    ]
    assert status["owner"]["alive"] is True
    assert status["next"] == "none: it is running"
    text = format_status(status)
    assert (
        "  in progress  generate (reference on train)  5 of 10 shards, 1.8 a minute, 3 min to go, 1 actor(s) died, "
        in text
    )
    assert text.endswith("last written 7 s ago\n  not started  score\n  not started  solve\n  not started  label\n"
                         "  not started  train\n  not started  evaluate\nnext: none: it is running")  # fmt: skip


def test_after_the_end_it_tells_what_came_out_and_in_which_pages(run: Path) -> None:
    solution, evaluation = (open_stage(run, name, "x", {}, {}) for name in ("solve", "evaluate"))
    judgement = {"objection": "", "lam_known": False}
    write_json(solution.path / "solution.json", {"diagnostics": {"verdict": "On new prompts.", "judgement": judgement}})
    realised = {"mean": 0.5, "low": 0.3, "high": 0.7}
    row = {"name": "calm", "margin": 0.1, "threshold": None, "realised": realised, "verdict": "met"}
    evaluation.commit(info={"constraints": [row]})
    (run / "report.html").touch()
    write_log(run, BEGAN, opened(solution.path.name), opened(evaluation.path.name), {"event": "ended"})
    assert "belief" not in read_status(run, NOW)["outcome"], "it is not finished"
    solution.commit(["solution.json"])
    text = format_status(read_status(run, NOW))
    assert (
        "\nprediction: May be trusted roughly: for what the policy delivers, not for lambda. On new prompts.\n" in text
    )
    assert "\nverdict: calm met: +0.5 [+0.3, +0.7] against a margin of +0.1\n" in text
    assert f"\npages: {run / 'report.html'}\n" in text
    assert text.endswith(f"next: can-dist verify {run}")


def test_after_a_kill_the_stage_is_interrupted_and_the_same_command_is_next(run: Path) -> None:
    sharded_run(run)
    own(run, dead_process())
    status = read_status(run, NOW)
    assert status["owner"]["alive"] is False
    assert [stage["state"] for stage in status["stages"][:2]] == ["finished", "interrupted"]
    assert status["next"] == f"can-dist run {run}/config.yaml --run {run}"
    assert ": gone\n" in format_status(status)
    assert "to go" not in format_status(status)


def test_p4_rows_in_are_rows_scored_and_rows_quarantined(run: Path) -> None:
    """While a stage goes on from its events, afterwards from its manifest."""
    done, going = make_stage(run, "score-1"), make_stage(run, "score-2", parts=5)
    files = [{"file": name, "bytes": 1, "sha256": ""} for name in ("part-00000.arrow", "part-00001.arrow", "x.json")]
    files[0]["rows"], files[1]["rows"] = 3, 4
    manifest = {
        "stage": "score",
        "identity": {},
        "inputs": {},
        "files": files,
        "info": {"quarantined": {"p1/2": "why"}},
    }
    (done / "MANIFEST.json").write_text(json.dumps(manifest))
    work = SHARDS | {"work": "score (calm, x)", "artifact": going.name}
    left_out = {"event": "quarantined", "work": work["work"], "shard": 3, "row": "response 'p9/1'"}
    other = left_out | {"work": "score (reward, x)"}
    write_log(run, BEGAN, opened("score-1", "reward, x"), opened("score-2", "calm, x"), work, left_out, left_out, other)
    own(run, os.getpid())
    first, second, *_ = read_status(run, NOW)["stages"]
    assert (first["rows"], first["quarantined"]) == (7, 1)
    assert second["quarantined"] == 1, "a row that a second session left out again counts once"
    text = format_status(read_status(run, NOW))
    assert "score (reward, x)  7 of 8 rows, 1 quarantined\n" in text
    assert "1 quarantined, last written" in text


def test_first_event_after_a_line_that_was_cut_is_read(run: Path, tmp_path: Path) -> None:
    (run / "log.jsonl").write_text('{"time": 1.0, "event": "began"}\n{"time": 2.0, "ev')
    Workspace(run, configuration(tmp_path)).close()
    assert [event["event"] for event in read_events(run / "log.jsonl")] == ["began", "began"]


def test_owner_on_another_machine_is_not_judged(run: Path) -> None:
    sharded_run(run)
    own(run, 123, "far-away")
    status = read_status(run, NOW)
    assert status["owner"]["alive"] is None
    assert status["stages"][1]["state"] == "in progress"
    assert status["next"].startswith("look on far-away whether process 123 is there")


def test_silent_process_is_to_be_killed(run: Path) -> None:
    sharded_run(run)
    own(run, os.getpid())
    assert read_status(run, NOW + 3600)["next"].startswith(f"kill {os.getpid()}  # nothing was written for 3607 s; ")


def test_training_tells_step_checkpoint_and_remaining_time(run: Path) -> None:
    train = make_stage(run, "train-1")
    (train / "metrics.jsonl").write_text(
        '{"step": 0, "loss": 0.6931}\n{"step": 4, "loss": 0.6}\n{"step": 4, "resumed_from": 4}\n'
        '{"step": 9, "loss": 0.5}\n{"step": 9, "eval_loss": 0.6}\n{"step": 10, "lo'
    )
    for step in (4, 8):
        (train / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (train / "checkpoints" / "step-000004" / "COMMIT.json").write_text("{}")
    write_log(run, BEGAN, opened("train-1", "policy"), opened("train-1", "policy", "started", ranks=2, steps=20))
    own(run, os.getpid())
    stage = read_status(run, NOW)["stages"][0]
    assert (stage["step"], stage["steps_total"], stage["loss"]) == (9, 20, 0.5)
    assert stage["checkpoint"] == "step-000004", "the newer one was never committed"
    assert stage["eta_s"] == 220, "5 steps since it went on, in 100 s; 11 are left"
    assert "step 9 of 20, loss 0.5000, checkpoint step-000004" in format_status(read_status(run, NOW))


def test_finished_run_is_to_be_verified(run: Path) -> None:
    for name in ("train-1", "evaluate-1"):
        make_stage(run, name, finished=True)
    write_log(run, BEGAN, opened("train-1", "policy", "reused"), opened("evaluate-1"),
              opened("evaluate-1", "x", "done", seconds=12.3), {"event": "ended"})  # fmt: skip
    status = read_status(run, NOW)
    assert [stage["state"] for stage in status["stages"]] == ["finished", "finished"]
    assert status["stages"][1]["seconds"] == 12.3
    assert (status["owner"], status["last_error"]) == (None, None)
    assert status["next"] == f"can-dist verify {run}"


def test_run_that_ended_before_its_evaluation_goes_on_with_it(run: Path) -> None:
    make_stage(run, "label-1", finished=True)
    write_log(run, BEGAN, opened("label-1"), {"event": "ended"})
    assert read_status(run, NOW)["next"] == f"can-dist run {run}/config.yaml --run {run}"


def test_only_the_newest_session_counts(run: Path) -> None:
    for name in ("solve-1", "solve-2"):
        make_stage(run, name, finished=True)
    failed = {"event": "failed", "error": "InfeasibleConstraint", "message": "no"}
    write_log(run, BEGAN, opened("solve-1"), failed)
    assert read_status(run, NOW)["last_error"]["error"] == "InfeasibleConstraint"
    write_log(run, BEGAN, opened("solve-2"))
    status = read_status(run, NOW)
    assert status["stages"][0]["artifact"] == "solve-2"
    assert status["last_error"] is None


def test_error_of_a_run_is_logged_and_told(tmp_path: Path) -> None:
    with pytest.raises(DataError), Run(tmp_path / "run", configuration(tmp_path)) as run:
        run.prompts()
    status = read_status(tmp_path / "run")
    assert status["last_error"]["error"] == "DataError"
    assert "prompts.jsonl: no such file" in status["last_error"]["message"]
    assert "DataError: " in format_status(status)


def test_reading_a_status_changes_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    with Run(tmp_path / "run", configuration(tmp_path)):
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        assert read_status(tmp_path / "run")["owner"]["process"] == os.getpid()
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert read_owner(tmp_path / "run") is None


def test_cut_line_of_the_log_is_left_out(run: Path) -> None:
    write_log(run, BEGAN)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"time": 1, "ev')
    assert [event["event"] for event in read_events(run / "log.jsonl")] == ["began"]


def test_command_prints_json_and_refuses_what_is_no_run(run: Path) -> None:
    write_log(run, BEGAN)
    printed = CliRunner().invoke(status_command, [str(run), "--json"])
    assert json.loads(printed.output)["method"] == "mocan"
    refused = CliRunner().invoke(status_command, [str(run / "nowhere")])
    assert isinstance(refused.exception, DataError)
    assert str(refused.exception).startswith(f"{run}/nowhere: holds no run (log.jsonl is missing).")


def test_time_is_the_wall_clock_by_default(run: Path) -> None:
    make_stage(run, "solve-1")
    os.utime(run / "solve-1")
    os.utime(run / "solve-1" / "STAGE.json")
    write_log(run, {**BEGAN, "time": time.time()}, opened("solve-1"))
    assert read_status(run)["stages"][0]["heartbeat_s"] < 60


@pytest.mark.parametrize(
    "line",
    [
        '{"time": 1.0, "event": "failed", "error": "DataError"}',
        '{"time": "soon", "event": "failed", "error": "DataError", "message": "m"}',
        '{"time": 1e300, "event": "failed", "error": "DataError", "message": "m"}',
        '{"event": "ended"}',
        '{"time": 1.0, "event": "shards", "artifact": "generate-1", "work": "w", "done": "0", "waiting": 4}',
        '{"time": 1.0, "event": "started", "artifact": "../../train-1"}',
        '{"time": 1.0, "event": "done", "artifact": "generate-1", "seconds": null}',
        "[" * 100_000,
    ],
)
def test_an_event_that_lost_a_field_is_no_event(tmp_path: Path, line: str) -> None:
    (tmp_path / "log.jsonl").write_text('{"time": 1.0, "event": "began"}\n' + line + "\n")
    assert [event["event"] for event in read_events(tmp_path / "log.jsonl")] == ["began"]
    assert "next: " in format_status(read_status(tmp_path))


POINTS = [{"calm": 0.1}, {"calm": 5.0}, {"calm": 0.2}]


def sweep_point(number: int, *events: dict[str, Any]) -> list[dict[str, Any]]:
    return [BEGAN, {"event": "sweep", "point": number, "points": POINTS}, *events]


REFUSED = {"event": "failed", "error": "InfeasibleConstraint", "message": "no policy can.\n  What can be had: ..."}
WHOLE_SWEEP = [
    *sweep_point(1, opened("prompts-1", "prompts"), {"event": "ended"}),
    *sweep_point(2, opened("solve-1"), REFUSED),
]


def test_a_sweep_tells_of_every_margin_and_of_its_page(run: Path) -> None:
    """As issue 23 saw it: the last margin's refusal was the last error, and `can-dist run` the advice."""
    evaluation = open_stage(run, "evaluate", "x", {}, {})
    row = {"name": "calm", "margin": 0.2, "threshold": None, "verdict": "met"}
    evaluation.commit(info={"constraints": [row | {"realised": {"mean": 0.5, "low": 0.3, "high": 0.7}}]})
    write_log(run, BEGAN, REFUSED, BEGAN, {"event": "ended"}, *WHOLE_SWEEP)  # other commands came before
    write_log(run, *sweep_point(3, opened(evaluation.path.name), {"event": "ended"}))
    (run / "sweep.html").touch()
    write_json(run / "sweep.json", {"points": [{"name": f"calm {margin['calm']:+g}"} for margin in POINTS]})
    status = read_status(run, NOW)
    assert (status["last_error"], status["outcome"]) == (None, {})
    text = format_status(status)
    assert "  finished     calm +0.1\n  no policy    calm +5    InfeasibleConstraint: no policy can.\n" in text
    assert "  finished     calm +0.2  calm met: +0.5 [+0.3, +0.7] against a margin of +0.2\n" in text
    assert f"\npage of all margins: {run / 'sweep.html'}\nnext: can-dist verify {run}" in text
    assert "not started" not in text
    assert "interrupted" not in text, "the solution that cannot be had is no work left over"


def test_an_interrupted_sweep_names_its_own_command(run: Path) -> None:
    write_log(run, *WHOLE_SWEEP, *sweep_point(3, {"event": "failed", "error": "Interrupted", "message": "stopped"}))
    (run / "sweep.html").touch()
    write_json(run / "sweep.json", {"points": [{"name": "calm +0.9"}]})
    status = read_status(run, NOW)
    assert [point["state"] for point in status["sweep"]["points"]] == ["finished", "no policy", "interrupted"]
    assert status["sweep"]["page"] is None, "the page is of another sweep"
    assert status["last_error"]["error"] == "Interrupted"
    assert status["next"] == f"can-dist sweep {run}/config.yaml --run {run} --margin calm=0.1,5,0.2"


def test_a_sweep_that_goes_on_tells_what_is_to_come(run: Path) -> None:
    write_log(run, *sweep_point(1, {"event": "ended"}), *sweep_point(2))
    own(run, os.getpid())
    status = read_status(run, NOW)
    assert [point["state"] for point in status["sweep"]["points"]] == ["finished", "in progress", "not started"]
    assert status["next"] == "none: it is running"


def test_a_sweep_of_margins_that_cannot_be_had_advises_nothing(run: Path) -> None:
    write_log(run, *(event for number in (1, 2, 3) for event in sweep_point(number, REFUSED)))
    assert read_status(run, NOW)["next"] == "none: these margins cannot be had, for the reasons above"


@pytest.mark.parametrize("points", [[], [1], [{"calm": "much"}]])
def test_a_damaged_event_of_a_sweep_is_no_sweep(run: Path, points: list[Any]) -> None:
    write_log(run, BEGAN, {"event": "sweep", "point": 1, "points": points}, {"event": "ended"})
    assert read_status(run, NOW)["sweep"] is None


def test_a_run_after_a_sweep_is_a_run(run: Path) -> None:
    write_log(run, *WHOLE_SWEEP, BEGAN, {"event": "ended"})
    assert read_status(run, NOW)["sweep"] is None
