"""Every finding of the doctor has a real cause here, and its remedy is named."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist.cli.look import doctor, format_findings
from can_dist.config import Cluster, Config, Model, validate_config
from can_dist.doctor import Finding, Severity, examine, filesystem, inputs
from can_dist.doctor import environment as machine
from can_dist.doctor.finding import error, note, ok
from can_dist.doctor.preflight import many_pairs, preflight
from can_dist.doctor.ray_cluster import check_ray, resources
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.modeling.attention import Machine, choose_attention
from can_dist.training import extensions

WORDS = ["w1", "w2", "w3"]
BOUNDS = ["ray[default,train]<2.61,>=2.59", "flash-attn<3,>=2.8; extra == 'gpu'", "colorama; sys_platform == 'win32'"]


def found(findings: list[Finding], what: str) -> Finding:
    """Return the one finding about something."""
    [one] = [finding for finding in findings if finding.subject == what]
    return one


# ------------------------------------------------------------------------------------------------- what is installed


@pytest.mark.parametrize(
    ("versions", "severities"),
    [
        ({"ray": "2.60.0"}, {"packages": Severity.OK}),
        ({"ray": "2.61.0"}, {"ray": Severity.ERROR}),
        ({}, {"ray": Severity.ERROR}),
        ({"ray": "2.60.0", "flash-attn": "2.8.3"}, {"packages": Severity.OK}),
        ({"ray": "2.60.0", "flash-attn": "1.0"}, {"packages": Severity.OK, "flash-attn": Severity.WARNING}),
    ],
    ids=["right", "too new", "absent", "extra", "extra too old"],
)
def test_packages_are_compared_with_their_bounds(versions: dict[str, str], severities: dict[str, Severity]) -> None:
    findings = machine.packages(BOUNDS, versions.get)
    assert {finding.subject: finding.severity for finding in findings} == severities


def test_a_package_outside_its_bounds_is_named_with_both_versions() -> None:
    [finding] = machine.packages(BOUNDS, {"ray": "2.61.0"}.get)
    assert finding.state == "2.61.0, required is <2.61,>=2.59"
    assert finding.remedy == "pip install 'ray<2.61,>=2.59', or run make setup."


def test_what_is_installed_here_is_within_its_bounds() -> None:
    assert len(machine.declared()) > 15
    assert [f for f in machine.packages(machine.declared(), machine.installed_version) if f.severity > 0] == []


def test_gpus_that_the_configuration_asks_for_and_this_machine_lacks(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    [finding] = machine.gpus(configure(world, cluster={"gpus_per_worker": 1}))
    assert finding.severity is Severity.WARNING
    assert "the configuration asks for 1 each" in finding.state
    assert "cluster.gpus_per_worker to 0" in finding.remedy
    assert machine.gpus(configure(world))[0].severity is Severity.NOTE


@pytest.mark.parametrize(
    ("capability", "precision", "gpus", "severity", "told"),
    [
        ((9, 0), "auto", 1, Severity.OK, "CUDA 13.0, bf16"),
        ((9, 0), "auto", 0, Severity.WARNING, "the configuration asks for none, models run in fp32 on the CPU"),
        ((7, 5), "auto", 1, Severity.OK, "fp32: too old for bf16"),
        ((7, 5), "bf16", 1, Severity.ERROR, "fp32: too old for bf16, which the configuration asks for"),
    ],
)
def test_a_gpu_that_is_there(
    capability: tuple[int, int],
    precision: str,
    gpus: int,
    severity: Severity,
    told: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimpleNamespace(name="GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    [finding] = machine.gpus(configure(world, precision=precision, cluster={"gpus_per_worker": gpus}))
    assert finding.severity is severity
    assert told in finding.state


def test_nvidia_driver_without_a_torch_that_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU that torch uses")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    [finding] = machine.gpus(None)
    assert finding.severity is Severity.WARNING
    assert "though nvidia-smi is there" in finding.state


def test_communication_and_attention_are_told() -> None:
    assert machine.communication().state.endswith(("ranks use gloo", "ranks use nccl"))
    finding = machine.attention(machine.attention_here())
    assert finding.state.startswith("scoring and training: attention by sdpa, segment by segment, of torch ")
    assert finding.severity == Severity.OK, "on a CPU nothing is missing"


@pytest.mark.parametrize(
    ("version", "varlen", "flash", "severity", "told"),
    [
        ("2.9.1", None, None, Severity.WARNING, "this torch has no varlen_attn, and flash-attn is not installed"),
        ("2.11.0", {"scale", "window_size"}, None, Severity.NOTE, "attention by varlen_attn of torch 2.11.0"),
        ("2.11.0", {"scale", "window_size"}, "2.8.3", Severity.OK, "attention by flash-attn 2.8.3"),
    ],
)
def test_doctor_says_the_attention_of_a_gpu_and_what_to_install(
    version: str, varlen: set[str] | None, flash: str | None, severity: Severity, told: str
) -> None:
    gpu = Machine("cuda", (9, 0), version, None if varlen is None else frozenset(varlen), flash)
    finding = machine.attention(choose_attention(gpu, torch.bfloat16))
    assert told in finding.state
    assert finding.severity == severity
    if severity == Severity.WARNING:
        assert "Install torch 2.11 or later, or flash-attn: pip install 'can-dist[gpu]'" in finding.remedy


# ---------------------------------------------------------------------------------- F41, S11: compiled extensions


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "extensions"
    (directory / "deepspeed_shm_comm").mkdir(parents=True)
    directory.chmod(0o700)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(directory))
    return directory


def leave_lock(builds: Path, age_s: float) -> Path:
    lock = builds / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (time.time() - age_s,) * 2)
    return lock


def test_f41_stale_build_lock_is_found_with_its_age_and_remedy(builds: Path) -> None:
    lock = leave_lock(builds, 720)
    [finding] = machine.extensions()
    assert finding.severity is Severity.ERROR
    assert f"{lock} (12 min old)" in finding.state
    assert finding.remedy.endswith(f"rm {lock}")


def test_f41_lock_of_torch_itself_left_by_a_killed_build_is_found(builds: Path) -> None:
    """The lock is torch's, and its process is killed while it holds it: no name or place is assumed here."""
    [torch] = importlib.util.find_spec("torch").submodule_search_locations  # type: ignore[union-attr, misc]
    code = (  # the module alone: importing torch takes seconds
        "import sys, time; sys.path.insert(0, sys.argv[1]); from file_baton import FileBaton\n"
        "assert FileBaton(sys.argv[2]).try_acquire(); print('held', flush=True); time.sleep(60)"
    )
    lock = builds / "deepspeed_shm_comm" / "lock"
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"{torch}/utils", str(lock)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    os.utime(lock, (time.time() - 3600,) * 2)
    assert extensions.stale_locks(extensions.operation_directories(launched=False)) == [], "a slow build holds it"
    process.kill()
    process.communicate()  # closes the pipe too
    assert [lock.path for lock in extensions.stale_locks(extensions.operation_directories(launched=False))] == [lock]


