"""The crash-point sweep: kill at every change of the run directory, run again, compare with an undisturbed run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import pytest
from forked import digests, forked
from ray_head import ray_head
from scored_world import configured, events, make_responses, scored
from tiny import make_tiny_lm

from can_dist.config import Config, PythonCallable, validate_config
from can_dist.doctor.status import read_status
from can_dist.run import Run
from can_dist.stages.score import score
from can_dist.tables.artifacts import load_artifact
from can_dist.workspace import Workspace

CRASHFS = Path(__file__).parents[1] / "helpers" / "faults" / "crashfs"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def sweep(work: Callable[[Path], None], where: Path, before: Callable[[Path], object] = Path.mkdir) -> int:
    """Kill at every change, look, run again, compare; returns the number of changes.

    ``before`` makes the run directory with what is there before the first command.
    """
    clean, log = where / "clean", where / "log"
    before(clean)
    changes = forked(work, clean, log, 0)
    undisturbed = digests(clean)
    for at in range(1, len(changes) + 1):
        run = where / f"killed-{at}"
        before(run)
        forked(work, run, log, at)
        assert digests(run).items() <= undisturbed.items(), changes[at - 1]
        if (run / "log.jsonl").is_file():
            read_status(run)
        forked(work, run, log, 0)
        assert digests(run) == undisturbed, changes[at - 1]
        assert not list(run.glob("*/.tmp-*")), changes[at - 1]
        shutil.rmtree(run)
    return len(changes)


# ------------------------------------------------------------------------------------------- stages on the driver alone

WORDS = [f"w{i}" for i in range(12)]


def brought(where: Path) -> Config:
    """Responses from a file, scores from the cache: all stages up to the preferences, without Ray."""
    scorer = {"kind": "callable", "function": "scorers:num_words"}
    calm = {"kind": "callable", "function": "scorers:num_calm"}
    return validate_config(
        {
            "prompts": {"source": str(where / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(where / "lm")},
            "beta": 1.0,
            "reward": scorer,
            "constraints": {"calm": {"scorer": calm, "margin": 0.05}},
            "generate": {"num_responses": 3, "responses": {"source": str(where / "responses.jsonl")}},
            "cluster": {"score_cache": True, "num_actors": 1},
        }
    )


def driver_stages(run: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(run.parent / "cache")
    config = brought(run.parent)
    with Run(run, config) as bound:
        prompts = bound.prompts()
        responses = bound.generate(config.reference, prompts)
        scores = bound.score(responses, config.reward, config.constraints, config.reference)
        solution = bound.solve(scores, config.constraints, config.beta)
        bound.label(responses, scores, solution, config.beta)


def test_crash_points_of_the_stages_that_run_on_the_driver(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)
    prompts = [f"w{i} w{i + 1}" for i in range(6)]
    texts = [{"prompt": p, "responses": [f"{p} w1", "w3", f"w{i} w1 w1"]} for i, p in enumerate(prompts)]
    for name, rows in (("prompts", [{"prompt": p} for p in prompts]), ("responses", texts)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    forked(driver_stages, tmp_path / "fills-the-cache", tmp_path / "log", 0)
    places = sweep(driver_stages, tmp_path)
    print(f"crash points: {places}")
    assert places > 150


# ------------------------------------------------------------------------------------------------- scoring, on Ray

SCORERS = {"r": PythonCallable(function="scorers:num_words")}


@pytest.fixture(scope="module")
def head() -> Iterator[Mapping[str, str]]:
    """A cluster that all the drivers of a sweep find; returns what they need in their environment."""
    with ray_head({}) as started:
        yield {**started.environment, "RAY_ADDRESS": started.address}


def scoring(run: Path) -> None:
    """The driver of a scoring stage on the cluster of ``head``; the responses are there already."""
    os.environ.update(json.loads((run.parent / "environment.json").read_text()))
    work = Workspace(run, configured(num_actors=1))
    try:
        score(work, load_artifact(next(run.glob("generate-*"))), SCORERS, role="reference on train")
    finally:
        work.close()


def test_crash_points_of_the_driver_of_a_scoring_stage(head: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(json.dumps(dict(head)))
    places = sweep(scoring, tmp_path, partial(make_responses, parts=2, prompts=1))
    print(f"crash points: {places}")
    assert places > 50


def test_crash_points_of_the_actors_of_a_scoring_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actor k dies at its k-th change, until one lives long enough to do the rest; no second command is given."""
    import ray

    responses = make_responses(tmp_path / "run", parts=10, prompts=1)
    undisturbed = scored(tmp_path / "calm", make_responses(tmp_path / "calm", parts=10, prompts=1), "num_words")
    ray.shutdown()  # the next actors must see the variables
    logs = tmp_path / "logs"
    logs.mkdir()
    monkeypatch.setenv("CRASHFS_DIRECTORY", str(tmp_path / "run"))
    monkeypatch.setenv("CRASHFS_LOGS", str(logs))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(CRASHFS), os.environ["PYTHONPATH"]]))
    try:
        disturbed = scored(tmp_path / "run", responses, "num_words", num_actors=1, shard_attempts=100)
    finally:
        ray.shutdown()
    *died, _ = ((logs / str(n)).read_text().splitlines() for n in range(1, len(list(logs.iterdir())) + 1))
    assert [len(changes) for changes in died] == list(range(1, len(died) + 1))
    assert len(events(tmp_path / "run", "actor died")) == len(died)
    renamed = next(n for n, change in enumerate(died[-1]) if change.endswith(".arrow"))
    print(f"crash points: {len(died)}, of a part: {[change.split()[0] for change in died[-1][: renamed + 3]]}")
    assert len(died) > renamed + 3, "some actor died after every change of a whole part"
    assert disturbed.digest == undisturbed.digest
    assert digests(tmp_path / "run").items() >= {disturbed.path.name: disturbed.digest}.items()
