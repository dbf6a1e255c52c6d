"""The Scorer protocol and its loader. Add a kind of scorer by a spec in ``config`` and a branch in ``load_scorer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from can_dist.config import Model, PythonCallable, SequenceClassifier, Strict
from can_dist.modeling.formatter import Message
from can_dist.modeling.loading import callable_identity, model_digest


class LogProb(Strict):
    """ln π(y|x) of each response under a causal language model, summed over the response's tokens (nats)."""

    model: Model


ScorerSpec = SequenceClassifier | PythonCallable | LogProb


@dataclass(frozen=True)
class Response:
    """One row to score: a conversation, the response's text, and its tokens in the reference's vocabulary."""

    response_id: str
    messages: Sequence[Message]
    text: str
    token_ids: Sequence[int]


class Scorer(Protocol):
    """Scores responses; opened once per actor."""

    def score(self, responses: Sequence[Response]) -> np.ndarray:
        """Return float64 scores, one per response, in order."""


def load_scorer(spec: ScorerSpec, precision: str) -> Scorer:
    """Open the scorer that a spec describes."""
    if isinstance(spec, PythonCallable):
        from can_dist.scoring.python_callable import CallableScorer

        return CallableScorer(spec)
    if isinstance(spec, LogProb):
        from can_dist.scoring.log_prob import LogProbScorer

        return LogProbScorer(spec.model, precision)
    from can_dist.scoring.sequence_classifier import ClassifierScorer

    return ClassifierScorer(spec, precision)


def scorer_identity(spec: ScorerSpec, precision: str) -> dict[str, Any]:
    """Return what decides a scorer's numbers: weights digest, text convention, sign, precision."""
    if isinstance(spec, PythonCallable):
        return {"kind": spec.kind, "sign": spec.sign, **callable_identity(spec.function)}
    if isinstance(spec, LogProb):
        return {
            "kind": "log_prob",
            "weights": model_digest(spec.model),
            "template": spec.model.template,
            "precision": precision,
        }
    return {
        "kind": spec.kind,
        "sign": spec.sign,
        "weights": model_digest(spec),
        "template": spec.template,
        "max_length": spec.max_length,
        "precision": precision,
    }
