"""Sixty random kills over all stages of two methods, their comparison and a certificate, under other paths.

Every stage runs in the process that is killed, also what Ray's actors would do, and a training leaves weights that
follow from its identity. How actors and ranks die is in ``test_crash_points``, ``test_train``, ``test_faults_train``.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked import digests, forked
from sealed_run import sealed_config, without_ray
from small_run import WORDS, write_config

from can_dist.config import load_config
from can_dist.doctor.status import read_status
from can_dist.outcomes.certify import run_certificate
from can_dist.outcomes.compare import PAGE, RECORD, compare
from can_dist.pipeline import run_methods

KILLS = 60
COMPARED = "compared"
SEED = int(os.environ.get("CAN_DIST_KILL_SEED", "20"))
STAGES = {"prompts", "generate", "score", "scores", "solve", "label", "train", "estimate", "strength", "merge",
          "evaluate", "certify", COMPARED}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def world(folder: Path) -> Path:
    """MoCAN at half of its strength, and a mixture of SACPO's two policies; one configuration for every path."""
    config = sealed_config(folder, num_validation=32)
    texts = [f"{a} {b}" for a in WORDS for b in WORDS if a != b][:116]  # 16 of them to train on
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config |= {"strength": 0.5, "sacpo": {"labels_from": "scores"}, "p_sacpo": {"q": [0.5]}}
    config["label"] = {"pairs_per_prompt": 1}
    config["cluster"] = {"score_cache": False}
    methods = {"sacpo", "p_sacpo"}
    config["methods"] = {"p_sacpo": {name: config.pop(name) for name in methods}}
    return write_config(folder / "small.yaml", config)


def everything(folder: Path, run: Path) -> None:
    """Two methods, their comparison, and the certificate of one's policy; what is finished is taken as it is."""
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        evaluations = run_methods(run, load_config(folder / "small.yaml"), ["mocan", "p_sacpo"])
        compare(evaluations, run / COMPARED)
        run_certificate(evaluations[0].input("policy").path, delta=0.05)


def comparison(run: Path) -> list[Any] | None:
    """Return what a comparison says of each method, without its cost in seconds; None before it is written."""
    if not (run / COMPARED / RECORD).exists():
        return None
    record = json.loads((run / COMPARED / RECORD).read_text(encoding="utf-8"))
    return [{name: method[name] for name in ("name", "gains", "kl", "constraints")} for method in record["methods"]]


def is_whole(run: Path) -> bool:
    page = run / COMPARED / PAGE
    return not page.exists() or page.read_text(encoding="utf-8").rstrip().endswith("</html>")


def by_place(changes: list[str]) -> Mapping[str, int]:
    """Return the number of changes below each directory of a run, in the order of the first."""
    return Counter(place for change in changes if "/" in (name := change.split(" ", 1)[1])
                   for place in [name.split("/")[0]] if place.split("-")[0] in STAGES)  # fmt: skip


def test_sixty_kills_over_all_stages_of_two_methods(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    world(tmp_path / "world")
    work = partial(everything, tmp_path / "world")
    clean, log = tmp_path / "clean", tmp_path / "log"
    number_of = by_place(forked(work, clean, log, 0))
    undisturbed, compared = digests(clean), comparison(clean)
    assert {place.split("-")[0] for place in number_of} == STAGES
    draw = random.Random(SEED)
    places = list(number_of)
    sentences = draw.sample(places, len(places)) + draw.choices(places, k=KILLS)
    killed: Counter[str] = Counter()
    for run, chosen in (
        (tmp_path / "another path" / "deep" / "run", sentences[: KILLS // 2]),
        (tmp_path / "b", sentences[KILLS // 2 : KILLS]),
    ):
        run.parent.mkdir(parents=True, exist_ok=True)
        chain = sorted(set(chosen), key=places.index)
        while chain:
            for place in chain:
                changes = forked(work, run, log, draw.randint(1, number_of[place]), below=place)
                killed[place.split("-")[0]] += 1
                assert digests(run).items() <= undisturbed.items(), f"torn or lost at {changes[-1]} of {place}"
                assert comparison(run) in (None, compared)
                assert is_whole(run)
                read_status(run)
            forked(work, run, log, 0)
            assert digests(run) == undisturbed
            assert comparison(run) == compared
            # beside a comparison one may stay, which nothing reads: its directory is the user's
            assert not [path for path in run.glob("*/.tmp-*") if path.parent.name != COMPARED]
            chosen = [place for place, times in Counter(chosen).items() for _ in range(times - 1)]
            chain = sorted(set(chosen), key=places.index)
            if chain:
                shutil.rmtree(run)
    print(f"{killed.total()} kills (seed {SEED}): {dict(killed)}; {len(undisturbed)} artifacts, 0 torn, 0 lost")
    assert killed.total() == KILLS
    assert set(killed) == STAGES
