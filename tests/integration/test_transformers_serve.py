"""Generation by an endpoint against a real `transformers serve` of the tiny model, started here."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import serving
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer

from can_dist.config import validate_config
from can_dist.errors import DataError
from can_dist.modeling.formatter import Formatter
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact

pytestmark = pytest.mark.slow

WORDS = [f"w{i}" for i in range(12)]
SAMPLE = {"generation_config": json.dumps({"do_sample": True})}  # else this server decodes greedily


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served")
    make_tiny_lm(directory / "lm", WORDS)
    lines = [json.dumps({"prompt": f"w{i} w{i + 1}"}) + "\n" for i in range(8)]
    (directory / "prompts.jsonl").write_text("".join(lines))
    return directory


@pytest.fixture(scope="module")
def url(world: Path) -> Iterator[str]:
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"transformers serve needs {name}, which is not installed; pip install -e '.[dev]'")
    command = ["-m", "transformers.cli.transformers", "serve", str(world / "lm"), "--host", "127.0.0.1"]
    command += ["--device", "cpu", "--dtype", "float32"]
    with serving(command, world / "serve.log", os.environ, seconds=120) as address:
        yield f"{address}/v1"


def ask(
    world: Path, run: Path, url: str, request: dict[str, Any], template: str | None = None, **generate: Any
) -> Artifact:
    endpoint = {"base_url": url, "model": str(world / "lm"), "concurrency": 1, "request": request}
    config = validate_config(
        {
            "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(world / "lm"), "template": template},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "generate": {"num_responses": 2, "max_new_tokens": 8, "endpoint": endpoint} | generate,
        }
    )
    with Run(run, config) as work:
        return work.generate(config.reference, work.prompts())


def test_served_samples_follow_their_seeds(world: Path, url: str, tmp_path: Path) -> None:
    table = ask(world, tmp_path / "a", url, SAMPLE).table
    assert table.num_rows == 12
    assert len(set(table.column("text").to_pylist())) > 6
    assert ask(world, tmp_path / "b", url, SAMPLE).table.equals(table)
    eos = AutoTokenizer.from_pretrained(world / "lm").eos_token_id
    for row in table.to_pylist():
        assert (row["token_ids"][-1] == eos) == (row["finish_reason"] == "stop")


@pytest.mark.parametrize("template", [None, "w9 {prompt} w8"])
def test_served_model_sees_the_prompt_as_the_reference_does(
    world: Path, url: str, tmp_path: Path, template: str | None
) -> None:
    """Nearly greedy, a response is what the model alone writes after the formatter's prompt."""
    changes: dict[str, Any] = {"num_responses": 1, "temperature": 1e-4}
    model = AutoModelForCausalLM.from_pretrained(world / "lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    formatter = Formatter(tokenizer, template)
    artifact = ask(world, tmp_path, url, SAMPLE, template=template, **changes)
    for row in artifact.table.to_pylist():
        ids = torch.tensor([formatter.prompt_ids(row["messages"])])
        written = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert tokenizer.decode(written, skip_special_tokens=True) == row["text"]


def test_server_that_does_not_sample_is_found_out(world: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 2 responses to each of 6 prompts are the same"):
        ask(world, tmp_path, url, {})
