"""What the driver says of an error that an actor raised."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from can_dist.cluster.actors import cause_of
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
