"""What the driver says of an error that an actor raised, and what an actor keeps open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from can_dist.cluster.actors import ShardWorker, cause_of
from can_dist.errors import EnvironmentProblem
from can_dist.tables.disk import naming


def fill() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def arrived(error: OSError) -> RayTaskError:
    """Return an actor's error as the driver gets it."""
    return RayTaskError(
        "process", "Traceback (most recent call last): ...", cloudpickle.loads(cloudpickle.dumps(error))
    )


def test_full_disk_of_an_actor_is_told_as_the_drivers_own() -> None:
    with pytest.raises(OSError, match="No space left") as refused, naming(Path("/runs/mine/score-ab/part-00003.arrow")):
        fill()
    told = cause_of(arrived(refused.value))
    assert isinstance(told, EnvironmentProblem)
    assert str(told) == (
        "/runs/mine/score-ab/part-00003.arrow: No space left on device. Free space, or give a place on another disk. "
        "Finished work is kept; the same command goes on from it."
    )


def test_error_without_a_path_is_told_as_unexpected() -> None:
    with pytest.raises(OSError, match="No space left") as refused:
        fill()
    told = cause_of(arrived(refused.value))
    assert str(told).startswith("a worker failed with an unexpected error")
    assert "standard output" not in str(told)


@dataclass(frozen=True)
class Job:
    """Work with models of a name; what it loaded is written down."""

    models: str
    shards: list[str]

    def load(self) -> str:
        loads.append(self.models)
        return f"opened {self.models}"

    def process(self, loaded: str, shard: int) -> None:
        self.shards.append(f"{shard}: {loaded}")


loads: list[str] = []


@pytest.mark.parametrize(
    ("num_gpus", "held", "loaded"),
    [(0, 0.05, ["a", "b"]), (0, 0.2, ["a", "b", "a"]), (1, 0.05, ["a", "b", "a"])],
    ids=["little memory", "much memory", "on a GPU"],
)
def test_an_actor_opens_models_once_where_they_take_little(
    num_gpus: float, held: float, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("can_dist.cluster.actors._held", lambda: held)
    monkeypatch.setattr("can_dist.cluster.actors.RowsDone", lambda key: lambda rows: None)
    loads.clear()
    actor, done = ShardWorker(num_gpus), []
    for number, name in enumerate(["a", "a", "b", "a"]):
        actor.run(Job(name, done), number, "work", "key")  # type: ignore[arg-type]
    assert loads == loaded
    assert done == ["0: opened a", "1: opened a", "2: opened b", "3: opened a"]
    assert actor.rest() == held
    actor.run(Job("a", done), 4, "work", "key")  # type: ignore[arg-type]
    assert loads == [*loaded, "a"], "an actor at rest has let go of its models"
