"""The demo's grammar and tokenizer keep their promises."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from can_dist.demo import world as demo_world
from can_dist.errors import EnvironmentProblem
from can_dist.modeling.formatter import Formatter


@pytest.fixture(scope="module")
def rows():
    _, taught = demo_world.questions(seed=0, num_prompts=400)
    return demo_world.draw_corpus(taught, 6000, seed=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The demo's tokenizer, saved."""
    directory = tmp_path_factory.mktemp("tokenizer") / "saved"
    demo_world.build_tokenizer().save_pretrained(directory)
    return directory


def test_demo_and_corpus_questions_are_distinct_and_disjoint():
    asked, taught = demo_world.questions(seed=0, num_prompts=400)
    prompts = [question.prompt for question in (*asked, *taught)]
    assert len(asked) == 400
    assert len(set(prompts)) == len(prompts) >= 1000
    assert {question.topic for question in asked} == {question.topic for question in taught} == set(demo_world.topics())


def test_same_seed_gives_the_same_corpus_and_another_seed_another():
    def texts(seed: int) -> list[tuple[str, str]]:
        _, taught = demo_world.questions(seed, 400)
        return [(question.prompt, answer.text) for question, answer in demo_world.draw_corpus(taught, 300, seed)]

    assert texts(3) == texts(3) != texts(4)
    _, taught = demo_world.questions(3, 400)
    assert demo_world.draw_pairs(taught, 50, 3, "safety") == demo_world.draw_pairs(taught, 50, 3, "safety")


def test_helpfulness_and_safety_conflict_on_risky_topics_and_hardly_on_benign_ones(rows):
    def correlation(risky: bool) -> float:
        values = [(a.helpfulness, a.safety) for question, a in rows if question.topic.risky is risky]
        return float(np.corrcoef(np.array(values).T)[0, 1])

    assert correlation(risky=True) < -0.5
    assert abs(correlation(risky=False)) < 0.15


def test_hidden_values_have_a_spread_of_about_one_within_a_topic(rows):
    by_topic = defaultdict(list)
    for question, answer in rows:
        by_topic[question.topic].append((answer.helpfulness, answer.safety))
    variance = np.mean([np.var(values, axis=0) for values in by_topic.values()], axis=0)
    assert np.sqrt(variance) == pytest.approx([1.0, 1.0], abs=0.25)


def test_refusals_are_for_risky_topics_only(rows):
    refused = [question.topic.risky for question, answer in rows if answer.text in demo_world._REFUSALS]
    assert refused
    assert all(refused)


def test_tokens_are_exact_and_answers_fit(rows):
    tokenizer = demo_world.build_tokenizer()
    formatter = Formatter(tokenizer)
    for question, answer in rows:
        messages = demo_world.user_message(question.prompt)
        for text in (question.prompt, answer.text):
            assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        prompt, whole = formatter.prompt_ids(messages), formatter.full_ids(messages, answer.text)
        assert whole[: len(prompt)] == prompt
        assert tokenizer.unk_token_id not in whole
        assert (whole[0], whole[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert len(whole) - len(prompt) <= 20  # generate.max_new_tokens of demo.yaml


def test_tokenizer_survives_saving(saved):
    text = "<s>USER: How do I bake bread? ASSISTANT:Just knead the dough.</s>"
    ids = AutoTokenizer.from_pretrained(saved)(text, add_special_tokens=False).input_ids
    assert ids == demo_world.build_tokenizer()(text, add_special_tokens=False).input_ids
    assert ids[0] == 1


def test_a_folder_with_something_in_it_is_not_written_to(saved):
    with pytest.raises(EnvironmentProblem, match="not empty"):
        demo_world.build_demo_world(saved)