def test_f41_young_lock_is_a_build(builds: Path) -> None:
    leave_lock(builds, 30)
    assert machine.extensions()[0].severity is Severity.OK


def test_f41_preflight_names_a_stale_lock_instead_of_waiting(world: Path, builds: Path) -> None:
    lock = leave_lock(builds, 3600)
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem, match="left its lock, and training would wait for it without end") as caught:
        preflight(configure(world))
    assert f"delete {lock}." in str(caught.value)
    assert time.monotonic() - started < 5
    lock.unlink()
    preflight(configure(world))


@pytest.mark.parametrize(
    ("label", "told"),
    [
        ({"labels": "sampled"}, "17,920 pairs, and each response is trained 7 times per epoch"),
        ({"pairs_per_prompt": 16}, "10,240 pairs, and each response is trained 4 times per epoch"),
        ({"pairs_per_prompt": 8}, None),
        ({}, None),
        ({"labels": "listwise"}, None),
    ],
)
def test_an_explosion_of_pairs_is_said_before_it_is_paid(world: Path, label: dict[str, Any], told: str | None) -> None:
    prompts: Any = SimpleNamespace(info={"counts": {"train": 640}})
    notes = many_pairs(configure(world, label=label, generate={"num_responses": 8}), prompts)
    assert notes == [] if told is None else told in notes[0]


