"""What a training is watched by, and what of it makes another training: only what steers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import watched_world as ww

from can_dist.config import Config
from can_dist.config.sections import Train
from can_dist.dual import Demand
from can_dist.errors import ConfigError, NumericalError
from can_dist.stages import train as stage
from can_dist.stages.estimate import lam_of
from can_dist.stages.watch import Watched, steering_inputs, watch_spec
from can_dist.tables.artifacts import Artifact, open_stage
from can_dist.workspace import Workspace

BOTH = ("calm", "short")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ww.Watching:
    return ww.make_watching(tmp_path_factory.mktemp("watch"), constraints=BOTH)


def opened(world: ww.Watching, watched: Watched | None, **train: Any) -> Path:
    """The directory that a training would have; it is opened, and not trained."""
    config: Config = world.config.model_copy(update={"train": Train(**train)})
    work = Workspace(world.root / "run", config)
    try:
        inputs = {"preferences": world.preferences, **steering_inputs(config.train, watched)}
        return stage._open(work, config, {"reference": config.reference}, inputs, ww.tw.BETA, None, "policy").path
    finally:
        work.close()


def test_the_ranks_are_told_of_scores_demands_and_lambda(world: ww.Watching) -> None:
    watched = Watched(world.solution, world.validation)
    spec = watch_spec(watched, world.preferences, Train(), 100)
    assert spec is not None
    assert spec.scores == world.validation.path.resolve()
    assert spec.lam == world.lam
    assert list(spec.demands) == [Demand("calm", 0.6), Demand("short", 0.3)]
    assert spec.steering is None
    assert watch_spec(Watched(world.solution, None), world.preferences, Train(), 100) is None
    assert watch_spec(None, world.preferences, Train(), 100) is None


def test_steering_begins_after_the_first_evaluation_and_ends_before_the_last_step(world: ww.Watching) -> None:
    watched = Watched(world.solution, world.validation)
    for total, steps in ((100, (25, 50, 75)), (101, (25, 50, 75, 100)), (26, (25,))):
        spec = watch_spec(watched, world.preferences, Train(feedback="validation", eval_every=25), total)
        assert spec is not None
        assert spec.steering is not None
        assert spec.steering.steps == steps
        assert spec.steering.step == 0.5
    with pytest.raises(ConfigError, match=re.escape("every train.eval_every = 25 steps, and this training has 25, so")):
        watch_spec(watched, world.preferences, Train(feedback="validation", eval_every=25), 25)


def test_scores_that_say_the_same_cannot_be_steered(tmp_path: Path) -> None:
    world = ww.make_watching(tmp_path, constraints=BOTH, alike=True)
    watched = Watched(world.solution, world.validation)
    assert watch_spec(watched, world.preferences, Train(), 100) is not None
    with pytest.raises(NumericalError, match=r"calm and short say the same .* lambda cannot be steered"):
        watch_spec(watched, world.preferences, Train(feedback="validation"), 100)


def test_what_watches_makes_no_other_training_and_what_steers_does(world: ww.Watching) -> None:
    watched = Watched(world.solution, world.validation)
    plain = opened(world, None)
    assert opened(world, watched, eval_every=3) == plain, "an evaluation changes nothing of the policy"
    assert "feedback" not in (plain / "STAGE.json").read_text(), "trainings of before keep their names"
    steered = opened(world, watched, feedback="validation")
    assert steered != plain
    assert opened(world, watched, feedback="validation", eval_every=3) != steered, "λ moves at other steps"
    assert opened(world, None, feedback="validation") == plain, "a training without a dual has nothing to steer"
    with pytest.raises(
        ConfigError, match=r"train.feedback: there are no validation responses to go by. Give prompts.num_validation"
    ):
        opened(world, Watched(world.solution, None), feedback="validation")


def test_what_can_end_a_training_makes_another_training(world: ww.Watching) -> None:
    watched = Watched(world.solution, world.validation)
    plain = opened(world, watched)
    assert "stop" not in json.loads((plain / "STAGE.json").read_text())["identity"]["train"]
    ended = opened(world, watched, stop="flat")
    assert ended != plain
    assert opened(world, watched, stop="flat", eval_every=3) == ended, "what is only shown does not end it"
    held = json.loads((ended / "STAGE.json").read_text())
    assert held["identity"]["train"]["stop"] == "flat"
    assert held["inputs"].keys() >= {"validation", "solution"}
    with pytest.raises(ConfigError, match=r"train.stop: flat: there are no validation responses to go by. Give"):
        opened(world, Watched(world.solution, None), stop="flat")
    with pytest.raises(ConfigError, match=r"train.stop: flat: nothing watches this training"):
        opened(world, None, stop="flat")


@pytest.mark.parametrize(("batch_size", "every"), [(1, 4), (4, 1), (100, 1)])
def test_three_evaluations_of_an_epoch_can_end_it(world: ww.Watching, batch_size: int, every: int) -> None:
    watched, options = Watched(world.solution, world.validation), {"batch_size": batch_size}
    assert world.preferences.info["splits"]["train"] == 13
    spec = watch_spec(watched, world.preferences, Train(stop="flat", **options), 100)
    assert spec is not None
    assert spec.stop_every == every
    plain = watch_spec(watched, world.preferences, Train(**options), 100)
    assert plain is not None
    assert plain.stop_every is None


def test_lambda_of_a_steered_policy_is_its_last(world: ww.Watching) -> None:
    def policy(name: str, **summary: Any) -> Artifact:
        place = open_stage(world.root / "run", "train", name, {}, {"preferences": world.preferences})
        return place.finished or place.commit(info={"summary": summary})

    assert lam_of(policy("plain"), world.solution) == world.lam
    assert lam_of(policy("steered", lam={"calm": 3.0, "short": 0.5}), world.solution) == {"calm": 3.0, "short": 0.5}
    assert json.loads((world.preferences.path / "MANIFEST.json").read_text())["inputs"].keys() >= {"solution"}
