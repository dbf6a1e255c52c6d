"""A score table of any size as columns: every number the solver needs is a sum over prompts, made in passes.

A :class:`Block` holds whole prompts; :func:`run_pass` answers one :class:`Pass` over blocks; :class:`ColumnScores`
is what :func:`can_dist.dual.solve_table` takes instead of a :class:`~can_dist.dual.table.ScoreTable`. Who brings the
blocks (an array in memory, files read one after the other, tasks on a cluster) is the caller's business: it hands in
a function from a pass to the results of its shards, and equal shards give equal sums wherever they are made.

What is kept grows with the number of prompts, not with the number of responses.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from can_dist.dual.jackknife import both_moments, gain_and_slope
from can_dist.dual.moments import PromptMoments
from can_dist.dual.objective import PartialSums, partial_sums
from can_dist.dual.predict import Prediction, predict, prediction_of
from can_dist.dual.table import FloatArray, IntArray, ScoreTable
from can_dist.errors import ConfigError, DataError

PassKind = Literal["survey", "sums", "best", "jackknife", "moments", "tail", "carriers"]


@dataclass(frozen=True)
class Block:
    """Whole prompts: K_i of each prompt (P,), and the raw score columns, reward first, each (N,) of one float type."""

    num_responses_P: IntArray
    columns: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True)
class Pass:
    """One visit of every score, and what it is for.

    Attributes:
        kind: ``survey`` (means, covariances, extremes), ``sums`` (a Newton step at λ), ``best`` (best response under
            the mixture λ of the utilities), ``jackknife`` (means without bias, slopes), ``moments`` (of
            every prompt under π_λ), ``tail`` (the largest (r + ⟨λ,g⟩)/β of all responses), ``carriers`` (of the bias of
            order 1/K).
        columns_C: which columns take part, the reward (0) first.
        scale_C: factor of each: standardisation and signs.
        lam_J: λ, or the mixture of ``best``.
        beta: KL weight.
        limit: how many of ``tail``; the largest of them for ``carriers``.
    """

    kind: PassKind
    columns_C: tuple[int, ...]
    scale_C: tuple[float, ...]
    lam_J: tuple[float, ...] = ()
    beta: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True)
class PassResult:
    """What a shard answers: sums that add up, and per-prompt rows that are put one after the other.

    Attributes:
        sums: shape (S,), whatever the pass sums.
        largest: one number of which the largest counts.
        rows: shape (P, R), one row per prompt, or one per response of ``tail``; R is 0 for passes that only sum.
    """

    sums: FloatArray
    largest: float
    rows: FloatArray

    @classmethod
    def total(cls, results: Iterable[PassResult]) -> PassResult:
        """Add up the results of blocks or shards, in their order."""
        every = list(results)
        sums = functools.reduce(operator.add, (part.sums for part in every))
        return cls(sums, max(part.largest for part in every), np.concatenate([part.rows for part in every]))


Runner = Callable[[Pass], Iterable[PassResult]]


def run_pass(blocks: Iterable[Block], request: Pass) -> PassResult:
    """Answer a pass over the blocks of one shard."""
    return PassResult.total(_block_pass(block, request) for block in blocks)


def _block_pass(block: Block, request: Pass) -> PassResult:
    from can_dist.dual import kernel  # compiled on first use; a table that fits NumPy never needs it

    start_Q = np.concatenate(([0], np.cumsum(block.num_responses_P))).astype(np.int64)
    longest = int(block.num_responses_P.max())
    scale_C, lam_J = np.array(request.scale_C, dtype=np.float64), np.array(request.lam_J, dtype=np.float64)
    columns = (start_Q, tuple(block.columns[c] for c in request.columns_C), scale_C, longest)
    if request.kind == "sums":
        return PassResult(kernel.newton_sums(*columns, lam_J, request.beta).sum(axis=0), 0.0, np.empty((0, 0)))
    if request.kind == "best":
        sums_J, largest = kernel.best_sums(*columns, lam_J)
        return PassResult(sums_J.sum(axis=0), float(largest.max()), np.empty((0, 0)))
    if request.kind == "jackknife":
        return PassResult(kernel.jackknife_sums(*columns, lam_J, request.beta).sum(axis=0), 0.0, np.empty((0, 0)))
    if request.kind == "moments":
        return PassResult(np.zeros(0), 0.0, kernel.moments(*columns, lam_J, request.beta))
    if request.kind == "tail":
        tail_M = largest_of(kernel.scores(*columns, lam_J, request.beta), int(request.limit))
        return PassResult(np.zeros(0), float(tail_M[-1]), tail_M[:, None])
    if request.kind == "carriers":
        sums_B4J, variance_PJ = kernel.carrier_sums(*columns, lam_J, request.beta, request.limit)
        return PassResult(sums_B4J.sum(axis=0), 0.0, variance_PJ)
    stats_PC3, covariance_PCC = kernel.survey(*columns)
    extremes_C2 = stats_PC3[:, :, 1:].sum(axis=0)
    sums = np.concatenate([extremes_C2.ravel(), covariance_PCC.sum(axis=0).ravel()])
    return PassResult(sums, float(np.abs(stats_PC3[:, :, 1:]).max()), stats_PC3[:, :, 0])


@dataclass(frozen=True)
class ColumnScores:
    """A score table of any size, as :func:`can_dist.dual.solve_table` takes it: reference uniform on the responses.

    Attributes:
        runner: from a pass to the results of the shards, in their order.
        num_responses_P: K_i.
        mean_PC: per-prompt mean of every column, reward first, scaled.
        top_C, low_C: mean over prompts of the largest and of the smallest centred score.
        covariance_CC: mean over prompts of the unbiased within-prompt covariance.
        peak: an upper bound of the centred |score|.
        columns_C, scale_C: the runner's columns and the factor of each.
    """

    runner: Runner
    num_responses_P: IntArray
    mean_PC: FloatArray
    top_C: FloatArray
    low_C: FloatArray
    covariance_CC: FloatArray
    peak: float
    columns_C: tuple[int, ...]
    scale_C: tuple[float, ...]

    weighted = False

    @classmethod
    def survey(cls, runner: Runner, num_responses_P: IntArray, num_constraints: int) -> ColumnScores:
        """Make the first pass: means, spreads and extremes.

        Args:
            runner: answers passes; its per-prompt rows come in the order of ``num_responses_P``.
            num_responses_P: K_i of every prompt.
            num_constraints: J, the number of columns but one.

        Raises:
            DataError: every prompt has one response.
        """
        num_columns, num_prompts = num_constraints + 1, num_responses_P.shape[0]
        if num_responses_P.max(initial=0) <= 1:
            raise DataError(
                "every prompt has one response (K = 1), so no response can be preferred to another and the dual knows "
                "nothing. Sample at least 2 responses per prompt (generate.num_responses)."
            )
        columns_C, scale_C = tuple(range(num_columns)), (1.0,) * num_columns
        answer = PassResult.total(runner(Pass("survey", columns_C, scale_C)))
        extremes_C2 = answer.sums[: 2 * num_columns].reshape(num_columns, 2) / num_prompts
        covariance = answer.sums[2 * num_columns :].reshape(num_columns, num_columns) / num_prompts
        top_C, low_C = extremes_C2[:, 0], extremes_C2[:, 1]
        return cls(runner, num_responses_P, answer.rows, top_C, low_C, covariance, answer.largest, columns_C, scale_C)

    @classmethod
    def from_arrays(
        cls,
        reward_N: npt.NDArray[Any],
        utility_NJ: Sequence[npt.NDArray[Any]],
        num_responses_P: npt.ArrayLike,
    ) -> ColumnScores:
        """Take columns that lie in memory; none is copied.

        Args:
            reward_N: float32 or float64, rows of a prompt side by side.
            utility_NJ: one column per constraint, of the same type.
            num_responses_P: K_i, in the order of the rows.

        Raises:
            ConfigError, DataError: lengths that do not agree, no rows, values that are not finite.
        """
        columns = same_type([np.asarray(reward_N), *(np.asarray(column) for column in utility_NJ)])
        counts = np.asarray(num_responses_P, dtype=np.int64)
        _check(columns, counts)
        blocks = [Block(counts, columns)]
        return cls.survey(lambda request: [run_pass(blocks, request)], counts, len(columns) - 1)

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts."""
        return int(self.num_responses_P.shape[0])

    @property
    def num_rows(self) -> int:
        """N, the number of responses."""
        return int(self.num_responses_P.sum())

    @property
    def num_constraints(self) -> int:
        """J, the number of utilities."""
        return len(self.scale_C) - 1

    @property
    def prompt_P(self) -> IntArray:
        """The prompts' numbers: their ids stay in the files."""
        return np.arange(self.num_prompts)

    @property
    def mean_utility_JP(self) -> FloatArray:
        """Reference mean of each utility and prompt."""
        return self.mean_PC[:, 1:].T

    @property
    def centre_J(self) -> FloatArray:
        """ḡ_j, mean over prompts of the reference mean of g_j."""
        mean_J: FloatArray = self.mean_PC[:, 1:].mean(axis=0)
        return mean_J

    @property
    def mean_reward(self) -> float:
        """Mean over prompts of the reference mean of r."""
        return float(self.mean_PC[:, 0].mean())

    @property
    def reward_spread(self) -> float:
        """Root mean within-prompt variance of r."""
        return math.sqrt(self.covariance_CC[0, 0])

    @property
    def spread_J(self) -> FloatArray:
        """Root mean within-prompt variance of each g_j."""
        return np.sqrt(np.diag(self.covariance_CC)[1:])

    @property
    def attainable_J(self) -> FloatArray:
        """Mean over prompts of max_k g_ikj, minus ḡ_j."""
        return self.top_C[1:]

    def score_spread(self, lam_J: FloatArray) -> float:
        """Return the root mean within-prompt variance of r + ⟨λ,g⟩."""
        weight_C = np.concatenate(([1.0], lam_J))
        return math.sqrt(max(float(weight_C @ self.covariance_CC @ weight_C), 0.0))

    def ask(self, kind: PassKind, lam_J: FloatArray, beta: float = 1.0, limit: float = 0.0) -> PassResult:
        """Make one pass over all shards."""
        request = Pass(kind, self.columns_C, self.scale_C, tuple(lam_J.tolist()), beta, limit)
        return PassResult.total(self.runner(request))

    def best(self, mixture_J: FloatArray) -> tuple[FloatArray, float]:
        """Return the mean utilities of each prompt's best response under ⟨v,g⟩, and the largest |⟨v,g⟩|."""
        answer = self.ask("best", mixture_J)
        return answer.sums / self.num_prompts, answer.largest

    def signed(self, sign_J: FloatArray) -> ColumnScores:
        """Multiply each utility by +1 or −1."""
        return self._times(np.concatenate(([1.0], sign_J)), np.ones(sign_J.size + 1, dtype=np.bool_))

    def scaled(self, reward_scale: float, utility_scale_J: FloatArray, keep_J: npt.NDArray[np.bool_]) -> ColumnScores:
        """Divide the scores by scales (powers of two lose no digit) and keep the utilities of ``keep_J``."""
        return self._times(1.0 / np.concatenate(([reward_scale], utility_scale_J)), np.concatenate(([True], keep_J)))

    def _times(self, factor_C: FloatArray, keep_C: npt.NDArray[np.bool_]) -> ColumnScores:
        top_C, low_C = self.top_C * factor_C, self.low_C * factor_C
        return replace(
            self,
            mean_PC=(self.mean_PC * factor_C)[:, keep_C],
            top_C=np.maximum(top_C, low_C)[keep_C],
            low_C=np.minimum(top_C, low_C)[keep_C],
            covariance_CC=(self.covariance_CC * np.outer(factor_C, factor_C))[np.ix_(keep_C, keep_C)],
            peak=self.peak * float(np.abs(factor_C[keep_C]).max()),
            columns_C=tuple(np.array(self.columns_C)[keep_C].tolist()),
            scale_C=tuple((np.array(self.scale_C) * factor_C)[keep_C].tolist()),
        )


