"""``can-dist fit-scorer``: what it writes and prints, and that a run refuses a scorer below its accuracy."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from small_run import WORDS
from tiny import make_tiny_lm

from can_dist.config import DataSource, Model, SequenceClassifier
from can_dist.doctor import inputs
from can_dist.errors import ConfigError, DataError
from can_dist.fitting.fit_scorer import fit_scorer, rows_of, told
from can_dist.measuring.calibration import reliability, wilson
from can_dist.scoring.fitted import check_fitted


@pytest.mark.parametrize(("right", "number"), [(0, 20), (13, 20), (20, 20), (311, 400)])
def test_the_interval_is_wilsons(right: int, number: int) -> None:
    expected = binomtest(right, number).proportion_ci(method="wilson")
    assert wilson(right, number) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_calibration_is_the_mean_gap_of_the_bins() -> None:
    random = np.random.default_rng(3)
    logit_N = random.normal(size=500) * 2
    label_N = (random.random(500) < 1 / (1 + np.exp(-logit_N))).astype(float)
    row = reliability(logit_N, label_N)
    confidence = np.maximum(1 / (1 + np.exp(-logit_N)), 1 / (1 + np.exp(logit_N)))
    right = (logit_N > 0) == (label_N == 1)
    edges = np.linspace(0.5, 1.0, 11)
    gap = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        gap += inside.mean() * abs(right[inside].mean() - confidence[inside].mean()) if inside.any() else 0.0
    assert row["ece"] == pytest.approx(gap, abs=1e-12)
    assert row["accuracy"] == pytest.approx(right.mean())
    assert sum(entry["number"] for entry in row["bins"]) == 500
    assert reliability(3 * logit_N, label_N)["ece"] > row["ece"] + 0.05, "one that is surer than it is right"
    assert reliability(np.zeros(4), np.array([0.0, 1.0, 0.0, 1.0]))["accuracy"] == 0.5


def test_pairs_and_flags_of_a_table() -> None:
    said: list[dict[str, str]] = [{"role": "user", "content": "q"}]
    row = {
        "messages": said,
        "response_a": "x",
        "response_b": "y",
        "better": 1,
        "safer": 0,
        "safe_a": True,
        "safe_b": None,
    }
    pairs, examples = rows_of([row, row | {"better": -1}], "helpful")
    assert [(pair.better, pair.worse) for pair in pairs] == [("y", "x")]
    assert examples == []
    pairs, examples = rows_of([row, row], "safe")
    assert [(pair.better, pair.worse) for pair in pairs] == [("x", "y")] * 2
    assert [(example.response, example.label) for example in examples] == [("x", 1)], "a response counts once"


def data(folder: Path, better: Any) -> DataSource:
    """200 prompts with two responses; ``better(n)`` says which one people prefer."""
    rows = [
        {
            "prompt": f"{a} {b}",
            "response_0": "w1 w2",
            "response_1": "w3 w4",
            "better_response_id": better(n),
            "safer_response_id": better(n),
            "is_response_0_safe": better(n) == 0,
            "is_response_1_safe": better(n) == 1,
        }
        for n, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(source=str(folder / "pairs.jsonl"))


OPTIONS: dict[str, Any] = {"criterion": "safe", "epochs": 3, "lr": 3e-3, "batch_size": 16, "held_out": 0.3, "seed": 0}


@pytest.mark.slow  # trains a tiny model
def test_a_scorer_is_fitted_measured_and_used(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)
    base, out = Model(model=str(tmp_path / "lm")), tmp_path / "safety"
    record = fit_scorer(base, data(tmp_path, lambda _: 0), out, least_accuracy=0.9, **OPTIONS)
    assert json.loads((out / "fit.json").read_text()) == record
    assert record["held_out"]["pairs"]["accuracy"] == 1.0
    assert record["held_out"]["labels"]["accuracy"] > 0.95
    assert record["held_out"]["pairs"]["number"] == record["num_held_out_pairs"] == 43
    text = "\n".join(told(record))
    assert "pairs ordered rightly: 100.0% [" in text
    assert "refuses" not in text
    assert "tokens for" in inputs.check_model(SequenceClassifier(model=str(out)))
    check_fitted(SequenceClassifier(model=str(out)))


@pytest.mark.slow  # trains a tiny model
def test_a_scorer_below_its_accuracy_is_refused_unless_told(tmp_path: Path) -> None:
    """Labels that nothing in the text tells."""
    make_tiny_lm(tmp_path / "lm", WORDS)
    random = np.random.default_rng(5).integers(0, 2, size=400).tolist()
    out = tmp_path / "safety"
    record = fit_scorer(
        Model(model=str(tmp_path / "lm")), data(tmp_path, lambda n: random[n]), out, least_accuracy=0.9, **OPTIONS
    )
    assert record["held_out"]["pairs"]["accuracy"] < 0.9
    assert "A run refuses it: its accuracy on 43 held-out pairs is" in "\n".join(told(record))
    with pytest.raises(ConfigError, match=r"safety': its accuracy on 43 held-out pairs is .* and 0\.9 is asked"):
        inputs.check_model(SequenceClassifier(model=str(out)))
    inputs.check_model(SequenceClassifier(model=str(out), min_accuracy=0.0))


def recorded(folder: Path, record: Any) -> SequenceClassifier:
    folder.mkdir()
    (folder / "fit.json").write_text(record if isinstance(record, str) else json.dumps(record))
    return SequenceClassifier(model=str(folder))


def test_models_without_a_record_are_taken_as_they_are_unless_one_is_asked_for(tmp_path: Path) -> None:
    check_fitted(SequenceClassifier(model="somebody/reward"))
    check_fitted(recorded(tmp_path / "old", {"pair_accuracy": 0.4}))
    with pytest.raises(ConfigError, match=r"min_accuracy asks for 0\.7, and nothing says how accurate it is"):
        check_fitted(SequenceClassifier(model="somebody/reward", min_accuracy=0.7))
    with pytest.raises(DataError, match=r"fit\.json: damaged"):
        check_fitted(recorded(tmp_path / "torn", '{"least_accuracy": 0.7}'))
    row = {"number": 50, "accuracy": 0.75, "low": 0.6, "high": 0.9}
    spec = recorded(tmp_path / "fair", {"least_accuracy": 0.7, "held_out": {"pairs": row}})
    check_fitted(spec)
    with pytest.raises(ConfigError, match=r"is 0\.750 \[0\.600, 0\.900\], and 0\.8 is asked"):
        check_fitted(spec.model_copy(update={"min_accuracy": 0.8}))


def test_what_cannot_be_fitted_is_refused(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "lm", WORDS)
    base = Model(model=str(tmp_path / "lm"))
    with pytest.raises(ConfigError, match=r"least accuracy 0\.4: expected 0\.5 or more"):
        fit_scorer(base, data(tmp_path, lambda _: 0), tmp_path / "out", least_accuracy=0.4, **OPTIONS)
    row = {"prompt": "w1", "chosen": "w2", "rejected": "w2"}
    (tmp_path / "same.jsonl").write_text((json.dumps(row) + "\n") * 3)
    source = DataSource(source=str(tmp_path / "same.jsonl"))
    with pytest.raises(DataError, match="no row has a label of what is helpful"):
        fit_scorer(base, source, tmp_path / "out", least_accuracy=0.6, **(OPTIONS | {"criterion": "helpful"}))
    assert not (tmp_path / "out").exists()
