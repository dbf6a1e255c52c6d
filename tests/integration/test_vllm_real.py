"""A real vLLM, on a CPU: inside the actors, behind HTTP as scorer and as endpoint, and as reader of what is exported.

vLLM pins its own torch and transformers: `make test-vllm` runs this in an environment of its own. The other side of
each comparison is transformers, on the same files.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from served import serving
from tiny import make_tiny_classifier, make_tiny_lm

from can_dist.config import Config, HttpScorer, Model, SequenceClassifier, validate_config
from can_dist.config.sections import Generate
from can_dist.errors import DataError, EnvironmentProblem
from can_dist.modeling import sampling, vllm_engine
from can_dist.modeling.loading import load_causal_lm, load_tokenizer
from can_dist.modeling.policy_probe import PROBE, check_probe, logp_alone
from can_dist.outcomes.export import export_policy
from can_dist.pipeline import run_pipeline
from can_dist.run import Run
from can_dist.scoring.http_scorer import HttpEndpointScorer
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Response
from can_dist.tables.artifacts import Artifact

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm is not installed; make test-vllm runs this"
    ),
]

ENGINE = {"engine": "transformers"}
WORDS = [f"w{i}" for i in range(12)]
END, OTHER_END = 4, 2  # </s> and <user>
HEAD = {"head_dim": 32}  # the smallest that vLLM's attention has on CPUs
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, of each engine here
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
SERVER_ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # before an engine in this process sets its own


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with two end tokens and sampling defaults of its own, a reward model, and prompts."""
    directory = tmp_path_factory.mktemp("vllm")
    make_tiny_lm(directory / "lm", WORDS, **HEAD)
    (directory / "lm" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [END, OTHER_END], "do_sample": True, "top_k": 1, "temperature": 0.2})
    )
    make_tiny_classifier(directory / "reward", WORDS, **HEAD)
    lines = [json.dumps({"prompt": f"w{i} w{i + 1} w3"[: 5 + 4 * (i % 2)].strip()}) + "\n" for i in range(10)]
    (directory / "prompts.jsonl").write_text("".join(lines))
    return directory