@partial_sums.register
def _column_sums(table: ColumnScores, lam_J: FloatArray, beta: float) -> PartialSums:
    num_constraints = table.num_constraints
    sums = table.ask("sums", lam_J, beta).sums
    return PartialSums(
        table.num_prompts,
        float(sums[0]),
        float(table.mean_PC[:, 0].sum()),
        sums[1 : num_constraints + 1],
        sums[num_constraints + 1 :].reshape(num_constraints, num_constraints),
    )


@predict.register
def _column_prediction(table: ColumnScores, lam_J: npt.ArrayLike, beta: float, margin_J: npt.ArrayLike) -> Prediction:
    moments, _ = both_moments(table, np.asarray(lam_J, dtype=np.float64), beta)
    return prediction_of(
        table.mean_reward,
        gain_PJ=moments.gain_PJ,
        reward_gain_P=moments.reward_gain_P,
        kl_P=moments.kl_P,
        ess_P=moments.ess_P,
        prompt_P=table.prompt_P,
        beta=beta,
        margin_J=np.asarray(margin_J, dtype=np.float64),
    )


@both_moments.register
def _column_moments(table: ColumnScores, lam_J: FloatArray, beta: float) -> tuple[PromptMoments, PromptMoments]:
    """Return the moments of :func:`can_dist.dual.kernel.moments`, plain and jackknifed."""
    rows = table.ask("moments", lam_J, beta).rows
    num_columns, num_constraints = table.num_constraints + 1, table.num_constraints
    again, rest = num_columns + 3, 2 * num_columns + 5
    cross = rest + num_constraints**2
    plain = PromptMoments(
        gain_PJ=rows[:, 1:num_columns],
        reward_gain_P=rows[:, 0],
        covariance_PJJ=rows[:, rest:cross].reshape(-1, num_constraints, num_constraints),
        cross_PJ=rows[:, cross:],
        kl_P=rows[:, num_columns],
        ess_P=rows[:, num_columns + 2],
        log_norm_P=rows[:, num_columns + 1],
    )
    corrected = replace(
        plain,
        gain_PJ=rows[:, again + 1 : again + num_columns],
        reward_gain_P=rows[:, again],
        kl_P=rows[:, again + num_columns],
        log_norm_P=rows[:, again + num_columns + 1],
    )
    return plain, corrected


