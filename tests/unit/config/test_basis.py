"""`basis: true`: where it is refused before anything runs, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from can_dist.config import Config, validate_config
from can_dist.config.base import identity
from can_dist.config.load import for_method
from can_dist.errors import ConfigError
from can_dist.pipeline import run_method
from can_dist.stages.label import combined_score


def configured(**sections: Any) -> Config:
    scorer = {"kind": "callable", "function": "builtins:len"}
    base = {"prompts": {"source": "p.jsonl"}, "reference": {"model": "lm"}, "reward": scorer}
    return validate_config({**base, "constraints": {"a": {"scorer": scorer, "margin": 1}}, "basis": True, **sections})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "cdpo"}, "method cdpo trains no policy of one score alone"),
        (
            {"method": "dpo_s", "label": {"preferences": {"source": "pairs.jsonl"}}},
            "leave out, or set method to mocan or pecan",
        ),
        ({"prompts": {"source": "p.jsonl", "num_validation": 0}, "strength": 1}, "basis is by validation prompts"),
        ({"generate": {"num_responses": 1}, "strength": 1}, "basis is by which of a prompt's responses"),
        ({"train": {"lora": {"quantize": "nf4"}}, "strength": 1}, "leave one of both out"),
        ({"basis": "much"}, "basis: expected a valid boolean"),
    ],
)
def test_bases_that_cannot_be_mixed_are_refused_before_anything_runs(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(**sections)


def test_a_launcher_that_starts_one_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="basis: true trains several times"):
        run_method(tmp_path / "run", configured(), "train", only_stage="train")
    assert not (tmp_path / "run").exists()


def test_runs_without_a_basis_keep_their_identities() -> None:
    assert "basis" not in identity(configured(basis=False))
    assert identity(configured())["basis"] is True
    both = configured(methods={"sacpo": {"label": {"preferences": {"source": "pairs.jsonl"}}}})
    assert not for_method(both, "sacpo").basis
    assert for_method(both, "mocan").basis


def test_scores_without_the_reward() -> None:
    table = pa.table({"reward": [1.0, 2.0], "a": [0.5, -0.5]})
    assert combined_score(table, {"a": 3.0}, None, {"a": 0.5}).tolist() == [3.0, -3.0]
    assert combined_score(table, {"a": 3.0}, "reward", {}).tolist() == [2.5, 0.5]
