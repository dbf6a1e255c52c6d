"""The HTTP scorer against a real local server: the shapes of known endpoints, and everything one can do wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from judge_server import Endpoint, serving
from pydantic import ValidationError

from can_dist.config import HttpScorer
from can_dist.console import heard_by
from can_dist.errors import CanDistError, DataError, EnvironmentProblem
from can_dist.scoring.kinds import check_scorer_opens, load_scorer, scorer_identity
from can_dist.scoring.protocol import Response

RESPONSES = [Response(f"r{n}", [{"role": "user", "content": f"prompt {n}"}], "y" * n, []) for n in range(1, 8)]
LENGTHS = [float(len(response.text)) for response in RESPONSES]
Answer = Callable[[dict[str, Any], int], Any]


def spec_of(server: Endpoint, **changes: Any) -> HttpScorer:
    """A scorer in the simplest shape: one response in, {"score": number} out."""
    simple = {"url": server.url + "/score", "model": "rm", "request": {"response": "{response}"}, "value": "score"}
    return HttpScorer(**(simple | {"max_retries": 1, "timeout_s": 5} | changes))


def scores(spec: HttpScorer) -> list[float]:
    found: list[float] = load_scorer(spec, "fp32").score(RESPONSES).tolist()
    return found


def ok(content: Any) -> tuple[int, dict[str, str], Any]:
    return 200, {}, content


# ----------------------------------------------------------------------------------------------------- known shapes


def vllm_classify(body: dict[str, Any], _: int) -> Any:
    return ok({"data": [{"index": i, "probs": [0.5, len(text)]} for i, text in enumerate(body["input"])]})


def vllm_pooling(body: dict[str, Any], _: int) -> Any:
    return ok({"data": [{"index": i, "data": [len(text)]} for i, text in enumerate(body["input"])]})


def vllm_score(body: dict[str, Any], _: int) -> Any:
    return ok({"data": [{"score": len(two)} for one, two in zip(body["text_1"], body["text_2"], strict=True)]})


def sglang_classify(body: dict[str, Any], _: int) -> Any:
    return ok([{"embedding": [len(text)], "meta_info": {}} for text in body["text"]])


def moderation(body: dict[str, Any], _: int) -> Any:
    return ok({"results": [{"flagged": False, "category_scores": {"violence/graphic": len(t)}} for t in body["input"]]})


def chat(body: dict[str, Any], _: int) -> Any:
    *_, prompt, response = body["messages"]
    assert prompt["content"].startswith("prompt")
    assert response["role"] == "assistant"
    return ok({"data": [{"data": [len(response["content"])]}]})


@pytest.mark.parametrize(
    ("answer", "request_", "value", "batch_size"),
    [
        (vllm_classify, {"model": "m", "input": "{response}"}, "data.*.probs.1", 3),
        (vllm_pooling, {"model": "m", "input": "{response}"}, "data.*.data.0", 3),
        (vllm_score, {"model": "m", "text_1": "{prompt}", "text_2": "{response}"}, "data.*.score", 3),
        (sglang_classify, {"model": "m", "text": "{response}"}, "*.embedding.0", 3),
        (moderation, {"input": "{response}"}, "results.*.category_scores.violence/graphic", 3),
        (chat, {"model": "m", "messages": "{messages}"}, "data.0.data.0", 1),
    ],
)
def test_shape_of_a_known_endpoint(answer: Answer, request_: dict[str, Any], value: str, batch_size: int) -> None:
    with serving(answer) as server:
        assert scores(spec_of(server, request=request_, value=value, batch_size=batch_size)) == LENGTHS
        assert len(server.bodies) == -(-len(RESPONSES) // batch_size)


def test_template_is_the_text_and_says_where_everything_goes() -> None:
    with serving(lambda body, _: ok({"data": [{"data": [len(text)]} for text in body["input"]]})) as server:
        template = "BEGIN {prompt} ASSISTANT:{response}</s>"
        spec = spec_of(server, request={"input": "{text}"}, value="data.*.data.0", template=template, batch_size=7)
        scores(spec)
        texts = server.bodies[0]["input"]
    assert texts[:2] == ["BEGIN prompt 1 ASSISTANT:y</s>", "BEGIN prompt 2 ASSISTANT:yy</s>"]


def test_text_that_looks_like_a_placeholder_is_sent_as_it_is() -> None:
    """A response of somebody's model must not be able to move text about."""
    rows = [Response("r0", [{"role": "user", "content": "{response}"}], "{prompt}", [])]
    with serving(lambda *_: ok({"score": 1})) as server:
        spec = spec_of(server, request={"input": "{text}"}, template="U:{prompt} A:{response}")
        load_scorer(spec, "fp32").score(rows)
        assert server.bodies == [{"input": "U:{response} A:{prompt}"}]


def test_scores_keep_the_order_of_the_rows_and_requests_their_bound() -> None:
    def slow_at_first(body: dict[str, Any], number: int) -> Any:
        time.sleep(0.1 if number < 3 else 0.02)
        return ok({"score": len(body["response"])})

    with serving(slow_at_first) as server:
        told: list[int] = []
        with heard_by(told.append):
            assert scores(spec_of(server, concurrency=3)) == LENGTHS
        assert server.most == 3
        assert told == [1] * len(LENGTHS), "for the bar"


