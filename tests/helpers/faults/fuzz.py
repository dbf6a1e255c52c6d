"""Readers fed with damaged files: ``python fuzz.py TARGET SECONDS SEED FOLDER``; for tests/integration/test_fuzz.py.

A process of its own, because a library in C that reads a damaged file may take the process with it. The file being read
stays in FOLDER, so that a crash can be repeated.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from can_dist.config import load_config
from can_dist.doctor.status import format_status, read_status
from can_dist.errors import CanDistError
from can_dist.tables.artifacts import MANIFEST, load_artifact, open_stage, write_part
from can_dist.tables.foreign.formats import read_preferences, read_prompts, read_responses
from can_dist.tables.schemas import PROMPTS
from can_dist.tables.score_shards import index_shard, open_score_shards, read_blocks
from can_dist.tables.scores import read_score_table, score_arrays
from can_dist.tables.verify import verify_run
from can_dist.training.metrics import training_curve
from can_dist.workspace import read_events

SLOWEST = 20
"""Seconds that one file may take."""
NASTY = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\\ud800", b"\xed\xa0\x80", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000,
    b"1e999", b"-0", b"NaN", b"Infinity", b"null", b"true", b'""', b"[]", b"{}", b"\n", b"\r", b"\x1b[31m", b"&a [*a]",
    b"!!python/x", b"? ", b"<<: *a", b"- ", b": ", b"#", b'"prompt":', b'"role"', b"../..", b"2026-99-99", b"0x1F",
    b"1_000", b"\xe2\x80\xa8", b"|\n", b"%TAG",
]  # fmt: skip
MESSAGES = [{"role": "user", "content": "é what?"}]
ROWS = [
    {"prompt_id": f"p{n}", "prompt": MESSAGES if n % 2 else "what?", "responses": ["one", "two ✓"]} for n in range(4)
]
PAIRS = [{"prompt": f"q{n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
PKU = [
    {"prompt": f"q{n}", "response_0": "a", "response_1": "b", "better_response_id": n % 2, "safer_response_id": 0,
     "is_response_0_safe": True, "is_response_1_safe": None} for n in range(4)
]  # fmt: skip
SCORES = [{"prompt_id": f"p{n // 2}", "response_id": n, "reward": n / 3, "safety": -n} for n in range(8)]
CONFIG = """
prompts: {source: a.jsonl, num_test: 2}
reference: {model: here, template: "{prompt}"}
beta: 0.1
reward: {kind: callable, function: "a:b"}
constraints:
  safety: {scorer: &scorer {kind: sequence_classifier, model: there, sign: -1}, margin: 0.1}
  harm: {scorer: *scorer, margin: 0.2}
