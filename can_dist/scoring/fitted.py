"""What is known of a score model that `can-dist fit-scorer` made: its held-out accuracy, below which no run uses it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from can_dist.config import SequenceClassifier
from can_dist.errors import ConfigError, DataError

FIT = "fit.json"


def above(record: Mapping[str, Any], least: float) -> str:
    """Return why a record's accuracy is not at least ``least``, or ''."""
    kinds = record["held_out"]
    kind = "pairs" if "pairs" in kinds else "labels"
    row = kinds[kind]
    if row["accuracy"] >= least:
        return ""
    return (
        f"its accuracy on {row['number']} held-out {kind} is {row['accuracy']:.3f} [{row['low']:.3f}, "
        f"{row['high']:.3f}], and {least:g} is asked"
    )


def check_fitted(spec: SequenceClassifier) -> None:
    """Raise ``ConfigError`` where a fitted model's held-out accuracy is below what it was asked, or is asked here.

    A model without a record of ``fit-scorer`` is taken as it is, unless ``min_accuracy`` asks for one.
    """
    path = Path(spec.model).expanduser() / FIT
    record = _record(path) if path.is_file() else {}
    if "least_accuracy" not in record:
        if spec.min_accuracy is not None:
            raise ConfigError(
                f"scorer {spec.model!r}: min_accuracy asks for {spec.min_accuracy:g}, and nothing says how accurate it "
                "is.",
                f"Fit it with `can-dist fit-scorer`, which writes {FIT}, or leave min_accuracy out.",
            )
        return
    least = record["least_accuracy"] if spec.min_accuracy is None else spec.min_accuracy
    if problem := above(record, least):
        raise ConfigError(
            f"scorer {spec.model!r}: {problem} ({path}).",
            "Fit it on more or better data; min_accuracy of the scorer says what is enough, 0 for any.",
        )


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "least_accuracy" in record:
            above(record, float(record["least_accuracy"]))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: damaged.", "Fit the scorer again.") from None
    return record
