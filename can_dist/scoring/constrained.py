"""r + ⟨λ, g⟩ of responses that other people's trainers sampled, in the signatures that they call rewards by."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from can_dist.config import Config, LogRatio, MultiHead, Scorer
from can_dist.errors import DataError
from can_dist.modeling.classifiers import output_weights
from can_dist.modeling.formatter import Message
from can_dist.modeling.loading import load_model_config, load_tokenizer
from can_dist.modeling.precision import run_precision
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Outputs, Response

Conversation = str | Sequence[Message]
"""Text, which is a user's, or messages."""


class ConstrainedReward:
    """r + ⟨λ*, g⟩ of responses: called as TRL calls a reward function, or by :meth:`openrlhf` and :meth:`verl`.

    A scorer is opened when it is first used. Constants of a prompt do not matter, so no margin is subtracted.
    """

    def __init__(self, weights: Mapping[str, float], scorers: Mapping[str, Scorer], config: Config) -> None:
        self.weights, self._scorers, self._config = dict(weights), dict(scorers), config
        self._opened: dict[str, Callable[[Sequence[Response]], np.ndarray]] = {}
        self.__name__ = "constrained_reward"  # TRL names its metrics by it

    def __call__(self, prompts: Sequence[Conversation], completions: Sequence[Conversation], **_: Any) -> list[float]:
        """Return one reward per completion, as TRL's trainers ask for it; texts or messages."""
        total = sum(weight * self._score(name, prompts, completions) for name, weight in self.weights.items())
        return [float(value) for value in np.asarray(total)]

    def part(self, name: str) -> Callable[..., list[float]]:
        """Return one score alone as TRL's reward function, for TRL to weigh by its ``reward_weights``."""

        def score(prompts: Sequence[Conversation], completions: Sequence[Conversation], **_: Any) -> list[float]:
            return [float(value) for value in self._score(name, prompts, completions)]

        score.__name__ = name
        return score

    def openrlhf(self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]) -> dict[str, Any]:
        """Return what OpenRLHF expects of ``reward_func`` in the file of ``--remote_rm_url``.

        A query is a prompt and its response as one text. Where the prompt was written by a chat template, give the
        conversation as JSON in the column of ``--label_key``: it is what the scorers are to see.

        Raises:
            DataError: A query does not begin with its prompt, or a label is no conversation.
        """
        for row, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            if not query.startswith(prompt):
                raise DataError(
                    f"query {row}: {query[:40]!r} does not begin with its prompt {prompt[:40]!r}, so its response "
                    "cannot be told.",
                    "Check that OpenRLHF gives prompts as they were tokenized.",
                )
        said = [_without(q[len(p) :], self._end_tokens) for q, p in zip(queries, prompts, strict=True)]
        conversations = [_labelled(label, prompt) for label, prompt in zip(labels, prompts, strict=True)]
        parts = {name: torch.tensor(self._score(name, conversations, said)) for name in self.weights}
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        return {"rewards": total, "scores": total, "extra_logs": parts}

    def verl(
        self,
        data_source: str,
        solution_str: str,
        ground_truth: Any,  # noqa: ARG002  verl gives it by name
        extra_info: Mapping[str, Any] | None = None,
    ) -> float:
        """Return one reward, as verl's ``custom_reward_function`` does; ``extra_info`` holds the messages.

        Raises:
            DataError: ``extra_info`` has no key 'messages'.
        """
        messages = (extra_info or {}).get("messages")
        if messages is None:
            raise DataError(
                f"data source {data_source!r}: extra_info has no key 'messages' (found "
                f"{', '.join(extra_info or {}) or 'none'}), and verl gives a reward function no prompt otherwise.",
                "Write the conversation into extra_info.messages of the data set.",
            )
        return self([list(messages)], [_without(solution_str, self._end_tokens)])[0]

    def _score(self, name: str, prompts: Sequence[Conversation], completions: Sequence[Conversation]) -> np.ndarray:
        if name not in self._opened:
            self._opened[name] = _open(self._scorers[name], run_precision(self._config))
        responses = [
            Response(str(row), _messages(prompt), completion if isinstance(completion, str) else _text(completion), [])
            for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return self._opened[name](responses)

    @functools.cached_property
    def _end_tokens(self) -> tuple[str, ...]:
        tokenizer = load_tokenizer(self._config.reference)
        return tuple({str(token) for token in (tokenizer.eos_token, tokenizer.pad_token) if token})


def _open(scorer: Scorer, precision: str) -> Callable[[Sequence[Response]], np.ndarray]:
    if isinstance(scorer, MultiHead):
        weight_L = np.array(output_weights(scorer, load_model_config(scorer, "sequence classifier"))) * scorer.sign
        outputs = load_scorer(Outputs(body=scorer), precision)
        return lambda responses: outputs.score(responses) @ weight_L
    assert not isinstance(scorer, LogRatio), "refused by constrained_reward"
    return load_scorer(scorer, precision).score


def _messages(prompt: Conversation) -> Sequence[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _text(completion: Sequence[Message]) -> str:
    return str(completion[-1]["content"])


def _without(text: str, ends: Sequence[str]) -> str:
    """Return a decoded response without the end and padding tokens behind it."""
    while end := next((end for end in ends if text.endswith(end)), None):
        text = text.removesuffix(end)
    return text


def _labelled(label: Any, prompt: str) -> Conversation:
    """Return the conversation that a label of OpenRLHF holds as JSON; the prompt itself where there is no label."""
    if not label:
        return prompt
    try:
        messages = json.loads(label) if isinstance(label, str) else label
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in messages]
    except (ValueError, TypeError, KeyError):
        raise DataError(
            f"label {str(label)[:40]!r}: expected a conversation as JSON, [{{'role': ..., 'content': ...}}, ...].",
            "Name such a column in --label_key, or leave it out.",
        ) from None
