"""The plan against the peak of real trainings: ZeRO-3 ranks on a CPU, float32, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from plan_world import PAIRS, RESPONSE_TOKENS, make_model, measured_peaks, tokens_of_a_pair
from train_world import ROOT

from can_dist.config import validate_config
from can_dist.training.plan import make_plan

# vocabulary, width, layers, heads, heads of the keys, inner width
TINY = (64, 32, 2, 2, 2, 64)
WIDE = (8000, 512, 6, 8, 8, 1376)  # 27 M parameters
VOCABULARY = (32000, 384, 4, 6, 2, 1024)  # 31 M, most of them in the embeddings
DEEP = (2000, 512, 12, 8, 4, 1536)  # 40 M
AGREEMENT = 0.15


def planned(model: Path, num_ranks: int, **train: object) -> int:
    scorer: dict[str, Any] = {"kind": "callable", "function": "builtins:len"}
    config = validate_config(
        {
            "prompts": {"source": "unread.jsonl"},
            "reference": {"model": str(model)},
            "reward": scorer,
            "constraints": {"safety": {"scorer": scorer, "margin": 1.0}},
            "generate": {"max_new_tokens": RESPONSE_TOKENS},
            "train": {
                "tokens_per_pack": PAIRS * tokens_of_a_pair(),
                "ds_config": str(ROOT / "ds_configs" / "zero3_cpu.json"),
                **train,
            },
            "cluster": {"num_workers": num_ranks},
        }
    )
    plan = make_plan(config, 10**12)
    return max(plan.pass_bytes, plan.step_bytes)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[int, int]:
    """What ranks need for themselves (what DeepSpeed imports, scratch of the linear algebra), by number of ranks.

    That is what they need to train a model of a few kilobytes.
    """
    found = {}
    for num_ranks in (1, 2):
        root = tmp_path_factory.mktemp(f"tiny{num_ranks}")
        found[num_ranks] = max(measured_peaks(root, make_model(root / "lm", *TINY), num_ranks))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "num_ranks", "train"),
    [
        (WIDE, 1, {}),
        (VOCABULARY, 1, {"activation_checkpointing": True}),
        (WIDE, 1, {"lora": {"r": 8}}),
        (VOCABULARY, 2, {}),
        (DEEP, 2, {"activation_checkpointing": True}),
    ],
    ids=["wide", "vocabulary-checkpointed", "wide-adapters", "vocabulary-2-ranks", "deep-2-ranks-checkpointed"],
)
def test_the_plan_is_what_training_takes(
    tmp_path: Path, own: dict[int, int], shape: tuple[int, ...], num_ranks: int, train: dict[str, Any]
) -> None:
    model = make_model(tmp_path / "lm", *shape)
    peak = max(measured_peaks(tmp_path, model, num_ranks, **train)) - own[num_ranks]
    plan = planned(model, num_ranks, **train)
    assert abs(plan / peak - 1) <= AGREEMENT, f"planned {plan / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB"
