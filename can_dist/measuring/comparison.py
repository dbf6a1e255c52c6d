"""Methods compared: the gains and the cost of each.

All methods are evaluated on the same P prompts against the same reference, so that their gains are paired. M methods,
R replicates. :mod:`can_dist.reporting.figures.comparison` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import fdtri

from can_dist.dual import Interval, mean_interval
from can_dist.errors import ConfigError, DataError
from can_dist.measuring.verdicts import Verdict

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95
MIN_PROMPTS = 3
"""Fewer give no confidence ellipse."""


@dataclass(frozen=True)
class Cost:
    """The cost of a method, all its trainings together.

    Attributes:
        generated_tokens: tokens sampled.
        scored_tokens: tokens of the responses that score models read.
        trained_tokens: tokens passed through training, every epoch counted.
        wall_s: seconds of its stages, one after the other; None without a log.
        num_trainings: policies trained.
    """

    generated_tokens: int
    scored_tokens: int
    trained_tokens: int
    wall_s: float | None
    num_trainings: int


@dataclass(frozen=True)
class MethodResult:
    """One method on one constraint.

    Attributes:
        name: of the method, as tables and pictures show it.
        reward_gain: E_{π_θ} r − E_{π_ref} r.
        safety_gain: E_{π_θ} g − E_{π_ref} g.
        margin: the safety gain that was demanded.
        verdict: whether it was met, in the words of the report.
        kl: KL(π_θ‖π_ref), nats.
        cost: of all its trainings.
        reward_P: reward gain of each prompt.
        safety_P: safety gain of each prompt.
        kl_P: KL of each prompt.
    """

    name: str
    reward_gain: float
    safety_gain: float
    margin: float
    verdict: Verdict
    kl: float
    cost: Cost
    reward_P: FloatArray
    safety_P: FloatArray
    kl_P: FloatArray


@dataclass(frozen=True)
class Ellipse:
    """A confidence region of two means; the width axis is turned ``angle`` degrees from that of x."""

    x: float
    y: float
    width: float
    height: float
    angle: float


@dataclass(frozen=True)
class Table:
    """Rows of text for Markdown or HTML; neither is escaped."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class OneShotRatio:
    """Training tokens of an iterative method over those of the one-shot method, to the same margin.

    Attributes:
        ratio: baseline's tokens over one-shot's; a lower bound where ``reached`` is false.
        reached: whether the baseline met the margin.
        rounds: trainings the baseline took to the margin, or all it did.
        baseline_tokens: trained tokens up to that round.
        one_shot_tokens: trained tokens of the one-shot method.
    """

    ratio: float
    reached: bool
    rounds: int
    baseline_tokens: int
    one_shot_tokens: int


def method_result(
    name: str,
    reward_P: npt.ArrayLike,
    safety_P: npt.ArrayLike,
    kl_P: npt.ArrayLike,
    *,
    margin: float,
    verdict: Verdict,
    cost: Cost,
) -> MethodResult:
    """Build a result from the gains and the KL of each prompt.

    Raises:
        DataError: not one finite reward gain, safety gain and KL per prompt, or fewer than 3 prompts.
    """
    value_3P = [np.asarray(value_P, dtype=np.float64) for value_P in (reward_P, safety_P, kl_P)]
    shapes = [value_P.shape for value_P in value_3P]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] < MIN_PROMPTS:
        raise DataError(
            f"method {name!r}: reward gains of shape {shapes[0]}, safety gains of shape {shapes[1]}, KL of shape "
            f"{shapes[2]}; expected one each per prompt, on at least {MIN_PROMPTS} prompts."
        )
    if not np.isfinite(value_3P).all():
        raise DataError(f"method {name!r}: a gain or a KL is not finite. Evaluate it again.")
    reward, safety, kl = (float(value_P.mean()) for value_P in value_3P)
    return MethodResult(name, reward, safety, margin, verdict, kl, cost, *value_3P)


def comparison_table(results: Sequence[MethodResult]) -> Table:
    """Return one row per method: gains with 95 % intervals over prompts, whether the margin was met, KL.

    Raises:
        DataError: no methods, two of one name, or methods of different prompts.
    """
    check_comparable(results)
    header = ("method", "helpfulness gain", "safety gain", "margin", "verdict", "KL (nats)")
    rows = []
    for result in results:
        reward, safety = (mean_interval(gain_P, CONFIDENCE) for gain_P in (result.reward_P, result.safety_P))
        gains = (_with_ends(reward), _with_ends(safety))
        rows.append((result.name, *gains, f"{result.margin:.3g}", result.verdict, f"{result.kl:.3g}"))
    return Table(header, tuple(rows))


