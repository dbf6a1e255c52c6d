"""Scoring by packs: a text has the score it has alone, whatever it is scored with and however much memory there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_tiny_lm, make_tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
)

from can_dist.config import Guard, Model, MultiHead, PythonCallable, SequenceClassifier
from can_dist.console import heard_by
from can_dist.errors import EnvironmentProblem
from can_dist.modeling.last_token import LastToken, choose_text_layout, reads_last_token
from can_dist.modeling.packs import common_prefixes, computed_tokens, in_layout, make_text_pack
from can_dist.scoring.kinds import halved, load_scorer, scorer_identity
from can_dist.scoring.log_prob import LogProbScorer
from can_dist.scoring.protocol import LogProb, Outputs, Response
from can_dist.scoring.sequence_classifier import ClassifierScorer

WORDS = [*(f"w{i}" for i in range(20)), "safe", "unsafe"]
# large weights: attention matters, so that a leak shows
SMALL = {"vocab_size": 27, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4, "initializer_range": 0.3}
HEADS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CAUSAL = {
    "llama": LlamaConfig(**SMALL, **HEADS, num_key_value_heads=2, num_labels=1),
    "window": MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=4, num_labels=1),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, num_labels=1),
}
BIDIRECTIONAL = Gemma3TextConfig(
    **SMALL, **HEADS, num_key_value_heads=2, head_dim=8, use_bidirectional_attention=True, num_labels=1
)
# of the norm of all scores
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


def make_classifier(directory: Path, config: Any) -> Path:
    make_tiny_tokenizer(directory, WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tmp_path_factory.mktemp("llama"), CAUSAL["llama"])


def make_responses(num_prompts: int = 5, num_responses: int = 4) -> list[Response]:
    """Several responses to each of a few prompts, in no order; some begin alike, two are the same."""
    random = np.random.default_rng(0)
    responses = [
        Response(f"{p}/{k}", [{"role": "user", "content": prompt}], text, random.integers(5, 25, size=1 + k).tolist())
        for p, prompt in enumerate(" ".join(random.choice(WORDS, size=1 + 2 * p)) for p in range(num_prompts))
        for k, text in enumerate(
            ["w1 w2", "w1 w2", *(" ".join(random.choice(WORDS, size=2 * k)) for k in range(num_responses - 2))]
        )
    ]
    return [responses[number] for number in random.permutation(len(responses))]


def alone(scorer: ClassifierScorer, directory: Path, responses: list[Response]) -> np.ndarray:
    """One plain transformers pass for each text, in float32."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        texts = [torch.tensor([scorer.formatter.full_ids(r.messages, r.text)]) for r in responses]
        return np.array([model(ids, attention_mask=torch.ones_like(ids)).logits.item() for ids in texts])


def assert_close(scores: np.ndarray, expected: np.ndarray, precision: str = "fp32") -> None:
    assert np.ptp(expected) > 0.1
    assert np.linalg.norm(scores - expected) <= TOLERANCE[precision] * np.linalg.norm(expected)


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("name", CAUSAL)
def test_packs_score_every_text_as_transformers_does_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, responses = make_classifier(tmp_path, CAUSAL[name]), make_responses()
    scorer = ClassifierScorer(SequenceClassifier(model=str(directory), tokens_per_pass=60), "fp32")
    assert scorer.passes.layout == "shared"
    assert "packs that share prompts, attention by sdpa" in capsys.readouterr().err
    assert_close(scorer.score(responses), alone(scorer, directory, responses))


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("layout", ["shared", "plain", "padded"])
def test_company_and_order_change_nothing(llama: Path, layout: str, precision: str) -> None:
    scorer, responses = ClassifierScorer(SequenceClassifier(model=str(llama)), precision), make_responses()
    scorer.passes.layout = layout
    together = scorer.score(responses)
    np.testing.assert_array_equal(scorer.score(responses), together)
    assert_close(together, alone(scorer, llama, responses), precision)
    random = np.random.default_rng(1)
    for size, budget in itertools.product((1, 7, len(responses)), (1, 50, 10**6)):
        scorer.passes.tokens = budget
        chosen = random.permutation(len(responses))[:size]
        scores = scorer.score([responses[number] for number in chosen])
        error = np.linalg.norm(scores - together[chosen])
        assert error <= TOLERANCE[precision] * np.linalg.norm(together), (size, budget)