@gain_and_slope.register
def _column_slope(table: ColumnScores, lam_J: FloatArray, beta: float) -> tuple[FloatArray, FloatArray]:
    sums = table.ask("jackknife", lam_J, beta).sums / table.num_prompts
    num_constraints = table.num_constraints
    return sums[:num_constraints], sums[num_constraints:].reshape(num_constraints, num_constraints)


def largest_of(value_N: FloatArray, number: int) -> FloatArray:
    """Return the ``number`` largest values, ascending; all of them where there are fewer."""
    if value_N.size > number:
        value_N = np.partition(value_N, -number)[-number:]
    return np.sort(value_N)


def same_type(columns: Sequence[npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], ...]:
    """Return the columns as all float32 where they all are, else as float64, read-only: the kernel reads one type."""
    kinds = {column.dtype for column in columns}
    dtype = np.float32 if kinds == {np.dtype(np.float32)} else np.float64
    views = tuple(np.ascontiguousarray(column, dtype=dtype).view() for column in columns)
    for view in views:
        view.flags.writeable = False
    return views


def _check(columns: tuple[npt.NDArray[Any], ...], num_responses_P: IntArray) -> None:
    num_rows = int(num_responses_P.sum())
    if num_rows == 0 or num_responses_P.min() < 1:
        raise DataError("the score table has no rows, or a prompt without any; score at least one response of each.")
    for number, column in enumerate(columns):
        name = "reward" if number == 0 else f"utility[{number - 1}]"
        if column.shape != (num_rows,):
            raise ConfigError(f"{name}: shape {column.shape}, expected ({num_rows},), the sum of num_responses_P.")
        bad = np.flatnonzero(~np.isfinite(column))
        if bad.size:
            raise DataError(f"column '{name}': {bad.size} of {num_rows} values are not finite, first at row {bad[0]}.")


Scores = ScoreTable | ColumnScores
"""What the solver takes: a table grouped in memory, or columns of any size."""
