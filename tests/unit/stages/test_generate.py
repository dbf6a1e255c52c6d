"""Responses of one shard: what is decoded together, what is refused, and what the stage's identity holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm
from transformers import AutoTokenizer

from can_dist.config import Config, validate_config
from can_dist.errors import ConfigError
from can_dist.stages.generate import GenerateJob, generate, prompts_of_split
from can_dist.stages.ingest import ingest_prompts
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(24)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_tiny_lm(directory / "lm", WORDS)
    make_tiny_lm(directory / "unpadded", WORDS)
    tokenizer = AutoTokenizer.from_pretrained(directory / "unpadded")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(directory / "unpadded")
    lines = [json.dumps({"prompt": " ".join(WORDS[i : i + 1 + i % 5])}) for i in range(12)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def configure(world: Path, model: str = "lm", **options: Any) -> Config:
    return validate_config(
        {
            "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 3, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(world / model)},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "generate": {"num_responses": 5, "max_new_tokens": 12, **options},
        }
    )


def sampled(run: Path, config: Config) -> list[dict[str, Any]]:
    """The responses of all training prompts as one shard, sampled in this process."""
    prompts = ingest_prompts(Workspace(run, config), config.prompts)
    job = GenerateJob(config.reference, config.generate, config.seed, "fp32", "train", prompts.path, run, "its digest")
    return job._sample(job.load(), prompts_of_split(prompts.path, "train").to_pylist())


def test_responses_do_not_depend_on_how_many_are_decoded_at_once(world: Path, tmp_path: Path) -> None:
    """5 responses of a prompt within 45 tokens: two at a time."""
    whole = sampled(tmp_path / "a", configure(world))
    split = sampled(tmp_path / "b", configure(world, batch_prompts=1, tokens_at_once=45))
    assert split == whole
    assert [row["response_id"] for row in whole] == [f"{row['prompt_id']}/{i % 5}" for i, row in enumerate(whole)]
    assert len(whole) == 45


def test_response_that_exceeds_what_is_decoded_at_once_is_refused_with_the_number(world: Path, tmp_path: Path) -> None:
    config = configure(world, tokens_at_once=18)
    work = Workspace(tmp_path, config)
    prompts = ingest_prompts(work, config.prompts)
    with pytest.raises(ConfigError, match=r"tokens_at_once is 18, and one response needs 19: .* 7 tokens") as caught:
        generate(work, config.reference, prompts, split="train", role="reference")
    assert "to 19 or more" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("lm", {}, False),
        ("lm", {"tokens_at_once": 32768}, False),
        ("lm", {"stop": ["w3"]}, False),
        ("unpadded", {}, False),
        ("unpadded", {"stop": ["w3"]}, True),
    ],
)
def test_identity_is_that_of_earlier_runs_but_where_they_kept_padding(
    model: str, options: dict[str, Any], told: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened(Exception):
        """Carries the identity that the stage was opened with."""

    def opened(*given: Any) -> Any:
        raise Opened(given[3])

    config = configure(world, model, **options)
    work = Workspace(tmp_path, config)
    prompts = ingest_prompts(work, config.prompts)
    monkeypatch.setattr(Workspace, "open", opened)
    with pytest.raises(Opened) as caught:
        generate(work, config.reference, prompts, split="train", role="reference")
    (identity,) = caught.value.args
    assert identity.get("after_stop") == ("nothing" if told else None)
    assert "tokens_at_once" not in identity["options"]