# ---------------------------------------------------------------------------------------------- what may go wrong


def test_rate_limit_is_waited_out_as_the_server_says() -> None:
    def once(body: dict[str, Any], number: int) -> Any:
        return (429, {"Retry-After": "0.3"}, {}) if number == 0 else ok({"score": len(body["response"])})

    with serving(once) as server:
        start = time.monotonic()
        assert scores(spec_of(server, concurrency=1)) == LENGTHS
        assert time.monotonic() - start > 0.3
        assert len(server.bodies) == len(RESPONSES) + 1


def test_broken_server_is_tried_again() -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return (503, {"retry-after-ms": "10"}, {}) if number % 2 == 0 else ok({"score": len(body["response"])})

    with serving(flaky) as server:
        assert scores(spec_of(server, concurrency=1)) == LENGTHS


SOON = {"retry-after-ms": "5"}


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (
            (200, {}, "<html>"),
            DataError,
            ", response 'r1': the answer is not JSON: '<html>'. Is url the right address?",
        ),
        (
            ok({"result": 1, "id": "a"}),
            DataError,
            ", response 'r1': the answer has no 'score' of value 'score'; there is: result, id. Set value to where the",
        ),
        (ok([1]), DataError, "the answer has no 'score' of value 'score'; there is: [1]. Set value"),
        (ok('{"score": NaN}'), DataError, "response 'r1': found nan at value 'score', expected a finite number."),
        (ok({"score": "0.5"}), DataError, "response 'r1': found '0.5' at value 'score', expected a finite number."),
        (ok({"score": None}), DataError, "response 'r1': found None at value 'score', expected a finite number."),
        (ok({"score": True}), DataError, "response 'r1': found True at value 'score', expected a finite number."),
        (
            (400, {}, {"error": "too long"}),
            DataError,
            ", response 'r1': HTTP 400, the endpoint refused this request. See its log: a text may be too long",
        ),
        (
            (401, {}, {}),
            EnvironmentProblem,
            ", response 'r1': HTTP 401, the endpoint refused a request without key. Set api_key_env",
        ),
        ((404, {}, {}), EnvironmentProblem, ", response 'r1': HTTP 404, no such model or address."),
        (
            (429, SOON, {}),
            EnvironmentProblem,
            ", response 'r1': still rate-limited (HTTP 429) after 1 retries. Lower concurrency, raise max_retries",
        ),
        ((500, SOON, {}), EnvironmentProblem, ", response 'r1': HTTP 500 after 1 retries. See the endpoint's log"),
    ],
)
def test_bad_answer_is_one_error_with_endpoint_row_and_remedy(
    reply: Any, kind: type[CanDistError], message: str
) -> None:
    with serving(lambda *_: reply) as server:
        with pytest.raises(kind) as caught:
            scores(spec_of(server, concurrency=1))
        assert f"scorer rm at {server.url}/score" in str(caught.value)
    assert message in str(caught.value)
    assert str(caught.value) == f"{caught.value.message} {caught.value.remedy}"
    assert caught.value.remedy.startswith(("Is ", "Set ", "See ", "Compare ", "Lower "))


def test_wrong_number_of_scores_is_refused_before_they_are_mixed_up() -> None:
    with serving(lambda body, _: ok({"data": [{"score": 1}] * (len(body["input"]) - 1)})) as server:
        spec = spec_of(server, request={"input": "{response}"}, value="data.*.score", batch_size=4, concurrency=1)
        with pytest.raises(DataError, match=r"4 responses 'r1' to 'r4': sent 4 response\(s\), the answer has 3 "):
            scores(spec)


def test_answers_in_another_order_are_refused_not_mixed_up() -> None:
    """A reranker answers sorted by score, and says by ``index`` which text each entry is about."""

    def reranker(body: dict[str, Any], _: int) -> Any:
        entries = [{"index": i, "relevance_score": len(text)} for i, text in enumerate(body["documents"])]
        return ok({"results": sorted(entries, key=lambda entry: -entry["relevance_score"])})

    with serving(reranker) as server:
        spec = spec_of(server, request={"documents": "{response}"}, value="results.*.relevance_score", batch_size=3)
        with pytest.raises(DataError, match=r"at 'results\.' are not in the order of .* index is \[2, 1, 0\]\. Use an"):
            scores(spec)
        assert scores(spec.model_copy(update={"batch_size": 1})) == LENGTHS


def test_bad_number_within_a_batch_is_that_of_its_row() -> None:
    with serving(lambda body, _: ok({"data": [{"s": float(len(t) != 6) or None} for t in body["input"]]})) as server:
        spec = spec_of(server, request={"input": "{response}"}, value="data.*.s", batch_size=7)
        with pytest.raises(DataError, match=r"response 'r6': found None at value 'data\.\*\.s'"):
            scores(spec)