def configure(world: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "seed": 3,
        "beta": 0.5,
        "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 2, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(world / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.05}},
        "generate": {"engine": "vllm", "num_responses": 4, "max_new_tokens": 8},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_config(raw)


def respond(run: Path, config: Config) -> Artifact:
    with Run(run, config) as work:
        return work.generate(config.reference, work.prompts())


@pytest.fixture(scope="module")
def responses(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return respond(tmp_path_factory.mktemp("run"), configure(world))


# ------------------------------------------------------------------------------------------------------ in the actors


def test_generate_stage_samples_distinct_responses_as_they_are_asked_for(world: Path, responses: Artifact) -> None:
    rows = responses.table.to_pylist()
    assert len(rows) == 8 * 4
    assert len({tuple(row["token_ids"]) for row in rows}) > 24
    for row in rows:
        assert row["num_tokens"] == len(row["token_ids"]) <= 8
        assert (row["token_ids"][-1] in (END, OTHER_END)) == (row["finish_reason"] == "stop")
        assert not {END, OTHER_END} & set(row["token_ids"][:-1])
        assert row["finish_reason"] == "stop" or row["num_tokens"] == 8
    reasons = Counter(row["finish_reason"] for row in rows)
    assert responses.info["finish_reason"] == dict(reasons)
    assert set(reasons) == {"stop", "length"}


def test_other_actors_other_shards_and_a_restart_give_the_same_responses(
    world: Path, responses: Artifact, tmp_path: Path
) -> None:
    changed = configure(world, generate={"shard_prompts": 2, "batch_prompts": 2}, cluster={"num_actors": 2})
    assert respond(tmp_path, changed).table.equals(responses.table)


@pytest.mark.parametrize("template", [None, "w9 {prompt} w8"])
def test_greedily_both_engines_write_the_same(world: Path, tmp_path: Path, template: str | None) -> None:
    """The same prompt ids, end tokens and reasons: a nucleus this small holds the likeliest token only."""
    greedy = {"num_responses": 2, "top_p": 1e-9}
    told = {"reference": {"template": template}, "generate": greedy}
    ours = respond(tmp_path / "vllm", configure(world, **told))
    plain = respond(tmp_path / "plain", configure(world, **told | {"generate": greedy | {"engine": "transformers"}}))
    assert ours.table.equals(plain.table)
    assert ours.info == plain.info
    assert ours.path.name != plain.path.name, "the engine is part of the identity"


@pytest.fixture(scope="module")
def run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MoCAN with LoRA, in which vLLM samples of the reference and, to evaluate it, of the policy."""
    directory = tmp_path_factory.mktemp("mocan") / "run"
    train = {"learning_rate": 3e-2, "batch_size": 8, "max_steps": 4, "lora": {"r": 4}}
    run_pipeline(directory, configure(world, train=train, evaluate={"num_responses": 2, "num_samples": 1}))
    return directory


def test_method_runs_on_what_vllm_samples(run: Path) -> None:
    stages = [json.loads((path / "STAGE.json").read_text()) for path in run.glob("generate-*")]
    assert len(stages) == 3, "reference on train and on test, policy on test"
    assert {stage["identity"]["options"]["engine"] for stage in stages} == {"vllm"}
    assert list(run.glob("evaluate-*/report.json"))


def test_model_that_vllm_does_not_take_is_told_in_words(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)  # heads of 16, which vLLM's attention has not on CPUs
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": word}) + "\n" for word in WORDS))
    with pytest.raises(EnvironmentProblem, match=r"vllm cannot sample: .*head_dim=16.* Set generate\.engine to transf"):
        respond(tmp_path / "run", configure(tmp_path))


# ----------------------------------------------------------------------------------- one engine, of an exported policy


@pytest.fixture(scope="module")
def policy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "policy"
    export_policy(run, directory, adapter=False)
    return directory


@pytest.fixture(scope="module")
def engine(policy: Path) -> Any:
    return vllm_engine.open_engine(Model(model=str(policy)), "fp32", 32)


@pytest.fixture(scope="module")
def plain(policy: Path) -> torch.nn.Module:
    return load_causal_lm(Model(model=str(policy)), "fp32").eval()


PROMPT = [2, 6, 9, 3]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
def test_tokens_are_drawn_from_the_models_own_distribution(
    engine: Any, plain: torch.nn.Module, temperature: float, top_p: float
) -> None:
    options = Generate(temperature=temperature, top_p=top_p, max_new_tokens=1)
    seeds = [sampling.row_seed(7, "p", k) for k in range(4000)]
    drawn = vllm_engine.sample(engine, [PROMPT] * len(seeds), seeds, options, [END])
    counts = np.bincount([tokens[0] for tokens, _ in drawn], minlength=17)
    with torch.no_grad():
        expected = (plain(torch.tensor([PROMPT])).logits[0, -1] / temperature).softmax(-1).double().numpy()
    order = np.argsort(-expected)
    inside = np.cumsum(expected[order]) - expected[order] < top_p
    expected[order[~inside]] = 0
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert stats.chisquare(counts[kept], expected[kept] / expected[kept].sum() * len(seeds)).pvalue > 1e-3


def test_responses_are_as_likely_as_those_of_transformers(engine: Any, plain: torch.nn.Module, policy: Path) -> None:
    """Mean ln π and mean length of whole responses; vLLM's own ln π is that of transformers."""
    tokenizer, options = load_tokenizer(Model(model=str(policy))), Generate(max_new_tokens=8)
    seeds = [sampling.row_seed(8, "p", k) for k in range(1000)]
    asked = [PROMPT] * len(seeds)
    ours = vllm_engine.sample(engine, asked, seeds, options, [END])
    theirs = sampling.sample(plain, tokenizer, asked, seeds, options, [END])
    assert ours != theirs, "the random numbers are the engine's own"
    logps, lengths = (
        [[measure(tokens) for tokens, _ in drawn] for drawn in (ours, theirs)]
        for measure in (lambda tokens: logp_alone(plain, PROMPT, tokens), len)
    )
    assert stats.ttest_ind(*logps).pvalue > 1e-3
    assert stats.ttest_ind(*lengths).pvalue > 1e-3
    assert [END] in [tokens for tokens, _ in ours], "empty responses come as the end token alone"
    for (tokens, _), expected in zip(ours[:20], logps[0], strict=False):
        assert vllm_engine.logp(engine, PROMPT, tokens) == pytest.approx(expected, abs=1e-4)


def test_a_response_is_its_seeds_whatever_is_asked_beside_it(engine: Any) -> None:
    options = Generate(max_new_tokens=8)
    seeds = [sampling.row_seed(9, "p", k) for k in range(64)]
    together = vllm_engine.sample(engine, [PROMPT] * 64, seeds, options, [END])
    assert vllm_engine.sample(engine, [PROMPT] * 8, seeds[40:48], options, [END]) == together[40:48]
    assert vllm_engine.sample(engine, [PROMPT], seeds[-1:], options, [END]) == together[-1:]


def test_f45_vllm_refuses_a_policy_that_is_not_the_one_trained(engine: Any, run: Path, tmp_path: Path) -> None:
    (train,) = run.glob("train-*")
    check_probe(engine, str(train / "policy"), "fp32", vllm_engine.logp)
    probe = json.loads((train / PROBE).read_text())
    probe["rows"][0]["logp"] -= 1.0
    (tmp_path / PROBE).write_text(json.dumps(probe))
    with pytest.raises(DataError, match="not the policy that was trained"):
        check_probe(engine, str(tmp_path / "policy"), "fp32", vllm_engine.logp)


@pytest.mark.parametrize("stop", [(".",), (" and", "the ")])
def test_stop_strings_end_a_response_where_transformers_ends_it(
    shared_data: Path, tmp_path: Path, stop: tuple[str, ...]
) -> None:
    """On real tokens, whose text depends on those before."""
    source = shared_data / "prompts" / "can_problem_safety.json"
    lines = [json.dumps({"prompt": row["prompt"]}) + "\n" for row in json.loads(source.read_text())[:30]]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    model = str(shared_data / "models" / "stories3M-qa-sft")
    told = {"reference": {"model": model}}
    greedy = {"num_responses": 1, "top_p": 1e-9, "max_new_tokens": 32, "stop": list(stop)}
    tables = [
        respond(tmp_path / engine, configure(tmp_path, **told, generate=greedy | {"engine": engine})).table
        for engine in ("vllm", "transformers")
    ]
    assert tables[0].equals(tables[1])
    ended = [row for row in tables[0].to_pylist() if row["finish_reason"] == "stop" and row["token_ids"][-1] != 2]
    assert len(ended) > 3, "at a stop string, not at the end token"


# ------------------------------------------------------------------------------------------------------- behind HTTP


def serving_vllm(directory: Path, *options: str) -> AbstractContextManager[str]:
    """Run vLLM's server of a model; yields its address without a path.

    The command `vllm serve` is the same; that of vllm-cpu 0.32.0 ends at once, looking for a package named vllm.
    """
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager", *options]
    return serving(command, directory.with_name(f"{directory.name}.log"), SERVER_ENVIRONMENT, seconds=240)


@pytest.fixture(scope="module")
def reward_url(world: Path) -> Iterator[str]:
    with serving_vllm(world / "reward", "--runner", "pooling", "--served-model-name", "reward") as url:
        yield url


TEXT = {"input": "{text}", "add_special_tokens": False, "use_activation": False}
TEMPLATE = "<user>{prompt}<assistant>{response}</s>"


@pytest.mark.parametrize(
    "block",
    [
        {"url": "/classify", "request": TEXT, "value": "data.*.probs.0", "template": TEMPLATE, "batch_size": 3},
        {"url": "/pooling", "request": TEXT, "value": "data.*.data.0", "template": TEMPLATE, "batch_size": 3},
        {
            "url": "/classify",
            "request": {"messages": "{messages}", "use_activation": False},
            "value": "data.0.probs.0",
        },
    ],
    ids=["classify", "pooling", "messages"],
)
def test_served_reward_model_scores_as_the_same_model_here(
    world: Path, reward_url: str, responses: Artifact, block: dict[str, Any]
) -> None:
    rows = [
        Response(row["response_id"], row["messages"], row["text"], row["token_ids"])
        for row in responses.table.to_pylist()
    ]
    block = block | {"url": reward_url + block["url"], "request": {"model": "reward"} | block["request"]}
    served = HttpEndpointScorer(HttpScorer(model="reward", **block)).score(rows)
    here = load_scorer(SequenceClassifier(model=str(world / "reward")), "fp32").score(rows)
    assert np.std(here) > 0.01
    np.testing.assert_allclose(served, here, atol=1e-5)


def test_what_the_server_refuses_is_told(reward_url: str, responses: Artifact) -> None:
    spec = {"kind": "http", "url": f"{reward_url}/classify", "model": "reward", "value": "data.*.probs.0"}
    spec |= {"template": TEMPLATE, "batch_size": 2, "request": {"model": "reward"} | TEXT}
    rows = [Response("p/0", [{"role": "user", "content": "w1"}], "w2 " * 80, [])]
    with pytest.raises(DataError, match=r"response 'p/0': HTTP 400, the endpoint refused this request.*too long"):
        HttpEndpointScorer(HttpScorer(**spec)).score(rows)
    with pytest.raises(EnvironmentProblem, match="HTTP 404, no such model or address"):
        HttpEndpointScorer(HttpScorer(**spec | {"request": {"model": "another"} | TEXT})).score(rows)


@pytest.fixture(scope="module")
def lm_url(world: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The reference, and the policy as an exported adapter over it."""
    adapter = tmp_path_factory.mktemp("exported") / "adapter"
    export_policy(run, adapter, adapter=True)
    with serving_vllm(
        world / "lm", "--served-model-name", "reference", "--enable-lora", "--max-lora-rank", "8",
        "--lora-modules", f"policy={adapter}",
    ) as url:  # fmt: skip
        yield f"{url}/v1"


SAMPLE = {"top_k": -1}  # else the server takes the model's own


def ask(
    world: Path, run: Path, url: str, *, model: str = "reference", request: dict[str, Any] = SAMPLE, **changes: Any
) -> Artifact:
    endpoint = {"base_url": url, "model": model, "concurrency": 2, "request": request}
    changes["generate"] = {"engine": "transformers", "endpoint": endpoint} | changes.get("generate", {})
    return respond(run, configure(world, **changes))


def test_endpoint_samples_by_seed(world: Path, lm_url: str, tmp_path: Path) -> None:
    table = ask(world, tmp_path / "a", lm_url).table
    assert len(set(table.column("text").to_pylist())) > 24
    assert ask(world, tmp_path / "b", lm_url).table.equals(table)


def test_the_models_own_sampling_defaults_are_found_out(world: Path, lm_url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 4 responses to each of 8 prompts are the same"):
        ask(world, tmp_path, lm_url, request={})


@pytest.mark.parametrize("template", [None, "w9 {prompt} w8"])
def test_endpoint_sees_the_prompt_as_the_reference_does(
    world: Path, lm_url: str, tmp_path: Path, template: str | None
) -> None:
    told: dict[str, Any] = {"reference": {"template": template}, "generate": {"num_responses": 1, "top_p": 1e-9}}
    plain = respond(tmp_path / "plain", configure(world, **told | {"generate": told["generate"] | ENGINE}))
    served = ask(world, tmp_path / "served", lm_url, **told)
    for column in ("text", "finish_reason"):
        assert served.table.column(column).equals(plain.table.column(column))


def test_exported_adapter_over_the_reference_is_the_exported_policy(
    world: Path, lm_url: str, policy: Path, tmp_path: Path
) -> None:
    greedy: dict[str, Any] = {"num_responses": 1, "top_p": 1e-9}
    adapted = ask(world, tmp_path / "adapter", lm_url, model="policy", generate=greedy).table.column("text")
    told = {"reference": {"model": str(policy)}, "generate": greedy | ENGINE}
    merged = respond(tmp_path / "merged", configure(world, **told)).table.column("text")
    base = ask(world, tmp_path / "base", lm_url, generate=greedy).table.column("text")
    assert adapted.equals(merged)
    assert not adapted.equals(base), "training changed something"
