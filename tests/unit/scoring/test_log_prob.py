"""Reference log-probabilities: the value of a response is its own, whatever is scored with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM

from can_dist.config import Model
from can_dist.errors import DataError
from can_dist.scoring.log_prob import LogProbScorer
from can_dist.scoring.protocol import LogProb, Response

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), WORDS)


def make_responses(num_prompts: int = 7, num_responses: int = 5) -> list[Response]:
    random = np.random.default_rng(0)
    return [
        Response(
            f"{p}/{k}",
            [{"role": "user", "content": " ".join(prompt)}],
            "",
            random.integers(5, 25, size=random.integers(1, 16)).tolist(),
        )
        for p, prompt in enumerate(random.choice(WORDS, size=1 + p).tolist() for p in range(num_prompts))
        for k in range(num_responses)
    ]


def test_scores_are_sums_over_each_response_alone(reference: Path) -> None:
    scorer = LogProbScorer(LogProb(model=Model(model=str(reference))), "fp32")
    exact = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float64).eval()
    responses = make_responses()
    scores = scorer.score(responses)
    assert scores.dtype == np.float64
    for response, score in zip(responses, scores.tolist(), strict=True):
        ids, expected = scorer.formatter.prompt_ids(response.messages), 0.0
        for token in response.token_ids:  # one token at a time, nothing batched, nothing shared
            with torch.no_grad():
                expected += exact(torch.tensor([ids])).logits[0, -1].log_softmax(dim=0)[token].item()
            ids = [*ids, token]
        assert score == pytest.approx(expected, rel=1e-5)


def test_company_and_order_change_nothing_and_a_shard_is_repeatable(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, responses = LogProbScorer(LogProb(model=Model(model=str(reference))), "fp32"), make_responses()
    together = scorer.score(responses)
    np.testing.assert_array_equal(scorer.score(responses), together)
    np.testing.assert_allclose([scorer.score([one])[0] for one in responses], together, rtol=1e-5)
    order = np.random.default_rng(1).permutation(len(responses))
    np.testing.assert_allclose(scorer.score([responses[i] for i in order]), together[order], rtol=1e-5)
    for budget in (1, 40):
        monkeypatch.setattr(scorer.passes, "tokens", budget)
        np.testing.assert_allclose(scorer.score(responses), together, rtol=1e-5)


def test_a_prompt_is_computed_once_for_all_its_responses(reference: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, responses, seen = LogProbScorer(LogProb(model=Model(model=str(reference))), "fp32"), make_responses(), []
    handle = scorer.model.lm.get_input_embeddings().register_forward_hook(
        lambda _, ids, __: seen.append(ids[0].numel())
    )
    scorer.score(responses)
    handle.remove()
    prompts = {tuple(scorer.formatter.prompt_ids(response.messages)) for response in responses}
    assert seen == [sum(map(len, prompts)) + sum(len(response.token_ids) for response in responses)]


def test_a_response_beyond_the_context_is_refused_by_name(reference: Path) -> None:
    scorer = LogProbScorer(LogProb(model=Model(model=str(reference))), "fp32")
    long = Response("p/0", [{"role": "user", "content": "w1"}], "", [5] * 70)
    with pytest.raises(DataError, match=r"response 'p/0' has 73 tokens with its prompt, the model's context is 64"):
        scorer.score([long])
