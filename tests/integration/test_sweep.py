"""``can-dist sweep``: real models, Ray, two ranks; one margin of three cannot be had, and the others go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from people_run import can_dist
from small_run import small_run, write_config

pytestmark = pytest.mark.slow  # two trainings
NAME = "calm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_config(folder / "my.yaml", small_run(folder))
    return folder


def test_margins_share_what_is_equal_and_the_page_says_which_cannot_be_had(folder: Path) -> None:
    command = ("sweep", "my.yaml", "--run", "run", "--margin")
    done = can_dist(folder, *command, f"{NAME}=0.05,50,0.1")
    assert done.returncode == 9, done.stderr
    first, refused, second, page = done.stdout.splitlines()
    assert page == "run/sweep.html"
    assert first.startswith(f"{NAME} +0.05: {NAME} ")
    assert second.startswith(f"{NAME} +0.1: {NAME} ")
    assert refused.startswith(f"{NAME} +50: no policy: ")
    assert "1 of 3 margins have no policy" in done.stderr
    points = json.loads((folder / "run" / "sweep.json").read_text())["points"]
    assert [point["refusal"] is None for point in points] == [True, False, True]
    assert points[1]["refusal"]["kind"] == "InfeasibleConstraint"
    assert all((folder / "run" / point["report"]).is_file() for point in points if point["refusal"] is None)
    counts = {stage: len(list((folder / "run").glob(f"{stage}-*/manifest.json"))) for stage in ("generate", "train")}
    assert counts == {"generate": 4, "train": 2}, "the reference's on both splits once, and each policy's"
    again = can_dist(folder, *command, f"{NAME}=0.05,0.1")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[0] == first
    assert ": started" not in again.stderr, "all of it is reused"


def test_margins_that_none_can_have_end_with_their_own_error(folder: Path) -> None:
    done = can_dist(folder, "sweep", "my.yaml", "--run", "run", "--margin", f"{NAME}=50,60")
    assert done.returncode == 4, done.stderr
    assert "no policy supported on this table" in done.stderr