def test_slow_endpoint_says_how_long_was_waited() -> None:
    def slow(*_: Any) -> Any:
        time.sleep(0.6)
        return ok({"score": 1})

    with (
        serving(slow) as server,
        pytest.raises(EnvironmentProblem, match=r"response 'r\d': no answer within 0.2 s, in 1 attempts\. Lower"),
    ):
        scores(spec_of(server, timeout_s=0.2, max_retries=0))


def test_endpoint_that_is_down_says_so() -> None:
    with serving(lambda *_: ok({})) as server:
        spec = spec_of(server, max_retries=0)
    with pytest.raises(EnvironmentProblem, match=r"response 'r\d': no connection in 1 attempts\. Is it run") as caught:
        scores(spec)
    assert caught.value.message.endswith("no connection in 1 attempts.")
    assert caught.value.remedy == "Is it running, and is base_url right?"


def test_failure_sends_nothing_that_was_still_waiting() -> None:
    def refuse(_: Any, number: int) -> Any:
        time.sleep(0.1 if number else 0)
        return 400, {}, {}

    with serving(refuse) as server:
        with pytest.raises(DataError):
            scores(spec_of(server, concurrency=1))
        assert len(server.bodies) <= 3


def test_conversation_of_several_turns_is_no_single_prompt() -> None:
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    with serving(lambda *_: ok({"score": 1})) as server:
        scorer = load_scorer(spec_of(server, request={"p": "{prompt}", "r": "{response}"}), "fp32")
        with pytest.raises(DataError, match=r"response 'r0': a conversation of 3 messages is no single \{prompt\}"):
            scorer.score([Response("r0", turns, "y", [])])


# ------------------------------------------------------------------------------------------------------------- keys


def test_key_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SCORER_KEY", "sk-secret-123")
    with serving(lambda *_: (403, {}, {"error": "bad key sk-secret-123"})) as server:
        spec = spec_of(server, api_key_env="MY_SCORER_KEY")
        with pytest.raises(EnvironmentProblem, match="refused the key in the environment variable MY_") as caught:
            scores(spec)
        assert set(server.keys) == {"Bearer sk-secret-123"}
    assert "sk-secret" not in str(caught.value) + spec.model_dump_json() + json.dumps(scorer_identity(spec, "fp32"))


def test_missing_key_is_found_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_SCORER_KEY", raising=False)
    spec = HttpScorer(url="http://localhost:1/score", model="rm", request={"r": "{response}"}, value="s",
                      api_key_env="MY_SCORER_KEY")  # fmt: skip
    with pytest.raises(EnvironmentProblem, match="environment variable MY_SCORER_KEY, which is not set or empty"):
        check_scorer_opens(spec)


# ---------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request": {"input": "hello"}}, "request holds no response"),
        ({"request": {"input": "{prompt}"}}, "request holds no response"),
        (
            {"request": {"q": "Q: {prompt}", "a": "{response}"}},
            "request value 'Q: {prompt}': only a whole value is repl",
        ),
        # a batch of two would be the pairs (prompt, prompt) and (response, response), and two scores come back
        (
            {"request": {"inputs": ["{prompt}", "{response}"]}, "value": "*.score", "batch_size": 2},
            "inside a list, where",
        ),
        ({"request": {"input": "{text}"}}, "'{text}' in request and template belong together"),
        ({"template": "{prompt}{response}"}, "'{text}' in request and template belong together"),
        ({"request": {"input": "{text}"}, "template": "{prompt}"}, "template must contain {prompt} and {response}"),
        ({"value": "data.*.probs.*"}, "is no dotted path with at most one"),
        ({"value": "data..score"}, "is no dotted path"),
        ({"batch_size": 2}, r"batch_size 2 sends lists; value needs a '\*'"),
        ({"url": "ftp://host/score"}, "expected an address such as"),
        ({"url": "http://host/score?key=abc"}, "a key belongs into api_key_env"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"concurrency": 0}, "greater than or equal to 1"),
        ({"concurrency": 257}, "less than or equal to 256"),
        ({"timeout_s": 0}, "greater than 0"),
        ({"max_retries": -1}, "greater than or equal to 0"),
        ({"sign": 0}, "should be 1 or -1"),
    ],
)
def test_request_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        spec_of(type("Server", (), {"url": "http://localhost"})(), **changes)


def test_identity_is_what_was_declared_not_where_it_runs() -> None:
    def identity_of(**changes: Any) -> dict[str, Any]:
        simple = {"url": "http://a:8000/classify", "model": "rm", "request": {"x": "{response}"}, "value": "*.s"}
        return scorer_identity(HttpScorer(**(simple | changes)), "fp32")

    base = identity_of()
    for change in ({"url": "https://b/classify"}, {"timeout_s": 1}, {"concurrency": 1}, {"batch_size": 8}):
        assert identity_of(**change) == base
    for other in ({"url": "http://a:8000/pooling"}, {"model": "m"}, {"revision": "1"}, {"sign": -1}, {"value": "*.t"}):
        assert identity_of(**other) != base
