"""The table of scorer kinds: one row says how a kind is opened, checked before that, identified and named.

Add a kind by a spec in :mod:`can_dist.config`, a file with its scorer, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from can_dist.config import Beaver, Guard, HttpScorer, MultiHead, PythonCallable, SequenceClassifier
from can_dist.config.base import identity
from can_dist.endpoints import open_client
from can_dist.modeling.formatter import Message, text_identity
from can_dist.modeling.loading import check_causal_lm, check_vocabulary, model_digest
from can_dist.scoring.protocol import ActorSpec, LogProb, Outputs, PolicyRatio, Scorer, ScorerSpec
from can_dist.scoring.python_callable import CallableScorer, callable_identity
from can_dist.tables.artifacts import MANIFEST

COMPUTATION = 3
"""Version of the score computation: raise it whenever a change may alter a score (1: padded batches, 2: packs,
3: classifiers read before a published padding token, guards before_verdict as tokens of its own, one fixed date)."""

Writer = Callable[[Sequence[Message], str], str]
"""Writes a conversation and its response as a scorer reads them."""


@dataclass(frozen=True)
class Kind:
    """What the rest of the code asks of a kind of scorer; every function takes a spec of the kind first."""

    name: Callable[[Any], str]
    """The name of its scorer in reports: its model, or its function."""
    identity: Callable[[Any, str], dict[str, Any]]
    """What decides its numbers, under a precision."""
    open: Callable[[Any, str], Scorer] | None = None
    """Opens it, in a precision; None for a score that is arithmetic on other columns."""
    check: Callable[[Any], None] = lambda spec: None  # noqa: ARG005
    """Raises what opening it would raise, as far as that is known without loading weights or sending text."""
    writer: Callable[[Any], Writer] | None = None
    """Returns what writes the text it reads; None where it gets the conversation itself."""
    size: str = "tokens_per_pass"
    """The field of its spec that bounds one pass."""


def kind_of(spec: ScorerSpec) -> Kind:
    """Return the row of a spec's kind."""
    return KINDS[type(spec)]


def load_scorer(spec: ActorSpec, precision: str) -> Scorer:
    """Open the scorer that a spec describes."""
    opened = kind_of(spec).open
    assert opened is not None, f"{spec} is no scorer of an actor"
    return opened(spec, precision)


def check_scorer_opens(spec: ActorSpec) -> None:
    """Raise what opening a scorer would raise, as far as that can be known without loading weights or sending text."""
    kind_of(spec).check(spec)


def scorer_identity(spec: ScorerSpec, precision: str) -> dict[str, Any]:
    """Return what decides a scorer's numbers: weights digest, text convention, sign, precision."""
    return kind_of(spec).identity(spec, precision)


def shown_name(spec: ScorerSpec) -> str:
    """Return the name of a scorer in reports: its model, or its function."""
    return kind_of(spec).name(spec)


