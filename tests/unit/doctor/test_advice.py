"""What the doctor says of a run's margins and β once there are scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from can_dist.config import Config, validate_config
from can_dist.doctor import Severity
from can_dist.doctor.advice import check_scores, scores_of
from can_dist.tables.artifacts import Artifact, open_stage, write_part

SCORER = {"kind": "callable", "function": "builtins:len"}
P, K = 220, 16


def config(beta: float, **changes: Any) -> Config:
    return validate_config(
        {
            "prompts": {"source": "prompts.jsonl", "num_validation": 0},
            "strength": 1,
            "reference": {"model": "lm"},
            "reward": SCORER,
            "constraints": {"safety": {"scorer": SCORER, "margin": 0.3}},
            "beta": beta,
            **changes,
        }
    )


def scores(run: Path, label: str, names: tuple[str, ...] = ("reward", "safety")) -> Artifact:
    """A finished table of Gaussian scores."""
    stage = open_stage(run, "scores", label, {"label": label}, {})
    values = {name: np.random.default_rng(index).normal(size=P * K) for index, name in enumerate(names)}
    write_part(stage.path, 0, pa.table({"prompt_id": np.repeat(np.arange(P), K), **values}))
    return stage.commit(info={"scorers": {name: {} for name in names}})


@pytest.mark.parametrize("beta", [0.05, 3.0])
def test_the_margin_is_told_in_words_and_beta_by_what_it_does(tmp_path: Path, beta: float) -> None:
    margin, weight = check_scores(scores(tmp_path, "reference on train"), config(beta))
    assert (margin.severity, margin.subject) == (Severity.NOTE, "constraints.safety")
    assert margin.state.startswith("a margin of 0.3 is 0.3 standard deviations of the scores within a prompt; 3")
    assert weight.subject == "beta"
    if beta == 3.0:
        assert (weight.severity, weight.remedy) == (Severity.OK, "")
        assert weight.state.startswith(
            "at beta = 3 the prediction for these margins is to be trusted (a median of 13.6 of"
        )
    else:
        assert weight.severity is Severity.WARNING
        named = weight.state.split("beta ≈ ")[1].split(" ")[0]
        assert weight.remedy.startswith(f"Set beta to {named}, or raise generate.num_responses")
        assert 0.05 < float(named) <= 3


def test_only_scores_of_the_training_responses_with_every_column_count(tmp_path: Path) -> None:
    settings = config(1.0)
    assert scores_of(tmp_path, settings) is None
    scores(tmp_path, "reference on test")
    half = scores(tmp_path, "reference on train", ("reward",))
    assert scores_of(tmp_path, settings) is None
    assert check_scores(half, settings) == []
    (tmp_path / "scores-damaged").mkdir()
    (tmp_path / "scores-damaged" / "MANIFEST.json").write_text("{")
    other = config(1.0, constraints={"calm": {"scorer": SCORER, "margin": 0.3}})
    whole = scores(tmp_path / "other", "reference on train")
    assert scores_of(tmp_path / "other", other) is None
    found = scores_of(tmp_path / "other", settings)
    assert found is not None
    assert found.path == whole.path
