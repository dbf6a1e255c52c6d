"""What a model that is gone is said to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from can_dist.config import Model
from can_dist.errors import DataError
from can_dist.modeling.loading import load_causal_lm, load_model_config, load_tokenizer


@pytest.mark.parametrize(
    "load",
    [load_tokenizer, lambda spec: load_model_config(spec, "model"), lambda spec: load_causal_lm(spec, "fp32")],
    ids=["tokenizer", "configuration", "weights"],
)
def test_directory_that_is_gone_is_no_hub_id(load: Callable[[Model], object], tmp_path: Path) -> None:
    """It was there when the driver looked, and was removed before a rank or an actor opened it."""
    with pytest.raises(DataError, match=r"model '.*/gone': no such directory"):
        load(Model(model=str(tmp_path / "gone")))