def test_s11_extensions_that_every_user_may_write_are_refused(world: Path, builds: Path) -> None:
    builds.chmod(0o777)
    [finding] = machine.extensions()
    assert finding.severity is Severity.ERROR
    assert finding.state == f"{builds} is writable by every user of this machine"
    assert finding.remedy.startswith(f"Run 'chmod -R go-w {builds}'")
    with pytest.raises(EnvironmentProblem, match=f"{builds}: is writable by every user of this machine"):
        preflight(configure(world))


def test_s11_compiled_code_that_the_group_may_write_is_refused(builds: Path) -> None:
    compiled = builds / "deepspeed_shm_comm" / "op.so"
    compiled.touch()
    compiled.chmod(0o664)
    assert extensions.unsafe_below(builds) is None  # nobody else can enter
    builds.chmod(0o755)
    assert extensions.unsafe_below(builds) == (compiled, f"is writable by its group (id {os.getgid()})")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_s11_extensions_of_another_user_are_refused(builds: Path) -> None:
    os.chown(builds, 12345, -1)
    assert extensions.unsafe_reason(builds) == "belongs to another user (id 12345)"


def test_launched_ranks_compile_elsewhere_than_those_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    here, of_torch = f"py{sys.version_info.major}{sys.version_info.minor}", tmp_path / ".cache" / "torch_extensions"
    lock = of_torch / f"{here}_cpu" / "fused_adam" / "lock"
    others = [of_torch / "py39_cpu" / "fused_adam" / "lock", of_torch / f"{here}_cpu" / "their_kernel" / "lock"]
    for path in (lock, *others):  # of another Python, and of another project
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, 0))
    own = extensions.extensions_directory()
    assert own.parent == tmp_path / ".cache" / "can_dist" / "torch_extensions"
    assert own.name.startswith(f"{here}-torch")
    launched = extensions.operation_directories(launched=True)
    assert [stale.path for stale in extensions.stale_locks(launched)] == [lock]
    assert extensions.stale_locks(extensions.operation_directories(launched=False)) == []


# -------------------------------------------------------------------------------------------------------------- Ray


def test_ray_is_not_started_where_no_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [finding] = check_ray(Cluster())
    assert finding.severity is Severity.OK
    assert "starts a local Ray" in finding.state


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "127.0.0.1:1: nothing answers"),
        ("somewhere", "somewhere: expected host:port"),
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is the address of a job server"),
    ],
)
def test_ray_address_that_leads_nowhere_is_an_error_at_once(address: str, text: str) -> None:
    started = time.monotonic()
    [finding] = check_ray(Cluster(address=address))
    assert finding.severity is Severity.ERROR
    assert finding.state.startswith(text)
    assert time.monotonic() - started < 5


def test_resources_that_the_cluster_lacks_are_listed() -> None:
    cluster = Cluster(num_actors=4, cpus_per_actor=2, num_workers=2, gpus_per_worker=1)
    finding = resources(cluster, {"CPU": 6.0})
    assert finding.severity is Severity.WARNING
    assert "cluster.num_actors = 4 with 2 CPU each, the cluster has 6 CPU" in finding.state
    assert "cluster.num_workers = 2 with 1 GPU each, the cluster has 0 GPU" in finding.state
    assert resources(cluster, {"CPU": 8.0, "GPU": 2.0}).severity is Severity.OK


