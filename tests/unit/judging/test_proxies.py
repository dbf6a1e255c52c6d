"""Proxies of the environment, met by every client of an endpoint: scorers, the endpoint that samples, the judge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from judge_server import serving

from can_dist.config import HttpScorer
from can_dist.config.endpoints import GenerateEndpoint
from can_dist.config.sections import Generate
from can_dist.endpoints import is_loopback, open_client
from can_dist.errors import EnvironmentProblem
from can_dist.judging.endpoint import JudgeSpec, ask
from can_dist.judging.endpoint import open_client as open_judge
from can_dist.scoring.kinds import check_scorer_opens, load_scorer
from can_dist.scoring.protocol import Response
from can_dist.stages.served_responses import Sampler

VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
ROW = Response("r", [{"role": "user", "content": "q"}], "a", [])


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def score(url: str) -> Any:
    spec = HttpScorer(url=url, model="m", request={"a": "{response}"}, value="score", max_retries=0)
    check_scorer_opens(spec)
    return load_scorer(spec, "fp32").score([ROW])


class NoTemplate:
    template = None
    options: dict[str, Any] = {}  # noqa: RUF012


def sample(url: str) -> Any:
    endpoint = GenerateEndpoint(base_url=url, model="m", max_retries=0)
    with open_client("generate.endpoint m", url, endpoint) as client:
        formatter: Any = NoTemplate()
        prompt = {"prompt_id": "p", "messages": ROW.messages}
        return Sampler(client, endpoint, formatter, Generate(), 0).sample(prompt, 0)


def judge(url: str) -> Any:
    spec = JudgeSpec(base_url=url, model="m", criterion="safety", max_retries=0)

    async def once() -> Any:
        async with open_judge(spec) as client:
            return await ask(client, spec, [{"role": "user", "content": "q"}])

    return asyncio.run(once())


CLIENTS = [score, sample, judge]


@pytest.mark.parametrize("use", CLIENTS)
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "socks5://127.0.0.1:9", "nonsense://x"])
def test_this_machine_is_reached_whatever_proxies_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any], proxy: str
) -> None:
    answers = {score: (200, {}, {"score": 0.5})}
    with serving(lambda *_: answers.get(use, "yes")) as server:
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy)
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            use(url)
        assert len(server.bodies) == 2


@pytest.mark.parametrize("use", CLIENTS)
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "nonsense://x", "http://proxy:port"])
def test_proxy_that_the_client_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any], proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EnvironmentProblem, match=r"the proxy that the environment names \(ALL_PROXY\) cannot be used"):
        use("http://endpoint.invalid/v1")


@pytest.mark.parametrize("use", CLIENTS)
@pytest.mark.parametrize("status", [502, 503, 403, 407])
def test_answer_of_a_proxy_names_the_variable_and_no_proxy(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any], status: int
) -> None:
    with serving(lambda *_: (status, {}, {"error": "proxy says no"})) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        with pytest.raises(EnvironmentProblem) as caught:
            use("http://endpoint.invalid/v1")
    message = str(caught.value)
    assert "The environment variable http_proxy sends this request through a proxy" in message
    assert "add endpoint.invalid to NO_PROXY" in message


@pytest.mark.parametrize("use", CLIENTS)
def test_dead_proxy_is_named(monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any]) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://user:secret@127.0.0.1:9")
    with pytest.raises(EnvironmentProblem, match=r"no connection .* variable ALL_PROXY sends") as caught:
        use("http://endpoint.invalid/v1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("use", CLIENTS)
def test_without_a_proxy_none_is_spoken_of(monkeypatch: pytest.MonkeyPatch, use: Callable[[str], Any]) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "endpoint.invalid")
    with pytest.raises(EnvironmentProblem) as caught:
        use("http://endpoint.invalid/v1")
    assert "proxy" not in str(caught.value).lower()


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1", "a.localhost")))
    assert not any(map(is_loopback, ("", "localhost.example", "10.0.0.1", "example.com")))