def test_what_texts_of_a_prompt_share_is_computed_once(llama: Path) -> None:
    scorer, responses, seen = ClassifierScorer(SequenceClassifier(model=str(llama)), "fp32"), make_responses(), []
    scorer.model.get_input_embeddings().register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    scorer.score(responses)
    texts = [scorer.formatter.full_ids(response.messages, response.text) for response in responses]
    prompts = [response.messages[0]["content"] for response in responses]
    shared = dict(zip(prompts, common_prefixes(prompts, texts), strict=True))
    assert seen == [sum(shared.values()) + sum(len(t) - shared[p] for p, t in zip(prompts, texts, strict=True))]
    assert min(shared.values()) >= 3, "the user's turn and the assistant's mark"


# ------------------------------------------------------------------------------------------------ what is not packed


def test_a_bidirectional_model_is_padded_by_the_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory, responses = make_classifier(tmp_path, BIDIRECTIONAL), make_responses()
    scorer = ClassifierScorer(SequenceClassifier(model=str(directory), tokens_per_pass=60), "fp32")
    assert scorer.passes.layout == "padded"
    said = capsys.readouterr().err
    assert "shared packs are not exact for this model (outputs off by" in said
    assert "plain packs are not exact for this model (outputs off by" in said
    assert_close(scorer.score(responses), alone(scorer, directory, responses))


def test_plain_packs_come_before_padded_batches(llama: Path) -> None:
    class NoSharing(LastToken):
        def __call__(self, pack: Any) -> torch.Tensor:
            shares = pack.segments is not None and max(pack.segments.prefixes) >= 0
            return super().__call__(pack) + float(shares)

    said: list[str] = []
    body = LlamaForSequenceClassification.from_pretrained(llama).eval().model
    assert choose_text_layout(NoSharing(body, "last_hidden_state"), said.append) == "plain"
    assert "; packs of separate sequences, attention by sdpa, segment by segment, of torch" in said[-1]


def test_a_classifier_that_does_more_than_its_head_is_left_to_itself(llama: Path) -> None:
    class Squashed(LlamaForSequenceClassification):
        def forward(self, *args: Any, **inputs: Any) -> Any:
            output = super().forward(*args, **inputs)
            output.logits = output.logits.tanh()
            return output

    found = [
        reads_last_token(model, model.model, model.score, 0)
        for model in (kind.from_pretrained(llama).eval() for kind in (LlamaForSequenceClassification, Squashed))
    ]
    assert found == [True, False]


# ----------------------------------------------------------------------------------------------------- the memory


@contextmanager
def little_memory(model: Any, tokens: int) -> Iterator[list[int]]:
    """Let a model's passes fail as on a GPU whose memory holds so many tokens; yields the sizes that failed."""
    failed: list[int] = []

    def check(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].numel() > tokens:
            failed.append(inputs[0].numel())
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    handle = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield failed
    finally:
        handle.remove()


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("kind", ["classifier", "guard", "log_prob"])
def test_f05_out_of_memory_halves_the_budget_for_good(
    kind: str, layout: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scorer: Any
    if kind == "classifier":
        scorer = load_scorer(SequenceClassifier(model=str(llama)), "fp32")
        model = scorer.model
    elif kind == "guard":
        scorer = load_scorer(Guard(model=str(make_tiny_lm(tmp_path, WORDS))), "fp32")
        model = scorer.read.model
    else:
        scorer = LogProbScorer(LogProb(model=Model(model=str(make_tiny_lm(tmp_path, WORDS)))), "fp32")
        model = scorer.model.lm
    responses = make_responses()
    scorer.passes.layout = layout
    expected = scorer.score(responses)
    capsys.readouterr()
    with little_memory(model, 40) as failed:
        np.testing.assert_allclose(scorer.score(responses), expected, rtol=1e-5, atol=1e-5)
        first = list(failed)
        np.testing.assert_allclose(scorer.score(responses), expected, rtol=1e-5, atol=1e-5)
    assert failed == first, "what did not fit is not tried again"
    assert scorer.passes.tokens <= 40
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(first) >= 1
    assert f"out of memory at {first[0]} tokens in one pass; from now on at most {first[0] // 2}" in said[0]


def test_f05_text_that_fits_no_memory_is_an_error_with_its_size(llama: Path) -> None:
    scorer = ClassifierScorer(SequenceClassifier(model=str(llama)), "fp32")
    with (
        little_memory(scorer.model, 6),
        pytest.raises(EnvironmentProblem, match=r"a text of \d+ tokens does not fit .* \(CUDA out of memory\)"),
    ):
        scorer.score(make_responses())
    assert scorer.passes.tokens >= 6


# ----------------------------------------------------------------------------------------------------- the tables


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1))
def test_common_prefix_is_shared_by_all_texts_of_a_prompt_and_is_the_longest(rows: list[tuple[int, list[int]]]) -> None:
    prompts, texts = [prompt for prompt, _ in rows], [text for _, text in rows]
    for prompt, shared in zip(prompts, common_prefixes(prompts, texts), strict=True):
        members = [text for other, text in rows if other == prompt]
        limit = min(map(len, members)) - 1
        agree = [len({tuple(text[:length]) for text in members}) == 1 for length in range(limit + 1)]
        assert shared == max(length for length in range(limit + 1) if agree[length])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=40), st.integers(1, 200))
