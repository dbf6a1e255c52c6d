"""The table of docs/speed.md is filled from the lines of a GPU; rows without a result stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_table

PAGE = gpu_table.SPEED.read_text(encoding="utf-8")


def run(seconds: float, **changes: Any) -> dict[str, Any]:
    numbers = {"reference_seconds": seconds, "train_seconds": seconds, "shared_tokens_per_second": 8000.0}
    memory = {"peak_gb": 100.0, "planned_gb": 110.0, "plan_over_peak": 1.1, "mfu_on_shared_tokens": 0.45}
    steps = {"kernels": None, "median_step_seconds": 3.0}
    return {"model": "random-7b", "micro_batch": 8, "tokens_per_pack": 16384, **steps, **numbers, **memory, **changes}


RESULTS: dict[str, Any] = {
    "attention": {"cases": {"a": {"ok": True}, "b": {"ok": False}}},
    "train-large": {"runs": [run(1.0)]},
    "train-large-trl": {"runs": [run(2.0, peak_gb=125.0), run(1.5, micro_batch=16, peak_gb=125.0)]},
    "train-small": {"works": {"pku-like": {"faster": 1.2}, "hh-like": {"faster": 1.65}, "tldr-like": {"faster": 2.0}}},
    "scoring": {"rows": [{"wall_seconds": {"ours": 2.0, "pipeline": 3.0, "bare": 1.9}}]},
    "kernels-bench": {"rows": [{"torch_over_triton": 4.0, "torch_over_trl": 3.0}]},
    "heads": {"rows": [{"ours_ms": 2.0, "trl_ms": 1.0}]},
    "packs": {
        "runs": [
            run(1.0),
            run(1.0, kernels="liger", median_step_seconds=2.5, shared_tokens_per_second=9000.0, peak_gb=90.0),
            run(1.0, tokens_per_pack=2048, shared_tokens_per_second=5000.0),
        ]
    },
}


def test_every_row_is_filled() -> None:
    table = gpu_table.fill(PAGE, RESULTS).split("## On GPUs")[1]
    for told in (
        "| 1 of 2 cases |",
        "| random-7b: 45% MFU, 8,000 shared tokens/s, 1.50 × TRL's best (micro-batch 16), 0.80 of its memory |",
        "| 1.20 × / 1.65 × / 2.00 × |",
        "| 1.10 of it (110.0 and 100.0 GB) |",
        "| 1.50 ×, and 1.05 of its time |",
        "| triton 4.0–4.0 × torch, trl 3.0–3.0 × torch; our head 0.50–0.50 × TRL's |",
        "| 2k: 5,000, 16k: 8,000 |",
        "| 1.20 × the speed, 0.90 of the memory |",
    ):
        assert told in table, told
    assert "not yet measured |" not in table


def test_sections_that_did_not_pass_leave_their_rows(tmp_path: Path) -> None:
    lines = tmp_path / "gpu.jsonl"
    passed = {"section": "attention", "status": "ok", "result": RESULTS["attention"]}
    failed = {"section": "scoring", "status": "exit code 1", "result": RESULTS["scoring"]}
    lines.write_text("\n".join(map(json.dumps, [passed, failed])))
    filled = gpu_table.fill(PAGE, gpu_table.read(lines))
    assert "| 1 of 2 cases |" in filled
    assert filled.count("not yet measured |") == PAGE.count("not yet measured |")
    assert gpu_table.fill(PAGE, {}) == PAGE
