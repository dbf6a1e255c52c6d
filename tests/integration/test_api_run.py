"""The examples of the names that train: real models, Ray and two ranks of ZeRO-3, two steps each."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm

import can_dist
from can_dist.config import dump_yaml, validate_config

COMPLETE = {"Run", "run_pipeline", "mocan", "constrained_reward"}
"""Examples that stand for themselves; the others go on from mocan's."""
WORDS = [f"w{i}" for i in range(12)]
PEOPLE = {"label": {"preferences": {"source": "pairs.jsonl"}}}
CASES: dict[str, dict[str, Any]] = {
    "Run": {},
    "run_pipeline": {},
    "mocan": {},
    "constrained_reward": {},
    "pecan": {
        "method": "pecan",
        "reward": {"kind": "log_ratio", "beta": 0.5, "criterion": "helpful"},
        "constraints": {"safety": {"scorer": {"kind": "log_ratio", "beta": 0.5, "criterion": "safe"}, "margin": 0.001}},
        **PEOPLE,
    },
    "cdpo": {"method": "cdpo", "cdpo": {"rounds": 1}},
    "caid": {"method": "caid"},
    "primal_dual": {"method": "primal_dual", "primal_dual": {"rounds": 1}},
    "sacpo": {"method": "sacpo", **PEOPLE},
    "p_sacpo": {"method": "p_sacpo", **PEOPLE},
    "dpo": {"method": "dpo_s", **PEOPLE},
    "safedpo": {"method": "safedpo", **PEOPLE},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("api")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [
        {"prompt": f"{a} {b}", "response_0": f"w1 {a}", "response_1": f"w2 {b}", "better_response_id": 0,
         "safer_response_id": 1, "is_response_0_safe": False, "is_response_1_safe": True}
        for a in WORDS[:4] for b in WORDS[8:]
    ]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield folder
    import ray

    ray.shutdown()


def configuration(sections: dict[str, Any]) -> str:
    base: dict[str, Any] = {
        "beta": 0.5,
        "prompts": {"source": "pairs.jsonl", "num_test": 4, "num_validation": 0},
        "strength": 1,
        "reference": {"model": "lm"},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "generate": {"num_responses": 4, "max_new_tokens": 6},
        "train": {"learning_rate": 3e-3, "batch_size": 8, "max_steps": 2},
    }
    return dump_yaml(validate_config({**base, **sections}))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_example_of_a_name_that_runs_stages(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my.yaml").write_text(configuration(CASES[name]), encoding="utf-8")
    monkeypatch.chdir(folder)
    example = example_of(name)
    assert example.examples
    told: list[str] = []
    with contextlib.ExitStack() as stack:
        if name not in COMPLETE:
            example.globs |= as_in_the_example_of_mocan(stack)
        results = doctest.DocTestRunner(verbose=False).run(example, out=told.append, clear_globs=False)
    assert results.failed == 0, "".join(told)
    if name not in COMPLETE:
        policies = [example.globs["policy"]] if "policy" in example.globs else example.globs["mixed"].values()
        assert all((policy.path / "policy" / "model.safetensors").is_file() for policy in policies)


def example_of(name: str) -> doctest.DocTest:
    public = getattr(can_dist, name)
    globs = vars(inspect.getmodule(public)).copy()
    (example,) = doctest.DocTestFinder(recurse=False).find(public, name, globs=globs)
    return example


def as_in_the_example_of_mocan(stack: contextlib.ExitStack) -> dict[str, Any]:
    """``config``, ``run`` and ``problem``, from which the other methods' examples go on."""
    config = can_dist.load_config("my.yaml")
    run = stack.enter_context(can_dist.Run("runs/mine", config))
    problem = {name: getattr(config, name) for name in ("reference", "reward", "constraints", "beta")}
    return {"config": config, "run": run, "problem": {"prompts": run.prompts(), **problem}}