generate: {num_responses: 4, temperature: 1.0, stop: ["a", "b"]}
train: {lora: {r: 4}}
"""


@dataclass(frozen=True)
class Target:
    """Writes sound files into a folder, and reads one that was damaged."""

    sound: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]


# ---------------------------------------------------------------------------------------------------- sound files


def json_files(folder: Path) -> list[Path]:
    paths = []
    for name, rows in (("rows", ROWS), ("pairs", PAIRS), ("pku", PKU), ("scores", SCORES)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        for ending, data in (
            (".jsonl", lines),
            (".json", json.dumps(rows).encode()),
            (".jsonl.gz", gzip.compress(lines)),
        ):
            path = folder / f"{name}{ending}"
            path.write_bytes(data)
            paths.append(path)
    return paths


def parquet_files(folder: Path) -> list[Path]:
    paths = []
    for name, rows in (("pairs", PAIRS), ("pku", PKU), ("scores", SCORES)):
        for codec in ("none", "snappy"):
            path = folder / f"{name}-{codec}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path, compression=codec, write_page_checksum=codec == "none")
            paths.append(path)
    return paths


def arrow_files(folder: Path) -> list[Path]:
    paths = []
    for name, rows in (("pairs", PAIRS), ("pku", PKU), ("scores", SCORES)):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / f"{name}.feather"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        paths.append(folder / f"{name}.feather")
        if name != "scores":  # a score table is a file, not a stream
            with (
                pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table)
            paths.append(folder / f"{name}.arrow")
    return paths


def yaml_files(folder: Path) -> list[Path]:
    (folder / "config.yaml").write_text(CONFIG)
    return [folder / "config.yaml"]


def run_files(folder: Path) -> list[Path]:
    """An artifact and one made from it: manifests, sidecars, parts."""
    run = folder / "run"
    folder.joinpath("run").mkdir()
    (run / "log.jsonl").write_text('{"time": 1.0, "event": "ended"}\n')
    stage = open_stage(run, "prompts", "prompts", {"seed": 0}, {})
    rows = [{"prompt_id": f"p{n}", "messages": MESSAGES, "split": "train"} for n in range(3)]
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PROMPTS))
    prompts = stage.commit(info={"counts": {"rows": 3}})
    stage = open_stage(run, "generate", "reference on train", {"seed": 1}, {"prompts": prompts})
    write_part(stage.path, 0, pa.table({"response_id": ["p0/0", "p0/1"]}))
    stage.commit(info={"num_prompts": 1})
    return sorted(path for path in run.rglob("*") if path.is_file())


def log_files(folder: Path) -> list[Path]:
    generate, train = "generate-0123456789abcdef", "train-0123456789abcdef"
    events: list[dict[str, Any]] = [
        {"time": 1.0, "event": "began", "command": "align"},
        {"time": 2.0, "event": "started", "stage": "generate", "label": "é", "artifact": generate},
        {"time": 3.0, "event": "shards", "work": "generate (é)", "artifact": generate, "done": 0, "waiting": 4},
        {"time": 3.5, "event": "actor died", "work": "generate (é)", "shard": 1, "attempt": 1, "message": "killed"},
        {"time": 3.6, "event": "quarantined", "work": "generate (é)", "shard": 1, "row": "r", "message": "killed"},
        {"time": 4.0, "event": "done", "stage": "generate", "label": "é", "artifact": generate, "seconds": 2.0},
        {"time": 5.0, "event": "started", "stage": "train", "label": "policy", "artifact": train, "steps": 4},
        {"time": 6.0, "event": "failed", "error": "DataError", "message": "é"},
    ]
    run = folder / "run"
    training = run / "train-0123456789abcdef"
    training.mkdir(parents=True)
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    metrics = [
        {"step": 1, "loss": 0.7, "reference_loss": 0.7},
        {"step": 1, "resumed_from": 1},
        {"step": 2, "loss": 0.5},
    ]
    (training / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    return [run / "log.jsonl", training / "metrics.jsonl"]


# ---------------------------------------------------------------------------------------------------------- readers


def read_data(path: Path) -> None:
    """Every reader of foreign data; a file that is sound for one is refused by others."""
    refusals = 0
    for read in (read_prompts, read_preferences, read_responses, read_scores, read_shard):
        try:
            read(path)
        except CanDistError:
            refusals += 1
    if refusals == 5:
        raise CanDistError("refused by all")


def read_scores(path: Path) -> None:
    score_arrays(read_score_table(path), "reward", ["safety"], str(path))


def read_shard(path: Path) -> None:
    """A score table, block by block."""
    columns = ["reward", "safety"]
    [shard] = open_score_shards(path, columns)
    for _, blocks in read_blocks(shard, columns, index_shard(shard, columns).num_responses_P):
        assert len(blocks) == 2


def read_run(path: Path) -> None:
    """The run of a damaged file: its check, and every artifact that opens."""
    run = next(parent for parent in path.parents if parent.name == "run")
    _, problems = verify_run(run)
    read_status(run)
    open_stage(run, "prompts", "prompts", {"seed": 2}, {})  # says why no artifact is reused
    shutil.rmtree(next(path for path in run.glob("prompts-*") if not (path / MANIFEST).is_file()), ignore_errors=True)
    for manifest in run.glob(f"*/{MANIFEST}"):
        artifact = load_artifact(manifest.parent)
        assert artifact.table.num_rows >= 0
        [artifact.input(name) for name in artifact.manifest["inputs"]]
    if problems:
        raise CanDistError(problems[0])


def read_log(path: Path) -> None:
    run = next(parent for parent in path.parents if parent.name == "run")
    format_status(read_status(run))
    training_curve(run / "train-0123456789abcdef")
    if len(read_events(run / "log.jsonl")) < 8:
        raise CanDistError("lines are left out")


TARGETS = {
    "json": Target(json_files, read_data),
    "parquet": Target(parquet_files, read_data),
    "arrow": Target(arrow_files, read_data),
    "yaml": Target(yaml_files, load_config),
    "run": Target(run_files, read_run),
    "log": Target(log_files, read_log),
}


# ---------------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return a file's bytes with one to four faults; one in twenty as it was."""
    if draw.random() < 0.05:
        return data
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        at, other = draw.randrange(len(data) + 1), draw.randrange(len(data) + 1)
        kind = draw.randrange(6)
        if kind == 0 and at < len(data):  # a bit
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == 1:  # cut off
            data = data[:at]
        elif kind == 2:  # something put in, or in the place of something
            data = data[:at] + draw.choice(NASTY) + data[at + draw.choice([0, 0, 1, 8]) :]
        elif kind == 3:  # a piece taken out
            data = data[: min(at, other)] + data[max(at, other) :]
        elif kind == 4:  # a piece twice
            data = data[: max(at, other)] + data[min(at, other) :]
        elif at < len(data):  # a byte
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
    return data


def too_slow(*_: object) -> None:
    raise TimeoutError(f"a file took more than {SLOWEST} s")


def main(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Feed the target for a while; return 1 at the first exception that is none of ours."""
    target, draw = TARGETS[name], random.Random(seed)
    sound = {path: path.read_bytes() for path in target.sound(folder)}
    for path in sound:
        target.read(path)
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, too_slow)
    counts, until = {"read": 0, "refused": 0}, time.monotonic() + seconds
    while time.monotonic() < until:
        path = draw.choice(list(sound))
        data = sound[path]
        if path.suffix == ".gz" and draw.random() < 0.5:
            data = gzip.compress(damaged(gzip.decompress(data), draw))
        path.write_bytes(damaged(data, draw))
        signal.alarm(SLOWEST)
        try:
            target.read(path)
            counts["read"] += 1
        except CanDistError:
            counts["refused"] += 1
        except BaseException:  # noqa: BLE001 (any but ours is what this looks for)
            traceback.print_exc()
            print(f"{path}: {path.read_bytes()[:2000]!r}", file=sys.stderr)
            return 1
        finally:
            signal.alarm(0)
        path.write_bytes(sound[path])
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])))
