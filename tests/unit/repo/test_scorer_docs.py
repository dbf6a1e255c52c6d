"""docs/scorers.md: every block of YAML on it is valid, every kind is there, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from judge_server import serving

from can_dist.cli import cli
from can_dist.config import validate_config
from can_dist.config.describe import models_in
from can_dist.config.sections import Constraint
from can_dist.config.yaml_files import merge, parse_yaml
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Response

PAGE = Path(__file__).parents[3] / "docs" / "scorers.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
YAML = [parse_yaml(text, "docs/scorers.md") for language, text in BLOCKS if language == "yaml"]
BASE: dict[str, Any] = {
    "prompts": {"source": "prompts.jsonl", "num_validation": 0},
    "strength": 1,
    "reference": {"model": "./reference"},
    "reward": {"kind": "callable", "function": "scorers:num_words"},
    "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 1.0}},
}


@pytest.mark.parametrize("block", YAML, ids=str)
def test_every_block_is_a_configuration(block: dict[str, Any]) -> None:
    if "kind" in block:
        assert validate_config(BASE | {"reward": block}).reward.kind == block["kind"]
    else:
        validate_config(merge(BASE, block))


def test_page_shows_every_kind() -> None:
    kinds = {one.model_fields["kind"].default for one in models_in(Constraint.model_fields["scorer"].annotation)}
    text = PAGE.read_text(encoding="utf-8")
    assert kinds == {kind for kind in kinds if f"| `{kind}` |" in text}
    assert kinds - {"log_ratio"} == {block["kind"] for block in YAML if "kind" in block}


def test_commands_on_the_page_exist() -> None:
    commands = re.findall(r"`can-dist (\w+)((?: --[\w-]+)*)", PAGE.read_text(encoding="utf-8"))
    assert len(commands) >= 2
    for name, options in commands:
        known = {option for one in cli.commands[name].params for option in one.opts}
        assert set(options.split()) <= known


def test_own_scorer_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [text for language, text in BLOCKS if language == "python"]
    body = source.partition("def ")[2]
    assert len(body.splitlines()) <= 10
    (tmp_path / "my_scorers.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    spec = validate_config(BASE | {"reward": {"kind": "callable", "function": "my_scorers:no_refusal"}}).reward
    rows = [Response(f"r{n}", [], text, []) for n, text in enumerate(["I'm sorry, no.", "Sure."])]
    assert load_scorer(spec, "fp32").score(rows).tolist() == [0.0, 1.0]  # type: ignore[arg-type]


# ------------------------------------------------- the endpoints of the page, answering as their own manuals print it


def classified(texts: list[str]) -> dict[str, Any]:
    """vLLM's /classify, and SGLang's /v1/classify, of a model with one output."""
    data = [{"index": i, "label": "LABEL_0", "probs": [float(len(t))], "num_classes": 1} for i, t in enumerate(texts)]
    usage = {"prompt_tokens": 10, "total_tokens": 10, "completion_tokens": 0, "prompt_tokens_details": None}
    return {"id": "classify-1", "object": "list", "created": 1745383213, "model": "m", "data": data, "usage": usage}


def embedded(texts: list[str]) -> list[dict[str, Any]]:
    """SGLang's own /classify of a reward model: its score is the one number of the embedding."""
    meta = {"id": "1", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": 8, "e2e_latency": 0.1}
    return [{"embedding": [float(len(text))], "meta_info": meta} for text in texts]


def moderated(texts: list[str]) -> dict[str, Any]:
    """OpenAI's /v1/moderations."""
    names = ("harassment", "harassment/threatening", "hate", "self-harm", "sexual", "violence", "violence/graphic")
    results = [
        {
            "flagged": False,
            "categories": dict.fromkeys(names, False),
            "category_scores": dict.fromkeys(names, 0.0) | {"violence": float(len(text))},
            "category_applied_input_types": {name: ["text"] for name in names},
        }
        for text in texts
    ]
    return {"id": "modr-1", "model": "omni-moderation-latest", "results": results}


def manual(body: dict[str, Any], _: int) -> tuple[int, dict[str, str], Any]:
    """Answer a request by its shape; refuse what the manuals do not know."""
    if "messages" in body:
        assert [message["role"] for message in body["messages"]] == ["user", "assistant"]
        return 200, {}, classified([body["messages"][-1]["content"]])
    if "text" in body:
        return 200, {}, embedded(body["text"])
    assert isinstance(body["input"], list)
    return 200, {}, (moderated if "moderation" in body["model"] else classified)(body["input"])


@pytest.mark.parametrize("block", [block for block in YAML if block.get("kind") == "http"], ids=str)
def test_endpoint_of_the_page_is_read_as_its_manual_prints_it(
    block: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    rows = [Response(f"r{n}", [{"role": "user", "content": "Hi?"}], "y" * n, []) for n in (3, 1, 2)]
    with serving(manual) as server:
        spec = validate_config(BASE | {"reward": block | {"url": f"{server.url}/x"}}).reward
        scores = load_scorer(spec, "fp32").score(rows).tolist()  # type: ignore[arg-type]
        assert set(server.keys) == {"Bearer sk-test"} if block.get("api_key_env") else True
        sent = len(server.bodies)
    assert [score - scores[1] for score in scores] == [2.0, 0.0, 1.0]  # the template's text is as long everywhere
    assert sent == (1 if block.get("batch_size", 1) > 1 else 3)
