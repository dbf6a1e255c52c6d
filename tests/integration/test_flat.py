"""A training that ends when it is flat: two gloo ranks under ZeRO-3, killed and resumed, and one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_world as tw
import watched_world as ww

from can_dist.dual.flat import Best

pytestmark = pytest.mark.slow

TOTAL = 24
OPTIONS: dict[str, Any] = {"learning_rate": 2e-2, "schedule": "constant", "checkpoint_every": 2, "eval_every": 100}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ww.Watching:
    return ww.make_watching(tmp_path_factory.mktemp("flat"))


@pytest.fixture(scope="module")
def undisturbed(world: ww.Watching) -> str:
    spec = world.spec("undisturbed", TOTAL, stop="flat", **OPTIONS)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    return spec


def folder_of(spec: str) -> Path:
    return Path(json.loads(spec)["directory"])


def summary_of(spec: str) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder_of(spec) / "summary.json").read_text())
    return summary


def test_it_ends_after_two_evaluations_without_a_rise(world: ww.Watching, undisturbed: str) -> None:
    summary = summary_of(undisturbed)
    done, stopped = summary["num_steps"], summary["stopped"]
    assert stopped["of_steps"] == TOTAL
    assert done < TOTAL, "this training memorises before it ends"
    course = tw.read_metrics(undisturbed, "estimate.reward")
    assert list(course) == list(range(1, done + 1)), "three evaluations an epoch, which has three steps"
    lam = world.lam["calm"]
    reward, gain, kl = (tw.read_metrics(undisturbed, f"estimate.{name}") for name in ("reward", "gain.calm", "kl"))
    height = {0: 0.0} | {step: reward[step] + lam * gain[step] - tw.BETA * kl[step] for step in course}
    best = stopped["best_step"]
    assert done - best >= 2
    assert height[best] > 0, "it rose before"
    # a standard error is at most the spread of what rose; the last two are no clear rise over the best
    assert max(height[done], height[done - 1]) < height[best] * 1.5
    # the same steps without a rule make the same bytes: the last policy is exported
    plain = world.spec("plain", done, **OPTIONS)
    assert tw.launch(plain).codes == [0, 0]
    assert tw.policy_bytes(plain) == tw.policy_bytes(undisturbed)
    assert "stopped" not in summary_of(plain)
    assert summary_of(plain)["num_tokens"] == summary["num_tokens"]


def test_a_killed_training_goes_on_with_its_best_and_ends_with_the_same_bytes(
    world: ww.Watching, undisturbed: str
) -> None:
    spec = world.spec("killed", TOTAL, stop="flat", **OPTIONS)
    done = summary_of(undisturbed)["num_steps"]
    kept = (done - 1) // 2 * 2  # the newest checkpoint before the end
    assert tw.launch(spec, hook=f"kill:1:{done - 1}").codes[1] == -9
    best = Best.from_dict(json.loads((folder_of(spec) / "checkpoints" / f"step-{kept:06d}" / "best.json").read_text()))
    assert best.step <= kept
    assert best.objective_P.shape == (15,)
    resumed = tw.launch(spec)
    assert resumed.codes == [0, 0], resumed.output
    assert f"going on from checkpoint step-{kept:06d}" in resumed.output
    assert tw.policy_bytes(spec) == tw.policy_bytes(undisturbed)
    assert summary_of(spec) == summary_of(undisturbed)


def test_one_rank_ends_at_the_same_step(world: ww.Watching, undisturbed: str) -> None:
    spec = world.spec("alone", TOTAL, stop="flat", **OPTIONS)
    assert tw.launch(spec, num_ranks=1).codes == [0]
    assert summary_of(spec)["stopped"] == summary_of(undisturbed)["stopped"]
    assert summary_of(spec)["num_steps"] == summary_of(undisturbed)["num_steps"]
