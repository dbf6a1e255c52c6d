"""No code from data, no secret in what is written, nothing outside the run directory: S2 to S11 of SECURITY.md."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from click.testing import CliRunner
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist.cli import cli
from can_dist.config import Model, SequenceClassifier, validate_config
from can_dist.config.sections import Prompts
from can_dist.doctor.preflight import preflight
from can_dist.errors import CanDistError, ConfigError, DataError, EnvironmentProblem
from can_dist.modeling.classifiers import load_sequence_classifier
from can_dist.modeling.loading import load_causal_lm, load_model_config, load_tokenizer, model_digest
from can_dist.run import Run
from can_dist.stages.ingest import ingest_prompts
from can_dist.tables.artifacts import digest_of, file_digest, load_artifact, open_stage
from can_dist.tables.verify import verify_run
from can_dist.training import checkpoints
from can_dist.workspace import Workspace

ROOT = Path(__file__).parents[3]
SECRET = "hf_canary_0f9d8c7b"


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path that nothing may make, and a standard input that nothing may read."""

    class Refusing:
        def readline(self, *_: Any) -> str:
            raise AssertionError("standard input was read")

        read = __iter__ = __next__ = readline

    monkeypatch.setattr(sys, "stdin", Refusing())
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code from data was run"


def test_the_bomb_goes_off_when_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))  # noqa: S301
    assert (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------ S2, S8: what is written


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "prompts": {"source": str(folder / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(folder / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
    } | changes


def write_prompts(folder: Path, **row: str) -> None:
    lines = [json.dumps({"prompt": f"zebracanary {n}", **row}) + "\n" for n in range(6)]
    (folder / "prompts.jsonl").write_text("".join(lines))


def test_s2_values_of_secrets_are_not_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", "wandb-" + SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    config = validate_config(configuration(tmp_path))
    with pytest.raises(DataError), Run(tmp_path / "run", config):
        raise DataError(f"401 for https://user:{SECRET}@hub: false token wandb-{SECRET}")
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "401 for https://user:<HF_TOKEN>@hub: false token" in log
    assert SECRET not in log


def test_s2_no_option_of_any_command_takes_a_secret() -> None:
    options = [name for command in cli.commands.values() for param in command.params for name in param.opts]
    assert len(options) > 30
    # --key-env takes the name of a variable
    assert [name for name in options if re.search("token|secret|password|key", name)] == ["--key-env"]


def test_s8_log_of_a_run_holds_no_prompt(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    work = Workspace(tmp_path / "run", validate_config(configuration(tmp_path)))
    prompts = ingest_prompts(work, work.config.prompts)
    work.close()
    assert "zebracanary" in str(prompts.table.to_pylist())
    assert "zebracanary" not in (tmp_path / "run" / "log.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------- S3: remote code


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_lm(folder / "lm", ["w1", "w2"])
    make_tiny_classifier(folder / "classifier", ["w1", "w2"])
    return folder


def with_code(model: Path, out: Path, marker: Path, model_type: str) -> Path:
    """Copy a model into one that ships code of its own for everything that transformers would load."""
    shutil.copytree(model, out)
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass C: pass\n"
    (out / "evil.py").write_text(code)
    kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
    config = json.loads((out / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {kind: "evil.C" for kind in kinds}}
    (out / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return out


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_s3_code_that_a_model_ships_is_not_run(models: Path, tmp_path: Path, marker: Path, model_type: str) -> None:
    lm = Model(model=str(with_code(models / "lm", tmp_path / "lm", marker, model_type)))
    scorer = with_code(models / "classifier", tmp_path / "classifier", marker, model_type)
    load_tokenizer(lm)
    for load in (
        lambda: load_causal_lm(lm, "fp32"),
        lambda: load_sequence_classifier(SequenceClassifier(model=str(scorer)), "fp32"),
    ):
        if model_type == "llama":  # a known architecture is loaded without the code
            load()
        else:
            with pytest.raises(DataError, match="cannot be loaded as a"):
                load()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "0123abc"])
def test_s3_remote_code_of_the_hub_needs_a_commit(tmp_path: Path, revision: str | None) -> None:
    reference = {"model": "owner/model", "trust_remote_code": True, "revision": revision}
    write_prompts(tmp_path)
    with pytest.raises(ConfigError, match="reference: trust_remote_code runs whatever code 'owner/model'") as caught:
        preflight(validate_config(configuration(tmp_path, reference=reference)))
    assert str(caught.value).endswith("give its 40 hexadecimal digits as revision.")


def test_s3_remote_code_of_a_commit_passes_that_check(tmp_path: Path) -> None:
    reference = {"model": "owner/model", "trust_remote_code": True, "revision": "0123456789" * 4}
    write_prompts(tmp_path)
    with pytest.raises(DataError, match="the hub could not be asked"):
        preflight(validate_config(configuration(tmp_path, reference=reference)))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_s3_code_of_another_repository_is_refused_wherever_a_model_is_opened(
    models: Path, tmp_path: Path, marker: Path, file: str
) -> None:
    directory = with_code(models / "lm", tmp_path / "lm", marker, "llama")
    code = "other/code--evil.C"
    named = {"AutoConfig": code} if file == "config.json" else {"AutoTokenizer": [None, code]}
    content = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(content | {"auto_map": named}))
    model = Model(model=str(directory), trust_remote_code=True)
    openings: list[Callable[[Model], Any]] = [
        load_tokenizer,
        model_digest,
        lambda spec: load_causal_lm(spec, "fp32"),
        lambda spec: load_model_config(spec, "lm"),
    ]
    for opening in openings:
        with pytest.raises(ConfigError, match=r"names 'other/code--evil\.C', code of another repository"):
            opening(model)


def test_s3_code_that_is_run_is_in_the_digest(models: Path, tmp_path: Path, marker: Path) -> None:
    directory = with_code(models / "lm", tmp_path / "lm", marker, "llama")
    plain, trusted = Model(model=str(directory)), Model(model=str(directory), trust_remote_code=True)
    first = model_digest(trusted)
    assert first != model_digest(plain)
    (directory / "inner").mkdir()
    (directory / "inner" / "more.py").write_text("x = 1")
    assert model_digest(trusted) != first


def test_s3_permission_to_run_code_is_given_in_one_place() -> None:
    given = [
        (path.name, ast.unparse(keyword.value))
        for path in sorted((ROOT / "can_dist").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False"
    ]
    assert given == [("loading.py", "source_options(spec)['trust_remote_code']")]


# --------------------------------------------------------------------------------------------------------- S4: pickle


def test_s4_pickled_weights_are_not_loaded(models: Path, tmp_path: Path, marker: Path) -> None:
    bomb = pickle.dumps(Bomb(marker))
    both = Path(shutil.copytree(models / "lm", tmp_path / "both"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pt", "rng_state.pth"):
        (both / name).write_bytes(bomb)
    load_causal_lm(Model(model=str(both)), "fp32")
    only = Path(shutil.copytree(both, tmp_path / "only"))
    (only / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot be loaded as a causal language model"):
        load_causal_lm(Model(model=str(only)), "fp32")


def test_s4_pickled_adapters_beside_the_weights_are_not_loaded(models: Path, tmp_path: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(models / "lm", tmp_path / "adapted"))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "task_type": "CAUSAL_LM", "r": 2,
               "target_modules": ["q_proj"]}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises((CanDistError, pickle.UnpicklingError)):
        load_causal_lm(Model(model=str(folder)), "fp32")


@pytest.mark.parametrize("name", ["prompts.pkl", "prompts.pt", "prompts.jsonl", "prompts.parquet", "prompts.arrow"])
def test_s4_pickled_data_are_not_loaded(tmp_path: Path, marker: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(marker)))
    work = Workspace(tmp_path / "run", validate_config(configuration(tmp_path)))
    with pytest.raises(DataError, match=re.escape(name)):
        ingest_prompts(work, Prompts(source=str(tmp_path / name), num_test=2, num_validation=0))
    work.close()


class Engine:
    """Stands for DeepSpeed, whose ``load_checkpoint`` unpickles."""

    def load_checkpoint(self, directory: str, **_: Any) -> None:
        pickle.loads(next(Path(directory).glob("state/*.pt")).read_bytes())  # noqa: S301


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write_checkpoint(directory: Path, bomb: Bomb, *, committed: bool) -> Path:
    step = directory / "step-000004"
    (step / "state").mkdir(parents=True)
    file = step / "state" / "rank_0.pt"
    file.write_bytes(pickle.dumps("harmless" if committed else "what was committed"))
    commit = {"step": 4, "world_size": 1, "files": {"state/rank_0.pt": file_digest(file)}}
    file.write_bytes(pickle.dumps(bomb))
    if committed:
        commit["files"] = {"state/rank_0.pt": file_digest(file)}
    (step / "COMMIT.json").write_text(json.dumps({**commit, "digest": digest_of(commit)}))
    return step


@pytest.mark.usefixtures("group")
def test_s4_checkpoint_that_was_changed_after_its_commit_is_not_loaded(tmp_path: Path, marker: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", Bomb(marker), committed=False)
    with pytest.raises(DataError, match=r"every checkpoint is damaged .*rank_0.pt changed since it was committed"):
        checkpoints.newest(tmp_path / "checkpoints")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("which", [".", "step-000004", "step-000004/state"])
def test_s4_checkpoint_that_others_can_write_is_not_loaded(tmp_path: Path, marker: Path, which: str) -> None:
    directory = tmp_path / "checkpoints"
    write_checkpoint(directory, Bomb(marker), committed=True)
    (directory / which).chmod(0o777)
    with pytest.raises(
        EnvironmentProblem, match="is writable by every user of this machine, and checkpoints"
    ) as caught:
        checkpoints.newest(directory)
    assert f"chmod -R go-w {directory}" in str(caught.value)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", [".", "step-000004", "step-000004/state", "step-000004/state/rank_0.pt",
                                  "step-000004/COMMIT.json"])  # fmt: skip
def test_s4_checkpoint_that_its_group_can_write_is_not_loaded(tmp_path: Path, marker: Path, name: str) -> None:
    directory = tmp_path / "checkpoints"
    write_checkpoint(directory, Bomb(marker), committed=True)
    path = directory / name
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(EnvironmentProblem, match="is writable by its group"):
        checkpoints.newest(directory)


@pytest.mark.usefixtures("group")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")
def test_s4_checkpoint_file_of_another_user_is_not_loaded(tmp_path: Path, marker: Path) -> None:
    directory = tmp_path / "checkpoints"
    write_checkpoint(directory, Bomb(marker), committed=True)
    os.chown(directory / "step-000004" / "state" / "rank_0.pt", 12345, -1)
    with pytest.raises(EnvironmentProblem, match=r"rank_0\.pt: belongs to another user \(id 12345\)"):
        checkpoints.newest(directory)


@pytest.mark.usefixtures("group")
def test_a_checkpoint_of_ours_is_loaded(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints", Bomb(tmp_path / "executed"), committed=True)
    found = checkpoints.newest(tmp_path / "checkpoints")
    assert found == checkpoints.Checkpoint(tmp_path / "checkpoints" / "step-000004", 4, universal=False)
    checkpoints.load(Engine(), found, adapters_only=False)
    assert (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------- S6: outside the run directory

HOSTILE = ["../../outside", "/tmp/can-dist-outside", "..", "a/../../b", "x\x00y", "$(touch outside)", "~root", "con\n"]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_s6_prompt_ids_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep" / "inside" / "cwd"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    ids = [prompt_id for prompt_id in HOSTILE for _ in range(3)]
    table = {
        "prompt_id": ids,
        "reward": [0.1 * n % 0.7 for n in range(len(ids))],
        "safety": [0.3 * n % 1 for n in range(len(ids))],
    }
    pq.write_table(pa.table(table), "scores.parquet")
    command = "solve --scores scores.parquet --reward reward --constraint safety:margin=0.05 --beta 0.5 --report r.html"
    result = CliRunner().invoke(cli, command.split())
    assert result.exit_code == 0, result.output
    assert everything(tmp_path) == {"deep", "deep/inside", "deep/inside/cwd", *(
        f"deep/inside/cwd/{name}" for name in ("scores.parquet", "r.html"))}  # fmt: skip
    assert not Path("/tmp/can-dist-outside").exists()


def test_s6_ids_of_the_prompts_are_no_paths(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "inside"
    folder.mkdir(parents=True)
    rows = [{"prompt_id": prompt_id, "prompt": f"w{n}"} for n, prompt_id in enumerate(HOSTILE)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    work = Workspace(folder / "run", validate_config(configuration(folder)))
    prompts = ingest_prompts(work, work.config.prompts)
    work.close()
    assert sorted(prompts.table.column("prompt_id").to_pylist()) == sorted(HOSTILE)
    written = {path for path in tmp_path.rglob("*") if path.is_file()} - {folder / "prompts.jsonl"}
    assert {path.name for path in written} <= {"MANIFEST.json", "STAGE.json", "config.yaml", "log.jsonl", ".lock",
                                               "part-00000.arrow", "part-00000.json"}  # fmt: skip
    assert all(folder / "run" in path.parents for path in written)


@pytest.mark.parametrize("name", ["../reward", "a/b", "..", "", ".hidden", "a b"])
def test_s6_constraint_names_are_no_paths(tmp_path: Path, name: str) -> None:
    constraint = configuration(tmp_path)["constraints"]["calm"]
    with pytest.raises(ConfigError, match="expected a letter, then letters, digits"):
        validate_config(configuration(tmp_path, constraints={name: constraint}))


@pytest.mark.parametrize("outside", ["../outside-0123456789abcdef", "/tmp/x", "..", ".", "a/b", ""])
def test_s6_manifest_cannot_name_an_input_outside_the_run(tmp_path: Path, outside: str) -> None:
    run = tmp_path / "run"
    source = open_stage(run, "prompts", "prompts", {}, {}).commit()
    made = open_stage(run, "score", "reward", {}, {"prompts": source}).commit()
    assert load_artifact(made.path).input("prompts").digest == source.digest
    manifest = json.loads((made.path / "MANIFEST.json").read_text())
    manifest["inputs"]["prompts"]["artifact"] = outside
    del manifest["digest"]
    (made.path / "MANIFEST.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    with pytest.raises(DataError, match="damaged, not a manifest of this program"):
        load_artifact(made.path)
    assert any("damaged" in problem for problem in verify_run(run)[1])


def test_s6_f25_link_out_of_an_artifact_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    stage = open_stage(tmp_path / "run", "solve", "dual", {}, {})
    (stage.path / "solution.json").write_text("{}")
    artifact = stage.commit(["solution.json"])
    assert artifact.read_json("solution.json") == {}
    (stage.path / "solution.json").unlink()
    (stage.path / "solution.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(DataError, match=r"'solution\.json', which lies outside the artifact"):
        artifact.read_json("solution.json")


# ---------------------------------------------------------------------------------------------- S7, S10: supply chain


def test_s7_everything_is_pinned_and_bounded() -> None:
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    dependencies = re.findall('"(.+)"', listed[1])
    assert len(dependencies) > 20
    assert [entry for entry in dependencies if "<" not in entry] == []
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] not in "# "]
    assert len(pins) > 100
    assert [pin for pin in pins if "==" not in pin] == []


def test_s10_top_level_packages_are_ours_alone() -> None:
    """A folder with ``__init__.py`` at the root would be importable, and shadow a package of that name."""
    assert [path.parent.name for path in ROOT.glob("*/__init__.py")] == ["can_dist"]
