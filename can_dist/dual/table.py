"""The score table in the form every dual function takes: grouped by prompt, centred, float64.

Shape legend of this package: N responses (rows), P prompts, J constraints, K responses of one prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from can_dist.errors import ConfigError, DataError

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

_ROUNDING = 8 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class ScoreTable:
    """Scores of every response, grouped by prompt and centred on the reference.

    Rows are sorted by prompt (CSR form): prompt i owns rows ``start_P[i]`` to ``start_P[i] + num_responses_P[i]``.
    Scores are stored minus their per-prompt reference mean, which the dual does not see (docs/dual.md):
    with them h_ik = g_ik − ḡ − b averages over prompts to ``utility_JN`` − b, and shifts by any f(x) cost no digits.

    Attributes:
        reward_N: reward minus the reference mean of its prompt, reward units.
        utility_JN: utilities minus the reference mean of their prompt, each in its own units; constraint-major.
        log_weight_N: ln π_ref(y|x) on the table, normalised within each prompt (−ln K where uniform).
        row_prompt_N: index in 0..P−1 of each row's prompt.
        start_P: first row of each prompt.
        num_responses_P: K_i.
        mean_reward_P: what was subtracted from ``reward_N``.
        mean_utility_JP: what was subtracted from ``utility_JN``.
        prompt_P: the prompt ids, ascending.
        order_N: row of the caller's arrays that each row here came from.
        weighted: whether the caller gave reference weights.
    """

    reward_N: FloatArray
    utility_JN: FloatArray
    log_weight_N: FloatArray
    row_prompt_N: IntArray
    start_P: IntArray
    num_responses_P: IntArray
    mean_reward_P: FloatArray
    mean_utility_JP: FloatArray
    prompt_P: npt.NDArray[Any]
    order_N: IntArray
    weighted: bool

    @classmethod
    def build(
        cls,
        reward_N: npt.ArrayLike,
        utility_NJ: npt.ArrayLike,
        prompt_N: npt.ArrayLike,
        log_weight_N: npt.ArrayLike | None = None,
        *,
        names: Sequence[str] | None = None,
    ) -> ScoreTable:
        """Check, group and centre a table of scores.

        Args:
            reward_N: r(x,y), higher is better.
            utility_NJ: g_j(x,y), higher is better (a cost enters as g = −cost); shape (N, J), or (N,) for J = 1.
            prompt_N: prompt ids, strings or integers; rows in any order, any number of responses per prompt.
            log_weight_N: ln of the weight of each response under π_ref within its prompt, up to a constant per
                prompt; uniform when absent. Needed only where the table enumerates the support.
            names: names of the J utilities, for messages.

        Raises:
            ConfigError: shapes do not agree.
            DataError: no rows, or a value that is not finite.
        """
        reward, utility = _check_scores(_floats(reward_N, "reward"), _floats(utility_NJ, "utility"), names)
        num_rows = reward.shape[0]
        ids_N = id_values(prompt_N)
        _check_length(ids_N, "prompt_N", num_rows)
        if log_weight_N is not None:
            log_weight = _floats(log_weight_N, "log_weight")
            _check_length(log_weight, "log_weight_N", num_rows)
            _check_finite("log_weight", log_weight, " A response of weight zero is left out of the table.")
        code_N, prompt_P = _group(ids_N, num_rows)
        grouped = bool(np.all(code_N[1:] >= code_N[:-1]))
        order = np.arange(num_rows) if grouped else np.argsort(code_N, kind="stable")
        row_prompt = code_N if grouped else code_N[order]
        num_responses = np.bincount(row_prompt, minlength=prompt_P.shape[0]).astype(np.int64)
        start = np.concatenate(([0], np.cumsum(num_responses)[:-1])).astype(np.int64)
        if log_weight_N is None:
            log_weight = _spread(-np.log(num_responses), num_responses)
        else:
            log_weight = _normalise(log_weight[order], start, row_prompt)
        weight = np.exp(log_weight)
        with np.errstate(over="ignore", invalid="ignore"):
            columns = [column if grouped else column[order] for column in (reward, *utility.T)]
            centred = [_centre(column, weight, start, num_responses) for column in columns]
        return cls(
            reward_N=centred[0][0],
            utility_JN=_stack([column for column, _ in centred[1:]], num_rows),
            log_weight_N=log_weight,
            row_prompt_N=row_prompt,
            start_P=start,
            num_responses_P=num_responses,
            mean_reward_P=centred[0][1],
            mean_utility_JP=_stack([mean for _, mean in centred[1:]], prompt_P.shape[0]),
            prompt_P=prompt_P,
            order_N=order,
            weighted=log_weight_N is not None,
        )

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts: the unit of replication."""
        return int(self.start_P.shape[0])

    @property
    def num_rows(self) -> int:
        """N, the number of responses."""
        return int(self.reward_N.shape[0])

    @property
    def num_constraints(self) -> int:
        """J, the number of utilities."""
        return int(self.utility_JN.shape[0])

    @property
    def centre_J(self) -> FloatArray:
        """ḡ_j, mean over prompts of the reference mean of g_j, in raw units."""
        mean_J: FloatArray = self.mean_utility_JP.mean(axis=1)
        return mean_J

    @property
    def mean_reward(self) -> float:
        """Mean over prompts of the reference mean of r, in raw units."""
        return float(self.mean_reward_P.mean())

    def blocks(self, num_rows: int) -> Iterator[ScoreTable]:
        """Split into views of consecutive whole prompts, about ``num_rows`` rows each, for the cache."""
        if self.num_rows <= num_rows:
            yield self
            return
        edge_B = np.arange(num_rows, self.num_rows, num_rows)
        first_B = np.unique(np.concatenate(([0], np.searchsorted(self.start_P, edge_B), [self.num_prompts])))
        for low, high in zip(first_B[:-1].tolist(), first_B[1:].tolist(), strict=True):
            begin = int(self.start_P[low])
            rows = slice(begin, int(self.start_P[high]) if high < self.num_prompts else self.num_rows)
            yield replace(
                self,
                reward_N=self.reward_N[rows],
                utility_JN=self.utility_JN[:, rows],
                log_weight_N=self.log_weight_N[rows],
                row_prompt_N=self.row_prompt_N[rows],
                start_P=self.start_P[low:high] - begin,
                num_responses_P=self.num_responses_P[low:high],
                mean_reward_P=self.mean_reward_P[low:high],
                mean_utility_JP=self.mean_utility_JP[:, low:high],
                prompt_P=self.prompt_P[low:high],
                order_N=self.order_N[rows],
            )

    def take(self, prompt_Q: npt.NDArray[Any]) -> ScoreTable:
        """Select prompts by mask or index, in that order; repeats count again (for the bootstrap)."""
        index = np.flatnonzero(prompt_Q) if prompt_Q.dtype == np.bool_ else prompt_Q
        num_responses = self.num_responses_P[index]
        start = np.concatenate(([0], np.cumsum(num_responses)[:-1])).astype(np.int64)
        rows = np.repeat(self.start_P[index] - start, num_responses) + np.arange(int(num_responses.sum()))
        return replace(
            self,
            reward_N=self.reward_N[rows],
            utility_JN=self.utility_JN[:, rows],
            log_weight_N=self.log_weight_N[rows],
            row_prompt_N=np.repeat(np.arange(index.size), num_responses),
            start_P=start,
            num_responses_P=num_responses,
            mean_reward_P=self.mean_reward_P[index],
            mean_utility_JP=self.mean_utility_JP[:, index],
            prompt_P=self.prompt_P[index],
            order_N=self.order_N[rows],
        )

    def sum_rows(self, value_N: FloatArray) -> FloatArray:
        """Sum a row quantity within each prompt: (N,) to (P,)."""
        return np.add.reduceat(value_N, self.start_P)

    def max_rows(self, value_N: FloatArray) -> FloatArray:
        """Take the largest value of a row quantity within each prompt: (N,) to (P,)."""
        return np.maximum.reduceat(value_N, self.start_P)

    def spread(self, value_P: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Give every row the value of its prompt: (P,) to (N,)."""
        return _spread(value_P, self.num_responses_P)

    def apply_rows(self, operation: np.ufunc, value_N: FloatArray, value_P: FloatArray) -> None:
        """Apply ``operation`` (np.subtract, np.divide, ...) in place to every row and the value of its prompt."""
        _apply(operation, value_N, value_P, self.num_responses_P)

    def score(self, lam_J: FloatArray) -> FloatArray:
        """Return r + ⟨λ,g⟩ of every row, centred per prompt, reward units."""
        score_N = self.reward_N.copy()
        for lam, column in zip(lam_J, self.utility_JN, strict=True):
            score_N += lam * column
        return score_N

    def within_sd(self, value_N: FloatArray) -> float:
        """Return the root mean over prompts of the within-prompt variance under π_ref.

        ``value_N`` is centred (a stored column or a combination of them). Unbiased variance for a sampled table;
        plain variance where reference weights were given. Prompts with one response count as zero.
        """
        peak = float(np.max(np.abs(value_N)))
        if peak == 0.0 or not np.isfinite(peak):
            return peak
        square_N = (value_N / peak) ** 2
        if self.weighted:
            variance_P = self.sum_rows(np.exp(self.log_weight_N) * square_N)
        else:
            variance_P = self.sum_rows(square_N) / np.maximum(self.num_responses_P - 1, 1)
        return peak * float(np.sqrt(variance_P.mean()))

    @property
    def reward_spread(self) -> float:
        """Root mean within-prompt variance of r."""
        return self.within_sd(self.reward_N)

    @property
    def spread_J(self) -> FloatArray:
        """Root mean within-prompt variance of each g_j."""
        return np.array([self.within_sd(column) for column in self.utility_JN])

    @property
    def attainable_J(self) -> FloatArray:
        """Mean over prompts of max_k g_ikj, minus ḡ_j."""
        return np.array([self.max_rows(column).mean() for column in self.utility_JN])

    @property
    def peak(self) -> float:
        """Largest centred |score|."""
        return float(max(np.abs(self.reward_N).max(), np.abs(self.utility_JN).max(initial=0.0)))

    def score_spread(self, lam_J: FloatArray) -> float:
        """Return the root mean within-prompt variance of r + ⟨λ,g⟩."""
        return self.within_sd(self.score(lam_J))

    def best(self, mixture_J: FloatArray) -> tuple[FloatArray, float]:
        """Return the mean utilities of each prompt's best response under ⟨v,g⟩ (J,), and the largest |⟨v,g⟩|."""
        score_N = mixture_J @ self.utility_JN
        hit = np.flatnonzero(score_N == self.spread(self.max_rows(score_N)))
        prompt = self.row_prompt_N[hit]
        first = hit[np.concatenate(([True], prompt[1:] != prompt[:-1]))]
        return self.utility_JN[:, first].mean(axis=1), float(np.abs(score_N).max())

    def signed(self, sign_J: FloatArray) -> ScoreTable:
        """Multiply each utility by +1 or −1."""
        return replace(
            self, utility_JN=self.utility_JN * sign_J[:, None], mean_utility_JP=self.mean_utility_JP * sign_J[:, None]
        )

    def scaled(self, reward_scale: float, utility_scale_J: FloatArray, keep_J: npt.NDArray[np.bool_]) -> ScoreTable:
        """Divide the scores by scales (powers of two lose no digit) and keep the utilities of ``keep_J``."""
        return replace(
            self,
            reward_N=self.reward_N / reward_scale,
            utility_JN=self.utility_JN[keep_J] / utility_scale_J[keep_J, None],
            mean_reward_P=self.mean_reward_P / reward_scale,
            mean_utility_JP=self.mean_utility_JP[keep_J] / utility_scale_J[keep_J, None],
        )


def _floats(values: npt.ArrayLike, name: str) -> FloatArray:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: not a column of numbers ({error}); every score must be one finite number.") from error


def _check_scores(
    reward_N: FloatArray, utility_NJ: FloatArray, names: Sequence[str] | None
) -> tuple[FloatArray, FloatArray]:
    """Check shapes and finiteness; one utility may come as a vector."""
    if reward_N.ndim != 1:
        raise ConfigError(f"reward_N: shape {reward_N.shape}, expected one dimension; give one reward per response.")
    num_rows = reward_N.shape[0]
    if utility_NJ.ndim == 1 and utility_NJ.size == num_rows:
        utility_NJ = utility_NJ[:, None]
    if utility_NJ.ndim != 2 or utility_NJ.shape[0] != num_rows:
        raise ConfigError(
            f"utility_NJ: shape {utility_NJ.shape}, expected ({num_rows}, J) to match the {num_rows} rows of "
            "reward_N; give one row per response and one column per constraint."
        )
    if num_rows == 0:
        raise DataError("the score table has no rows; score at least one response before solving.")
    if names is not None and utility_NJ.shape[1] != len(names):
        raise ConfigError(
            f"utility_NJ: {utility_NJ.shape[1]} columns for {len(names)} constraints ({', '.join(names) or 'none'}); "
            "give one column per constraint, in the same order."
        )
    columns = names if names is not None else [f"utility[{j}]" for j in range(utility_NJ.shape[1])]
    _check_finite("reward", reward_N)
    for name, column in zip(columns, utility_NJ.T, strict=True):
        _check_finite(name, column)
    return reward_N, utility_NJ


def _check_length(values: npt.NDArray[Any], name: str, num_rows: int) -> None:
    if values.shape != (num_rows,):
        raise ConfigError(f"{name}: shape {values.shape}, expected ({num_rows},) to match the rows of reward_N.")


def _check_finite(name: str, values_N: FloatArray, hint: str = "") -> None:
    """Raise DataError with the first bad rows of a column."""
    bad = np.flatnonzero(~np.isfinite(values_N))
    if bad.size == 0:
        return
    shown = ", ".join(str(int(row)) for row in bad[:5])
    more = f" and {bad.size - 5} more" if bad.size > 5 else ""
    raise DataError(
        f"column '{name}': {bad.size} of {values_N.size} values are not finite, at rows {shown}{more} "
        f"(first found: {values_N[bad[0]]}). Score these responses again or leave them out.{hint}"
    )


def _group(ids: npt.NDArray[Any], num_rows: int) -> tuple[IntArray, npt.NDArray[Any]]:
    """Return the integer code of each row's prompt and the sorted distinct ids; cheap where rows come grouped."""
    if ids.dtype == object:
        kinds = set(map(type, ids.tolist()))
        if not kinds <= {str} and not kinds <= {int}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise DataError(
                f"prompt_N: ids of types {names}; give every prompt id as a string, or every one as an integer."
            )
        ids = ids if kinds == {str} else np.asarray(ids.tolist())
    elif ids.dtype.kind not in "USiu":
        raise DataError(f"prompt_N: ids of dtype {ids.dtype}; give prompt ids as strings or integers.")
    first = np.flatnonzero(np.concatenate(([True], ids[1:] != ids[:-1])))
    prompt_P, run_code = np.unique(ids[first], return_inverse=True)
    run_length = np.diff(np.concatenate((first, [num_rows])))
    return np.repeat(run_code.astype(np.int64), run_length), prompt_P


def id_values(values: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return ids as an array that keeps texts as they are: NumPy's own have the width of the longest, row by row."""
    if isinstance(values, list | tuple) and values and isinstance(values[0], str):
        return np.array([*values, None], dtype=object)[:-1]
    return np.asarray(values)


def _normalise(log_weight_N: FloatArray, start_P: IntArray, row_prompt_N: IntArray) -> FloatArray:
    shifted = log_weight_N - np.maximum.reduceat(log_weight_N, start_P)[row_prompt_N]
    return shifted - np.log(np.add.reduceat(np.exp(shifted), start_P))[row_prompt_N]


def _spread(value_P: npt.NDArray[Any], num_responses_P: IntArray) -> npt.NDArray[Any]:
    """Give every row the value of its prompt: (P,) to (N,); a plain copy where every prompt has as many rows."""
    count = int(num_responses_P[0])
    if np.all(num_responses_P == count):
        return np.broadcast_to(value_P[:, None], (value_P.shape[0], count)).reshape(-1)
    return np.repeat(value_P, num_responses_P)


def _apply(operation: np.ufunc, value_N: FloatArray, value_P: FloatArray, num_responses_P: IntArray) -> None:
    count = int(num_responses_P[0])
    if np.all(num_responses_P == count):
        value_PK = value_N.reshape(-1, count)
        operation(value_PK, value_P[:, None], out=value_PK)
    else:
        operation(value_N, np.repeat(value_P, num_responses_P), out=value_N)


def _centre(
    value_N: FloatArray, weight_N: FloatArray, start_P: IntArray, num_responses_P: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Subtract the reference mean of each prompt; a prompt whose scores are equal to rounding becomes exactly zero."""
    top = np.maximum.reduceat(value_N, start_P)
    low = np.minimum.reduceat(value_N, start_P)
    offset = value_N.copy()
    _apply(np.subtract, offset, low, num_responses_P)
    mean_offset = np.add.reduceat(weight_N * offset, start_P)
    constant = (top - low) <= _ROUNDING * np.maximum(np.abs(top), np.abs(low))
    if constant.any():
        mean_offset[constant] = 0.0
        offset[_spread(constant, num_responses_P)] = 0.0
    _apply(np.subtract, offset, mean_offset, num_responses_P)
    return offset, low + mean_offset


def _stack(columns: list[FloatArray], width: int) -> FloatArray:
    return np.stack(columns) if columns else np.zeros((0, width))