# ------------------------------------------------------------------------------------------------------- file system


def test_a_good_file_system_and_nothing_left_behind(tmp_path: Path) -> None:
    run = tmp_path / "not" / "there" / "yet"
    findings = filesystem.check_filesystem(run, 1000, clean=False)
    assert {finding.subject for finding in findings} == {"rename", "hard link", "lock", "free space"}
    assert {finding.severity for finding in findings} == {Severity.OK}
    assert list(tmp_path.iterdir()) == []


def test_run_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    [finding] = filesystem.check_filesystem(tmp_path / "run", None, clean=False)
    assert (finding.severity, finding.state) == (Severity.ERROR, f"{tmp_path / 'run'} is a file")


def test_run_directory_that_cannot_be_written() -> None:
    [finding] = filesystem.check_filesystem(Path("/proc/can-dist"), None, clean=False)
    assert finding.severity is Severity.ERROR
    assert finding.state.startswith("/proc cannot be written: ")


def refuse(*_: Any) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


def test_storage_without_links_is_a_note_and_without_locks_an_error(tmp_path: Path) -> None:
    assert filesystem.links(tmp_path, refuse).severity is Severity.NOTE
    assert filesystem.locks(tmp_path, refuse).severity is Severity.ERROR
    both = filesystem.locks(tmp_path, lambda *_: None)
    assert both.severity is Severity.WARNING
    assert "two processes could hold this run directory" in both.state


def test_rename_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", refuse)
    finding = filesystem.replaces_atomically(tmp_path)
    assert (finding.severity, finding.state) == (Severity.ERROR, "fails: Operation not supported")


def test_free_space_is_compared_with_the_plan(tmp_path: Path) -> None:
    short = filesystem.space(10**9, 5 * 10**9, tmp_path)
    assert short.severity is Severity.ERROR
    assert short.state == f"1.0 GB at {tmp_path}; checkpoints and policy need about 5.0 GB"
    assert filesystem.space(10**9, None, tmp_path).severity is Severity.NOTE


def test_space_that_is_needed_follows_from_the_models_parameters(world: Path) -> None:
    from safetensors.torch import load_file

    numbers = sum(tensor.numel() for tensor in load_file(world / "lm" / "model.safetensors").values())
    assert inputs.needed_bytes(configure(world)) == numbers * (3 * 16 + 4)
    assert inputs.needed_bytes(configure(world, train={"lora": {}})) == numbers * 4
    assert inputs.needed_bytes(configure(world, reference={"model": "owner/on-the-hub"})) is None


def test_run_lock_of_a_dead_and_of_a_living_process(tmp_path: Path) -> None:
    host = os.uname().nodename
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / ".owner").write_text(f"process {child.pid} on {host} since 2100-01-01 10:00:00\n")
    [dead] = filesystem.held(tmp_path)
    assert dead.state.endswith("which is gone")
    (tmp_path / ".owner").write_text(f"process {os.getpid()} on {host} since 2100-01-01 10:00:00\n")
    [alive] = filesystem.held(tmp_path)
    assert alive.state == f"held by process {os.getpid()} on {host} since 2100-01-01 10:00:00"


def test_f25_clean_removes_old_temporary_files_of_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = run / "score-0123456789abcdef"
    stage.mkdir(parents=True)
    outside = tmp_path / "outside"
    old = [run / ".tmp-a", stage / ".tmp-b"]
    kept = [stage / ".tmp-young", stage / "part-00000.arrow", stage / "tmp-c", run / "notes.txt", outside]
    for path in [*old, *kept]:
        path.write_text("x")
        os.utime(path, (0, 0))
    os.utime(stage / ".tmp-young")
    (run / ".tmp-directory").mkdir()
    (stage / ".tmp-link").symlink_to(outside)
    [young, warned] = filesystem.leftovers(run, clean=False)
    assert young.state == "1 younger than a day, perhaps being written"
    assert warned.severity is Severity.WARNING
    assert warned.state.startswith("2 older than a day")
    assert f"can-dist doctor --run {run} --clean" in warned.remedy
    assert all(path.exists() for path in [*old, *kept])
    filesystem.leftovers(run, clean=True)
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in [*kept, run / ".tmp-directory", stage / ".tmp-link"])


