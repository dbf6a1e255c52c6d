"""One training, other strengths and margins: what is written, what is said of it, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from trained_run import BETA, TABLE, TrainedRun, assert_weights

from can_dist.cli import cli
from can_dist.dual import Margin, solve_dual
from can_dist.errors import ConfigError, DataError, InfeasibleConstraint
from can_dist.outcomes.export import export_policy
from can_dist.outcomes.stretch import export_strength
from can_dist.stages.strength import strengthen
from can_dist.training import ADAPTER


@pytest.fixture
def world(tmp_path: Path) -> TrainedRun:
    return TrainedRun(tmp_path)


def test_a_margin_becomes_the_strength_that_meets_it(world: TrainedRun, tmp_path: Path) -> None:
    policy = world.train()
    world.estimate(policy, 0.25)
    found = export_strength(world.run, tmp_path / "out", margins={"": 0.3})
    assert found.alpha == pytest.approx(1.2)
    assert_weights(tmp_path / "out", world.weights_at(policy, 1.2))
    expected, far, frontier = found.sentences
    assert expected == "a +0.3, reward +0.12, KL 0.144 nats by the linear law, not measured"
    assert far == "0.60 times the margin of a it was trained for (+0.5)"
    solution = solve_dual(
        TABLE["reward"].to_numpy(), TABLE["a"].to_numpy(), TABLE["prompt_id"].to_numpy(),
        beta=BETA, constraints=[Margin("a", margin=0.3)],
    )  # fmt: skip
    reward, kl = solution.predicted["reward_improvement"], solution.predicted["kl"]
    assert frontier == f"at these gains the dual's frontier has reward {reward:+.3g}, KL {kl:.3g} nats"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"This policy was not evaluated: expected is {expected}" in card
    assert "| strength | 1.2 times what was trained |" in card


def test_strength_of_a_run_that_has_one_counts_from_the_training(world: TrainedRun, tmp_path: Path) -> None:
    policy = world.train()
    strengthen(world.work, policy, world.reference, world.solution, world.estimate(policy, 0.25))
    found = export_strength(world.run, tmp_path / "out", strength=1.3)
    assert found.alpha == 1.3
    assert_weights(tmp_path / "out", world.weights_at(policy, 1.3))


def test_margin_by_name_and_a_name_that_is_no_constraint(world: TrainedRun, tmp_path: Path) -> None:
    world.estimate(world.train(), 0.25)
    assert export_strength(world.run, tmp_path / "out", margins={"a": 0.25}).alpha == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"no constraint of the run\. Its constraints: a"):
        export_strength(world.run, tmp_path / "other", margins={"b": 0.25})


@pytest.mark.parametrize(("strength", "margins"), [(1.3, {"": 0.3}), (None, {}), (None, None)])
def test_strength_and_margin_are_two_ways_to_say_one_thing(
    world: TrainedRun, tmp_path: Path, strength: float | None, margins: dict[str, float] | None
) -> None:
    with pytest.raises(ConfigError, match="expected one of them, since a margin sets the strength"):
        export_strength(world.run, tmp_path / "out", strength=strength, margins=margins)


def test_margin_that_nothing_attains_is_refused(world: TrainedRun, tmp_path: Path) -> None:
    world.estimate(world.train(), 0.25)
    with pytest.raises(InfeasibleConstraint, match="attainable"):
        export_strength(world.run, tmp_path / "out", margins={"": 9.0})
    assert not (tmp_path / "out").exists()


def test_run_without_an_estimate_says_how_to_get_one(world: TrainedRun, tmp_path: Path) -> None:
    policy = world.train()
    with pytest.raises(DataError, match=rf"Run 'can-dist estimate {policy.path}' first"):
        export_strength(world.run, tmp_path / "out", strength=1.3)


def test_reference_that_changed_is_refused(world: TrainedRun, tmp_path: Path) -> None:
    world.estimate(world.train(), 0.25)
    path = tmp_path / "lm" / "model.safetensors"
    weights = load_file(path)
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"its weights are not those that .* was trained from"):
        export_strength(world.run, tmp_path / "out", strength=1.3)


def test_quantised_base_can_be_scaled_in_its_adapter_alone(world: TrainedRun, tmp_path: Path) -> None:
    policy = world.train(lora={"r": 8, "quantize": "nf4"})
    world.estimate(policy, 0.25)
    with pytest.raises(DataError, match="Its adapter can be: 'can-dist export adapter RUN --strength A'"):
        export_strength(world.run, tmp_path / "out", strength=1.5)
    found = export_strength(world.run, tmp_path / "out", strength=1.5, adapter=True)
    assert '"lora_alpha": 24' in (found.path / "adapter_config.json").read_text()
    assert '"lora_alpha": 16' in (policy.path / ADAPTER / "adapter_config.json").read_text()


def test_command_prints_what_is_expected_and_the_directory(world: TrainedRun, tmp_path: Path) -> None:
    world.estimate(world.train(), 0.25)
    arguments = ["export", "policy", str(world.run), "--out", str(tmp_path / "out"), "--margin", "0.3"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(tmp_path / "out")]
    assert "can-dist: strength 1.2\n" in result.stderr
    assert "0.60 times the margin of a" in result.stderr


def test_command_refuses_a_margin_that_is_no_number(world: TrainedRun, tmp_path: Path) -> None:
    world.estimate(world.train(), 0.25)
    arguments = ["export", "policy", str(world.run), "--out", str(tmp_path / "out"), "--margin", "a=much"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "--margin a=much: expected a number, or NAME=number" in str(result.exception)


@pytest.mark.parametrize("way", ["as trained", "as trained, in other files", "stronger"])
def test_files_that_no_manifest_lists_do_not_leave(world: TrainedRun, tmp_path: Path, way: str) -> None:
    policy = world.train()
    world.estimate(policy, 0.25)
    secret = tmp_path / "secret"
    secret.write_text("sk-canary")
    for name in (".env", "notes.pkl", "tokenizer_backup.json"):
        (policy.path / "policy" / name).write_text("sk-canary")
    (policy.path / "policy" / "tokenizer.model").symlink_to(secret)
    if way == "stronger":
        export_strength(world.run, tmp_path / "out", strength=1.3)
    else:
        export_policy(world.run, tmp_path / "out", adapter=False, max_shard_mb=None if way == "as trained" else 1)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"config.json", "README.md"}
    assert not [path for path in written if path.is_symlink() or b"sk-canary" in path.read_bytes()]
