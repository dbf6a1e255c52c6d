"""evaluation → verdicts of a language model: policy against reference on the held-out prompts, in both orders.

The texts are those of the evaluation; nothing is generated. Answers are kept under ``RUN/judge/answers`` as they come,
so a rerun pays only for what has no verdict yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from can_dist.judging.endpoint import JudgeSpec
from can_dist.judging.judge import Comparison, CostEstimate, estimate_cost, judge_pairs
from can_dist.judging.summary import summarise
from can_dist.tables.artifacts import Artifact, digest_of, write_json

FOLDER, ANSWERS = "judge", "answers"


def comparisons(evaluation: Artifact) -> list[Comparison]:
    """Return the policy's first response to every held-out prompt beside the reference's."""
    first: list[dict[str, Any]] = []
    for name in ("responses_before", "responses_after"):
        rows: dict[str, Any] = {}
        for row in evaluation.input(name).table.select(["prompt_id", "messages", "text"]).to_pylist():
            rows.setdefault(row["prompt_id"], row)
        first.append(rows)
    before, after = first
    return [
        Comparison(prompt_id, _prompt(row["messages"]), after[prompt_id]["text"], row["text"])
        for prompt_id, row in before.items()
    ]


def estimate(evaluations: Sequence[Artifact], spec: JudgeSpec) -> CostEstimate:
    """Return the cost of judging all evaluations of one run, without a request."""
    pairs = [pair for evaluation in evaluations for pair in comparisons(evaluation)]
    return estimate_cost(pairs, spec, _answers(evaluations[0]))


def judge(evaluation: Artifact, spec: JudgeSpec) -> tuple[Path, dict[str, Any]]:
    """Ask the judge, and write the summary and every verdict as JSON; return its path and the summary.

    Raises:
        EnvironmentProblem: the endpoint or its key fails; verdicts so far are kept.
        DataError: too many comparisons have no verdict.
    """
    rows = judge_pairs(comparisons(evaluation), spec, _answers(evaluation))
    summary = asdict(summarise(rows))
    # the endpoint's address and its retries do not change a verdict, so they are left out
    key = digest_of({"model": spec.model, "criterion": spec.criterion, "request": spec.request})[:8]
    path = evaluation.path.parent / FOLDER / f"{evaluation.path.name}-{spec.criterion}-{key}.json"
    verdicts = [
        {name: getattr(row, name) for name in ("prompt_id", "order", "verdict", "failure", "length_difference")}
        for row in rows
    ]
    record = {
        "evaluation": evaluation.path.name,
        "method": evaluation.info["method"],
        "variant": evaluation.info["variant"],
        "judge": spec.model_dump(mode="json"),
        "summary": summary,
        "verdicts": verdicts,
    }
    write_json(path, record)
    return path, summary


def _answers(evaluation: Artifact) -> Path:
    return evaluation.path.parent / FOLDER / ANSWERS


def _prompt(messages: Sequence[dict[str, str]]) -> str:
    """Return a lone question as it is, a conversation with the role of each message."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
