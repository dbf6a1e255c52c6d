"""Pairs that both sides of a benchmark train on: four length shapes of random words, and real data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from can_dist.modeling.formatter import Formatter, Message
from can_dist.tables.foreign.formats import read_preferences

DATA = Path(os.environ.get("CAN_DIST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
# median tokens of a prompt and of a response; lengths are lognormal
SHAPES = {"pku-like": (28, 90), "hh-like": (130, 60), "uf-like": (120, 285), "tldr-like": (360, 32)}
SPREAD = 0.55  # standard deviation of ln length: two responses of a pair padded to the longer waste 30 %
REAL = {"pku-real": "pku_saferlhf_dual_500.jsonl.gz", "hh-real": "hh_harmless-base_test.jsonl.gz"}


@dataclass(frozen=True)
class PairTokens:
    """A pair as both sides see it: the messages are what our stages read, the ids are what the peer is given."""

    messages: Sequence[Message]
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def num_shared(self) -> int:
        """Tokens with the prompt once."""
        return len(self.prompt_ids) + self.num_targets

    @property
    def num_targets(self) -> int:
        """Tokens of both responses."""
        return len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class PairSet:
    """Pairs, and how many of the candidates had to be scaled down or left out to fit the context."""

    pairs: list[PairTokens]
    scaled: int = 0
    left_out: int = 0


def make_pairs(name: str, count: int, formatter: Formatter, context: int, seed: int = 0) -> PairSet:
    """Return the first ``count`` pairs of a shape or of a real file."""
    if name in SHAPES:
        return _random_pairs(*SHAPES[name], count, formatter, context, seed)
    return _real_pairs(DATA / "preferences" / REAL[name], count, formatter, context)


def random_lengths(
    prompt: int, response: int, num_prompts: int, num_responses: int, context: int, seed: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (prompt lengths (P,), response lengths (P, K), number of prompts scaled down to fit the context)."""
    random = np.random.default_rng([seed, prompt, response])
    prompt_P = prompt * np.exp(SPREAD * random.normal(size=num_prompts))
    response_PK = response * np.exp(SPREAD * random.normal(size=(num_prompts, num_responses)))
    scale_P = np.minimum(1.0, context / (prompt_P + response_PK.max(axis=1)))
    prompt_P, response_PK = prompt_P * scale_P, response_PK * scale_P[:, None]
    return prompt_P.astype(int).clip(8), response_PK.astype(int).clip(2), int((scale_P < 1).sum())


def words_of(formatter: Formatter) -> list[str]:
    """Return words that are one token each after a space, so that a text has the length that was asked for."""
    vocabulary = formatter.tokenizer.get_vocab()
    candidates = sorted(token[1:] for token in vocabulary if token[:1] == "▁" and token[1:].isalpha())
    return [word for word in candidates if word.isascii() and len(word) > 1]


def _random_pairs(prompt: int, response: int, count: int, formatter: Formatter, context: int, seed: int) -> PairSet:
    words = words_of(formatter)
    ids = formatter.tokenizer.convert_tokens_to_ids([f"▁{word}" for word in words])
    around = len(formatter.prompt_ids([{"role": "user", "content": words[0]}])) - 1
    prompt_P, response_PK, scaled = random_lengths(prompt, response, count, 2, context - 4, seed)
    random = np.random.default_rng([seed, count])
    pairs = []
    for prompt_length, response_K in zip(prompt_P.tolist(), response_PK.tolist(), strict=True):
        content = " ".join(random.choice(words, size=max(1, prompt_length - around)).tolist())
        messages = [{"role": "user", "content": content}]
        chosen, rejected = (
            [*random.choice(ids, size=length - 1).tolist(), formatter.tokenizer.eos_token_id] for length in response_K
        )
        pairs.append(PairTokens(messages, formatter.prompt_ids(messages), chosen, rejected))
    return PairSet(pairs, scaled=scaled)


def _real_pairs(path: Path, count: int, formatter: Formatter, context: int) -> PairSet:
    pairs: list[PairTokens] = []
    left_out = 0
    for row in read_preferences(path).table.to_pylist():
        messages, texts = row["messages"], (row["response_a"], row["response_b"])
        if row["better"]:
            texts = texts[::-1]
        chosen, rejected = (formatter.response_ids(messages, text) for text in texts)
        prompt = formatter.prompt_ids(messages)
        if len(prompt) + max(len(chosen), len(rejected)) > context:
            left_out += 1
            continue
        pairs.append(PairTokens(messages, prompt, chosen, rejected))
        if len(pairs) == count:
            break
    return PairSet(pairs, left_out=left_out)