def halved(spec: ActorSpec) -> ActorSpec | None:
    """Return the scorer with passes of half the size, which give the same scores; None where they hold one already."""
    if isinstance(spec, Outputs):
        body = halved(spec.body)
        return None if body is None else spec.model_copy(update={"body": body})
    field = kind_of(spec).size
    size = getattr(spec, field)
    return spec.model_copy(update={field: size // 2}) if size > 1 else None


# ------------------------------------------------------------------------------------------------------ classifiers


def _open_classifier(spec: SequenceClassifier, precision: str) -> Scorer:
    from can_dist.scoring.sequence_classifier import ClassifierScorer

    return ClassifierScorer(spec, precision)


def _check_classifier(spec: SequenceClassifier) -> None:
    from can_dist.scoring.sequence_classifier import check_classifier

    check_classifier(spec)


def _classifier_writer(spec: SequenceClassifier) -> Writer:
    from can_dist.scoring.sequence_classifier import text_of_classifier

    return text_of_classifier(spec)


def _body_identity(spec: SequenceClassifier, precision: str) -> dict[str, Any]:
    return {
        "weights": model_digest(spec),
        **text_identity(spec),
        **({} if spec.text_pair is None else {"text_pair": spec.text_pair}),
        "max_length": spec.max_length,
        "precision": precision,
        "computation": COMPUTATION,
    }


def _classifier_identity(spec: SequenceClassifier, precision: str) -> dict[str, Any]:
    return {"kind": spec.kind, "sign": spec.sign, **_body_identity(spec, precision)}


def _choice_identity(spec: MultiHead, precision: str) -> dict[str, Any]:
    return {**_classifier_identity(spec, precision), "output": spec.output, "weights_by_name": spec.weights}


def _outputs_identity(spec: Outputs, precision: str) -> dict[str, Any]:
    return {"kind": "outputs", **_body_identity(spec.body, precision)}


# ----------------------------------------------------------------------------------------------- guards and endpoints


def _open_guard(spec: Guard, precision: str) -> Scorer:
    from can_dist.scoring.guard import GuardScorer

    return GuardScorer(spec, precision)


def _check_guard(spec: Guard) -> None:
    from can_dist.scoring.guard import check_guard

    check_guard(spec)


def _guard_writer(spec: Guard) -> Writer:
    from can_dist.scoring.guard import text_of_guard

    return text_of_guard(spec)


def _guard_identity(spec: Guard, precision: str) -> dict[str, Any]:
    named = identity(spec, exclude=("model", "revision", "trust_remote_code"))
    return {**named, "weights": model_digest(spec), "precision": precision, "computation": COMPUTATION}


def _open_http(spec: HttpScorer, precision: str) -> Scorer:  # noqa: ARG001
    from can_dist.scoring.http_scorer import HttpEndpointScorer

    return HttpEndpointScorer(spec)


def _check_http(spec: HttpScorer) -> None:
    open_client(f"scorer {spec.model} at {spec.url}", spec.url, spec).close()


def _http_writer(spec: HttpScorer) -> Writer:
    from can_dist.scoring.http_scorer import request_text

    return lambda messages, text: request_text(spec, messages, text)


def _http_identity(spec: HttpScorer, precision: str) -> dict[str, Any]:  # noqa: ARG001
    # the user declares the model, so the host is left out; the path stays, since one server may serve several models
    return {**identity(spec, exclude=("url", "batch_size")), "path": urlsplit(spec.url).path}


def _callable_identity(spec: PythonCallable, precision: str) -> dict[str, Any]:  # noqa: ARG001
    return {"kind": spec.kind, "sign": spec.sign, **callable_identity(spec.function)}


# ---------------------------------------------------------------------------------------------------- language models


def _open_log_prob(spec: LogProb, precision: str) -> Scorer:
    from can_dist.scoring.log_prob import LogProbScorer

    return LogProbScorer(spec, precision)


def _check_log_prob(spec: LogProb) -> None:
    check_vocabulary(spec.model)
    check_causal_lm(spec.model)


def _log_prob_identity(spec: LogProb, precision: str) -> dict[str, Any]:
    return {
        "kind": "log_prob",
        "weights": model_digest(spec.model),
        **text_identity(spec.model),
        "precision": precision,
        "computation": COMPUTATION,
        **({"quantize": spec.quantize} if spec.quantize else {}),
    }


def _ratio_identity(spec: PolicyRatio, precision: str) -> dict[str, Any]:
    return {
        "kind": "log_ratio",
        "weights": model_digest(spec.policy),
        "reference": model_digest(spec.reference),
        **text_identity(spec.policy),
        "precision": precision,
        "beta": spec.beta,
        "scale": spec.scale,
        "scale_se": spec.scale_se,
    }


def _place(model: str) -> str:
    """Return a model as typed; one that lies in an artifact by the artifact's name, whatever the path of the run."""
    path = Path(model)
    return f"{path.parent.name}/{path.name}" if (path.parent / MANIFEST).is_file() else model


def _model_name(spec: Any) -> str:
    return str(spec.model)


CLASSIFIER = Kind(_model_name, _classifier_identity, _open_classifier, _check_classifier, _classifier_writer)

KINDS: dict[type, Kind] = {
    SequenceClassifier: CLASSIFIER,
    Beaver: CLASSIFIER,
    MultiHead: Kind(_model_name, _choice_identity, _open_classifier, _check_classifier, _classifier_writer),
    Outputs: Kind(
        name=lambda spec: str(spec.body.model),
        identity=_outputs_identity,
        open=lambda spec, precision: _open_classifier(spec.body, precision),
        check=lambda spec: _check_classifier(spec.body),
    ),
    Guard: Kind(_model_name, _guard_identity, _open_guard, _check_guard, _guard_writer),
    HttpScorer: Kind(
        _model_name,
        _http_identity,
        _open_http,
        check=_check_http,
        writer=_http_writer,
        size="batch_size",
    ),
    PythonCallable: Kind(
        name=lambda spec: str(spec.function),
        identity=_callable_identity,
        open=lambda spec, precision: CallableScorer(spec),  # noqa: ARG005
        size="batch_size",
    ),
    LogProb: Kind(lambda spec: _place(spec.model.model), _log_prob_identity, _open_log_prob, _check_log_prob),
    PolicyRatio: Kind(lambda spec: _place(spec.policy.model), _ratio_identity),
}
