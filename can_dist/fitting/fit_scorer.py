"""A score model from a data set of preferences: read, fitted, measured on prompts that it did not see, written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from can_dist.config import DataSource, Model
from can_dist.errors import ConfigError, DataError
from can_dist.fitting.score_models import ScoreExample, ScorePair, fit_score_model
from can_dist.measuring.calibration import reliability
from can_dist.modeling.formatter import open_formatter
from can_dist.modeling.loading import context_length, load_model_config, model_directory
from can_dist.scoring.fitted import above
from can_dist.tables.foreign.formats import read_preferences

Criterion = Literal["helpful", "safe"]
MIN_HELD_OUT = 20
"""Fewer held-out pairs and labelled responses say nothing of an accuracy."""


def fit_scorer(
    base: Model,
    source: DataSource,
    out: Path,
    *,
    criterion: Criterion,
    least_accuracy: float,
    **options: Any,
) -> dict[str, Any]:
    """Fit a one-output classifier on the body of ``base``, and write it with what it is worth on held-out prompts.

    Pairs are fitted by Bradley–Terry; of the criterion 'safe', flagged responses by the logistic loss too, so that a
    score above 0 means safe. ``out/fit.json`` holds the record: held-out accuracy with Wilson's 95 % interval, and
    calibration, of pairs and of flagged responses; and ``least_accuracy``, below which a run refuses the model.

    Args:
        base: A causal language model with its tokenizer, in a directory.
        source: Preferences in any format that is read (docs/data.md).
        out: Written whole or not at all; must not exist.
        criterion: Which labels are learnt.
        least_accuracy: Least share of held-out pairs (else of flagged responses) that the model must order rightly.
        options: Of :func:`can_dist.fitting.score_models.fit_score_model`: epochs, lr, batch_size, held_out, seed.

    Raises:
        ConfigError: ``least_accuracy`` is no share above one half.
        DataError: No row has a label of the criterion, too few are held out, or the texts do not fit the model.
        EnvironmentProblem: ``out`` exists.
        NumericalError: The loss is not finite.
    """
    if not 0.5 <= least_accuracy < 1:
        raise ConfigError(f"least accuracy {least_accuracy:g}: expected 0.5 or more, and less than 1.")
    read = read_preferences(source.source, split=source.split, subset=source.subset, revision=source.revision)
    pairs, examples = rows_of(read.table.to_pylist(), criterion)
    if not pairs and not examples:
        raise DataError(
            f"{source.source}: no row has a label of what is {criterion} ({read.announcement}).",
            "Give --criterion helpful or safe, whichever the data labels.",
        )
    formatter = open_formatter(base)
    context = context_length(load_model_config(base, "base of the scorer"))
    about = {"criterion": criterion, "source": source.source, "read_as": read.format, "base": base.model}
    held: dict[str, Any] = {}
    further = {**about, "least_accuracy": least_accuracy, "held_out": held}

    def measured(pair_logit_N: Any, score_N: Any, label_N: Any) -> dict[str, Any]:
        if len(pair_logit_N) >= MIN_HELD_OUT:
            held["pairs"] = reliability(pair_logit_N, pair_logit_N * 0 + 1)
        if len(score_N) >= MIN_HELD_OUT:
            held["labels"] = reliability(score_N, label_N)
        if not held:
            raise DataError(
                f"{source.source}: {len(pair_logit_N)} pairs and {len(score_N)} labelled responses are held out; "
                f"expected {MIN_HELD_OUT} of one kind at least, to measure an accuracy.",
                "Bring more data, or raise --held-out.",
            )
        return further

    result = fit_score_model(
        model_directory(base), pairs, out, encode=formatter.full_ids, examples=examples, max_length=context,
        measured=measured, **options,
    )  # fmt: skip
    return {**asdict(result), **further}


def rows_of(table: Sequence[Mapping[str, Any]], criterion: Criterion) -> tuple[list[ScorePair], list[ScoreExample]]:
    """Return the pairs and the flagged responses of a table of preferences (schema ``PREFERENCES_READ``)."""
    pairs, examples = [], {}
    label = {"helpful": "better", "safe": "safer"}[criterion]
    for row in table:
        messages, a, b = row["messages"], row["response_a"], row["response_b"]
        if row[label] in (0, 1) and a != b:
            better, worse = (a, b) if row[label] == 0 else (b, a)
            pairs.append(ScorePair(messages, better, worse))
        for text, flag in ((a, row["safe_a"]), (b, row["safe_b"])):
            if criterion == "safe" and flag is not None:
                examples[json.dumps([messages, text], sort_keys=True)] = ScoreExample(messages, text, int(flag))
    return pairs, list(examples.values())


def told(record: Mapping[str, Any]) -> list[str]:
    """Return what a fit is worth, in lines for people."""
    lines = []
    for kind, words in (("pairs", "pairs ordered rightly"), ("labels", "flagged responses on the right side of 0")):
        if row := record["held_out"].get(kind):
            lines.append(
                f"{words}: {row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] of {row['number']} held out; "
                f"expected calibration error {row['ece']:.3f}"
            )
            lines += [
                f"  says {entry['confidence']:.2f}: right {entry['right']:.2f} of {entry['number']}"
                for entry in row["bins"]
            ]
    if record["num_truncated"]:
        lines.append(f"{record['num_truncated']} texts were longer than the model's context, and lost their end")
    if problem := above(record, record["least_accuracy"]):
        lines.append(f"A run refuses it: {problem}")
    return lines
