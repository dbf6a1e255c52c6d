"""Verdicts summarised: the win rate with its interval over prompts, and how far the judge can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from can_dist.dual import Interval
from can_dist.errors import DataError
from can_dist.judging.judge import ORDERS, Judgement, Verdict, total
from can_dist.measuring.tails import prompt_share

SCORE: dict[Verdict, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True)
class JudgeSummary:
    """The verdicts of one judge on one candidate against one baseline.

    Attributes:
        num_prompts: with at least one verdict.
        wins: verdicts for the candidate, over both orders.
        ties: verdicts for neither.
        losses: verdicts for the baseline.
        no_verdict: comparisons whose answers had no verdict line; in no rate below.
        rejected: comparisons the endpoint refused to judge; in no rate below.
        win_rate: mean over prompts, a tie counts ½; 95 % interval clustered by prompt.
        flip_rate: share of the pairs judged in both orders whose verdict changed with the order; None without pairs.
        first_rate: share of the decided verdicts that went to the response shown first, ½ for an unbiased judge.
        length_difference: mean characters of the candidate's response less the baseline's.
        requests: sent now, that is, for rows that were not on disk.
        prompt_tokens: the endpoint's count for these requests; None where it does not say.
        completion_tokens: likewise.
    """

    num_prompts: int
    wins: int
    ties: int
    losses: int
    no_verdict: int
    rejected: int
    win_rate: Interval
    flip_rate: float | None
    first_rate: float | None
    length_difference: float
    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None


def summarise(rows: Sequence[Judgement]) -> JudgeSummary:
    """Count verdicts and estimate win rates.

    Raises:
        DataError: fewer than 2 prompts have a verdict, or rows are not in pairs.
    """
    judged = [(row, row.verdict) for row in rows if row.verdict is not None]
    prompts = [row.prompt_id for row, _ in judged]
    if len(set(prompts)) < 2:
        raise DataError(
            f"judgements: verdicts on {len(set(prompts))} prompt(s) in {len(rows)} rows; an interval needs at least "
            "2. Judge more prompts."
        )
    verdicts = [verdict for _, verdict in judged]
    score_N = np.array([SCORE[verdict] for verdict in verdicts])
    first = [(verdict == "win") == (row.order == "candidate first") for row, verdict in judged if verdict != "tie"]
    spent = [row.record for row in rows if not row.cached]
    return JudgeSummary(
        num_prompts=len(set(prompts)),
        wins=verdicts.count("win"),
        ties=verdicts.count("tie"),
        losses=verdicts.count("loss"),
        no_verdict=sum(row.failure == "no verdict" for row in rows),
        rejected=sum(row.failure == "rejected" for row in rows),
        win_rate=prompt_share(score_N, prompts),
        flip_rate=flip_rate(rows),
        first_rate=float(np.mean(first)) if first else None,
        length_difference=float(np.mean([row.length_difference for row, _ in judged])),
        requests=sum(record.requests for record in spent),
        prompt_tokens=total([record.prompt_tokens for record in spent]),
        completion_tokens=total([record.completion_tokens for record in spent]),
    )


def flip_rate(rows: Sequence[Judgement]) -> float | None:
    """Return the share of pairs judged in both orders whose verdict changed with the order (win and tie differ).

    The rows of a pair follow each other, as :func:`can_dist.judging.judge.judge_pairs` returns them.

    Raises:
        DataError: rows that are not in pairs.
    """
    orders = [row.order for row in rows]
    same = [row.prompt_id for row in rows[::2]] == [row.prompt_id for row in rows[1::2]]
    if not same or orders != list(ORDERS) * (len(rows) // 2):
        raise DataError(
            "judgements: not two rows per comparison, one per order. Pass all rows that judge_pairs returned."
        )
    both = [(a.verdict, b.verdict) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    judged = [a != b for a, b in both if a is not None and b is not None]
    return float(np.mean(judged)) if judged else None
