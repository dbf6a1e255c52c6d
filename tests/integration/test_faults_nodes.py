"""Two nodes on real raylets: who works where, and what the loss of a node costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray_head import ray_head
from scored_world import configured, events, make_responses, scored
from small_run import small_run

from can_dist.cluster.connection import connect
from can_dist.config import Config, PythonCallable, validate_config
from can_dist.errors import EnvironmentProblem
from can_dist.pipeline import run_method
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.verify import verify_run
from can_dist.workspace import Workspace

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without CPUs, so no place for an actor, and two nodes with two CPUs and what Ray takes for a GPU each."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setenv("CAN_DIST_TEST_FOLDER", str(tmp_path))
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(2):
            cluster.add_node(num_cpus=2, num_gpus=1)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_placement_actors_on_both_nodes_have_the_resources_that_the_config_names(nodes: Any, tmp_path: Path) -> None:
    import ray

    responses = make_responses(tmp_path, parts=6)
    scored(tmp_path, responses, "tells_where", address=nodes.address, num_actors=2, cpus_per_actor=1.5)
    told = [json.loads(path.read_text()) for path in tmp_path.glob("where-*.json")]
    assert len(told) == 6
    assert {entry["node"] for entry in told} == {node.node_id for node in nodes.worker_nodes}
    for entry in told:
        assert {key: amount for key, amount in entry["resources"].items() if key == "CPU"} == {"CPU": 1.5}
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU") == 4, "the stage gave its CPUs back"


class Placements(threading.Thread):
    """Notes, several times a second, on which nodes the actors of each class live."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.nodes: dict[str, set[str]] = {}

    def run(self) -> None:
        import ray
        from ray._private.state import actors

        while not self.over.wait(0.3):
            if ray.is_initialized():
                for actor in actors(actor_state_name="ALIVE").values():
                    self.nodes.setdefault(actor["ActorClassName"], set()).add(actor["Address"]["NodeID"])


def on_nodes(nodes: Any, folder: Path, **cluster: Any) -> Config:
    """The configuration of a whole run of two actors and two ranks on the nodes."""
    where = {"address": nodes.address, "num_actors": 2, "num_workers": 2, **cluster}
    return validate_config(small_run(folder, cluster=where))


def test_placement_stages_hand_all_cpus_of_two_nodes_to_each_other(nodes: Any, tmp_path: Path) -> None:
    """Actors and ranks each ask for every CPU; a third rank has no place, which is told instead of waited for."""
    every = {"cpus_per_actor": 2, "cpus_per_worker": 2}
    placements = Placements()
    placements.start()
    told = r"waiting for 3 x \{'CPU': 2.0\}; the cluster has \{'CPU': 4.0.*_s = 3 s. Lower cluster.num_workers"
    try:
        with pytest.raises(EnvironmentProblem, match=told):
            run_method(tmp_path / "run", on_nodes(nodes, tmp_path, **every, num_workers=3, wait_resources_s=3))
        run_method(tmp_path / "run", on_nodes(nodes, tmp_path, **every))
    finally:
        placements.over.set()
        placements.join()
    both = {node.node_id for node in nodes.worker_nodes}
    assert placements.nodes["ShardWorker"] == both
    assert placements.nodes["RayTrainWorker"] == both
    assert verify_run(tmp_path / "run")[1] == []
    stages = [event["stage"] for event in events(tmp_path / "run", "done")]
    assert (stages.count("train"), stages[-1]) == (1, "evaluate")


def test_placement_actors_hand_the_gpus_to_the_ranks(nodes: Any, tmp_path: Path) -> None:
    """Every GPU that Ray counts: actors of two stages take and leave them, and NCCL is the first to miss real ones."""
    gpus = {"gpus_per_actor": 1, "gpus_per_worker": 1, "wait_resources_s": 20}
    placements = Placements()
    placements.start()
    try:
        config = on_nodes(nodes, tmp_path, **gpus).model_copy(update={"precision": "fp32"})
        with pytest.raises(EnvironmentProblem, match="NCCL"):
            run_method(tmp_path / "run", config)
    finally:
        placements.over.set()
        placements.join()
    assert placements.nodes["ShardWorker"] == placements.nodes["RayTrainWorker"]
    assert len(placements.nodes["RayTrainWorker"]) == 2
    stages = [event["stage"] for event in events(tmp_path / "run", "done")]
    assert {"generate", "score", "solve", "label"} <= set(stages)


