"""Faults of training, on real ranks: two gloo processes under ZeRO-3, killed, stopped, or with damaged files."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import train_world as tw
from safetensors.torch import load_file, save_file

from can_dist.config import Model
from can_dist.config.sections import Generate
from can_dist.errors import DataError
from can_dist.scoring.log_prob import LogProbScorer
from can_dist.scoring.protocol import LogProb
from can_dist.stages.generate import GenerateJob
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import PROMPTS

pytestmark = pytest.mark.slow
LORA = {"r": 2, "alpha": 8, "dropout": 0.1}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tw.World:
    return tw.make_world(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(world: tw.World) -> str:
    spec = world.spec("undisturbed", checkpoint_every=2)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    return spec


@pytest.fixture(scope="module")
def killed(world: tw.World) -> Path:
    """The directory of a training of two ranks that committed steps 2 and 4 and was killed in step 5."""
    spec = world.spec("killed", checkpoint_every=2)
    assert tw.launch(spec, hook="kill:1:4").codes[1] == -9
    return tw.policy_dir(spec).parent


def copied(world: tw.World, killed: Path, name: str) -> str:
    """Another training in the same state."""
    shutil.copytree(killed, world.root / name)
    return world.spec(name, checkpoint_every=2)


def checkpoint(spec: str, step: int) -> Path:
    return tw.policy_dir(spec).parent / "checkpoints" / f"step-{step:06d}"


def committed(spec: str) -> list[str]:
    return sorted(path.parent.name for path in checkpoint(spec, 0).parent.glob("*/COMMIT.json"))


def assert_ends_like(outcome: tw.Outcome, spec: str, undisturbed: str) -> None:
    """The bytes of the policy, and every metric, are those of a training that nothing disturbed."""
    assert set(outcome.codes) == {0}, outcome.output
    assert tw.policy_bytes(spec) == tw.policy_bytes(undisturbed)
    for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        assert tw.read_metrics(spec, key) == tw.read_metrics(undisturbed, key)


def assert_same_trajectory(spec: str, undisturbed: str) -> None:
    """The same steps up to the order in which ranks add numbers up."""
    for key in ("loss", "grad_norm", "eval_loss"):
        assert tw.read_metrics(spec, key) == pytest.approx(tw.read_metrics(undisturbed, key), rel=1e-4)
    assert tw.read_metrics(spec, "learning_rate") == tw.read_metrics(undisturbed, "learning_rate")
    found, expected = (tw.load_whole(tw.policy_dir(one)).state_dict() for one in (spec, undisturbed))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-3)


def test_f37_two_ranks_go_on_as_one_from_the_same_state(world: tw.World, undisturbed: str, killed: Path) -> None:
    alone, both = copied(world, killed, "two-to-one"), copied(world, killed, "two-to-two")
    outcome = tw.launch(alone, num_ranks=1, hook=f"states:{world.root}/alone")
    assert outcome.codes == [0], outcome.output
    assert "step-000004 was written by 2 rank(s) and is converted for 1" in outcome.output
    assert "going on from checkpoint step-000004" in outcome.output
    assert_same_trajectory(alone, undisturbed)
    assert_ends_like(tw.launch(both, hook=f"states:{world.root}/both"), both, undisturbed)
    found, expected = load_file(world.root / "alone"), load_file(world.root / "both")
    assert found.keys() == expected.keys()
    for name, state in expected.items():
        assert torch.equal(found[name], state), f"{name}: not the same bits after the conversion"
        assert name.endswith("weight") or state.abs().max() > 0


def test_f37_one_rank_goes_on_as_two(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("one-to-two", checkpoint_every=2)
    assert tw.launch(spec, num_ranks=1, hook="kill:0:4").codes == [-9]
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    assert "step-000004 was written by 1 rank(s) and is converted for 2" in outcome.output
    assert_same_trajectory(spec, undisturbed)
    assert not (checkpoint(spec, 0).parent / "universal").exists()


def test_f37_adapters_go_on_with_another_number_of_ranks(world: tw.World) -> None:
    options = {"lora": {**LORA, "dropout": 0.0}, "learning_rate": 2e-2, "checkpoint_every": 2}
    whole, spec = world.spec("lora-whole", **options), world.spec("lora-two-to-one", **options)
    assert tw.launch(whole).codes == [0, 0]
    assert tw.launch(spec, hook="kill:1:4").codes[1] == -9
    outcome = tw.launch(spec, num_ranks=1)
    assert outcome.codes == [0], outcome.output
    assert "is converted for 1" in outcome.output
    assert_same_trajectory(spec, whole)


def test_f35_rank_killed_inside_its_file_of_a_checkpoint(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("torn", checkpoint_every=2)
    assert tw.launch(spec, hook="kill_writing:1:4").codes[1] == -9
    torn = [file for file in checkpoint(spec, 4).rglob("*optim_states*") if file.stat().st_size]
    assert torn, "the kill must leave something that could be taken for a checkpoint"
    assert committed(spec) == ["step-000002"]
    outcome = tw.launch(spec)
    assert "checkpoint step-000004 is not whole and is passed over: its COMMIT.json is missing" in outcome.output
    assert "going on from checkpoint step-000002" in outcome.output
    assert_ends_like(outcome, spec, undisturbed)


def write_prompts(run: Path) -> Artifact:
    stage = open_stage(run, "prompts", "one", {}, {})
    row = {"prompt_id": "p", "messages": [{"role": "user", "content": "w1"}], "split": "test"}
    write_part(stage.path, 0, pa.Table.from_pylist([row], schema=PROMPTS))
    return stage.commit()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path) -> None:
    """Exchange the files of the two ranks: each of them is whole."""
    other = path.with_name(path.name.replace("pp_rank_0_", "pp_rank_1_"))
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "changed since it was committed"),
        (flip, "changed since it was committed"),
        (Path.unlink, "is missing"),
        (swap, "changed since it was committed"),
    ],
    ids=["truncated", "flipped", "deleted", "swapped"],
)
def test_f36_damaged_checkpoint_is_passed_over_by_all_ranks(
    world: tw.World, undisturbed: str, killed: Path, damage: object, message: str
) -> None:
    spec = copied(world, killed, damage.__name__)
    file = next(checkpoint(spec, 4).rglob("*pp_rank_0_*optim_states.pt"))
    damage(file)
    outcome = tw.launch(spec)
    name = file.relative_to(checkpoint(spec, 4))
    assert f"checkpoint step-000004 is not whole and is passed over: state/{name.name} {message}" in outcome.output
    assert "going on from checkpoint step-000002" in outcome.output
    assert_ends_like(outcome, spec, undisturbed)


def test_f36_training_does_not_start_over_when_every_checkpoint_is_damaged(world: tw.World, killed: Path) -> None:
    spec = copied(world, killed, "all-damaged")
    flip(checkpoint(spec, 4) / "COMMIT.json")
    truncate(next(checkpoint(spec, 2).rglob("*pp_rank_1_*optim_states.pt")))
    outcome = tw.launch(spec)
    assert outcome.codes == [3, 3], outcome.output
    directory = checkpoint(spec, 2).parent
    assert (
        f"DataError: {directory}: every checkpoint is damaged (step-000004: its COMMIT.json is damaged"
        in outcome.output
    )
    assert f"delete {directory} to train from the start" in outcome.output


def test_f32_rank_that_hangs_is_named_with_its_last_step(world: tw.World, undisturbed: str) -> None:
    """One that is stopped as by SIGSTOP and gives no sign, and one that is alive and does something else."""
    spec = world.spec("frozen", checkpoint_every=2, hang_timeout_s=20)
    outcome = tw.launch(spec, hook="freeze:1:5", timeout=100)
    assert outcome.codes == [6, -9], outcome.output
    assert "training made no progress for cluster.hang_timeout_s = 20 s. rank 1 (process " in outcome.output
    assert "step 5, update, in " in outcome.output
    assert "gave no sign of life since then" in outcome.output
    assert "The others wait, at step 6, pass 1 of" in outcome.output
    assert outcome.seconds < 80
    asleep = tw.launch(spec, hook="sleep:0:5", timeout=100)
    assert asleep.codes == [6, 6], asleep.output
    assert "rank 0 (process " in asleep.output
    assert "step 5, update, in engine.py:" in asleep.output
    assert "> train_world.py:" in asleep.output
    assert "it is behind the others" in asleep.output
    assert_ends_like(tw.launch(spec), spec, undisturbed)


def test_f34_disk_that_fills_during_a_checkpoint_costs_no_committed_one(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("full", checkpoint_every=2)
    outcome = tw.launch(spec, hook="file_size:1:4:3000")
    assert outcome.codes == [6, 6], outcome.output
    assert "EnvironmentProblem: on rank 1 only: " in outcome.output
    assert "optim_states.pt: could not be written (" in outcome.output
    assert "MB are free there. Free space; the same command goes on from step-000002." in outcome.output
    assert [path.name for path in checkpoint(spec, 0).parent.iterdir()] == ["step-000002"]
    assert_ends_like(tw.launch(spec), spec, undisturbed)


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A file system of 100 kB at ``directory``; the test is skipped where none may be mounted."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k,mode=700", "tmpfs", directory], check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


def test_f34_disk_without_room_for_a_checkpoint_is_told_before_writing(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("small-disk", checkpoint_every=2)
    directory = checkpoint(spec, 0).parent
    directory.mkdir()
    with small_disk(directory):
        outcome = tw.launch(spec)
        assert outcome.codes == [6, 6], outcome.output
        assert f"EnvironmentProblem: on rank 0 only: {directory}: a checkpoint needs up to " in outcome.output
        assert "MB, 0.1 MB are free. Free space; the same command goes on from the start." in outcome.output
        assert not list(directory.iterdir())
    assert_ends_like(tw.launch(spec), spec, undisturbed)


@pytest.mark.parametrize(
    ("lora", "file", "told"),
    [
        (None, "model.safetensors", "policy/model.safetensors"),
        (None, "tokenizer.json", "policy"),
        (LORA, "adapter_model.safetensors", "adapter"),
    ],
    ids=["weights", "tokenizer", "adapter"],
)
def test_f34_disk_that_fills_during_the_export_leaves_no_policy(
    world: tw.World, undisturbed: str, lora: dict | None, file: str, told: str
) -> None:
    spec = world.spec(f"full-{file}", checkpoint_every=2, lora=lora)
    outcome = tw.launch(spec, hook=f"export_size:{file}:1000")
    assert outcome.codes == [6, 6], outcome.output
    directory = tw.policy_dir(spec).parent
    assert f"EnvironmentProblem: on rank 0 only: {directory / told}: could not be written (" in outcome.output
    assert "MB are free there. Free space; the same command goes on from step-000004." in outcome.output
    assert not list(directory.glob("policy")) + list(directory.glob("adapter")) + list(directory.glob("summary.json"))
    assert committed(spec) == ["step-000002", "step-000004"]
    again = tw.launch(spec)
    assert again.codes == [0, 0], again.output
    if lora is None:
        assert_ends_like(again, spec, undisturbed)


def test_f34_disk_without_room_for_the_policy_is_told_before_writing(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("small-disk-export", checkpoint_every=100)
    directory = tw.policy_dir(spec).parent
    with small_disk(directory):
        outcome = tw.launch(spec)
        assert outcome.codes == [6, 6], outcome.output
        assert f"EnvironmentProblem: on rank 0 only: {directory}/policy: the policy takes 0." in outcome.output
        assert "MB are free. Free space; the same command goes on from the start." in outcome.output
    assert_ends_like(tw.launch(spec), spec, undisturbed)


@pytest.mark.parametrize("step", [1, 4])
def test_f40_sigterm_to_one_rank_commits_and_exits_75(world: tw.World, undisturbed: str, step: int) -> None:
    spec = world.spec(f"term-{step}", checkpoint_every=100)
    outcome = tw.launch(spec, hook=f"term:1:{step}")
    assert outcome.codes == [75, 75], outcome.output
    done = step + 1
    assert f"Interrupted: stopped by a signal; step {done} is committed, run again to continue." in outcome.output
    assert committed(spec) == [f"step-{done:06d}"]
    assert max(tw.read_metrics(spec)) == done
    assert_ends_like(tw.launch(spec), spec, undisturbed)


def test_f45_kill_during_the_export_leaves_no_policy_that_counts(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("export", checkpoint_every=2)
    outcome = tw.launch(spec, hook="kill_export")
    assert outcome.codes[0] == -9
    assert not (tw.policy_dir(spec).parent / "summary.json").exists(), "the stage has nothing to commit"
    (tw.policy_dir(spec) / "model-00001-of-00002.safetensors").write_bytes(b"left by the attempt before")
    assert_ends_like(tw.launch(spec), spec, undisturbed)


def swap_tensors(file: Path) -> None:
    """Exchange a weight of the two layers: names, shapes and numbers are those of the policy."""
    tensors = load_file(file)
    one, other = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    save_file(tensors | {one: tensors[other], other: tensors[one]}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_f45_policy_that_is_not_the_function_that_was_trained_is_refused_by_its_readers(
    world: tw.World, lora: dict | None
) -> None:
    name = "probe-lora" if lora else "probe"
    spec = world.spec(name, lora=lora, learning_rate=2e-2)
    assert tw.launch(spec).codes == [0, 0]
    policy = tw.policy_dir(spec)
    prompts = write_prompts(world.root / f"{name}-run")
    options = Generate(num_responses=1, max_new_tokens=4)
    job = GenerateJob(Model(model=str(policy)), options, 0, "fp32", "test", prompts.path, world.root, "its digest")

    def score() -> None:
        LogProbScorer(LogProb(model=job.model), "fp32")

    for read in (job.load, score):
        read()
    if lora:  # adapters left out
        shutil.copy(world.reference / "model.safetensors", policy / "model.safetensors")
    else:
        swap_tensors(policy / "model.safetensors")
    for read in (job.load, score):
        with pytest.raises(
            DataError, match="not the policy that was trained: its log-probabilities of 4 responses are "
        ):
            read()


def test_f42_rank_with_other_preferences_is_named_before_training(world: tw.World) -> None:
    """The same path, as on a disk of each node, with another content."""
    spec = world.spec("other-preferences")
    other = tw.write_preferences(world.root, world.rows[:-2])
    outcome = tw.launch(spec, hook=f"preferences:{other.path}")
    assert outcome.codes == [6, 6], outcome.output
    assert "EnvironmentProblem: rank(s) [1] were started with another content of " in outcome.output
    assert "Start all ranks with the same command, on the same files." in outcome.output


def test_f43_ranks_that_cannot_meet_say_so(world: tw.World) -> None:
    """A port in use, a rank that is missing, and two that have the same number."""
    spec = world.spec("strangers", hang_timeout_s=5)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        taken = tw.launch(spec, hook="lonely", port=busy.getsockname()[1], timeout=60)
    assert taken.codes == [6, 6], taken.output
    assert "EADDRINUSE" in taken.output
    twins = tw.launch(spec, hook="twin", timeout=60)
    assert twins.codes == [6, 6], twins.output
    for outcome in (taken, twins):
        assert "the ranks did not find each other ({'RANK': '0', 'WORLD_SIZE': '2', 'MASTER_ADDR'" in outcome.output
        assert "each RANK once, on a port that is free." in outcome.output
