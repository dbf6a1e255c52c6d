"""What the sections of ``gpu.sh`` wrote, read into their lines: ratios, tokens a second, MFU, memory and plan."""

from __future__ import annotations

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Reader = Callable[[Path], dict[str, Any]]
# dense bf16 products a second, by the makers' data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a training's file; a line that a stop tore is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def peak_flops(name: str) -> float | None:
    """Return a GPU's bf16 products a second; None for one that is not listed."""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def model_flops(record: dict[str, Any]) -> float:
    """Return the FLOPs of the optimizer steps: 6 per weight and token that has to be seen, once.

    Attention's own products and recomputed activations are not counted, nor is a token of a prompt twice.
    """
    config = json.loads((Path(record["job"]["model"]) / "config.json").read_text())
    width, heads = config["hidden_size"], config["num_attention_heads"]
    key_width = width // heads * config["num_key_value_heads"]
    block = 2 * width * width + 2 * width * key_width + 3 * width * config["intermediate_size"]
    body, head = block * config["num_hidden_layers"], width * config["vocab_size"]
    return float(6 * (body * record["shared_tokens"] + head * record["target_tokens"]))


def training(record: dict[str, Any], gpu_name: str = "") -> dict[str, Any]:
    """Return the numbers of one training."""
    wall = record["seconds"]["train"][0]
    reference = record["seconds"].get("reference", (0.0, 0.0))[0]
    flops = peak_flops(gpu_name)
    planned, peak = record.get("planned_mb"), record["peak_device_mb"]
    return {
        "side": record["job"]["side"],
        "work": record["job"]["work"],
        "model": Path(record["job"]["model"]).name,
        "lora": record["job"]["lora"],
        "kernels": record["job"]["kernels"],
        "tokens_per_pack": record["job"]["tokens_per_pack"],
        "micro_batch": record["job"]["micro_batch"],
        "reference_seconds": reference,
        "train_seconds": wall,
        "median_step_seconds": statistics.median(record["step_seconds"]),
        "first_step_seconds": record["step_seconds"][0],
        "shared_tokens_per_second": record["shared_tokens"] / wall,
        "unshared_over_shared": record["unshared_tokens"] / record["shared_tokens"],
        "mfu_on_shared_tokens": model_flops(record) / wall / flops if flops and not record["job"]["lora"] else None,
        "peak_gb": peak * 2**20 / 1e9 if peak else None,
        "planned_gb": planned * 2**20 / 1e9 if planned else None,
        "plan_over_peak": planned / peak if planned and peak else None,
        "first_loss_from_ln2": abs(record["first_loss"] - math.log(2)),
        "last_loss": record["losses"][-1],
        "attention": record.get("attention"),
        "distributed": record.get("distributed"),
        "operations": record.get("operations") or None,
    }


def read_trainings(path: Path) -> dict[str, Any]:
    """Return every training of a file."""
    return {"runs": [training(record, gpu_name()) for record in records(path)]}


def read_turns(path: Path) -> dict[str, Any]:
    """Return ours beside TRL's best per work, medians over rounds, and how far their losses are apart."""
    done, rows = records(path), {}
    for work in dict.fromkeys(record["job"]["work"] for record in done):
        rows[work] = turns([record for record in done if record["job"]["work"] == work])
    return {"works": rows, "runs": [training(record, gpu_name()) for record in done]}


def turns(done: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of one work: seconds are of the reference pass and the steps; the ratio is TRL's over ours."""
    ours = [record for record in done if record["job"]["side"] == "ours"]
    peers: dict[int, list[dict[str, Any]]] = {}
    for record in done:
        if record["job"]["side"] == "trl":
            peers.setdefault(record["job"]["micro_batch"], []).append(record)
    row: dict[str, Any] = {"ours_seconds": statistics.median(map(seconds, ours)), "rounds": len(ours)}
    if not peers:
        return row
    searched = {size: statistics.median(map(seconds, runs)) for size, runs in peers.items()}
    best = min(searched, key=lambda size: searched[size])
    row |= {"trl_seconds": searched, "trl_best_micro_batch": best, "faster": searched[best] / row["ours_seconds"]}
    memory = [statistics.median(r["peak_device_mb"] or r["peak_mb"] for r in runs) for runs in (ours, peers[best])]
    return row | {"memory_ours_over_trl": memory[0] / memory[1], "agreement": agreement(ours[0], peers)}


def agreement(ours: dict[str, Any], peers: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return whether both learnt from as many tokens, and how far the losses of the run in our order are apart."""
    every = [record for runs in peers.values() for record in runs]
    ordered = [record for record in every if record["job"]["strategy"] == "sequential"]
    tokens = {record["targets_seen"] for record in (ours, *every)}
    apart = [max(abs(a - b) for a, b in zip(ours["losses"], record["losses"], strict=True)) for record in ordered]
    first = max(abs(record["first_loss"] - math.log(2)) for record in (ours, *every))
    return {"same_tokens": len(tokens) == 1, "loss_of_a_step": max(apart, default=None), "first_loss_from_ln2": first}


def seconds(record: dict[str, Any]) -> float:
    """Return the wall seconds of the reference pass and the optimizer steps."""
    return sum(record["seconds"].get(name, (0.0, 0.0))[0] for name in ("reference", "train"))


def gpu_name() -> str:
    """Return the name of the GPU, '' without one."""
    from machine import gpu

    return str(gpu().get("gpu", ""))


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def read_junit(path: Path) -> dict[str, Any]:
    """Return the counts of a pytest run."""
    suite = next(ElementTree.parse(path).iter("testsuite"))
    return {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}


def read_folder(path: Path) -> dict[str, Any]:
    """Return the gigabytes of each model that was written."""
    folders = [folder for folder in path.iterdir() if folder.is_dir()]
    return {folder.name: sum(file.stat().st_size for file in folder.iterdir()) / 1e9 for folder in folders}


READERS: dict[str, Reader] = {
    "json": read_json,
    "junit": read_junit,
    "folder": read_folder,
    "ours": read_trainings,
    "peer": read_trainings,
    "turns": read_turns,
}
