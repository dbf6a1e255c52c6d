"""A soak: many responses scored by a small real model while actors are killed at random; nothing lost, nothing twice.

The scorer is the published stories260K (260 thousand parameters) with a linear head of random weights: what is measured
is the ledger, the parts and the memory, not the judgement. Kills are SIGKILL from outside, at random times. Writes
``results/soak.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from machine import machine

from can_dist.config import SequenceClassifier, validate_config
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Response
from can_dist.stages.score import score
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import RESPONSES
from can_dist.tables.verify import verify_run
from can_dist.workspace import Workspace

DATA = Path(os.environ.get("CAN_DIST_DATA", Path(__file__).parents[2] / "shared" / "data"))
WORDS = "a little big red cat dog bird ran sat saw to in on and happy sad day sun tree ball mom said she he".split()  # noqa: SIM905
RESULT = Path(__file__).parent / "results" / "soak.json"
K = 8
"""Responses to a prompt."""


def make_classifier(source: Path, path: Path) -> Path:
    """Write the language model with a head of one output."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        source, num_labels=1, pad_token_id=tokenizer.pad_token_id, use_safetensors=True
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_responses(run: Path, number: int, shard_rows: int) -> Artifact:
    """Write ``number`` responses of two to four words, ``K`` to a prompt, a part per ``shard_rows``."""
    stage, draw = open_stage(run, "generate", "reference on train", {"number": number}, {}), random.Random(0)
    for part, first in enumerate(range(0, number, shard_rows)):
        rows = []
        for row in range(first, min(first + shard_rows, number)):
            words = draw.choices(WORDS, k=draw.randint(2, 4))
            rows.append(
                {
                    "prompt_id": f"p{row // K}",
                    "response_id": f"p{row // K}/{row % K}",
                    "messages": [{"role": "user", "content": f"story {row // K}"}],
                    "text": " ".join(words),
                    "token_ids": [1] * len(words),
                    "num_tokens": len(words),
                    "finish_reason": "stop",
                }
            )
        write_part(stage.path, part, pa.Table.from_pylist(rows, schema=RESPONSES))
    return stage.commit(info={"num_prompts": number // K})


class Disturbance(threading.Thread):
    """Kills an actor now and then, and notes the resident memory of the driver and of the actors."""

    def __init__(self, seconds_between: float) -> None:
        super().__init__(daemon=True)
        self.seconds_between, self.over = seconds_between, threading.Event()
        self.kills: list[float] = []
        self.memory: list[dict[str, Any]] = []
        self.began = time.monotonic()

    def run(self) -> None:
        """Look every two seconds."""
        draw, driver = random.Random(1), psutil.Process()
        due = draw.expovariate(1 / self.seconds_between)
        while not self.over.wait(2):
            now, actors = time.monotonic() - self.began, at_work(driver)
            told = {pid: private_mb(actor) for pid, actor in actors.items()}
            self.memory.append({"s": round(now, 1), "driver": private_mb(driver), "actors": told})
            if now > due and actors:
                os.kill(draw.choice(sorted(actors)), signal.SIGKILL)
                self.kills.append(round(now, 1))
                due = now + draw.expovariate(1 / self.seconds_between)


def at_work(driver: psutil.Process) -> dict[int, psutil.Process]:
    """Return the actors of this driver that are in the middle of a shard, by process id."""
    children = {}
    for child in driver.children(recursive=True):
        try:
            if child.cmdline()[:1] == ["ray::ShardWorker.run"]:
                children[child.pid] = child
        except psutil.Error:
            continue
    return children


def private_mb(process: psutil.Process) -> float:
    """Return resident memory without what is shared, such as mapped files and Ray's object store (0: it is gone)."""
    try:
        memory = process.memory_info()
    except psutil.Error:
        return 0.0
    return round((memory.rss - memory.shared) / 2**20, 1)


def grows(memory: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the driver's memory in the first and last tenth, and how the longest-lived actor's changed in its life."""
    tenth = max(1, len(memory) // 10)
    lives: dict[int, list[float]] = {}
    for sample in memory:
        for pid, mb in sample["actors"].items():
            lives.setdefault(pid, []).append(mb)
    longest = max(lives.values(), key=len)
    quarter = max(1, len(longest) // 4)
    return {
        "driver_mb_first_tenth": round(float(np.median([s["driver"] for s in memory[:tenth]])), 1),
        "driver_mb_last_tenth": round(float(np.median([s["driver"] for s in memory[-tenth:]])), 1),
        "driver_mb_largest": max(s["driver"] for s in memory),
        "actor_mb_second_quarter_of_its_life": round(float(np.median(longest[quarter : 2 * quarter])), 1),
        "actor_mb_last_quarter_of_its_life": round(float(np.median(longest[-quarter:])), 1),
        "actor_mb_largest": max(mb for life in lives.values() for mb in life),
        "seconds_of_that_life": 2 * len(longest),
        "actors": len(lives),
    }


def check(responses: Artifact, scores: Artifact, spec: SequenceClassifier, shards: list[int]) -> None:
    """Raise unless every response has one score, in order, and some shards are those of an undisturbed scorer."""
    ids = scores.table.column("response_id").to_pylist()
    assert ids == responses.table.column("response_id").to_pylist(), "lost, repeated or out of order"
    assert len(set(ids)) == len(ids)
    scorer = load_scorer(spec, "fp32")
    column = scores.input("r")
    for shard in shards:
        rows = responses.part(shard).to_pylist()
        again = scorer.score([Response(r["response_id"], r["messages"], r["text"], r["token_ids"]) for r in rows])
        assert np.array_equal(again, column.part(shard).column("r").to_numpy()), f"shard {shard} differs"
    assert verify_run(scores.path.parent)[1] == []


def main() -> None:
    """Run the soak and write its figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--responses", type=int, default=1_000_000)
    options.add_argument("--shard-rows", type=int, default=5_000)
    options.add_argument("--seconds-between-kills", type=float, default=30.0)
    options.add_argument("--out", type=Path, default=RESULT)
    given = options.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run = Path(folder) / "run"
        spec = SequenceClassifier(
            model=str(make_classifier(DATA / "models" / "stories260K", Path(folder) / "model")),
            template="{prompt} ",
        )
        responses = make_responses(run, given.responses, given.shard_rows)
        config = validate_config(
            {
                "prompts": {"source": "unused.jsonl"},
                "reference": {"model": spec.model},
                "reward": {"model": spec.model},
                "constraints": {"c": {"scorer": {"model": spec.model}, "margin": 0.1}},
                "cluster": {"num_actors": 2, "shard_attempts": 20},
            }
        )
        work, disturbance = Workspace(run, config), Disturbance(given.seconds_between_kills)
        disturbance.start()
        began = time.monotonic()
        try:
            scores = score(work, responses, {"r": spec}, role="reference on train")
        finally:
            disturbance.over.set()
            work.close()
        seconds = time.monotonic() - began
        disturbance.join()
        num_shards = len(responses.parts)
        check(responses, scores, spec, random.Random(2).sample(range(num_shards), min(5, num_shards)))
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    lost = [line for line in lines if line.get("event") == "actor died"]
    result = {
        "responses": given.responses,
        "shards": num_shards,
        "kills": len(disturbance.kills),
        "actor_deaths_seen_by_the_driver": len(lost),
        "seconds": round(seconds, 1),
        "responses_per_second": round(given.responses / seconds, 1),
        "lost": 0,
        "twice": 0,
        "memory": grows(disturbance.memory),
        "machine": machine("ray", "torch", "transformers", "pyarrow"),
        "samples": disturbance.memory[:: max(1, len(disturbance.memory) // 60)],
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))


if __name__ == "__main__":
    main()
