"""What a policy cost, by the artifacts that it was made from and the log of its run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from can_dist.measuring.comparison import Cost
from can_dist.stages.report import as_trained
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact
from can_dist.tables.lineage import ancestors
from can_dist.workspace import LOG, read_events


def cost_of(evaluation: Artifact) -> Cost:
    """Add up the cost of every artifact that a policy was made from, each once, without its evaluation.

    Every round of a loop counts: its trajectory was made from them.
    """
    policy = evaluation.input("policy")
    made = {a.path.name: a for root in (policy, *trajectories(evaluation)) for a in ancestors(root)}
    total = Counter[str]()
    for artifact in made.values():
        total["generated"] += artifact.info["num_tokens"] if artifact.stage == "generate" else 0
        total["scored"] += artifact.info.get("num_tokens", 0) if artifact.stage == "score" else 0
        if artifact.stage == "train":
            total["trained"] += artifact.info["summary"]["num_tokens"]
            total["trainings"] += 1
    seconds = _seconds(evaluation.path.parent, made.keys())
    return Cost(total["generated"], total["scored"], total["trained"], seconds, total["trainings"])


def made(evaluation: Artifact) -> dict[str, Any]:
    """Return when a policy was measured, how long it and its measurement took, and its cost, for the run's own page.

    The page in the evaluation's directory has none of it: its digest must not depend on the clock.

    Returns:
        ``finished`` (local time, '' where the log does not tell), ``seconds`` and ``measured_seconds`` (None likewise),
        ``generated_tokens``, ``scored_tokens``, ``trained_tokens`` and ``num_trainings`` of the policy.
    """
    cost, log = cost_of(evaluation), evaluation.path.parent / LOG
    done = [event for event in read_events(log) if event["event"] == "done"] if log.is_file() else []
    ends = [event["time"] for event in done if event.get("artifact") == evaluation.path.name]
    before = {artifact.path.name for artifact in ancestors(evaluation.input("policy"))}
    measured = {artifact.path.name for artifact in ancestors(evaluation)} - before
    return {
        "finished": time.strftime("%Y-%m-%d %H:%M", time.localtime(ends[-1])) if ends else "",
        "seconds": cost.wall_s,
        "measured_seconds": _seconds(evaluation.path.parent, measured),
        "generated_tokens": cost.generated_tokens,
        "scored_tokens": cost.scored_tokens,
        "trained_tokens": cost.trained_tokens,
        "num_trainings": cost.num_trainings,
    }


def trajectories(evaluation: Artifact) -> list[Artifact]:
    """Return the records of loops of this evaluation's method that ended with its policy."""
    policy = as_trained(evaluation.input("policy"))
    records = [load_artifact(path.parent) for path in sorted(evaluation.path.parent.glob(f"trajectory-*/{MANIFEST}"))]
    return [
        record
        for record in records
        if record.manifest["identity"]["label"] == evaluation.info["method"]
        and record.manifest["inputs"][f"policy-{record.info['rounds'] - 1}"]["artifact"] == policy.path.name
    ]


def _seconds(run: Path, names: Collection[str]) -> float | None:
    """Return the seconds of the artifacts by the run's log; None where it has none of them."""
    log = run / LOG
    if not log.is_file():
        return None
    events = read_events(log)
    spent = [e["seconds"] for e in events if e.get("event") == "done" and e.get("artifact") in names]
    return sum(spent) if spent else None
