"""The doctor prints the problem and the remedy of an error as the error holds them, whatever dots its names have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm

from can_dist.config import Cluster, Config, validate_config
from can_dist.config.walk import read_as, sources
from can_dist.doctor import Finding, Severity, inputs
from can_dist.doctor.finding import refusal
from can_dist.doctor.preflight import check_pinned, check_sources
from can_dist.doctor.ray_cluster import check_ray
from can_dist.errors import CanDistError, ConfigError, DataError

DOTS = "v1. of May"
"""A name that looks as if a sentence ended in it."""
ENDPOINT = {"kind": "http", "model": DOTS, "request": {"input": "{response}"}, "value": "score"}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A small world in a directory whose own name has a dot and a space."""
    world = tmp_path / DOTS
    make_tiny_lm(world / "lm", ["w1", "w2"])
    (world / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w1 w2 {i}"}) + "\n" for i in range(9)))
    return world


def configure(world: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 3, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(world / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_calm"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
    }
    return validate_config(raw | changes)


def error_of(findings: list[Finding], subject: str) -> Finding:
    [finding] = [finding for finding in findings if finding.subject == subject]
    assert finding.severity is Severity.ERROR
    return finding


def missing_file(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    config = configure(world, prompts={"source": str(world / "none.jsonl"), "num_test": 3})
    finding = error_of(inputs.check_inputs(config), "prompts")
    return finding, f"{world}/none.jsonl: no such file", "Give a JSONL, Parquet or Arrow file, or a hub data set id."


def bad_row(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    path = world / "bad.jsonl"
    path.write_text('{"prompt": "w1"}\n{"prompt": 3}\n')
    finding = error_of(inputs.check_inputs(configure(world, prompts={"source": str(path), "num_test": 3})), "prompts")
    state = f"{path}, row 1, field 'prompt': found 3, expected a string or a list of messages"
    return finding, state, "Correct the row, or remove it."


def bad_line(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    path = world / "bad.jsonl"
    path.write_text('{"prompt": "w1"}\nw2\n')
    finding = error_of(inputs.check_inputs(configure(world, prompts={"source": str(path), "num_test": 3})), "prompts")
    return finding, f"{path}, line 2: malformed JSON", "Correct the line or write the file again."


def none_left_to_train_on(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    source = str(world / "prompts.jsonl")
    finding = error_of(inputs.check_inputs(configure(world, prompts={"source": source, "num_test": 1000})), "prompts")
    state = f"{source}: 9 distinct prompts, of which prompts.num_test = 1000 are to be held out; none would be left to"
    return finding, f"{state} train on", "Lower prompts.num_test or bring more prompts."


def missing_model(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    config = configure(world, reference={"model": str(world / "none")})
    finding = error_of(inputs.check_inputs(config), "reference")
    return finding, f"model '{world}/none': no such directory", "Give a model directory or a hub id 'owner/name'."


def model_that_no_hub_could_be_asked_for(world: Path, _: Any) -> tuple[Finding, str, str]:
    finding = error_of(inputs.check_inputs(configure(world, reference={"model": "owner/none"})), "reference")
    assert "\n" not in finding.state
    return finding, "model 'owner/none': is in no cache of this machine, and", "`hf download owner/none` fetches it"


def adapter_for_a_model(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    (world / "lm" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": DOTS}))
    finding = error_of(inputs.check_inputs(configure(world)), "reference")
    state = f"model '{world}/lm': an adapter (peft; base model {DOTS}), not a model"
    return finding, state, "It is an adapter: merge it into its base model first, and give the result:\n"


def bad_conversation(world: Path, _: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    turns = [[{"role": role, "content": f"w1 {n}"} for role in ("user", "assistant", "user")] for n in range(9)]
    path = world / "turns.jsonl"
    rows = [{"prompt_id": DOTS if n == 0 else f"p{n}", "prompt": prompt} for n, prompt in enumerate(turns)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"model": str(world / "lm"), "template": "Q: {prompt} A:"}
    config = configure(world, prompts={"source": str(path), "num_test": 3}, reference=reference)
    finding = error_of(inputs.check_inputs(config), "conversations")
    return (
        finding,
        f"reference '{world}/lm', prompt '{DOTS}': a conversation of ",
        "Use a tokenizer with a chat template, or single-turn prompts.",
    )


def endpoint_without_key(world: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    monkeypatch.delenv("SCORER_KEY", raising=False)
    reward = {**ENDPOINT, "url": "http://localhost:1/classify", "api_key_env": "SCORER_KEY"}
    finding = error_of(inputs.check_inputs(configure(world, reward=reward)), "reward")
    return finding, "reward: its key is expected in the environment variable SCORER_KEY", "Export the key there."


def endpoint_out_of_reach(world: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy. of ours:port")
    reward = {**ENDPOINT, "url": "https://scorer.example/classify"}
    finding = error_of(inputs.check_inputs(configure(world, reward=reward)), "reward")
    return finding, "reward: the proxy that the environment names (", "Unset the variable or give a proxy whose"


def local_ray(world: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Finding, str, str]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    long = world / ("long. " * 20)
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    finding = error_of(check_ray(Cluster()), "Ray")
    return finding, f"RAY_TMPDIR={long}: ", "Set RAY_TMPDIR to a shorter directory of yours, or unset it."


def ray_that_does_not_answer(*_: Any) -> tuple[Finding, str, str]:
    finding = error_of(check_ray(Cluster(address="127.0.0.1:1")), "Ray")
    return finding, "127.0.0.1:1: nothing answers", "Start the head, or correct cluster.address or RAY_ADDRESS."


KINDS = [
    missing_file,
    bad_row,
    bad_line,
    none_left_to_train_on,
    missing_model,
    model_that_no_hub_could_be_asked_for,
    adapter_for_a_model,
    bad_conversation,
    endpoint_without_key,
    endpoint_out_of_reach,
    local_ray,
    ray_that_does_not_answer,
]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_every_kind_of_problem_has_its_whole_text_and_its_remedy(
    kind: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding, state, remedy = kind(world, monkeypatch)
    assert finding.state.startswith(state)
    assert finding.remedy.startswith(remedy)
    assert remedy not in finding.state, "it stands once, on the line of its own"
    assert not finding.state.endswith((".", "\n"))


@pytest.mark.parametrize(
    ("problem", "state", "remedy"),
    [
        (DataError("a. b: 3 rows.", "Bring 4."), "a. b: 3 rows", "Bring 4."),
        (DataError("a. b: 3 rows.\n", "Bring 4."), "a. b: 3 rows", "Bring 4."),
        (ConfigError("a. b: expected 3, is 4."), "a. b: expected 3, is 4", "Correct it."),
    ],
)
def test_a_finding_is_what_the_error_holds(problem: CanDistError, state: str, remedy: str) -> None:
    finding = refusal("prompts", problem)
    assert (finding.severity, finding.subject, finding.state, finding.remedy) == (
        Severity.ERROR,
        "prompts",
        state,
        remedy,
    )


def test_the_walk_and_the_check_of_pins_hand_on_the_remedy(world: Path) -> None:
    config = configure(world, prompts={"source": str(world / "none.jsonl"), "num_test": 3})
    assert [read_as(key) for key in sources(config)] == ["prompts"]
    with pytest.raises(DataError) as caught:
        check_sources(config)
    assert caught.value.message == f"prompts: {world}/none.jsonl: no such file."
    assert caught.value.remedy == "Give a JSONL, Parquet or Arrow file, or a hub data set id."
    with pytest.raises(ConfigError) as unpinned:
        check_pinned(configure(world, pinned=True, prompts={"source": "owner/data", "num_test": 3, "revision": DOTS}))
    assert unpinned.value.message.endswith(f"\n  prompts: owner/data at revision {DOTS}\n")
    assert unpinned.value.remedy.startswith("Give each its commit (40 hexadecimal digits) as revision: ")
    assert f"{DOTS}\n  Give each its commit" in str(unpinned.value)
