"""Preference training beside TRL's DPOTrainer: the same pairs, loss, model, dtype and optimizer steps; time and memory.

    python benchmarks/train_vs_trl.py                      # all works on one core; benchmarks/results/train_vs_trl.*
    python benchmarks/train_vs_trl.py --works hh-like --num-pairs 128 --rounds 5
    python benchmarks/train_vs_trl.py --device cuda --model random-7b --activation-checkpointing --batch-size 64 ...

Every run is a process of its own (``train_side.py``), on a CPU pinned to one core; ours and TRL alternate. TRL's best
setting is searched per work in round 0, by CPU seconds (on a GPU by wall seconds): precomputed reference, grouping by
length, no activation checkpointing, micro-batches of 1, 2 and 4 pairs (on a GPU up to 32) until one is slower. Every
run is written to ``….runs.jsonl`` as it ends. It needs no DeepSpeed on one device, which spares it the
partitioning that we always pay; so the same setting also runs under the DeepSpeed configuration of our engine, which
is the comparison of two trainers on ZeRO-3. Its default (8 pairs, live reference, activation checkpointing)
runs once per work.

Times are of the reference pass and the optimizer steps; what happens once per run (loading, DeepSpeed's and the
Trainer's start, our check of the first loss) is left out of them on both sides and is shown as `start`.

A comparison of different work is void: TRL once trains on our order of the pairs (micro-batch 1, sequential), and the
number of response tokens learnt from, the first loss (ln 2) and the loss of every step must agree. On a GPU both train
in bf16 at a rate of 1e-6: at 2e-5 their losses are a third apart after four steps, whatever computes them.

``--device cuda`` (7B shapes from a config with random weights, model FLOPs utilisation on shared tokens) has not been
run, and there are no numbers for it; ``gpu.sh`` asks a GPU more in less time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_report import gpu_name, model_flops, peak_flops
from machine import machine
from models import RANDOM, SMALL, language_model
from pairs import REAL, SHAPES
from train_job import Job

RESULTS = Path(__file__).parent / "results" / "train_vs_trl.json"
MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (1, 4, 8, 16, 32)}
# of a step's loss: float32 sums in another order, then through the steps before
LOSS_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
TARGETS = {"pku-like": 1.6, "pku-real": 1.6, "hh-like": 2.5, "hh-real": 2.5, "tldr-like": 3.0}
GPU_TARGETS = {"pku-like": 1.2, "hh-like": 1.6, "tldr-like": 1.9}
MEMORY_TARGET = 0.75


def run_side(arguments: argparse.Namespace, work: str, side: str, **options: Any) -> dict[str, Any]:
    """Run one side in a process of its own and return its record."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "record.json"
        job = Job(
            side=side,
            work=work,
            model=arguments.model,
            output=str(output),
            num_pairs=arguments.num_pairs,
            batch_size=arguments.batch_size,
            context=arguments.context,
            device=arguments.device,
            core=arguments.core if arguments.device == "cpu" else None,
            tokens_per_pack=arguments.tokens_per_pack,
            activation_checkpointing=arguments.activation_checkpointing,
            **options,
        )
        command = [sys.executable, str(Path(__file__).with_name("train_side.py")), json.dumps([asdict(job)])]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if job.core is not None:
            environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{side} on {work} failed:\n{done.stderr[-3000:]}")
        record: dict[str, Any] = json.loads(output.read_text())
    with arguments.output.with_suffix(".runs.jsonl").open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    wall, cpu = times(record)
    print(f"{work:10} {side:12} {options or ''} wall {wall:.1f} s, CPU {cpu:.1f} s", file=sys.stderr, flush=True)
    return record


def times(record: dict[str, Any]) -> tuple[float, float]:
    """Return (wall, CPU) seconds of the reference pass and the optimizer steps."""
    phases = [record["seconds"].get(name, (0.0, 0.0)) for name in ("reference", "train")]
    return sum(wall for wall, _ in phases), sum(cpu for _, cpu in phases)


def cost(record: dict[str, Any]) -> float:
    """Return the seconds that settings are chosen by: CPU seconds, or wall seconds where a GPU works."""
    return times(record)[0 if record["job"]["device"] == "cuda" else 1]


