"""Responses that are not sampled here: brought as a file, or asked of an OpenAI-compatible server."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from judge_server import Endpoint, completion, serving
from tiny import make_tiny_lm
from transformers import AutoTokenizer

from can_dist.config import Config, Model, validate_config
from can_dist.doctor.preflight import check_sources, preflight
from can_dist.errors import CanDistError, ConfigError, DataError, EnvironmentProblem, Interrupted
from can_dist.modeling.formatter import open_formatter
from can_dist.run import Run
from can_dist.stages import brought_responses
from can_dist.stages.generate import prompts_of_split
from can_dist.tables.artifacts import Artifact, file_digest, write_part
from can_dist.tables.schemas import RESPONSES

WORDS = [f"w{i}" for i in range(12)]
PROMPTS = [f"w{i} w{i + 1}" for i in range(8)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_tiny_lm(directory / "lm", WORDS)
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return directory


def configure(world: Path, generate: dict[str, Any], **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 3, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(world / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "generate": {"num_responses": 2, "max_new_tokens": 8, "batch_prompts": 2, "shard_prompts": 2, **generate},
    }
    return validate_config(raw | changes)


def respond(run: Path, config: Config) -> Artifact:
    with Run(run, config) as work:
        return work.generate(config.reference, work.prompts())


# ------------------------------------------------------------------------------------------------------------- a file


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def complete() -> list[dict[str, Any]]:
    """Two responses to every prompt."""
    return [{"prompt": p, "responses": [f"{p} w5", "w3"]} for p in PROMPTS]


def bring(world: Path, tmp_path: Path, rows: Sequence[dict[str, Any]], **changes: Any) -> Artifact:
    source = write(tmp_path / "responses.jsonl", rows)
    return respond(tmp_path / "run", configure(world, {"responses": {"source": str(source)}}, **changes))


def test_brought_responses_are_joined_by_prompt_and_tokenised(world: Path, tmp_path: Path) -> None:
    rows = [row for row in complete() for row in ({**row, "responses": [text]} for text in row["responses"])]
    artifact = bring(world, tmp_path, [*rows[::-1], {"prompt": "another", "responses": ["w1"]}])
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    table = artifact.table.to_pylist()
    assert len(table) == 5 * 2
    for row in table:
        prompt = row["messages"][0]["content"]
        assert row["text"] in (f"{prompt} w5", "w3")
        assert row["finish_reason"] == "given"
        expected = tokenizer(row["text"], add_special_tokens=False).input_ids
        assert row["token_ids"] == [*expected, tokenizer.eos_token_id]
        assert row["num_tokens"] == len(row["token_ids"])
    assert [row["response_id"].split("/")[1] for row in table] == ["0", "1"] * 5
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "17 rows, 17 responses to 9 prompts; 5 of these prompts are among the 5 training prompts" in log


def test_parts_are_the_bytes_of_responses_tokenised_one_by_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part may end inside a prompt; batches and a prompt rendered once change no byte."""
    monkeypatch.setattr(brought_responses, "SHARD_ROWS", 3)
    artifact = bring(world, tmp_path, complete())
    formatter = open_formatter(Model(model=str(world / "lm")))
    rows = []
    for prompt in prompts_of_split(artifact.input("prompts").path, "train").to_pylist():
        for k, text in enumerate([f"{prompt['messages'][0]['content']} w5", "w3"]):
            row = brought_responses.response_row(prompt, k, text, "given")
            ids = formatter.response_ids(prompt["messages"], text)
            rows.append(row | {"token_ids": ids, "num_tokens": len(ids)})
    for part, first in enumerate(range(0, 10, 3)):
        write_part(tmp_path, part, pa.Table.from_pylist(rows[first : first + 3], schema=RESPONSES))
    written = [file_digest(path) for path in sorted(tmp_path.glob("part-*.arrow"))]
    assert [entry["sha256"] for entry in artifact.manifest["files"]] == written
    assert len(written) == 4


