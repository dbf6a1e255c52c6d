"""Fill the table of docs/speed.md from what ``make gpu`` measured: a row's result is that of the sections it names.

python benchmarks/gpu_table.py benchmarks/results/gpu_nvidia-h200.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SPEED = Path(__file__).resolve().parents[1] / "docs" / "speed.md"
Results = Mapping[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Return the results of the sections that passed, by name."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["section"]: line["result"] for line in lines if line["status"] == "ok"}


def attention(results: Results) -> str:
    """Say how many cases kept their bounds."""
    cases = results["attention"]["cases"].values()
    return f"{sum(case['ok'] for case in cases)} of {len(cases)} cases"


def large(results: Results) -> str:
    """Say what the large training did, and how much faster it was than TRL's best."""
    ours, peers = results["train-large"]["runs"][0], results["train-large-trl"]["runs"]
    best = min(peers, key=seconds)
    utilised = ours["mfu_on_shared_tokens"]
    mfu = "" if utilised is None else f"{utilised:.0%} MFU, "
    ratio, memory = seconds(best) / seconds(ours), ours["peak_gb"] / best["peak_gb"]
    return (
        f"{ours['model']}: {mfu}{ours['shared_tokens_per_second']:,.0f} shared tokens/s, {ratio:.2f} × TRL's best "
        f"(micro-batch {best['micro_batch']}), {memory:.2f} of its memory"
    )


def seconds(run: Mapping[str, Any]) -> float:
    """Return the seconds of reference pass and steps."""
    return float(run["reference_seconds"] + run["train_seconds"])


def small(results: Results) -> str:
    """Say the ratio of every work."""
    works = results["train-small"]["works"]
    return " / ".join(f"{row['faster']:.2f} ×" for row in works.values())


def memory(results: Results) -> str:
    """Say the plan beside the peak."""
    run = results["train-large"]["runs"][0]
    return f"{run['plan_over_peak']:.2f} of it ({run['planned_gb']:.1f} and {run['peak_gb']:.1f} GB)"


def scoring(results: Results) -> str:
    """Say the ratios of the scorer."""
    row = results["scoring"]["rows"][0]["wall_seconds"]
    return f"{row['pipeline'] / row['ours']:.2f} ×, and {row['ours'] / row['bare']:.2f} of its time"


def kernels(results: Results) -> str:
    """Say the ratios of the kernel and of the heads."""
    rows, heads = results["kernels-bench"]["rows"], results["heads"]["rows"]
    ratios = {name: [row[f"torch_over_{name}"] for row in rows] for name in ("triton", "trl")}
    told = [f"{name} {min(values):.1f}–{max(values):.1f} × torch" for name, values in ratios.items()]
    own = [row["trl_ms"] / row["ours_ms"] for row in heads]
    return f"{', '.join(told)}; our head {min(own):.2f}–{max(own):.2f} × TRL's"


def packs(results: Results) -> str:
    """Say the speed of every size of packs."""
    plain = [run for run in results["packs"]["runs"] if run["kernels"] is None]
    runs = sorted(plain, key=lambda run: run["tokens_per_pack"])
    return ", ".join(f"{run['tokens_per_pack'] // 1024}k: {run['shared_tokens_per_second']:,.0f}" for run in runs)


def liger(results: Results) -> str:
    """Say the ratio of the steps without liger's kernels and with them, and that of the memory."""
    runs = results["packs"]["runs"]
    tried = [run for run in runs if run["kernels"] == "liger"]
    if not tried:
        return "not yet measured"
    (plain,) = (run for run in runs if (run["kernels"], run["tokens_per_pack"]) == (None, tried[0]["tokens_per_pack"]))
    faster = plain["median_step_seconds"] / tried[0]["median_step_seconds"]
    return f"{faster:.2f} × the speed, {tried[0]['peak_gb'] / plain['peak_gb']:.2f} of the memory"


# by the cell of the table that names the sections, and the start of the row where two rows name the same
ROWS: dict[tuple[str, str], Callable[[Results], str]] = {
    ("`attention`", "attention"): attention,
    ("`train-large`, `train-large-trl`", "training"): large,
    ("`train-small`", "training"): small,
    ("`train-large`", "memory"): memory,
    ("`scoring`", "scoring"): scoring,
    ("`kernels-bench`, `heads`", "the Triton kernel"): kernels,
    ("`packs`", "where"): packs,
    ("`packs`", "norm"): liger,
}


def fill(text: str, results: Results) -> str:
    """Return the page with the results of those rows whose sections passed; the others stay as they are."""
    lines = text.splitlines()
    for (cell, start), tell in ROWS.items():
        if not all(name in results for name in re.findall(r"`([\w-]+)`", cell)):
            continue
        (number,) = [n for n, line in enumerate(lines) if line.startswith(f"| {start}") and f"| {cell} |" in line]
        lines[number] = f"{lines[number].rsplit('|', 2)[0]}| {tell(results)} |"
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fill the page."""
    results = read(Path(sys.argv[1]))
    SPEED.write_text(fill(SPEED.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"{SPEED}: filled from {len(results)} sections of {sys.argv[1]}; now say above the table what it was run on")


if __name__ == "__main__":
    main()