def require_same_work(ours: dict[str, Any], peer: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Return the largest differences of the losses, or stop: a benchmark of different work is void."""
    tokens = {ours["targets_seen"], peer["targets_seen"], ours["target_tokens"]}
    first = max(abs(side["first_loss"] - math.log(2)) for side in (ours, peer))
    later = max(abs(a - b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    if len(tokens) != 1 or first > tolerance or later > tolerance:
        sys.exit(
            f"void: not the same work. Response tokens {tokens}, first losses {ours['first_loss']}, "
            f"{peer['first_loss']}, losses of the steps {ours['losses']}, {peer['losses']}."
        )
    return {"first_loss_from_ln2": first, "loss_of_a_step": later, "last_loss": ours["losses"][-1]}


def compare(arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    """Return the row of one work: round 0 checks that the work is the same and finds TRL's best setting."""
    ours = [run_side(arguments, work, "ours")]
    searched = {1: run_side(arguments, work, "trl", micro_batch=1, strategy="sequential")}
    agreement = require_same_work(ours[0], searched[1], LOSS_TOLERANCE[arguments.device])
    sizes = [size for size in MICRO_BATCHES[arguments.device] if size <= arguments.batch_size]
    for before, size in itertools.pairwise(sizes):
        searched[size] = run_side(arguments, work, "trl", micro_batch=size)
        if cost(searched[size]) > cost(searched[before]):
            break
    best = min(searched, key=lambda size: cost(searched[size]))
    peer = [searched[best]]  # the order of micro-batches of one pair does not change their cost
    zero3 = [run_side(arguments, work, "trl_zero3", micro_batch=best)]
    for number in range(1, arguments.rounds):
        options = {"micro_batch": best}
        sides = [("ours", ours, {}), ("trl", peer, options), ("trl_zero3", zero3, options)]
        for side, records, given in sides if number % 2 == 0 else sides[::-1]:
            records.append(run_side(arguments, work, side, **given))
    row = summarize(work, ours, peer)
    row |= {"trl_micro_batch": best, "agreement": agreement, "trl_zero3": summarize(work, ours, zero3)}
    row["trl_search_seconds"] = {size: cost(record) for size, record in searched.items()}
    if not arguments.no_default:
        row["trl_default"] = summarize(work, ours, [run_side(arguments, work, "trl_default")])
    if arguments.device == "cuda":
        row["mfu_on_shared_tokens"] = utilisation(ours)
    row["runs"] = {"ours": ours, "trl": peer}
    return row


def summarize(work: str, ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians of both sides and their ratios (TRL over ours)."""
    row: dict[str, Any] = {"work": work, "pairs": ours[0]["pairs"], "scaled_to_fit": ours[0]["scaled_to_fit"]}
    row["tokens_unshared_over_shared"] = ours[0]["unshared_tokens"] / ours[0]["shared_tokens"]
    sides = {}
    for name, records in (("ours", ours), ("trl", peer)):
        wall, cpu = (statistics.median(times(record)[kind] for record in records) for kind in (0, 1))
        sides[name] = {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "start_cpu_seconds": statistics.median(r["seconds"]["whole"][1] - times(r)[1] for r in records),
            "peak_mb": statistics.median(r["peak_device_mb"] or r["peak_mb"] for r in records),
            "above_model_mb": statistics.median(
                r["peak_device_mb"] or r["peak_mb"] - r["loaded_model_mb"] for r in records
            ),
            "runs": len(records),
        }
    row |= sides
    mine, theirs = sides["ours"], sides["trl"]
    for kind in ("wall", "cpu"):
        row[f"speed_{kind}"] = theirs[f"{kind}_seconds"] / mine[f"{kind}_seconds"]
    row["memory_whole"] = mine["peak_mb"] / theirs["peak_mb"]
    row["memory_above_model"] = mine["above_model_mb"] / theirs["above_model_mb"]
    return row


def utilisation(records: list[dict[str, Any]]) -> float | None:
    """Return the model FLOPs of the optimizer steps over what the GPU can do; None for a GPU that is not listed."""
    flops = peak_flops(gpu_name())
    seconds = statistics.median(record["seconds"]["train"][0] for record in records)
    return model_flops(records[0]) / seconds / flops if flops else None


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown: CPU seconds decide on a CPU, wall seconds on a GPU."""
    device, on_cpu = record["machine"], record["device"] == "cpu"
    kind, other = ("CPU", "wall") if on_cpu else ("wall", "CPU")
    hardware = f"{device['cpu']}, one core, one thread, float32" if on_cpu else f"{device['gpu']}, bf16"
    load = f"load average {device['load_average']:.0f} on {device['cores']} cores"
    lines = [
        "# Training beside TRL",
        "",
        f"{device['date'][:10]}; {hardware}; torch {device['torch']}, deepspeed {device['deepspeed']}, "
        f"trl {device['trl']}; {load}{', so the ratio of CPU seconds is the one to read' if on_cpu else ''}.",
        f"Model {record['model']}. {record['pairs']} pairs per run, batches of {record['batch_size']}, "
        f"medians of {record['rounds']} rounds in "
        f"turn; ours: packs of {record['tokens_per_pack']} tokens. Seconds: reference pass and optimizer steps. "
        f"Memory: peak of the {'process' if on_cpu else 'GPU'} in MB, whole and above the loaded model. "
        "Written by `benchmarks/train_vs_trl.py`.",
        "",
        f"| pairs of | tokens: unshared/shared | ours {kind} s | TRL's best {kind} s (pairs per micro-batch) "
        f"| **faster, {kind}** | {other} | than TRL under the same ZeRO-3, {kind} (memory) | target "
        f"| TRL's default, {kind} | start, ours / TRL CPU s | memory ours / TRL | whole | above model "
        "| largest difference of a loss |",
        "|" + "---|" * 14,
    ]
    lines += [_line(row, kind.lower(), other.lower(), on_cpu) for row in record["rows"]]
    lines += ["", _notes(record)]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any], kind: str, other: str, on_cpu: bool) -> str:
    mine, theirs, default = row["ours"], row["trl"], row.get("trl_default")
    target = TARGETS.get(row["work"]) if on_cpu else GPU_TARGETS.get(row["work"])
    cells = [
        row["work"],
        f"{row['tokens_unshared_over_shared']:.2f}",
        f"{mine[f'{kind}_seconds']:.1f}",
        f"{theirs[f'{kind}_seconds']:.1f} ({row['trl_micro_batch']})",
        f"**{row[f'speed_{kind}']:.2f}×**",
        f"{row[f'speed_{other}']:.2f}×",
        f"{row['trl_zero3'][f'speed_{kind}']:.2f}× ({row['trl_zero3']['memory_whole']:.2f})",
        f"{target}×" if target else "—",
        f"{default[f'speed_{kind}']:.1f}×" if default else "not run",
        f"{mine['start_cpu_seconds']:.1f} / {theirs['start_cpu_seconds']:.1f}",
        f"{mine['peak_mb']:.0f} / {theirs['peak_mb']:.0f}",
        f"{row['memory_whole']:.2f}",
        f"{row['memory_above_model']:.2f}",
        f"{row['agreement']['loss_of_a_step']:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def _notes(record: dict[str, Any]) -> str:
    scaled = ", ".join(f"{row['work']} {row['scaled_to_fit']}" for row in record["rows"] if row["scaled_to_fit"])
    used = "; ".join(
        f"{row['work']}: {row['mfu_on_shared_tokens']:.0%} MFU on shared tokens"
        for row in record["rows"]
        if row.get("mfu_on_shared_tokens") is not None
    )
    return (
        f"Lengths are lognormal; pairs scaled down to fit the context of {record['context']}: {scaled or 'none'}. "
        f"Peak memory was to be at most {MEMORY_TARGET} of TRL's. The whole of it, and the start, hold what each side "
        f"imports, which for TRL is also every tracker that is installed. {used}".rstrip()
    )


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--works", nargs="+", choices=[*SHAPES, *REAL], default=[*SHAPES, *REAL])
    parser.add_argument("--model", default=str(SMALL), help=f"directory, {', '.join(RANDOM)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, default=1, help="the core that all runs are pinned to (CPU)")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens-per-pack", type=int, default=2048)
    parser.add_argument("--activation-checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--no-default", action="store_true", help="leave out TRL's default, which takes longest")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".runs.jsonl").unlink(missing_ok=True)
    scratch = tempfile.TemporaryDirectory()
    arguments.model = language_model(arguments.model, Path(scratch.name), arguments.device)
    record = {
        "machine": machine("torch", "transformers", "deepspeed", "trl"),
        "device": arguments.device,
        "model": Path(arguments.model).name,
        "pairs": arguments.num_pairs,
        **{name: getattr(arguments, name) for name in ("batch_size", "rounds", "context", "tokens_per_pack")},
        "rows": [],
    }
    for work in arguments.works:
        record["rows"].append(compare(arguments, work))
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
