"""The Scorer protocol and its loader. Add a kind of scorer by a spec in ``config`` and a branch in ``load_scorer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from can_dist.config import Guard, HttpScorer, Model, MultiHead, PythonCallable, SequenceClassifier, identity
from can_dist.config.base import Strict
from can_dist.endpoints import read_key
from can_dist.modeling.formatter import Message
from can_dist.modeling.loading import callable_identity, check_sequence_classifier, check_vocabulary, model_digest
from can_dist.tables.artifacts import Artifact

# how texts are computed; another number where a score may differ (1: padded batches, 2: packs, 3: classifiers read
# before a published padding token, guards before_verdict as tokens of its own, chat templates one fixed date)
COMPUTATION = 3


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


def load_scorer(spec: ActorSpec, precision: str) -> Scorer:
    """Open the scorer that a spec describes."""
    if isinstance(spec, PythonCallable):
        from can_dist.scoring.python_callable import CallableScorer

        return CallableScorer(spec)
    if isinstance(spec, LogProb):
        from can_dist.scoring.log_prob import LogProbScorer

        return LogProbScorer(spec, precision)
    if isinstance(spec, Guard):
        from can_dist.scoring.guard import GuardScorer

        return GuardScorer(spec, precision)
    if isinstance(spec, HttpScorer):
        from can_dist.scoring.http_scorer import HttpEndpointScorer

        return HttpEndpointScorer(spec)
    from can_dist.scoring.sequence_classifier import ClassifierScorer

    return ClassifierScorer(spec.body if isinstance(spec, Outputs) else spec, precision)


def check_scorer_opens(spec: ActorSpec) -> None:
    """Raise what opening a scorer would raise, as far as that can be known without loading weights or sending text."""
    if isinstance(spec, SequenceClassifier):
        check_sequence_classifier(spec)
        check_vocabulary(spec)
    elif isinstance(spec, Guard):
        from can_dist.scoring.guard import check_guard

        check_guard(spec)
    elif isinstance(spec, LogProb):
        check_vocabulary(spec.model)
    elif isinstance(spec, Outputs):
        check_scorer_opens(spec.body)
    elif isinstance(spec, HttpScorer):
        read_key(f"scorer {spec.model} at {spec.url}", spec)


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
            "computation": COMPUTATION,
            **({"quantize": spec.quantize} if spec.quantize else {}),
        }
    if isinstance(spec, PolicyRatio):
        return {
            "kind": "log_ratio",
            "weights": model_digest(spec.policy),
            "reference": model_digest(spec.reference),
            "template": spec.policy.template,
            "precision": precision,
            "beta": spec.beta,
            "scale": spec.scale,
            "scale_se": spec.scale_se,
        }
    if isinstance(spec, HttpScorer):
        # who answers is declared; the path stays, because one server answers differently at each of its own
        what = identity(spec, exclude=("url", "batch_size"))
        return {**what, "path": urlsplit(spec.url).path}
    if isinstance(spec, Guard):
        what = identity(spec, exclude=("model", "revision", "trust_remote_code"))
        return {**what, "weights": model_digest(spec), "precision": precision, "computation": COMPUTATION}
    body = spec.body if isinstance(spec, Outputs) else spec
    what = {
        "weights": model_digest(body),
        "template": body.template,
        "max_length": body.max_length,
        "precision": precision,
        "computation": COMPUTATION,
    }
    if isinstance(spec, Outputs):
        return {"kind": "outputs", **what}
    chosen = {"output": spec.output, "weights_by_name": spec.weights} if isinstance(spec, MultiHead) else {}
    return {"kind": spec.kind, "sign": spec.sign, **what, **chosen}


def halved(spec: ActorSpec) -> ActorSpec | None:
    """Return the scorer with passes of half the size, which give the same scores; None where they hold one already."""
    if isinstance(spec, Outputs):
        body = halved(spec.body)
        return None if body is None else spec.model_copy(update={"body": body})
    name = "tokens_per_pass" if hasattr(spec, "tokens_per_pass") else "batch_size"
    size = getattr(spec, name)
    return spec.model_copy(update={name: size // 2}) if size > 1 else None


def shown_name(spec: ScorerSpec) -> str:
    """Return what a scorer is called in reports: its model, or its function."""
    if isinstance(spec, PythonCallable):
        return spec.function
    if isinstance(spec, Outputs):
        return spec.body.model
    if isinstance(spec, PolicyRatio):
        return spec.policy.model
    return spec.model.model if isinstance(spec, LogProb) else spec.model
