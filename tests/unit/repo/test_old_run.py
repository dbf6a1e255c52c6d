"""A run that older code made is continued by the code of today: every stage is reused, none starts.

``tests/fixtures/old_run`` is what commit c475135 left of MoCAN and CAID on a small world: the manifest of
every stage, the two files that later stages read, and the digests of the model and of the scorers' source. Tables and
weights are left out: what their digests were, the manifests say.

A test that fails here means that the identity of a stage changed: everybody's finished work is made anew. Where that
is meant (what a stage computes has changed), say so in CHANGELOG.md and record the fixture again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import scorers
from tiny import make_tiny_lm

from can_dist.algorithms import ascent
from can_dist.config import Config, for_method, validate_config
from can_dist.config.sections import Label, Solve
from can_dist.doctor import preflight
from can_dist.errors import DataError
from can_dist.modeling import loading
from can_dist.pipeline import run_method
from can_dist.scoring import python_callable
from can_dist.stages.trajectory import Round
from can_dist.tables import artifacts

OLD_RUN = Path(__file__).parents[2] / "fixtures" / "old_run"
MANIFESTS: dict[str, dict[str, Any]] = {}
for line in (OLD_RUN / "manifests.jsonl").read_text(encoding="utf-8").splitlines():
    MANIFESTS |= json.loads(line)
METHODS = ("mocan", "caid")  # the pairs of P-SACPO are made anew since their tokens end where sampled ones end
WORDS = [f"w{i}" for i in range(12)]
LISTS = Label.lists
NO_STAGE = "none"  # the one stage that may compute: whatever is not finished raises


def text_of(manifest: dict[str, Any]) -> str:
    """The bytes of a MANIFEST.json, whose digest later stages hold."""
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def preference(first: str, second: str) -> dict[str, Any]:
    """A row in the layout of PKU-SafeRLHF, written as when the run was made."""
    return {
        "prompt": f"{first} {second}",
        "response_0": f"w1 {first}",
        "response_1": f"w5 {second}",
        "better_response_id": 0,
        "safer_response_id": 1,
        "is_response_0_safe": False,
        "is_response_1_safe": True,
    }


def configure(folder: Path, **changes: Any) -> Config:
    def scorer(function: str) -> dict[str, str]:
        return {"kind": "callable", "function": f"scorers:{function}"}

    people = {"label": {"preferences": {"source": str(folder / "pairs.jsonl")}}}
    sections = {
        "beta": 1.0,
        "prompts": {"source": str(folder / "pairs.jsonl"), "num_test": 12, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(folder / "lm")},
        "reward": scorer("num_words"),
        "constraints": {"safety": {"scorer": scorer("num_calm"), "margin": 0.05}},
        "generate": {"num_responses": 4, "max_new_tokens": 8},
        "solve": {"estimator": "empirical"},  # the default of then; a run that names none is solved by today's
        "train": {"learning_rate": 3e-3, "batch_size": 8, "max_steps": 4, "log_every": 1},
        "evaluate": {"num_responses": 4},
        "methods": {"p_sacpo": {**people, "p_sacpo": {"q": [0.5]}}, "caid": {"caid": {"rounds": 1}}},
    }
    for key, value in changes.items():
        sections[key] = {**sections.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_config(sections)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world and the old run in it, as far as the fixture holds it."""
    folder = tmp_path_factory.mktemp("old")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [preference(first, second) for first in WORDS[:6] for second in WORDS[6:]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, manifest in MANIFESTS.items():
        (folder / "run" / name).mkdir(parents=True)
        (folder / "run" / name / artifacts.MANIFEST).write_text(text_of(manifest), encoding="utf-8")
        digests = {role: entry["digest"] for role, entry in manifest["inputs"].items()}
        artifacts.write_json(
            folder / "run" / name / artifacts.STAGE, {"identity": manifest["identity"], "inputs": digests}
        )
    shutil.copytree(OLD_RUN / "files", folder / "run", dirs_exist_ok=True)
    return folder


@pytest.fixture
def world(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded world, whose weights and tables have the digests of then without being there."""
    folder = tmp_path / "old"
    shutil.copytree(recorded, folder)
    then = json.loads((OLD_RUN / "digests.json").read_text(encoding="utf-8"))
    digests = {str(folder / name): digest for name, digest in then.items()}
    digests[str(Path(scorers.__file__).resolve())] = then["scorers.py"]
    for name, manifest in MANIFESTS.items():
        for entry in manifest["files"]:
            digests[str(folder / "run" / name / entry["file"])] = entry["sha256"]
            if "/" in entry["file"]:  # of a policy: which files there are is part of its digest
                (folder / "run" / name / entry["file"]).parent.mkdir(exist_ok=True)
                (folder / "run" / name / entry["file"]).touch()
    today = loading.file_digest
    for module in (loading, python_callable):
        monkeypatch.setattr(module, "file_digest", lambda path: digests.get(str(path)) or today(path))
    monkeypatch.setattr(artifacts, "check_file", lambda directory, entry: None)
    monkeypatch.setattr(preflight, "check_conversations", lambda config, prompts: [])  # the table is not there
    monkeypatch.setattr(sys.modules["can_dist.algorithms.caid"], "next_lam", lam_of_then)
    monkeypatch.setattr(Label, "lists", False)  # all pairs of soft labels were an example each
    return folder


def lam_of_then(last: Round, step_size: Mapping[str, float]) -> dict[str, float]:
    """Return λ of the next round, of which the last bit is that of the processor that made the old run."""
    [trajectory] = [manifest for manifest in MANIFESTS.values() if manifest["identity"]["label"] == "caid"]
    following = trajectory["identity"]["lam"][1]
    lam = ascent.next_lam(last, step_size)
    return following if lam == pytest.approx(following, rel=1e-14) else lam


def continue_run(folder: Path, config: Config) -> None:
    """Run the methods up to their training; a stage that is not there raises, with what made it another one.

    Evaluations are made anew since their intervals changed.
    """
    for method in METHODS:
        try:
            run_method(folder / "run", for_method(config, method), "train", only_stage=NO_STAGE, measured_by=config)
        except DataError as error:
            [new] = {path.name for path in (folder / "run").glob("*-*")} - MANIFESTS.keys()
            pytest.fail(f"{error}\nof today: {(folder / 'run' / new / artifacts.STAGE).read_text(encoding='utf-8')}")


def test_the_name_of_every_directory_follows_from_its_identity_and_inputs() -> None:
    assert len(MANIFESTS) > 20
    for name, manifest in MANIFESTS.items():
        inputs = {role: entry["digest"] for role, entry in manifest["inputs"].items()}
        content = {"identity": manifest["identity"], "inputs": inputs}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert name == f"{manifest['stage']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        for entry in manifest["inputs"].values():
            text = text_of(MANIFESTS[entry["artifact"]])
            assert hashlib.sha256(text.encode()).hexdigest() == entry["digest"], (name, entry["artifact"])


def test_old_run_is_continued_without_starting_a_stage(world: Path) -> None:
    continue_run(world, configure(world))
    lines = [json.loads(line) for line in (world / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    events = [line for line in lines if "event" in line]
    assert {event["artifact"] for event in events if event["event"] == "reused"} == set(MANIFESTS)
    assert {event["event"] for event in events} == {"began", "reused", "ended"}
    assert {path.name for path in (world / "run").glob("*-*")} == set(MANIFESTS)


CHANGES = {
    "prompts": {"seed": 1},
    "generate": {"generate": {"max_new_tokens": 9}},
    "solve": {"beta": 2.0},
    "label": {"label": {"validation_fraction": 0.5}},
    "train": {"train": {"learning_rate": 1e-3}},
}


@pytest.mark.parametrize("stage", CHANGES)
def test_a_changed_identity_would_be_noticed_and_its_stage_named(world: Path, stage: str) -> None:
    config = configure(world, **CHANGES[stage])
    with pytest.raises(pytest.fail.Exception, match=rf": {stage} \(.*not finished for this configuration"):
        continue_run(world, config)


@pytest.mark.parametrize("named", [{}, {"estimator": "auto"}, {"estimator": "jackknife"}])
def test_a_run_without_a_named_estimator_is_solved_anew(world: Path, named: dict[str, Any]) -> None:
    """The old run was solved by the paper's estimator, then the default: no other one may take its λ*."""
    config = configure(world).model_copy(update={"solve": Solve(**named)})
    with pytest.raises(pytest.fail.Exception, match=r": solve \(.*not finished for this configuration"):
        continue_run(world, config)


def test_all_pairs_of_soft_labels_are_labelled_anew(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one example per prompt now; nothing takes the old ones for them."""
    monkeypatch.setattr(Label, "lists", LISTS)
    with pytest.raises(pytest.fail.Exception, match=r": label \(.*not finished for this configuration"):
        continue_run(world, configure(world))


def test_another_format_version_would_be_noticed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "FORMAT_VERSION", artifacts.FORMAT_VERSION + 1)
    with pytest.raises(pytest.fail.Exception, match=r": prompts \(prompts\) is not finished"):
        continue_run(world, configure(world))