# ------------------------------------------------------------------------------------------------- models and data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_tiny_lm(folder / "lm", WORDS)
    make_tiny_classifier(folder / "classifier", WORDS)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w1 w2 {i}"}) + "\n" for i in range(9)))
    return folder


def configure(world: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 3, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(world / "lm")},
        "reward": {"model": str(world / "classifier")},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
    }
    return validate_config(raw | changes)


def test_good_inputs_are_all_looked_at(world: Path) -> None:
    findings = inputs.check_inputs(configure(world))
    assert {finding.severity for finding in findings} == {Severity.OK}
    kinds = [finding.subject for finding in findings]
    assert kinds == ["reference", "reward", "prompts", "constraints.calm.scorer", "conversations", "train.ds_config"]
    assert findings[0].state == f"{world / 'lm'}: llama, 8 tokens for 8 embeddings, chat template"


@pytest.fixture
def broken(world: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the language model, to be broken."""
    import shutil

    return Path(shutil.copytree(world / "lm", tmp_path / "broken"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_f23_tokenizer_with_more_tokens_than_embeddings(world: Path, broken: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(broken)
    tokenizer.add_tokens(["more", "tokens"])
    tokenizer.save_pretrained(broken)
    finding = inputs.check_inputs(configure(world, reference={"model": str(broken)}))[0]
    assert finding.severity is Severity.ERROR
    assert finding.state == f"model {str(broken)!r}: its tokenizer has 10 tokens, the model has embeddings for 8"
    assert finding.remedy == "Give the tokenizer that the model was trained with."


def test_f23_special_token_beyond_the_embeddings(world: Path, broken: Path) -> None:
    edit(broken / "config.json", pad_token_id=8)
    finding = inputs.check_inputs(configure(world, reference={"model": str(broken)}))[0]
    assert finding.severity is Severity.ERROR
    assert (
        finding.state
        == f"model {str(broken)!r}: special tokens without an embedding (there are 8): pad_token_id of config.json is 8"
    )


def test_f23_tokenizer_of_another_model_ends_a_command_before_it_starts(world: Path, broken: Path) -> None:
    edit(broken / "config.json", pad_token_id=8)
    with pytest.raises(DataError, match=r"special tokens without an embedding \(there are 8\): pad_token_id"):
        preflight(configure(world, reference={"model": str(broken)}))


def test_f23_stages_refuse_a_tokenizer_of_another_model_whoever_calls_them(world: Path, broken: Path) -> None:
    from can_dist.scoring.kinds import check_scorer_opens
    from can_dist.scoring.protocol import LogProb
    from can_dist.stages.generate import check_prompts_fit
    from can_dist.tables.schemas import PROMPTS

    edit(broken / "config.json", pad_token_id=8)
    model = Model(model=str(broken))
    with pytest.raises(DataError, match="special tokens without an embedding"):
        check_prompts_fit(model, PROMPTS.empty_table(), 1)
    with pytest.raises(DataError, match="special tokens without an embedding"):
        check_scorer_opens(LogProb(model=model))


def test_f23_no_chat_template(world: Path, broken: Path) -> None:
    (broken / "chat_template.jinja").unlink()
    finding = inputs.check_inputs(configure(world, reference={"model": str(broken)}))[0]
    assert finding.severity is Severity.ERROR
    assert finding.state.endswith("its tokenizer has no chat template")
    with_template = {"model": str(broken), "template": "Q: {prompt} A:"}
    assert inputs.check_inputs(configure(world, reference=with_template))[0].severity is Severity.OK


@pytest.mark.parametrize(
    ("key", "value", "what", "text"),
    [
        ("reference", {"model": "./nowhere"}, "reference", "no such directory"),
        ("reward", {"kind": "callable", "function": "no_such:thing"}, "reward", "cannot import 'no_such'"),
        ("prompts", {"source": "./nowhere.jsonl"}, "prompts", "./nowhere.jsonl"),
        ("train", {"ds_config": "./nowhere.json"}, "train.ds_config", "no such file"),
    ],
)
def test_inputs_that_are_missing_are_errors(world: Path, key: str, value: Any, what: str, text: str) -> None:
    finding = found(inputs.check_inputs(configure(world, **{key: value})), what)
    assert finding.severity is Severity.ERROR
    assert text in finding.state


def test_f24_causal_model_as_a_scorer_is_an_error(world: Path) -> None:
    finding = inputs.check_inputs(configure(world, reward={"model": str(world / "lm")}))[1]
    assert finding.severity is Severity.ERROR
    assert "not a sequence classifier" in finding.state


def test_guard_whose_verdict_is_no_token_is_an_error(world: Path) -> None:
    words = {"safe_word": "w1", "unsafe_word": "w2"}
    for unsafe, severity in (("w2", Severity.OK), ("w1 w2", Severity.ERROR)):
        guard = {"kind": "guard", "model": str(world / "lm"), **words, "unsafe_word": unsafe}
        finding = inputs.check_inputs(configure(world, reward=guard))[1]
        assert (finding.subject, finding.severity) == ("reward", severity)


def test_endpoint_without_its_key_is_an_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = {
        "kind": "http",
        "url": "http://localhost:1/classify",
        "model": "m",
        "request": {"input": "{response}"},
        "value": "score",
        "api_key_env": "SCORER_KEY",
    }
    monkeypatch.delenv("SCORER_KEY", raising=False)
    for key, severity in ((None, Severity.ERROR), ("a-key-of-tests", Severity.OK)):
        if key is not None:
            monkeypatch.setenv("SCORER_KEY", key)
        finding = found(inputs.check_inputs(configure(world, reward=endpoint)), "reward")
        assert finding.severity is severity
        assert "a-key-of-tests" not in finding.state


def test_model_directory_without_safetensors(world: Path, broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    finding = inputs.check_inputs(configure(world, reference={"model": str(broken)}))[0]
    assert "no *.safetensors in the directory" in finding.state


# ---------------------------------------------------------------------------------------------------- the command


def test_table_shows_severity_and_remedy_and_counts() -> None:
    text = format_findings([ok("Python", "3.11"), note("GPUs", "none"), error("lock", "held", "Wait.")])
    lines = text.splitlines()
    assert lines[0] == "ok       Python  3.11"
    assert lines[2:] == ["error    lock    held", " " * 17 + "→ Wait.", "1 error, 0 warnings, 1 note"]


def test_exit_code_follows_the_worst_finding(builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    good = CliRunner().invoke(doctor, ["--run", str(tmp_path / "run")])
    assert good.exit_code == 0, good.output
    leave_lock(builds, 3600)
    bad = CliRunner().invoke(doctor, ["--run", str(tmp_path / "run")])
    assert bad.exit_code == 6
    assert "1 error, " in bad.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--clean"], "Give --run DIR."), (["--set", "beta=1"], "Give --config FILE.")],
)
def test_options_that_need_another(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(doctor, arguments)
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception).endswith(message)


def test_examine_looks_at_everything(world: Path, builds: Path, tmp_path: Path) -> None:
    findings = examine(tmp_path, configure(world))
    kinds = {finding.subject for finding in findings}
    assert {"Python", "packages", "GPUs", "communication", "attention", "compiled extensions", "Ray"} <= kinds
    assert {"rename", "lock", "free space", "reference", "reward", "prompts"} <= kinds