def losing_nodes(
    nodes: Any, run: Path, responses: Artifact, afterwards: Callable[[], None], *, num: int, **cluster: Any
) -> Artifact:
    """Score slowly on both nodes, kill ``num`` of them as soon as the first part is there, and do something more.

    The scoring has the thread: Ray starts nodes in the main thread only (it sets a signal handler).
    """
    work = Workspace(run, configured(address=nodes.address, num_actors=2, cpus_per_actor=2, **cluster))
    connect(work.config.cluster)
    slow = {"r": PythonCallable(function="scorers:slow")}
    try:
        with ThreadPoolExecutor(1) as thread:
            scoring = thread.submit(score, work, responses, slow, role="reference on train")
            wait_until(lambda: scoring.done() or bool(list(run.glob("score-*/part-*.arrow"))))
            for node in list(nodes.worker_nodes)[:num]:
                nodes.remove_node(node, allow_graceful=False)
            afterwards()
            return scoring.result(timeout=240)
    finally:
        work.close()


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline, "waited for two minutes"
        time.sleep(0.05)


def test_f03_shards_of_a_lost_node_are_done_by_the_other(nodes: Any, tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=8)
    undisturbed = scored(tmp_path / "undisturbed", responses, "slow", address=nodes.address, num_actors=2)
    after = losing_nodes(nodes, tmp_path / "run", responses, lambda: None, num=1)
    assert after.digest == undisturbed.digest
    assert events(tmp_path / "run", "actor died")


def test_f03_shards_of_lost_nodes_wait_for_a_new_one(nodes: Any, tmp_path: Path) -> None:
    responses = make_responses(tmp_path, parts=8)
    undisturbed = scored(tmp_path / "undisturbed", responses, "slow", address=nodes.address, num_actors=2)
    run = tmp_path / "run"

    def add_when_it_waits() -> None:
        wait_until(lambda: bool(events(run, "waiting")))
        nodes.add_node(num_cpus=4)

    after = losing_nodes(nodes, run, responses, add_when_it_waits, num=2)
    assert after.digest == undisturbed.digest
    waited = events(run, "waiting")
    assert waited[0]["message"].startswith("waiting for 2 x {'CPU': 2.0}; the cluster has {'CPU': 0.0, 'GPU': 0.0}")


def test_f03_lost_nodes_that_do_not_come_back_are_waited_for_as_long_as_the_config_says(
    nodes: Any, tmp_path: Path
) -> None:
    responses = make_responses(tmp_path, parts=8)
    told = r"waiting for 2 x \{'CPU': 2.0\}; the cluster has \{'CPU': 0.0.*Gave up after cluster.wait_resources_s = 8 s"
    with pytest.raises(EnvironmentProblem, match=told):
        losing_nodes(nodes, tmp_path / "run", responses, lambda: None, num=2, wait_resources_s=8)
    assert list((tmp_path / "run").glob("score-*/part-*.arrow")), "finished shards are kept"


DRIVER = """
import sys
from pathlib import Path
from scored_world import scored
from can_dist.tables.artifacts import load_artifact

run = Path(sys.argv[1])
scored(run, load_artifact(next(run.glob("generate-*"))), "slow", num_actors=1, address=sys.argv[2])
"""


def test_f11_job_whose_head_is_lost_ends_and_the_same_command_goes_on_with_another_cluster(tmp_path: Path) -> None:
    run, calm = tmp_path / "run", tmp_path / "calm"
    for directory in (run, calm):
        make_responses(directory, parts=12, prompts=1)

    def start(directory: Path, head: Any) -> subprocess.Popen:
        """A driver in a process of its own: what Ray does to a driver without a head, it does to the process."""
        command = [sys.executable, "-c", DRIVER, str(directory), head.address]
        return subprocess.Popen(command, env={**os.environ, **head.environment}, stderr=subprocess.PIPE, text=True)

    with ray_head({}) as head:
        driver = start(run, head)
        wait_until(lambda: driver.poll() is not None or len(list(run.glob("score-*/part-*.arrow"))) >= 3)
        head.kill()
        began = time.monotonic()
        _, said = driver.communicate(timeout=300)
        seconds = time.monotonic() - began
        print(f"the driver ended {seconds:.0f} s after its head, with {driver.returncode}:\n{said[-700:]}")
    assert driver.returncode != 0
    kept = {path: path.stat().st_mtime_ns for path in run.glob("score-*/part-*.arrow")}
    assert 3 <= len(kept) < 12
    with ray_head({}) as other:
        for directory in (run, calm):
            driver = start(directory, other)
            _, said = driver.communicate(timeout=300)
            assert driver.returncode == 0, said
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards are not scored again"
    digests = [load_artifact(next(directory.glob("scores-*"))).digest for directory in (run, calm)]
    assert digests[0] == digests[1]