def test_file_that_is_unchanged_is_reused_and_another_one_is_not(world: Path, tmp_path: Path) -> None:
    first = bring(world, tmp_path, complete())
    assert bring(world, tmp_path, complete()).path == first.path
    assert bring(world, tmp_path, complete()[::-1]).path != first.path


def test_message_list_is_the_same_prompt(world: Path, tmp_path: Path) -> None:
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in complete()]
    assert bring(world, tmp_path, rows).table.num_rows == 10


def drop(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "prompt": row["prompt"] + " "} for row in rows]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [{**row, "responses": row["responses"][:1]} for row in rows],
            "5 of 5 training prompts have not generate.num_responses = 2 responses",
        ),
        (drop, "Found: 5 prompts with 0. Complete them or set generate.num_responses; a row belongs to the prompt"),
        (lambda rows: [*rows, *rows], "Found: 5 prompts with 4."),
        (
            lambda rows: [{"prompt": row["prompt"], "answers": row["responses"]} for row in rows],
            "responses.jsonl: no column 'responses'. Columns found: prompt, answers. Expected prompt",
        ),
        (
            lambda rows: [{**row, "responses": "w1"} for row in rows],
            "responses.jsonl, row 0, field 'responses': found 'w1', expected a list of texts.",
        ),
        (
            lambda rows: [rows[0], {**rows[1], "responses": ["w1", None]}],
            "responses.jsonl, row 1, field 'responses[1]': found None, expected a string.",
        ),
        (
            lambda rows: [{**row, "responses": ["w1", "unheard of"]} for row in rows],
            "5 of 10 responses are another text in the tokens of",
        ),
        (
            lambda rows: [{**row, "responses": ["w1", "<user>w2"]} for row in rows],
            "('<user>w2' reads back as 'w2'",
        ),
        (
            lambda rows: [{**row, "responses": ["w1", "w2 " * 60]} for row in rows],
            "5 of 10 responses do not fit the context of",
        ),
    ],
)
def test_file_that_does_not_fit_is_refused(
    world: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        bring(world, tmp_path, change(complete()))
    assert message in str(caught.value)
    assert "responses.jsonl" in str(caught.value)


def test_missing_file_is_found_before_anything_is_computed(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        check_sources(configure(world, {"responses": {"source": str(tmp_path / "nowhere.jsonl")}}))


# -------------------------------------------------------------------------------------------------------- an endpoint

COUNTER = itertools.count()


def chat(text: str = "", **choice: Any) -> Any:
    """A completion; without a text, another one each time, as of a server that samples."""
    body = completion(text or f"w1 w{next(COUNTER) % 10}")
    body["choices"][0] |= choice
    return 200, {}, body


def ask(
    world: Path,
    run: Path,
    server: Endpoint,
    *,
    raw: dict[str, Any] | None = None,
    shard_prompts: int = 2,
    **endpoint: Any,
) -> Artifact:
    spec = {"base_url": server.url, "model": "tiny", "max_retries": 0, "timeout_s": 5, **endpoint}
    return respond(
        run, configure(world, {"endpoint": spec, "stop": ["END"], "shard_prompts": shard_prompts}, **(raw or {}))
    )


def test_endpoint_is_asked_once_per_response_with_its_own_seed(world: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        words = " ".join(f"w{digit}" for digit in str(body["seed"])[-4:])
        return chat(f"{body['messages'][0]['content']} {words}")

    with serving(answer) as server:
        table = ask(world, tmp_path / "a", server, request={"top_k": 0}).table
        bodies = server.bodies[:]
        again = ask(world, tmp_path / "b", server, concurrency=1).table
    assert len(bodies) == 10 == len({body["seed"] for body in bodies})
    for body in bodies:
        assert {
            "model": "tiny",
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 8,
            "stop": ["END"],
            "top_k": 0,
        }.items() <= body.items()
    assert table.equals(again), "neither the order of the requests nor their number at once decides a response"
    for row in table.to_pylist():
        assert row["text"].startswith(row["messages"][0]["content"])
        assert row["finish_reason"] == "stop"
        assert row["token_ids"][-1] == AutoTokenizer.from_pretrained(world / "lm").eos_token_id


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "tool_calls"])
def test_server_that_takes_parts_out_of_a_response_is_refused(world: Path, tmp_path: Path, name: str) -> None:
    """What is left is another text than the reference wrote, and ln π_ref would be of that one."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    taken = [call] if name == "tool_calls" else "w1"
    message = {"role": "assistant", "content": "w2", name: taken}
    with (
        serving(lambda *_: chat(message=message)) as server,
        pytest.raises(DataError, match=rf"takes {name} out of the response, .* Start it without a parser of reasoning"),
    ):
        ask(world, tmp_path, server)


def test_options_of_the_chat_template_go_to_the_server_too(world: Path, tmp_path: Path) -> None:
    template = world / "lm" / "chat_template.jinja"
    before = template.read_text()
    template.write_text(before + "{# enable_thinking #}")
    raw = {"reference": {"model": str(world / "lm"), "template_options": {"enable_thinking": False}}}
    try:
        with serving(lambda *_: chat()) as server:
            ask(world, tmp_path / "a", server, raw=raw)
            assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in server.bodies)
            request = {"chat_template_kwargs": {"enable_thinking": True}}
            with pytest.raises(ConfigError, match=r"chat_template_kwargs is .* leave chat_template_kwargs out"):
                ask(world, tmp_path / "b", server, raw=raw, request=request)
    finally:
        template.write_text(before)


def test_response_that_was_cut_has_no_end_token(world: Path, tmp_path: Path) -> None:
    with serving(lambda *_: chat(finish_reason="length")) as server:
        row = ask(world, tmp_path, server).table.to_pylist()[0]
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    assert row["token_ids"] == tokenizer.convert_tokens_to_ids(row["text"].split())
    assert row["finish_reason"] == "length"


def test_f21_responses_that_were_cut_are_told_and_above_the_limit_an_error(world: Path, tmp_path: Path) -> None:
    """3 of 10; the limit is asked again of finished work, and what was sampled is kept."""
    with serving(lambda _, number: chat(finish_reason="length" if number < 3 else "stop")) as server:
        artifact = ask(world, tmp_path / "run", server)
    cut = f"{artifact.path.name}: 3 of 10 responses (30%) were cut at generate.max_new_tokens = 8"
    assert f"{cut}; their scores may depend on what is missing" in (tmp_path / "run" / "log.jsonl").read_text()
    endpoint = {"base_url": server.url, "model": "tiny"}
    for limit, allowed in ((0.29, False), (0.3, True)):
        config = configure(world, {"endpoint": endpoint, "stop": ["END"], "max_truncated": limit})
        if allowed:
            assert respond(tmp_path / "run", config).digest == artifact.digest
        else:
            with pytest.raises(DataError) as refused:
                respond(tmp_path / "run", config)
            assert str(refused.value).startswith(f"{cut}; generate.max_truncated allows 29%. Raise generate.max_new")


def test_plain_template_is_completed_not_chatted(world: Path, tmp_path: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> Any:
        assert "messages" not in body
        choice = {"index": 0, "text": f"w{number}", "finish_reason": "stop", "logprobs": None}
        return 200, {}, {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}

    with serving(answer) as server:
        reference = {"model": str(world / "lm"), "template": "w9 {prompt} w8"}
        ask(world, tmp_path, server, raw={"reference": reference})
        assert all(body["prompt"].startswith("w9 w") and body["prompt"].endswith(" w8") for body in server.bodies)


def test_signal_ends_sampling_by_a_silent_endpoint_at_once(world: Path, tmp_path: Path) -> None:
    def silent(body: dict[str, Any], number: int) -> Any:
        if number >= 4:  # the first shard is whole
            time.sleep(4)
        return chat()

    with serving(silent) as server:

        def stop() -> None:
            while len(server.bodies) < 5:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=stop, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(Interrupted):
            ask(world, tmp_path / "run", server, timeout_s=60, concurrency=2)
        assert time.monotonic() - started < 10
        asked = len(server.bodies)
        server.judge = lambda *_: chat()
        assert ask(world, tmp_path / "run", server).num_rows == 10
        assert len(server.bodies) - asked == 6, "the first shard is kept"


def test_finished_shards_are_not_asked_for_again(world: Path, tmp_path: Path) -> None:
    with (
        serving(lambda _, number: chat() if number < 6 else (500, {}, {})) as server,
        pytest.raises(EnvironmentProblem, match=r"/[01]': HTTP 500 after 0 retries"),
    ):
        ask(world, tmp_path, server, concurrency=1)
    with serving(lambda *_: chat()) as server:
        assert ask(world, tmp_path, server).table.num_rows == 10
        assert len(server.bodies) == 10 - 4, "one shard of two prompts with two responses was kept"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            chat(finish_reason="content_filter"),
            "ended with finish_reason 'content_filter', expected 'stop' or 'length'",
        ),
        ((200, {}, {"choices": []}), "the answer is no completion (no text in it). Expected an OpenAI-compatible"),
        ((200, {}, "<html>"), "the answer is no completion"),
        ((404, {}, {}), "HTTP 404, no such model or address"),
        ((400, {}, {}), "HTTP 400, the endpoint refused this request"),
        ((429, {}, {}), "still rate-limited (HTTP 429) after 0 retries"),
        (chat("unheard of"), "2 of 4 responses are another text"),
    ],
)
def test_bad_answer_names_endpoint_and_response(world: Path, tmp_path: Path, reply: Any, message: str) -> None:
    def answer(_: Any, number: int) -> Any:
        return chat() if number < 2 else reply

    with serving(answer) as server:
        with pytest.raises(CanDistError) as caught:
            ask(world, tmp_path, server, concurrency=1)
        assert f"generate.endpoint tiny at {server.url}" in str(caught.value)
    assert message in str(caught.value)
    assert "/0" in str(caught.value)


def test_server_that_does_not_sample_is_found_out(world: Path, tmp_path: Path) -> None:
    with serving(lambda *_: chat("w1")) as server:
        assert ask(world, tmp_path / "few", server).table.num_rows == 10, "two prompts may have one answer each"
        with pytest.raises(DataError, match=r"all 2 responses to each of 4 prompts are the same \(.*/0: 'w1'\)"):
            ask(world, tmp_path / "run", server, shard_prompts=4)


def test_address_is_no_part_of_what_was_sampled(world: Path, tmp_path: Path) -> None:
    with serving(lambda *_: chat()) as server:
        first = ask(world, tmp_path, server)
    with serving(lambda *_: chat()) as server:
        assert ask(world, tmp_path, server, timeout_s=9).path == first.path
        assert not server.bodies
        assert ask(world, tmp_path, server, revision="b").path != first.path


def test_key_of_the_endpoint_is_looked_for_first(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    endpoint = {"base_url": "http://localhost:1/v1", "model": "m", "api_key_env": "MY_KEY"}
    with pytest.raises(
        EnvironmentProblem, match=r"generate\.endpoint m: its key is expected in the environment variable"
    ):
        preflight(configure(world, {"endpoint": endpoint}))


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"responses": {"source": "a.jsonl"}, "endpoint": {"base_url": "http://a/v1", "model": "m"}}, "leave out one"),
        ({"endpoint": {"base_url": "http://a/v1", "model": "m", "request": {"seed": 1}}}, "seed: set by the keys of"),
        ({"endpoint": {"base_url": "a/v1", "model": "m"}}, "generate.endpoint.base_url: expected an address such as"),
        ({"endpoint": {"model": "m"}}, "generate.endpoint.base_url: required, not given"),
        ({"endpoint": {"base_url": "http://a/v1", "model": "m", "timeout_s": 0}}, "generate.endpoint.timeout_s"),
    ],
)
def test_options_that_cannot_work_are_refused(world: Path, generate: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configure(world, generate)
    assert message in str(caught.value)
