"""Generation and scoring on real Ray actors: what comes out depends on the inputs alone, whoever does the work."""

import json
import os
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import ray
import torch
from scipy import stats
from tiny import make_tiny_classifier, make_tiny_lm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from can_dist.config import Config, Model, MultiHead, PythonCallable, SequenceClassifier, validate_config
from can_dist.console import interruptible
from can_dist.errors import DataError, EnvironmentProblem, Interrupted
from can_dist.scoring.protocol import LogProb
from can_dist.stages.generate import GenerateJob, generate
from can_dist.stages.ingest import ingest_prompts
from can_dist.stages.score import ScoreJob, score
from can_dist.stages.score_cache import keep, look_up, open_cache
from can_dist.tables.artifacts import read_part
from can_dist.workspace import Workspace

WORDS = [f"w{i}" for i in range(12)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    make_tiny_lm(directory / "lm", WORDS)
    make_tiny_classifier(directory / "classifier", WORDS)
    prompts = [{"prompt": f"{a} {b} {a}"[: 5 + 3 * (i % 2)].strip()} for i, (a, b) in enumerate(pairwise(WORDS))]
    lines = [json.dumps({"prompt": f"{p['prompt']} w{i}"}) for i, p in enumerate(prompts)]
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def configure(world: Path, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "seed": 3,
        "prompts": {"source": str(world / "prompts.jsonl"), "num_test": 3, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(world / "lm")},
        "reward": {"kind": "callable", "function": "scorers:num_words"},
        "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
        "generate": {"num_responses": 3, "max_new_tokens": 8, "batch_prompts": 2, "shard_prompts": 2},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return validate_config(raw)


def respond(run: Path, config: Config) -> Any:
    work = Workspace(run, config)
    try:
        prompts = ingest_prompts(work, config.prompts)
        return generate(work, config.reference, prompts, split="train", role="reference")
    finally:
        work.close()


@pytest.fixture(scope="module")
def responses(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return respond(tmp_path_factory.mktemp("base"), configure(world))


def scored(run: Path, config: Config, responses: Any, scorers: dict) -> Any:
    work = Workspace(run, config)
    try:
        return score(work, responses, scorers, role="reference on train")
    finally:
        work.close()


def test_responses_do_not_depend_on_sharding_or_on_the_number_of_actors(world, responses, tmp_path) -> None:
    sharded = configure(world, generate={"shard_prompts": 8}, cluster={"num_actors": 1})
    other = respond(tmp_path, sharded)
    assert len(other.parts) == 1
    assert len(responses.parts) == 4
    assert other.table.equals(responses.table)


def test_every_prompt_has_its_k_responses_and_finish_reasons(responses) -> None:
    table = responses.table
    per_prompt = pc.value_counts(table.column("prompt_id").combine_chunks()).field("counts")
    assert set(per_prompt.to_pylist()) == {3}
    for row in table.to_pylist():
        assert row["num_tokens"] == len(row["token_ids"]) <= 8
        assert (row["finish_reason"] == "stop") == (row["token_ids"][-1] == 4)
        assert row["finish_reason"] == "stop" or row["num_tokens"] == 8


def test_another_seed_gives_other_responses(world, responses, tmp_path) -> None:
    other = respond(tmp_path, configure(world, seed=4))
    assert other.table.column("text").to_pylist() != responses.table.column("text").to_pylist()


def test_samples_follow_the_models_distribution(world, tmp_path) -> None:
    """χ² of 4,000 first tokens of one prompt against the model's own softmax, with temperature and nucleus."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "w1 w2"}\n{"prompt": "w3"}\n{"prompt": "w4 w5"}\n')
    options = {
        "num_responses": 4000,
        "max_new_tokens": 1,
        "temperature": 0.05,
        "top_p": 0.9,
        "batch_prompts": 1,
        "shard_prompts": 1,
    }
    prompts = {"source": str(tmp_path / "one.jsonl"), "num_test": 2, "num_validation": 0}
    config = configure(world, prompts=prompts, generate=options)
    table = respond(tmp_path / "run", config).table
    tokens = np.array([ids[0] for ids in table.column("token_ids").to_pylist()])
    tokenizer, model = AutoTokenizer.from_pretrained(world / "lm"), AutoModelForCausalLM.from_pretrained(world / "lm")
    text = tokenizer.apply_chat_template(
        table.column("messages")[0].as_py(), tokenize=False, add_generation_prompt=True
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        probability = torch.softmax(model(ids).logits[0, -1].double() / 0.05, dim=-1).numpy()
    order = np.argsort(-probability)
    kept = order[: np.searchsorted(np.cumsum(probability[order]), 0.9) + 1]
    assert set(tokens) <= set(kept)
    expected = probability[kept] / probability[kept].sum() * len(tokens)
    observed = np.array([(tokens == token).sum() for token in kept])
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    assert len(kept) < len(probability), "the nucleus must cut something here"


def test_stop_string_ends_a_response_and_is_not_kept(world, tmp_path) -> None:
    config = configure(world, generate={"stop": ["w3", "w5"], "max_new_tokens": 24, "num_responses": 8})
    rows = respond(tmp_path, config).table.to_pylist()
    stopped = [row for row in rows if row["finish_reason"] == "stop" and row["token_ids"][-1] != 4]
    assert stopped
    for row in rows:
        assert "w3" not in row["text"]
        assert "w5" not in row["text"]


def test_scores_are_those_of_the_models_alone(world, responses, tmp_path) -> None:
    """Classifier scores and ln π against one forward pass per text with plain transformers."""
    spec = SequenceClassifier(model=str(world / "classifier"), sign=-1, tokens_per_pass=50)
    scorers = {"cost": spec, "logp.reference": LogProb(model=Model(model=str(world / "lm")))}
    table = scored(tmp_path, configure(world), responses, scorers).table
    tokenizer = AutoTokenizer.from_pretrained(world / "lm")
    classifier = AutoModelForSequenceClassification.from_pretrained(world / "classifier").eval()
    lm = AutoModelForCausalLM.from_pretrained(world / "lm").eval()
    for row, values in zip(responses.table.to_pylist(), table.to_pylist(), strict=True):
        conversation = [*row["messages"], {"role": "assistant", "content": row["text"]}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
            cost = classifier(ids, attention_mask=torch.ones_like(ids)).logits.item()
            logits = lm(torch.tensor([prompt_ids + row["token_ids"]])).logits[0].log_softmax(-1)
        logp = sum(logits[len(prompt_ids) - 1 + t, token].item() for t, token in enumerate(row["token_ids"]))
        assert values["cost"] == pytest.approx(-cost, abs=1e-5)
        assert values["logp.reference"] == pytest.approx(logp, abs=1e-4)


def test_f01_actor_killed_mid_shard_loses_and_repeats_nothing(world, responses, tmp_path, monkeypatch) -> None:
    kills = tmp_path / "kills"
    kills.mkdir()
    monkeypatch.setenv("CAN_DIST_TEST_KILLS", str(kills))
    config = configure(world)
    plain = scored(tmp_path / "plain", config, responses, {"r": PythonCallable(function="scorers:num_words")})
    import ray

    ray.shutdown()  # the next actors must see the variable
    spec = PythonCallable(function="scorers:kills_its_actor_once")
    killed = scored(tmp_path / "killed", config, responses, {"r": spec})
    ray.shutdown()
    assert (kills / "killed").exists()
    assert len(list(kills.glob("call-*"))) == len(responses.parts) + 1
    assert killed.table.drop_columns("r").equals(plain.table.drop_columns("r"))
    assert killed.table.column("r").equals(plain.table.column("r"))


def test_f01_actor_killed_from_outside_gives_identical_artifacts(world, responses, tmp_path) -> None:
    config = configure(world)
    scorers = {"r": PythonCallable(function="scorers:slow")}
    undisturbed = scored(tmp_path / "undisturbed", config, responses, scorers)
    work = Workspace(tmp_path / "killed", config)
    killed: list[int] = []

    def kill() -> None:
        while work._pool is None or not killed:
            if work._pool is not None and list((tmp_path / "killed").glob("score-*/part-*.arrow")):
                killed.append(ray.get(work._pool.actor(0).__ray_call__.remote(lambda _: os.getpid())))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        after = score(work, responses, scorers, role="reference on train")
    finally:
        thread.join(timeout=60)
        work.close()
    assert killed
    assert after.digest == undisturbed.digest


def test_f02_shard_that_always_kills_its_actor_fails_the_stage_by_name(world, responses, tmp_path) -> None:
    config = configure(world, cluster={"shard_attempts": 2})
    with pytest.raises(EnvironmentProblem, match=r"shard \d ended its actor 2 times; response .* does so by itself"):
        scored(tmp_path, config, responses, {"r": PythonCallable(function="scorers:always_kills_its_actor")})


def test_f17_non_finite_score_names_scorer_and_response(world, responses, tmp_path) -> None:
    with pytest.raises(DataError, match=r"scorer 'r': 1 score\(s\) are not finite numbers: \w+/1 \(nan\)"):
        scored(tmp_path, configure(world), responses, {"r": PythonCallable(function="scorers:not_a_number")})


def test_scorer_that_returns_too_few_scores_is_refused(world, responses, tmp_path) -> None:
    with pytest.raises(DataError, match=r"'scorers:one_short': returned 5 scores for 6 responses"):
        scored(tmp_path, configure(world), responses, {"r": PythonCallable(function="scorers:one_short")})


def test_placement_more_actors_than_the_cluster_has_say_what_there_is(world, responses, tmp_path) -> None:
    config = configure(world, cluster={"num_actors": 64, "wait_resources_s": 2})
    with pytest.raises(EnvironmentProblem, match=r"waiting for 64 x \{'CPU': 1\}; the cluster has .* Gave up after"):
        scored(tmp_path, config, responses, {"r": PythonCallable(function="scorers:num_words")})


def test_f21_classifier_context_too_short_for_a_text_is_refused(world, responses, tmp_path) -> None:
    spec = SequenceClassifier(model=str(world / "classifier"), max_length=8)
    with pytest.raises(DataError, match=r"has \d+ tokens with its prompt, the model takes 8"):
        scored(tmp_path, configure(world), responses, {"r": spec})


def test_f02_generation_names_and_tries_single_prompts(world, responses, tmp_path) -> None:
    config = configure(world)
    model, options = config.reference, config.generate
    job = GenerateJob(model, options, 3, "fp32", "train", responses.input("prompts").path, tmp_path, "its digest")
    ids = [row["prompt_id"] for row in responses.part(1).to_pylist()]
    assert job.row_names(1) == [f"prompt {name!r}" for name in dict.fromkeys(ids)]
    loaded = job.load()
    job.try_rows(loaded, 1, range(1, 2))
    assert list(tmp_path.iterdir()) == [], "nothing is kept"
    assert job.set_aside(1, 1, "why") is False
    job.process(loaded, 1)
    assert read_part(tmp_path / "part-00001.arrow").equals(responses.part(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_f17_no_score_that_is_not_finite_leaves_the_actor(responses, tmp_path, bad: float | None) -> None:
    class Scorer:
        def score(self, rows: list) -> np.ndarray:
            return np.array([1.0] * (len(rows) - 1) + [bad], dtype=np.float64)

    spec = PythonCallable(function="scorers:num_words")
    job = ScoreJob("r", spec, "{}", "fp32", responses.path, tmp_path, 0)
    shown = "nan" if bad is None else str(bad)
    with pytest.raises(DataError, match=rf"scorer 'r': 1 score\(s\) are not finite numbers: \w+/2 \({shown}\)"):
        job.process(Scorer(), 0)
    assert list(tmp_path.iterdir()) == []


def test_f17_scores_that_are_not_finite_are_quarantined_as_far_as_allowed(responses, tmp_path) -> None:
    class Scorer:
        def score(self, rows: list) -> np.ndarray:
            return np.array([np.nan, *range(1, len(rows) - 1), -np.inf])

    spec = PythonCallable(function="scorers:num_words")
    table = responses.part(0)
    names = table.column("response_id").to_pylist()
    with pytest.raises(
        DataError, match=r"2 score\(s\) are not finite .* cluster.max_quarantine, which is 1, at least 2"
    ):
        ScoreJob("r", spec, "{}", "fp32", responses.path, tmp_path, 1, "quarantine").process(Scorer(), 0)
    assert list(tmp_path.iterdir()) == []
    job = ScoreJob("r", spec, "{}", "fp32", responses.path, tmp_path, 2, "quarantine")
    job.process(Scorer(), 0)
    assert job.quarantined() == {names[0]: "r: its score is nan", names[-1]: "r: its score is -inf"}
    part = read_part(tmp_path / "part-00000.arrow")
    assert part.column("response_id").to_pylist() == names[1:-1]
    assert part.column("r").to_pylist() == list(range(1, len(names) - 1))


class _SignalWhenRead:
    """Reading it back from Ray sends this process a SIGTERM: the worst moment, inside Ray's own error handling."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.kill, (os.getpid(), signal.SIGTERM)


def test_f07_stop_signal_inside_ray_is_not_made_an_error(world, responses) -> None:
    """Ray wraps the exceptions it meets while it deserialises; a stop request must come through as itself."""
    import ray

    assert ray.is_initialized(), "the fixture generated on a real Ray"
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
        ray.get(ray.put(_SignalWhenRead()))


# ---------------------------------------------------------------------------------------------------- the score cache

CACHED = {"cluster": {"score_cache": True}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "can_dist" / "scores.sqlite"


def said(run: Path) -> list[str]:
    lines = [json.loads(line).get("message", "") for line in (run / "log.jsonl").read_text().splitlines()]
    return [line.partition(": ")[2] for line in lines if "from cache" in line]


def test_no_text_is_scored_twice_across_runs(world, responses, tmp_path, cache) -> None:
    scorers = {"reward": PythonCallable(function="scorers:num_calm")}
    plain = scored(tmp_path / "plain", configure(world), responses, scorers)
    assert not cache.exists(), "off unless asked for"
    cold = scored(tmp_path / "cold", configure(world, **CACHED), responses, scorers)
    work = Workspace(tmp_path / "warm", configure(world, **CACHED))
    try:
        warm = score(work, responses, scorers, role="reference on train")
        assert work._pool is None, "no actor was needed"
    finally:
        work.close()
    assert plain.digest == cold.digest == warm.digest
    n = responses.table.num_rows
    assert said(tmp_path / "cold") == [f"0 of {n} from cache"]
    assert said(tmp_path / "warm") == [f"{n} of {n} from cache"]


def test_only_what_the_cache_lacks_is_scored(world, responses, tmp_path, cache) -> None:
    scorers = {"reward": PythonCallable(function="scorers:num_words")}
    whole = scored(tmp_path / "cold", configure(world, **CACHED), responses, scorers)
    with open_cache() as connection, connection:
        keys = [key for (key,) in connection.execute("SELECT key FROM scores ORDER BY key")]
        value_N = look_up(connection, keys)
        connection.execute("DELETE FROM scores")
        keep(connection, keys[::2], value_N[::2] + 100)  # so that it shows which came from here
    mixed = scored(tmp_path / "mixed", configure(world, **CACHED), responses, scorers)
    difference_N = mixed.table.column("reward").to_numpy() - whole.table.column("reward").to_numpy()
    assert set(difference_N) == {0.0, 100.0}
    assert not list((tmp_path / "mixed").rglob(".tmp-known*"))
    assert scored(tmp_path / "again", configure(world, **CACHED), responses, scorers).digest == mixed.digest


@pytest.mark.slow
def test_heads_on_one_body_are_scored_in_one_pass(world, responses, tmp_path, cache) -> None:
    """Three columns of one model, against plain transformers; from the cache a second time, by no actor."""
    heads = make_tiny_classifier(tmp_path / "heads", WORDS, num_labels=2)
    choices = {
        "one": {"output": 0},
        "other": {"output": 1, "sign": -1},
        "both": {"weights": {"LABEL_0": 2, "LABEL_1": 1}},
    }
    scorers = {name: MultiHead(model=str(heads), **choice) for name, choice in choices.items()}
    table = scored(tmp_path / "cold", configure(world, **CACHED), responses, scorers)
    events = [json.loads(line) for line in (tmp_path / "cold" / "log.jsonl").read_text().splitlines()]
    assert [e["work"] for e in events if e.get("event") == "shards"] == ["score (outputs.heads, reference on train)"]
    tokenizer = AutoTokenizer.from_pretrained(heads)
    model = AutoModelForSequenceClassification.from_pretrained(heads).eval()
    for row, values in zip(responses.table.to_pylist(), table.table.to_pylist(), strict=True):
        conversation = [*row["messages"], {"role": "assistant", "content": row["text"]}]
        ids = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False).input_ids
        with torch.no_grad():
            first, second = model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).logits[0].tolist()
        expected = {"one": first, "other": -second, "both": 2 * first + second}
        assert {name: values[name] for name in scorers} == pytest.approx(expected, abs=1e-5)
    work = Workspace(tmp_path / "warm", configure(world, **CACHED))
    try:
        assert score(work, responses, scorers, role="reference on train").digest == table.digest
        assert work._pool is None, "no actor was needed"
    finally:
        work.close()
