"""Log-ratios of aligned policies as scores (PeCAN, arXiv 2405.19544, algorithm 3): a·β(ln π(y|x) − ln π_ref(y|x)).

An aligned policy π ∝ π_ref exp(r/β) holds its reward: β ln π/π_ref = r − β ln Z(x), and what depends on the prompt
alone changes neither λ* nor the labels. Sums over the response's tokens, in nats; times β, in score units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from can_dist.config import LogRatio, Model, Scorer
from can_dist.dual import Margin, ScoreTable
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.loading import load_tokenizer
from can_dist.scoring.protocol import PolicyRatio, ScorerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Hello, world: 12 naïve <s> tests."
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "unk_token_id")  # padding is no part of a text


def log_ratio(logp_N: pa.ChunkedArray, logp_ref_N: pa.ChunkedArray, spec: PolicyRatio) -> np.ndarray:
    """Return the scores a·β(ln π − ln π_ref), (N,) float64, from log-probabilities in nats."""
    ratio_N: np.ndarray = logp_N.to_numpy() - logp_ref_N.to_numpy()
    return spec.scale * spec.beta * ratio_N


def score_columns(
    scorers: Mapping[str, Scorer], aligned: Mapping[str, PolicyRatio], reference: Model
) -> dict[str, ScorerSpec]:
    """Return the scorer of each column; a log-ratio that is not in ``aligned`` must have a model."""
    columns: dict[str, ScorerSpec] = {}
    for name, scorer in scorers.items():
        if isinstance(scorer, LogRatio):
            columns[name] = aligned[name] if name in aligned else given_ratio(name, scorer, reference)
        else:
            columns[name] = scorer
    return columns


def given_ratio(name: str, scorer: LogRatio, reference: Model) -> PolicyRatio:
    """Return the score of a policy that was given, checked to read and write text as the reference does.

    Raises:
        ConfigError: The policy is yet to be trained or its score to be calibrated.
        DataError: Tokenizer or template are not the reference's.
    """
    if scorer.model is None or scorer.learns:
        raise ConfigError(
            f"scorer {name!r}: its policy is yet to be trained, or its score to be calibrated, on people's "
            "preferences.",
            "Call run.aligned first and give what it returns to run.score.",
        )
    check_same_text(scorer.model, reference)
    return PolicyRatio(scorer.model, reference, scorer.beta)


# ----------------------------------------------------------------------------------------------- what may be mixed


def check_same_text(policy: Model, reference: Model) -> None:
    """Raise ``DataError`` naming the first difference in how two models read and write text.

    The same token ids must be the same string to both, in the same conversation, or their log-probabilities are of
    different things and a ratio of them means nothing.
    """
    if difference := _text_difference(policy, reference):
        raise DataError(
            f"model {policy.model!r}: {difference}. A log-ratio needs both models to see the same tokens.",
            f"Give a policy aligned from {reference.model!r}, with its tokenizer and template, or leave out the model "
            "to have one trained.",
        )


def _text_difference(policy: Model, reference: Model) -> str:
    mine, theirs = load_tokenizer(policy), load_tokenizer(reference)
    vocabulary, expected = mine.get_vocab(), theirs.get_vocab()
    if vocabulary != expected:
        token, _ = min(set(vocabulary.items()) ^ set(expected.items()), key=lambda pair: (pair[1], pair[0]))
        state = f"{token!r} is {vocabulary.get(token, 'absent')}"
        return f"vocabulary: {state}, in the reference's {expected.get(token, 'absent')}"
    for name in SPECIAL_IDS:
        if getattr(mine, name) != getattr(theirs, name):
            return f"{name} is {getattr(mine, name)}, the reference's {getattr(theirs, name)}"
    if policy.template != reference.template:
        return f"template is {policy.template!r}, the reference's {reference.template!r}"
    if policy.template_options != reference.template_options:
        return f"template_options are {policy.template_options}, the reference's {reference.template_options}"
    if policy.template is None and mine.chat_template != theirs.chat_template:
        return f"its tokenizer's chat template differs from the reference's ({_first_difference(mine, theirs)})"
    messages = [{"role": "user", "content": PROBE}]
    convention = reference.template, reference.template_options
    ids, expected_ids = (Formatter(t, *convention).full_ids(messages, PROBE) for t in (mine, theirs))
    return "" if ids == expected_ids else f"splits {PROBE!r} into {ids}, the reference into {expected_ids}"


def _first_difference(mine: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    own, other = str(mine.chat_template), str(theirs.chat_template)
    shared = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
    return f"from character {shared}: {own[shared : shared + 30]!r}, {other[shared : shared + 30]!r}"


def check_one_reference(identities: Mapping[str, Mapping[str, Any]], reference_column: str) -> None:
    """Raise ``DataError`` unless all log-ratios, and the column ln π_ref, are of one and the same reference."""
    state = {name: ratio["reference"] for name, ratio in identities.items() if ratio["kind"] == "log_ratio"}
    if state and reference_column in identities:
        state[reference_column] = identities[reference_column]["weights"]
    if len(set(state.values())) > 1:
        listed = ", ".join(f"{name} to {weights[:12]}" for name, weights in state.items())
        raise DataError(
            f"log-ratios relative to different references ({listed}): their sum is the reward of no policy.",
            "Score them all relative to the model that is trained.",
        )


# ------------------------------------------------------------------------------------------------- margins in nats


def margins_in_nats(table: ScoreTable, margins: Sequence[Margin], scorers: Mapping[str, Any]) -> list[str]:
    """Say, for each constraint on a log-ratio, its margin and the most attainable in score units and in nats."""
    lines = []
    for margin, centre, attainable in zip(margins, table.centre_J, table.attainable_J, strict=True):
        scorer = scorers.get(margin.name, {})
        if scorer.get("kind") != "log_ratio":
            continue
        unit = scorer["scale"] * scorer["beta"]
        demand = float(margin.margin if margin.margin is not None else (margin.threshold or 0.0) - centre)
        lines.append(
            f"{margin.name}: margin {demand:.4g} is {demand / unit:.4g} nats of ln π/π_ref, at most {attainable:.4g} "
            f"or {attainable / unit:.4g} nats attainable (one nat is {unit:.4g} of the score)"
        )
    return lines