def cost_table(cost_by_method: Mapping[str, Cost]) -> Table:
    """Return one row per method: its cost."""
    header = ("method", "trainings", "trained tokens", "generated tokens", "scored tokens", "time")
    rows = []
    for name, cost in cost_by_method.items():
        tokens = (cost.trained_tokens, cost.generated_tokens, cost.scored_tokens)
        time = "–" if cost.wall_s is None else short_time(cost.wall_s)
        rows.append((name, str(cost.num_trainings), *map(short_count, tokens), time))
    return Table(header, tuple(rows))


def confidence_ellipse(x_P: FloatArray, y_P: FloatArray, confidence: float = CONFIDENCE) -> Ellipse:
    """Return the joint confidence region of the means of two numbers per prompt (Hotelling's T², exact for Gaussians).

    (m − m̄)ᵀ C⁻¹ (m − m̄) ≤ 2(P − 1)/(P − 2) · F_{2,P−2}, with C the covariance of the means.
    """
    num_prompts = x_P.size
    scale = 2.0 * (num_prompts - 1) / (num_prompts - 2) * float(fdtri(2, num_prompts - 2, confidence))
    value_2, vector_22 = np.linalg.eigh(np.cov(np.stack([x_P, y_P]), ddof=1) / num_prompts)
    height, width = 2.0 * np.sqrt(np.maximum(value_2, 0.0) * scale)
    angle = math.degrees(math.atan2(vector_22[1, 1], vector_22[0, 1]))
    return Ellipse(float(x_P.mean()), float(y_P.mean()), float(width), float(height), angle)


def one_shot_ratio(
    one_shot_tokens: int, trained_tokens: Sequence[int], safety_gains: Sequence[float], margin: float
) -> OneShotRatio:
    """Compare the training an iterative method (C-DPO) needs for a margin with that of the one-shot method (MoCAN).

    Args:
        one_shot_tokens: tokens trained by the method that meets the margin in one training.
        trained_tokens: tokens trained in each round of the iterative method, in order.
        safety_gains: E g − E_{π_ref} g measured after each round; the first at or above the margin ends the count.
        margin: the same for both.

    Raises:
        ConfigError: no rounds, lists of different lengths, or tokens that are not positive.
    """
    if not trained_tokens or len(trained_tokens) != len(safety_gains) or min(one_shot_tokens, *trained_tokens) <= 0:
        raise ConfigError(
            f"one_shot_ratio: {one_shot_tokens} tokens against {len(trained_tokens)} rounds of training with "
            f"{len(safety_gains)} measured gains; expected positive tokens and one gain per round."
        )
    met = [gain >= margin for gain in safety_gains]
    rounds = met.index(True) + 1 if any(met) else len(met)
    tokens = sum(trained_tokens[:rounds])
    return OneShotRatio(tokens / one_shot_tokens, any(met), rounds, tokens, one_shot_tokens)


def check_comparable(results: Sequence[MethodResult]) -> None:
    """Raise ``DataError`` unless there are methods, of different names, on one set of prompts."""
    names = [result.name for result in results]
    sizes = {result.name: result.reward_P.size for result in results}
    if not results or len(sizes) < len(names) or len(set(sizes.values())) > 1:
        raise DataError(
            f"methods {', '.join(names) or '(none)'} with {', '.join(map(str, sizes.values())) or 'no'} prompts: "
            "expected methods of different names, evaluated on the same prompts."
        )


def short_count(count: int) -> str:
    """Return a count with three digits: 940, 1.23k, 12.3M, 1.23G."""
    value = float(count)
    for unit in ("", "k", "M", "G"):
        if value < 999.5 or unit == "G":
            return f"{count}" if unit == "" else f"{value:.3g}{unit}"
        value /= 1000.0
    raise AssertionError


def short_time(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _with_ends(interval: Interval) -> str:
    """Return the mean with its interval, to two digits of the longer arm."""
    reach = max(interval.high - interval.mean, interval.mean - interval.low)
    digits = 2 if reach == 0.0 else min(max(1 - math.floor(math.log10(reach)), 0), 6)
    return f"{interval.mean:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
