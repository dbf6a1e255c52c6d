"""The stage strength on real weights: what it chooses, writes, says and refuses; who follows the policy through it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trained_run import TrainedRun, assert_weights

from can_dist.config import Config, StrengthChoice, validate_config
from can_dist.config.base import identity
from can_dist.errors import CanDistError, ConfigError, DataError, InfeasibleConstraint
from can_dist.outcomes.export import find_policy
from can_dist.stages.estimate import lam_of, trained_policy
from can_dist.stages.report import lineage_of
from can_dist.stages.solve import demands
from can_dist.stages.strength import STRENGTH, check, strengthen
from can_dist.tables.artifacts import Artifact, open_stage
from can_dist.training import ADAPTER, POLICY


def strengthened(world: TrainedRun, policy: Artifact, *gains: float, **numbers: Any) -> Artifact:
    estimate = world.estimate(policy, *gains, **numbers)
    return strengthen(world.work, policy, world.reference, world.solution, estimate)


def test_the_strength_that_meets_the_margin_is_written(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path)
    policy = world.train()
    found = strengthened(world, policy, 0.25)
    assert found.stage == "strength"
    assert found.info["alpha"] == pytest.approx(2.0)
    assert_weights(found.path / POLICY, world.weights_at(policy, 2.0))
    record = found.read_json(STRENGTH)
    assert (record["limiting"], record["predicted"]["improvement"]["a"]["mean"]) == ("a", pytest.approx(0.5))
    assert "strength: Stopped short: a went 50% of the way" in world.said()
    assert "strength: 2, which a needs: a +0.5, KL 0.4 expected" in world.said()
    again = strengthened(world, policy, 0.25)
    assert again.digest == found.digest
    assert len(list(world.run.glob("strength-*"))) == 1


def test_a_policy_that_a_kill_left_half_written_is_written_again(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path)
    policy = world.train()
    estimate = world.estimate(policy, 0.25)
    place = open_stage(
        world.run, "strength", "policy", {"alpha": 2.0, "strength": identity(StrengthChoice())},
        {"policy": policy, "estimate": estimate, "solution": world.solution},
    ).path  # fmt: skip
    for half in (place / ".tmp-merge-1" / POLICY, place / POLICY):
        half.mkdir(parents=True)
        (half / "model.safetensors").write_bytes(b"half")
    found = strengthen(world.work, policy, world.reference, world.solution, estimate)
    assert found.path == place
    assert_weights(found.path / POLICY, world.weights_at(policy, 2.0))
    assert not list(place.glob(".tmp-*"))
    found.check()


def test_lineage_and_export_follow_the_policy_through_its_strength(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path)
    policy = world.train()
    found = strengthened(world, policy, 0.25)
    lineage = lineage_of(found, found)
    assert lineage.solution is not None
    assert lineage.solution.digest == world.solution.digest
    assert trained_policy(found).digest == policy.digest
    assert lam_of(found, world.solution) == pytest.approx(lineage.solution.info["lam"])
    assert find_policy(world.run)[0].digest == found.digest, "the training it was made from is no second policy"


@pytest.mark.parametrize(
    ("gains", "numbers", "sections", "kind", "reason"),
    [
        ((-0.1,), {}, {}, InfeasibleConstraint, "its direction is wrong"),
        ((0.01,), {}, {}, DataError, "a validation table of 200 prompts cannot tell it from zero"),
        ((0.25,), {"num_prompts": 20}, {}, DataError, "at least 32 are needed"),
        ((0.25,), {}, {"strength": {"max": 1.5}}, InfeasibleConstraint, "above strength.max = 1.5"),
        ((0.25,), {"kl": 0.3}, {"strength": {"max_kl": 1.0}}, InfeasibleConstraint, "above strength.max_kl = 1"),
    ],
)
def test_refusals_say_why_and_leave_the_policy_as_trained(
    tmp_path: Path,
    gains: tuple[float, ...],
    numbers: dict[str, Any],
    sections: dict[str, Any],
    kind: type[CanDistError],
    reason: str,
) -> None:
    world = TrainedRun(tmp_path, **sections)
    policy = world.train()
    with pytest.raises(kind) as caught:
        strengthened(world, policy, *gains, **numbers)
    assert reason in str(caught.value)
    assert str(caught.value).endswith(
        f"The policy as trained is whole ({policy.path}); --set strength=1 goes on with it."
    )
    policy.check()
    assert not list(world.run.glob("strength-*"))


def test_a_policy_that_needs_none_stays_as_trained(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path, {"margin": -1.0})
    policy = world.train()
    assert strengthened(world, policy, 0.2, lam=0.0).digest == policy.digest
    assert "strength: 1, the policy as trained" in world.said()


@pytest.mark.parametrize(("gain", "warned"), [(0.30, True), (0.47, False), (0.70, False)])
def test_check_says_when_the_law_ended_before_the_margin(tmp_path: Path, gain: float, warned: bool) -> None:
    world = TrainedRun(tmp_path)
    found = strengthened(world, world.train(), 0.25)
    check(world.work, found, world.solution, world.estimate(found, gain))
    sentence = f"at strength 2 a is {gain:+.3g} ± 0.039 where +0.5 is asked: the law of small steps"
    assert (sentence in world.said()) is warned


def test_a_number_is_taken_as_it_is(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path, strength=1.3)
    policy = world.train()
    found = strengthened(world, policy, 0.25)
    assert found.info["alpha"] == 1.3
    assert_weights(found.path / POLICY, world.weights_at(policy, 1.3))


def test_confidence_asks_for_more(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path, strength={"confidence": 0.95})
    found = strengthened(world, world.train(), 0.25)
    assert found.info["alpha"] == pytest.approx(0.5 / (0.25 - 1.6525 * 0.02), rel=1e-3)


def test_a_threshold_is_an_improvement_over_the_mean_that_lambda_was_solved_on(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path, {"threshold": 0.6})
    (demand,) = demands(world.solution)
    centre = world.solution.read_json("solution.json")["centre"]["a"]
    assert demand.margin == pytest.approx(0.6 - centre)
    assert demand.error > 0
    assert strengthened(world, world.train(), 0.25).info["alpha"] == pytest.approx(demand.margin / 0.25)


def test_small_table_says_once_what_it_costs(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path)
    strengthened(world, world.train(), 0.25, num_prompts=64)
    assert world.said().count("64 validation prompts leave the gain of a between") == 1


def test_adapter_is_scaled_beside_the_policy(tmp_path: Path) -> None:
    world = TrainedRun(tmp_path)
    found = strengthened(world, world.train(lora={"r": 8}), 0.25)
    assert json.loads((found.path / ADAPTER / "adapter_config.json").read_text())["lora_alpha"] == 32
    found.check()


# -------------------------------------------------------------------------------------------------------- bad input


def configured(**sections: Any) -> Config:
    scorer = {"kind": "callable", "function": "builtins:len"}
    base = {"prompts": {"source": "p.jsonl"}, "reference": {"model": "lm"}, "reward": scorer}
    return validate_config({**base, "constraints": {"a": {"scorer": scorer, "margin": 1}}, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prompts": {"source": "p.jsonl", "num_validation": 0}}, "prompts.num_validation is 0"),
        ({"generate": {"num_responses": 1}}, "generate.num_responses is 1"),
        ({"train": {"lora": {"quantize": "nf4"}}}, "Its adapter can be scaled"),
        ({"strength": 0}, "strength: expected greater than 0"),
        ({"strength": "much"}, "strength: expected a valid number"),
        ({"strength": {"maximum": 2}}, "strength.maximum: unknown key"),
        (
            {"method": "dpo_s", "strength": 2, "label": {"preferences": {"source": "pairs.jsonl"}}},
            "method dpo_s keeps its policy as trained",
        ),
    ],
)
def test_strengths_that_cannot_be_chosen_are_refused_before_anything_runs(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**sections)
    assert message in str(caught.value)


def test_strength_one_needs_nothing() -> None:
    assert configured(prompts={"source": "p.jsonl", "num_validation": 0}, strength=1).strength == 1.0
    assert configured(strength=1, train={"lora": {"quantize": "nf4"}}).strength == 1.0
    assert configured(method="dpo_s", strength=1, label={"preferences": {"source": "pairs.jsonl"}}).strength == 1.0
