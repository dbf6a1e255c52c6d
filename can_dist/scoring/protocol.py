"""What a scorer is, and what it is given; the kinds of scorers are the rows of :mod:`can_dist.scoring.kinds`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from can_dist.config import Guard, HttpScorer, Model, MultiHead, PythonCallable, SequenceClassifier
from can_dist.config.base import Strict
from can_dist.modeling.formatter import Message
from can_dist.tables.artifacts import Artifact


class LogProb(Strict):
    """ln π(y|x) of each response under a causal language model, summed over the response's tokens (nats)."""

    model: Model
    quantize: Literal["nf4"] | None = None
    tokens_per_pass: int = 4096


class Outputs(Strict):
    """Every output of a classifier with several: one pass for all the score columns that are made of them."""

    body: MultiHead


@dataclass(frozen=True)
class PolicyRatio:
    """The score a·β(ln π(y|x) − ln π_ref(y|x)) of each response: arithmetic on two ``LogProb`` columns.

    ``beta`` is the β that π was trained with; ``scale`` is a, with its standard error where it was fitted;
    ``made_from`` holds the training and the calibration, where the run made them.
    """

    policy: Model
    reference: Model
    beta: float
    scale: float = 1.0
    scale_se: float | None = None
    made_from: Mapping[str, Artifact] = field(default_factory=dict)


ActorSpec = SequenceClassifier | Outputs | Guard | HttpScorer | PythonCallable | LogProb
"""What an actor opens."""

ScorerSpec = ActorSpec | PolicyRatio


@dataclass(frozen=True)
class Response:
    """One row to score: a conversation, the response's text, and its tokens in the reference's vocabulary."""

    response_id: str
    messages: Sequence[Message]
    text: str
    token_ids: Sequence[int]


class Scorer(Protocol):
    """Scores responses; opened once per actor. Any object with this method is one.

    >>> class Length:
    ...     def score(self, responses):
    ...         return np.array([float(len(response.text)) for response in responses])
    >>> scorer: Scorer = Length()
    >>> scorer.score([Response("r0", [{"role": "user", "content": "Hi"}], "Hello", [])])
    array([5.])
    """

    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores in order, (R,): one per response; of ``Outputs``, (R, L)."""
