"""What the verdicts say: win rates with intervals over prompts, at equal length too, and how far to trust the judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import t

from can_dist.dual import Interval
from can_dist.errors import DataError
from can_dist.judging.judge import ORDERS, Judgement, Verdict
from can_dist.measuring.tails import prompt_share

FloatArray = npt.NDArray[np.float64]

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
        length_controlled: the win rate at equal length, see :func:`length_controlled_win_rate`.
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
    length_controlled: Interval
    flip_rate: float | None
    first_rate: float | None
    length_difference: float
    requests: int
    prompt_tokens: int | None
    completion_tokens: int | None


def summarise(rows: Sequence[Judgement], confidence: float = 0.95) -> JudgeSummary:
    """Count verdicts and estimate win rates.

    Raises:
        DataError: fewer than 2 prompts have a verdict, or rows are not in pairs.
        ConfigError: confidence outside (0, 1).
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
    difference_N = np.array([float(row.length_difference) for row, _ in judged])
    first = [(verdict == "win") == (row.order == "candidate first") for row, verdict in judged if verdict != "tie"]
    spent = [row for row in rows if not row.cached]
    return JudgeSummary(
        num_prompts=len(set(prompts)),
        wins=verdicts.count("win"),
        ties=verdicts.count("tie"),
        losses=verdicts.count("loss"),
        no_verdict=sum(row.failure == "no verdict" for row in rows),
        rejected=sum(row.failure == "rejected" for row in rows),
        win_rate=prompt_share(score_N, prompts, confidence),
        length_controlled=length_controlled_win_rate(score_N, difference_N, prompts, confidence),
        flip_rate=flip_rate(rows),
        first_rate=float(np.mean(first)) if first else None,
        length_difference=float(difference_N.mean()),
        requests=sum(row.requests for row in spent),
        prompt_tokens=_total([row.prompt_tokens for row in spent]),
        completion_tokens=_total([row.completion_tokens for row in spent]),
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


def length_controlled_win_rate(
    score_N: npt.ArrayLike, length_difference_N: npt.ArrayLike, prompts: Sequence[str], confidence: float = 0.95
) -> Interval:
    """Return the win rate if both responses had the same length (AlpacaEval-LC, arXiv 2404.04475).

    Logistic regression of the verdict, σ(θ + φ·tanh(Δ/sd Δ)), Δ the length difference; evaluated at Δ = 0, so σ(θ). The
    paper's third term, a difficulty per prompt shared by many models, is left out: here is one pair of models. One
    imaginary tie, half of it at either end of the length scale, keeps θ and φ finite where every verdict is the same or
    length separates them; it moves the estimate by O(1/P). Prompts weigh alike. The interval is that of θ (sandwich
    clustered by prompt, Student's t) through σ.

    Args:
        score_N: 1 for a win, ½ for a tie, 0 for a loss.
        length_difference_N: the candidate's length less the baseline's, any unit.
        prompts: the prompt of each verdict.
        confidence: of the interval.

    Raises:
        DataError: lengths differ, a value is not finite, or there are fewer than 2 prompts.
    """
    score_N, delta_N = np.asarray(score_N, dtype=np.float64), np.asarray(length_difference_N, dtype=np.float64)
    ids, index_N = np.unique(np.asarray(prompts), return_inverse=True)
    if not score_N.shape == delta_N.shape == index_N.shape or ids.size < 2 or not np.isfinite(delta_N).all():
        raise DataError(
            f"verdicts: {score_N.shape} scores, {delta_N.shape} length differences, {ids.size} prompts; expected one "
            "finite number each per row, on at least 2 prompts."
        )
    spread = float(delta_N.std())
    x_N = np.tanh(delta_N / spread) if spread > 0 else np.zeros_like(delta_N)
    design_N2 = np.column_stack([np.ones_like(x_N), x_N])
    design_N2 = np.vstack([design_N2, [[1.0, 1.0], [1.0, -1.0]]])
    score_N = np.append(score_N, [0.5, 0.5])
    weight_N = np.append(1.0 / np.bincount(index_N)[index_N], [0.5, 0.5])
    group_N = np.append(index_N, [ids.size, ids.size])

    def loss(theta_2: FloatArray) -> tuple[float, FloatArray]:
        logit_N = design_N2 @ theta_2
        gradient_2 = design_N2.T @ (weight_N * (expit(logit_N) - score_N))
        return float(weight_N @ (np.logaddexp(0.0, logit_N) - score_N * logit_N)), gradient_2

    theta_2 = minimize(loss, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-8 * ids.size}).x
    win_N = expit(design_N2 @ theta_2)
    hessian_22 = design_N2.T @ (design_N2 * (weight_N * win_N * (1.0 - win_N))[:, None])
    gradient_N2 = design_N2 * (weight_N * (score_N - win_N))[:, None]
    gradient_G2 = np.stack([np.bincount(group_N, weights=column) for column in gradient_N2.T], axis=1)
    inverse_22 = np.linalg.inv(hessian_22)
    variance = float((inverse_22 @ (gradient_G2.T @ gradient_G2) @ inverse_22)[0, 0])
    rate, reach = float(expit(theta_2[0])), float(t.ppf(0.5 + confidence / 2, ids.size - 1)) * math.sqrt(variance)
    return Interval(
        rate,
        rate * (1.0 - rate) * math.sqrt(variance),
        float(expit(theta_2[0] - reach)),
        float(expit(theta_2[0] + reach)),
    )


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