def test_padded_batches_hold_every_text_once_within_the_budget(sizes: list[tuple[int, int]], budget: int) -> None:
    packs = in_layout([0] * len(sizes), sizes, "padded", budget)
    assert sorted(number for pack in packs for (number,) in pack) == list(range(len(sizes)))
    for pack in packs:
        widest = max(sum(sizes[number]) for (number,) in pack)
        assert computed_tokens(pack, sizes, "padded") == widest * len(pack)
        assert widest * len(pack) <= budget or len(pack) == 1


@pytest.mark.parametrize(("layout", "rows"), [("shared", [4, 5, 7]), ("plain", [4, 8, 10]), ("padded", [4, 8, 11])])
def test_rows_of_the_last_tokens(layout: str, rows: list[int]) -> None:
    pack = make_text_pack([([10, 11, 12], [[20, 21], [30]]), ([], [[13, 40]])], layout, pad_id=3)
    assert pack.input_ids_BT.flatten()[pack.rows_N].tolist() == [21, 30, 40]
    assert pack.rows_N.tolist() == rows
    if layout == "padded":
        assert pack.input_ids_BT.tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 30, 3], [13, 40, 3, 3, 3]]


def test_rows_are_told_pass_by_pass(llama: Path) -> None:
    scorer, responses = (
        ClassifierScorer(SequenceClassifier(model=str(llama), tokens_per_pass=60), "fp32"),
        make_responses(),
    )
    told: list[int] = []
    with heard_by(told.append):
        scores = scorer.score(responses)
    assert len(told) > 1
    assert sum(told) == len(responses)
    np.testing.assert_array_equal(scorer.score(responses), scores)
    assert sum(told) == len(responses), "told to nobody any more"


def test_budget_is_no_part_of_the_identity_and_older_scores_are_another(llama: Path) -> None:
    one, other = (scorer_identity(SequenceClassifier(model=str(llama), tokens_per_pass=n), "fp32") for n in (64, 128))
    assert one == other
    assert one["computation"] == 3, "scores of padded batches, without this key, are not mixed in"


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        (SequenceClassifier(model="m", tokens_per_pass=5), [2, 1]),
        (Outputs(body=MultiHead(model="m", output=0, tokens_per_pass=2)), [1]),
        (LogProb(model=Model(model="m"), tokens_per_pass=3), [1]),
        (PythonCallable(function="builtins:len", batch_size=4), [2, 1]),
    ],
)
def test_f04_passes_are_halved_down_to_one(spec: Any, sizes: list[int]) -> None:
    found = []
    while (spec := halved(spec)) is not None:
        inner = spec.body if isinstance(spec, Outputs) else spec
        found.append(inner.batch_size if isinstance(inner, PythonCallable) else inner.tokens_per_pass)
    assert found == sizes
