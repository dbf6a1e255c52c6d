"""Sequence classifiers: what must be true of one before it scores, and how it is opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from can_dist.config import Beaver, MultiHead, SequenceClassifier
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import check_weights, has_own_marks, load_model_config, load_tokenizer, load_whole
from can_dist.modeling.stored import read_json, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLE = "sequence classifier"
NORMALISING = ("normalize_reward", "do_normalize")
"""Keys of config.json under which makers (OpenRLHF, Safe RLHF) normalise the scores of a model when they open it."""


def load_sequence_classifier(
    spec: SequenceClassifier,
    precision: str,
    tell: Callable[[str], None] = lambda line: None,  # noqa: ARG005
) -> PreTrainedModel:
    """Load a sequence classifier or Beaver model; refuse one whose head was not in the checkpoint.

    transformers initialises a missing head at random with only a warning, so a causal language model given as a
    reward model would yield noise. ``tell`` takes a line on harmless tensors that nothing reads.
    """
    check_sequence_classifier(spec)
    model: PreTrainedModel = load_whole(_class_of(spec), spec, precision, ROLE, tell=tell).eval()
    return model


def _class_of(spec: SequenceClassifier) -> Any:
    if isinstance(spec, Beaver):
        from can_dist.modeling.beaver import LlamaForScore

        return LlamaForScore
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification


def check_sequence_classifier(spec: SequenceClassifier) -> None:
    """Raise ``DataError`` unless a model has the head and outputs that its spec says; loads no weights."""
    config = load_model_config(spec, ROLE)
    if isinstance(spec, Beaver):
        from can_dist.modeling.beaver import check_beaver

        check_beaver(spec, config)
        check_weights(_class_of(spec), spec, ROLE)
        return
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise DataError(
            f"scorer model {spec.model!r}: its checkpoint is a {', '.join(architectures) or 'model without head'}, "
            "not a sequence classifier; its score head would be random.",
            "Give a trained reward or cost model.",
        )
    _refuse_normalised(spec, config)
    _check_outputs(spec, config)
    check_weights(_class_of(spec), spec, ROLE)
    if isinstance(spec, MultiHead):
        output_weights(spec, config)
    elif config.num_labels != 1:
        raise DataError(
            f"scorer model {spec.model!r}: has {config.num_labels} outputs, expected 1 score per response.",
            "Choose one with 'kind: multi_head'.",
        )


def _refuse_normalised(spec: SequenceClassifier, config: Any) -> None:
    for key in NORMALISING:
        if getattr(config, key, False):
            given = [f"{name} {getattr(config, name)}" for name in ("mean", "std") if hasattr(config, name)]
            statistics = f" ({', '.join(given)})" if given else ""
            raise DataError(
                f"scorer model {spec.model!r}: config.json has {key} true: its maker's loader returns (score - mean) "
                f"/ std{statistics}, which is not computed here.",
                "For the raw score set it to false; margins and thresholds are then in its units, std times as large.",
            )


HEADS = ("score.weight", "classifier.out_proj.weight", "classifier.weight", "logits_proj.weight")
"""What transformers' classifiers call the last linear map to their outputs, (L, H)."""


def _check_outputs(spec: SequenceClassifier, config: Any) -> None:
    """Raise ``DataError`` when the head in a local checkpoint has another number of outputs than config.json says."""
    path = Path(spec.model).expanduser()
    tensors = stored_tensors(path) if path.is_dir() else {}
    for name in HEADS:
        if name in tensors and (rows := tensors[name].shape[0]) != config.num_labels:
            given = read_json(path / "config.json")
            says = (
                ""
                if {"num_labels", "id2label"} & given.keys()
                else ", which is transformers' default where it says none"
            )
            raise DataError(
                f"scorer model {spec.model!r}: config.json has {config.num_labels} outputs (num_labels{says}), the "
                f"checkpoint's {name} has {rows} row{'s' * (rows != 1)}.",
                f'Write "num_labels": {rows} into its config.json{", with as many names in id2label" * (rows != 1)}.',
            )


def output_weights(spec: MultiHead, config: Any) -> list[float]:
    """Return the weight of each output of a classifier in its score, (L,), in the order of the outputs.

    Raises:
        DataError: A chosen output does not exist; those that do are listed.
    """
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    if isinstance(spec.output, int):
        chosen: dict[str, float] = {names[spec.output]: 1.0} if 0 <= spec.output < len(names) else {}
    else:
        chosen = spec.weights or {str(spec.output): 1.0}
    if not chosen or not set(chosen) <= set(names) or len(set(names)) < len(names):
        wrong = ", ".join(sorted(set(chosen) - set(names))) or spec.output
        raise DataError(
            f"scorer model {spec.model!r}: no single output {wrong}.",
            f"Its outputs are {', '.join(f'{number}: {name}' for number, name in enumerate(names))}.",
        )
    return [chosen.get(name, 0.0) for name in names]


def check_pair_is_chosen(spec: SequenceClassifier) -> None:
    """Raise ``ConfigError`` where a model may have been trained on pairs of texts and nothing says how it reads them.

    An encoder reads ``tokenizer(question, answer)``, with token types where it has them, or one text. Where it has no
    token types, a template that holds its separator gives the same numbers as the pair.
    """
    tokenizer = load_tokenizer(spec)
    if spec.text_pair is None:
        num_types = getattr(load_model_config(spec, ROLE), "type_vocab_size", 0) or 0
        spelled = num_types <= 1 and str(tokenizer.sep_token) in (spec.template or "")
        if isinstance(spec, Beaver) or not has_own_marks(tokenizer) or spelled or tokenizer.chat_template:
            return
        types = f" and has {num_types} token types" if num_types > 1 else ""
        raise ConfigError(
            f"scorer model {spec.model!r}: its tokenizer joins two texts as a pair ({tokenizer.cls_token} a "
            f"{tokenizer.sep_token} b {tokenizer.sep_token}){types}.",
            "Set text_pair: true for a model trained on tokenizer(question, answer), as DeBERTa and Electra reward "
            "models are, or text_pair: false and a template for one that reads a single text.",
        )
    if spec.text_pair and not has_own_marks(tokenizer):
        raise ConfigError(
            f"scorer model {spec.model!r}: text_pair is true, but its tokenizer puts no mark between two texts.",
            "Leave text_pair out and give the text by template, or by a chat template.",
        )
