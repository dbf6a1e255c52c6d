"""Which responses the report shows: of prompts that changed most, that crossed the border, and that stayed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.dual import Column
from can_dist.measuring.gains import SIDES, by_prompt, column
from can_dist.tables.artifacts import Artifact
from can_dist.tables.quarantine import scored_responses
from can_dist.tables.utilities import with_utilities

FloatArray = npt.NDArray[np.float64]

WORSENED, IMPROVED, STAYED = "most worsened", "most improved", "least changed"
SAFE_TO_UNSAFE, UNSAFE_TO_SAFE = "safe to unsafe", "unsafe to safe"
GROUPS = (WORSENED, SAFE_TO_UNSAFE, IMPROVED, UNSAFE_TO_SAFE, STAYED)
"""Groups of samples, in the order of the page: a regression comes first."""


def chosen_samples(
    inputs: Mapping[str, Artifact],
    names: Sequence[str],
    borders: Mapping[str, float],
    count: int,
    worst: Sequence[Column] = (),
) -> list[dict[str, Any]]:
    """Return both models' responses to the held-out prompts that say most of the change.

    Prompts are ranked by the change of their mean score. The groups of each constraint take turns until ``count``
    prompts are shown; a prompt is shown once. Of its responses the one nearest to the mean is shown, for each model.

    Args:
        inputs: artifacts ``responses_before``, ``scores_before``, ``responses_after`` and ``scores_after``.
        names: of the scores to show.
        borders: of each constraint, the mean from which a prompt counts as safe.
        count: prompts to show.
        worst: constraints whose score is the smallest of several.
    """
    tables = [_table(inputs, who, worst) for who in ("before", "after")]
    queues: list[tuple[str, str, Iterator[str]]] = []
    for name, border in borders.items():
        (prompt_P, before_P), (_, after_P) = (by_prompt(table, column(table, name)) for table in tables)
        for group, ranked in _ranked(before_P, after_P, border).items():
            queues.append((name, group, iter([str(prompt_P[index]) for index in ranked])))
    shown: dict[str, tuple[str, str]] = {}
    turns = cycle(queues)
    while len(shown) < min(count, prompt_P.size):
        name, group, ranked_ids = next(turns)
        prompt_id = next((prompt for prompt in ranked_ids if prompt not in shown), None)
        if prompt_id is not None:
            shown[prompt_id] = (name, group)
    sides = [
        _typical(inputs[f"responses_{who}"], inputs[f"scores_{who}"], table, names, shown)
        for who, table in zip(("before", "after"), tables, strict=True)
    ]
    return [
        {
            "prompt": "\n\n".join(f"{m['role']}: {m['content']}" for m in sides[0][prompt_id]["messages"]),
            "constraint": name,
            "group": group,
            **{side: rows[prompt_id]["text"] for side, rows in zip(SIDES, sides, strict=True)},
            "scores": {key: [rows[prompt_id][key] for rows in sides] for key in names},
            "means": {key: [rows[prompt_id]["means"][key] for rows in sides] for key in names},
        }
        for prompt_id, (name, group) in sorted(shown.items(), key=lambda item: GROUPS.index(item[1][1]))
    ]


def _ranked(before_P: FloatArray, after_P: FloatArray, border: float) -> dict[str, list[int]]:
    """Return the prompts of each group, the most telling first."""
    change_P = after_P - before_P
    order = np.argsort(change_P, kind="stable").tolist()
    worsened, improved = [i for i in order if change_P[i] < 0], [i for i in reversed(order) if change_P[i] > 0]
    lost = [i for i in worsened if before_P[i] >= border > after_P[i]]
    won = [i for i in improved if before_P[i] < border <= after_P[i]]
    stayed = np.argsort(np.abs(change_P), kind="stable").tolist()
    return {WORSENED: worsened, IMPROVED: improved, SAFE_TO_UNSAFE: lost, UNSAFE_TO_SAFE: won, STAYED: stayed}


def _table(inputs: Mapping[str, Artifact], who: str, worst: Sequence[Column]) -> pa.Table:
    scores = inputs[f"scores_{who}"]
    return with_utilities(scores.table, worst, str(scores.path))


def _typical(
    responses_of: Artifact,
    scores_of: Artifact,
    table: pa.Table,
    names: Sequence[str],
    shown: Mapping[str, tuple[str, str]],
) -> dict[str, dict[str, Any]]:
    """Return by prompt the response whose score is nearest to the prompt's mean, with its scores and all means."""
    responses = scored_responses(responses_of, scores_of).to_pylist()
    rows: dict[str, list[dict[str, Any]]] = {}
    for response, scores in zip(responses, table.to_pylist(), strict=True):
        if response["prompt_id"] in shown:
            rows.setdefault(response["prompt_id"], []).append({**response, **{name: scores[name] for name in names}})
    typical = {}
    for prompt_id, (ranked_by, _) in shown.items():
        means = {name: float(np.mean([row[name] for row in rows[prompt_id]])) for name in names}
        nearest = min(rows[prompt_id], key=lambda row: abs(row[ranked_by] - means[ranked_by]))
        typical[prompt_id] = {**nearest, "means": means}
    return typical


def crossings(
    inputs: Mapping[str, Artifact], borders: Mapping[str, float], worst: Sequence[Column] = ()
) -> dict[str, dict[str, Any]]:
    """Return by constraint how many held-out prompts are safe under the reference, the policy, both and neither.

    A prompt is safe where the mean score of its responses is at or above the border.
    """
    record = {}
    for name, border in borders.items():
        tables = (_table(inputs, who, worst) for who in ("before", "after"))
        before_P, after_P = (by_prompt(table, column(table, name))[1] >= border for table in tables)
        counts = {
            "stayed safe": before_P & after_P,
            UNSAFE_TO_SAFE: ~before_P & after_P,
            SAFE_TO_UNSAFE: before_P & ~after_P,
            "stayed unsafe": ~before_P & ~after_P,
        }
        record[name] = {"border": border, "counts": {key: int(value_P.sum()) for key, value_P in counts.items()}}
    return record


def beginnings(scores: Artifact, prompt_ids: Sequence[str], length: int = 70) -> dict[str, str]:
    """Return the beginning of the last turn of prompts, by id; empty where the scores were made from no responses."""
    if "responses" not in scores.manifest["inputs"]:
        return {}
    table, texts = scores.input("responses").table.select(["prompt_id", "messages"]), {}
    is_wanted = pc.is_in(table.column("prompt_id"), value_set=pa.array(prompt_ids, pa.string()))
    for row in table.filter(is_wanted).to_pylist():
        line = " ".join(row["messages"][-1]["content"].split())
        texts[row["prompt_id"]] = line if len(line) <= length else line[: length - 1].rstrip() + "…"
    return texts
