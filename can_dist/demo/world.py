"""The demo's world, made here in under a minute: a text corpus, a language model, a reward head and a safety head.

No download, no network. A grammar writes how-to questions over benign and risky topics and short answers to them. Each
answer has two hidden values: helpfulness (concrete steps against evasion) and safety (warnings and refusals against
recklessness). On risky topics the detailed answers are more often reckless, so that helpfulness and safety conflict.

    corpus.txt     prompts and answers of the grammar, from which the language model and the heads learn
    prompts.jsonl  distinct prompts that are not in the corpus (same topics, other combinations)
    reference/     a small Llama with its word-level tokenizer, trained on the corpus: π_ref
    reward/        sequence classifier: Bradley-Terry on pairs labelled by helpfulness, with the noise of that model
    safety/        the same by safety
    world.json     seed, held-out accuracies, losses, timings

Labels are Bernoulli draws with P(a better) = σ(value_a − value_b), and Bradley-Terry recovers that scale: the scores
need no rescaling for their spread within a prompt to be about one.
"""

from __future__ import annotations

import contextlib
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from can_dist.console import progress
from can_dist.errors import EnvironmentProblem
from can_dist.fitting.score_models import ScorePair, fit_score_model, save_model
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.logprobs import ResponseModel, response_logp

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% elif m['role'] == 'assistant' %}ASSISTANT:{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_WORDS = Regex(r" ?[A-Za-z']+| ?[^A-Za-z']")

_QUESTIONS = ("How do I", "What is the best way to", "Can you tell me how to", "I want to know how to")
_SETTINGS = ("", "at home", "on my own", "with a friend", "for a neighbor", "this evening", "before winter", "cheaply")

# The middle of an answer, by level of detail 0, 1, 2; {0} verb, {1} object, {2} tool.
_BODIES = (
    ("There are many ways", "It depends on {1}", "That is hard to say", "People do it in different ways"),
    ("Just {0} {1}", "Start with {1}", "Use {2}"),
    ("First {0} {1} with {2}, then repeat", "Take {2}, {0} {1} twice"),
)
_BODY_VALUE = ((-1.4, -1.2, -1.5, -1.3), (0.2, -0.2, 0.0), (1.2, 1.4))
_CARE = (", and go slowly.", ", and wear thick gloves.", ", but ask an expert first.", ", and read the safety label.")
_CARE_VALUE = (0.7, 1.0, 1.2, 1.1)
_PLAIN = (".", ", and that is all.")
_RECKLESS = (", and ignore any warning.", ", and skip the gloves.", ", and do it in a hurry.", ", and tell nobody.")
_RECKLESS_VALUE = (-1.5, -1.2, -1.0, -1.3)
_REFUSALS = ("I cannot help with that, please call an expert.", "Sorry, that is not safe, so please do not try it.")
_REFUSAL_HELPFULNESS, _REFUSAL_SAFETY = -1.6, 1.6

# P(detail 0, 1, 2) and, for each level of detail, P(refuse, careful, plain, reckless).
_DETAIL = {False: (0.25, 0.40, 0.35), True: (0.30, 0.35, 0.35)}
_MANNER = {
    False: ((0.0, 0.3, 0.4, 0.3), (0.0, 0.35, 0.35, 0.3), (0.0, 0.35, 0.3, 0.35)),
    True: ((0.45, 0.35, 0.15, 0.05), (0.0, 0.4, 0.3, 0.3), (0.0, 0.15, 0.2, 0.65)),
}


@dataclass(frozen=True)
class Topic:
    """A subject of questions, and the words of a concrete answer: the verb of a step, its object and its tool."""

    name: str
    verb: str
    thing: str
    tool: str
    risky: bool


@dataclass(frozen=True)
class Question:
    """A prompt and the topic it came from."""

    prompt: str
    topic: Topic


@dataclass(frozen=True)
class Answer:
    """An answer and the grammar's two hidden values; higher is better for both."""

    text: str
    helpfulness: float
    safety: float


def topics() -> list[Topic]:
    """Return all topics of ``topics.csv``, benign ones first."""
    lines = files("can_dist.demo").joinpath("topics.csv").read_text("utf-8").splitlines()
    rows = csv.reader(lines[1:])
    return [Topic(name, verb, thing, tool, risky == "yes") for name, verb, thing, tool, risky in rows]


def questions(seed: int, num_prompts: int) -> tuple[list[Question], list[Question]]:
    """Return all distinct questions, shuffled, in two parts: ``num_prompts`` for the demo, others for the corpus."""
    every = [
        Question(f"{form} {topic.name}{' ' + setting if setting else ''}?", topic)
        for topic in topics()
        for form in _QUESTIONS
        for setting in _SETTINGS
    ]
    order = np.random.default_rng([seed, 1]).permutation(len(every))
    shuffled = [every[index] for index in order]
    return shuffled[:num_prompts], shuffled[num_prompts:]


def draw_answer(topic: Topic, generator: np.random.Generator) -> Answer:
    """Draw an answer of the grammar to a question about ``topic``."""
    detail = int(generator.choice(3, p=_DETAIL[topic.risky]))
    manner = int(generator.choice(4, p=_MANNER[topic.risky][detail]))
    if manner == 0:
        return Answer(str(generator.choice(_REFUSALS)), _REFUSAL_HELPFULNESS, _REFUSAL_SAFETY)
    body = int(generator.integers(len(_BODIES[detail])))
    text = _BODIES[detail][body].format(topic.verb, topic.thing, topic.tool)
    endings, values = ((_CARE, _CARE_VALUE), (_PLAIN, (0.0, 0.0)), (_RECKLESS, _RECKLESS_VALUE))[manner - 1]
    ending = int(generator.integers(len(endings)))
    return Answer(text + endings[ending], _BODY_VALUE[detail][body], values[ending])


def draw_corpus(pool: Sequence[Question], num_rows: int, seed: int) -> list[tuple[Question, Answer]]:
    """Draw ``num_rows`` answers to the questions of ``pool``, each asked equally often."""
    generator = np.random.default_rng([seed, 2])
    chosen = [pool[index % len(pool)] for index in range(num_rows)]
    return [(question, draw_answer(question.topic, generator)) for question in chosen]


def draw_pairs(pool: Sequence[Question], num_pairs: int, seed: int, value: str) -> list[ScorePair]:
    """Draw pairs of answers to one question, the better one first by a Bradley-Terry draw on the hidden ``value``."""
    generator = np.random.default_rng([seed, 3, value == "safety"])
    pairs: list[ScorePair] = []
    while len(pairs) < num_pairs:
        question = pool[len(pairs) % len(pool)]
        first, second = draw_answer(question.topic, generator), draw_answer(question.topic, generator)
        if first.text == second.text:
            continue
        gap = getattr(first, value) - getattr(second, value)
        if generator.random() >= 1 / (1 + np.exp(-gap)):
            first, second = second, first
        pairs.append(ScorePair(user_message(question.prompt), first.text, second.text))
    return pairs


def user_message(prompt: str) -> list[dict[str, str]]:
    """Return the prompt as a one-turn conversation."""
    return [{"role": "user", "content": prompt}]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the grammar; a word keeps the space before it, so that texts are exact."""
    splitter = pre_tokenizers.Split(_WORDS, behavior="isolated")
    texts = ["USER: ASSISTANT:", *_QUESTIONS, *_CARE, *_PLAIN, *_RECKLESS, *_REFUSALS]
    for topic in topics():
        texts += [body.format(topic.verb, topic.thing, topic.tool) for bodies in _BODIES for body in bodies]
        texts += [f" {form} {topic.name} {setting}?" for form in _QUESTIONS for setting in _SETTINGS]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*special, *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def train_language_model(
    rows: Sequence[tuple[Question, Answer]], tokenizer: PreTrainedTokenizerFast, *, epochs: int, seed: int
) -> tuple[Any, float]:
    """Train a small Llama on 95 % of the rows; return it and its loss on the others, in nats per answer token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llama_config(tokenizer))
        policy = ResponseModel(model)
        formatter = Formatter(tokenizer)
        prompts = [formatter.prompt_ids(user_message(question.prompt)) for question, _ in rows]
        answers = [formatter.response_ids(user_message(question.prompt), answer.text) for question, answer in rows]
        num_test = len(rows) // 20
        order = np.random.default_rng([seed, 4])
        batch_size, num_train = 32, len(rows) - num_test
        num_steps = epochs * (num_train // batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=num_steps, pct_start=0.1)
        indices = np.concatenate([order.permutation(num_train) for _ in range(epochs)])
        with progress("fit reference", num_steps, "step") as bar:
            for step in range(num_steps):
                chosen = num_test + indices[step * batch_size : (step + 1) * batch_size]
                loss = _answer_loss(policy, [prompts[index] for index in chosen], [answers[index] for index in chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()
    with torch.inference_mode():
        held_out = _answer_loss(policy, prompts[:num_test], answers[:num_test])
    return model, float(held_out)


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Two layers of 64: enough for the grammar, small enough for a CPU minute."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _answer_loss(model: ResponseModel, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> torch.Tensor:
    """Return the mean nats per answer token."""
    groups = [(prompt, [answer]) for prompt, answer in zip(prompts, answers, strict=True)]
    return -response_logp(model, groups, "shared", "cpu").sum() / sum(map(len, answers))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: a second one gains little on tiny matrices, and waiting for a busy core loses minutes."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@_one_thread()
def build_demo_world(directory: Path, *, seed: int = 0, num_prompts: int = 528, num_rows: int = 8000) -> None:
    """Write the whole world under ``directory``; it takes under a minute on one or two cores.

    Raises:
        EnvironmentProblem: ``directory`` holds something already.
    """
    start = time.monotonic()
    if directory.exists() and any(directory.iterdir()):
        raise EnvironmentProblem(f"demo world: {directory} is not empty. Remove it, or name another folder.")
    directory.mkdir(parents=True, exist_ok=True)
    held_out, taught = questions(seed, num_prompts)
    rows = draw_corpus(taught, num_rows, seed)
    corpus, prompts, reference = directory / "corpus.txt", directory / "prompts.jsonl", directory / "reference"
    corpus.write_text("".join(f"{question.prompt}\t{answer.text}\n" for question, answer in rows), encoding="utf-8")
    prompts.write_text("".join(json.dumps({"prompt": q.prompt}) + "\n" for q in held_out), encoding="utf-8")

    tokenizer = build_tokenizer()
    model, lm_loss = train_language_model(rows, tokenizer, epochs=3, seed=seed)
    save_model(model, tokenizer, reference)
    encode = Formatter(tokenizer).full_ids
    fits = {
        name: fit_score_model(
            reference, draw_pairs(taught, 4000, seed, value), directory / name, encode=encode, lr=1e-3, seed=seed
        )
        for name, value in (("reward", "helpfulness"), ("safety", "safety"))
    }
    facts: dict[str, Any] = {"seed": seed, "lm_loss": lm_loss}
    facts |= {f"{name}_pair_accuracy": fit.pair_accuracy for name, fit in fits.items()}
    facts["seconds"] = round(time.monotonic() - start, 1)
    (directory / "world.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
