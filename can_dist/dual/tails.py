"""Constraints on more than a mean, as columns made from scores (docs/dual.md, 7 to 9): the dual itself does not change.

``rectified``: min(0, g − level), so that a response above the level makes up for none below it. ``worst_of``: the
smallest of several scores. ``cvar``: the mean of the worst share α of the policy's responses, over all prompts, is

    CVaR_α(π) = max_τ E_π h_τ,     h_τ = τ − max(0, τ − g)/α                  (Rockafellar and Uryasev 2000)

so it reaches c where, for some τ, the mean of h_τ does: a constraint on a mean. :func:`settle` finds the τ that costs
least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from can_dist.dual.frame import source_column
from can_dist.dual.objective import tilt
from can_dist.dual.solution import Margin, Status
from can_dist.dual.solve import solve_table
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError, InfeasibleConstraint

Kind = Literal["mean", "rectified", "worst_of", "cvar"]

_STARTS = 12
_MAX_STEPS = 50
_SETTLED = 1e-9


@dataclass(frozen=True)
class Column:
    """One utility: which scores it is made from, and how.

    Attributes:
        name: of the constraint.
        sources: names of the scores; ``-cost`` is minus the score ``cost``. One, but for ``worst_of``.
        of: ``mean`` takes the score as it is.
        level: of ``rectified``, in the score's units.
        alpha: of ``cvar``, the share of responses that counts, in (0, 1).
        tau: of ``cvar``, in the score's units; None until :func:`settle` has found it.

    Raises:
        ConfigError: an option that is missing, does not belong to its kind, or lies outside its range.
    """

    name: str
    sources: tuple[str, ...]
    of: Kind = "mean"
    level: float | None = None
    alpha: float | None = None
    tau: float | None = None

    def __post_init__(self) -> None:
        place = f"constraints.{self.name}"
        if (self.of == "worst_of") != (len(self.sources) > 1):
            few = "one score" if len(self.sources) == 1 else f"{len(self.sources)} scores"
            raise ConfigError(f"{place}: {self.of} of {few}.", "worst_of takes several scores, every other kind one.")
        for option, value, kind in (("level", self.level, "rectified"), ("alpha", self.alpha, "cvar")):
            if (value is not None) != (self.of == kind):
                given = f"{option} is missing" if value is None else f"{option} {value:g} is given"
                raise ConfigError(f"{place}: {self.of}, and {given}.", f"{option} belongs to {kind}, and only there.")
        if self.level is not None and not math.isfinite(self.level):
            raise ConfigError(
                f"{place}.level: {self.level}, expected a finite number.", "Give it in the score's units."
            )
        if self.alpha is not None and not 0 < self.alpha < 1:
            raise ConfigError(
                f"{place}.alpha: {self.alpha:g}, expected above 0 and below 1.",
                "It is the share of responses, the worst ones, whose mean is asked for; 1 would be the mean itself.",
            )

    @property
    def is_score(self) -> bool:
        """Whether the utility is a score as it stands: a mean, or a ``cvar`` without its τ."""
        return self.of == "mean" or (self.of == "cvar" and self.tau is None)

    @property
    def words(self) -> str:
        """Of what the mean is demanded, for people; empty for a score."""
        if self.level is not None:
            return f"min(0, score - {self.level:g}), which is 0 for every response above {self.level:g}"
        if self.alpha is not None:
            return f"the worst {100 * self.alpha:g}% of all responses (CVaR)"
        return f"the smallest of the scores {', '.join(self.sources)}" if self.of == "worst_of" else ""

    def at_own_tau(self, score_N: npt.NDArray[Any], prompt_N: npt.NDArray[Any]) -> Column:
        """Return a ``cvar`` at the α-quantile of responses, whose mean of h_τ over prompts is their CVaR.

        Args:
            score_N: the score of every response.
            prompt_N: its prompt; every prompt weighs the same.
        """
        _, index_N, count_P = np.unique(prompt_N, return_inverse=True, return_counts=True)
        share_N = 1.0 / (count_P.size * count_P[index_N])
        return replace(self, tau=quantile(np.asarray(score_N, dtype=np.float64), share_N, self.alpha or 1.0))

    def read(self, scores: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return :meth:`values` from the score columns of a table by name, ``-cost`` being minus ``cost``."""
        signed = []
        for name in self.sources:
            column, sign = source_column(name, list(scores))
            signed.append(scores[column] if sign > 0 else -scores[column])
        return self.values(signed)

    def values(self, scores: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return the utility of every response from its scores, in the order of ``sources``; higher is better."""
        if self.of == "mean":
            return np.asarray(scores[0])
        first_N = np.asarray(scores[0], dtype=np.float64)
        if self.of == "worst_of":
            smallest_N: FloatArray = np.minimum.reduce([np.asarray(score_N, dtype=np.float64) for score_N in scores])
            return smallest_N
        if self.level is not None:
            return np.minimum(first_N - self.level, 0.0)
        if self.alpha is not None and self.tau is not None:
            return self.tau - np.maximum(self.tau - first_N, 0.0) / self.alpha
        return first_N


@dataclass(frozen=True)
class Settled:
    """The columns with the τ of every ``cvar``, and what is then demanded of their means.

    Attributes:
        columns: as given, each ``cvar`` with its τ.
        constraints: as given, but a ``cvar``'s is the level that its CVaR is to reach: b + CVaR_α(π_ref), or the
            threshold.
        reference: CVaR_α(π_ref) of each ``cvar`` by name, score units.
    """

    columns: tuple[Column, ...]
    constraints: tuple[Margin, ...]
    reference: dict[str, float]

    @property
    def is_derived(self) -> bool:
        """Whether any column is more than a score."""
        return any(column.of != "mean" for column in self.columns)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return by constraint what its column is made of, JSON-safe.

        Of a ``cvar`` also CVaR_α(π_ref), and the level that is demanded of its column's mean.
        """
        rows: dict[str, dict[str, Any]] = {}
        for column, demand in zip(self.columns, self.constraints, strict=True):
            level = demand.threshold if column.of == "cvar" else None
            beside = {"reference_cvar": self.reference.get(column.name), "demanded": level}
            rows[column.name] = asdict(column) | {"sources": list(column.sources)} | beside
        return rows

    def lines(self) -> list[str]:
        """Return a line for people on every column that is more than a score."""
        lines = []
        for column, demand in zip(self.columns, self.constraints, strict=True):
            if column.tau is not None:
                lines.append(
                    f"{column.name}: the worst {100 * (column.alpha or 1.0):g} % of responses have mean "
                    f"{self.reference[column.name]:.4g} in the reference and are to have {demand.threshold:.4g}; the "
                    f"numbers above are of tau - max(0, tau - g)/alpha at tau = {column.tau:.4g}, whose mean is no "
                    "larger"
                )
            elif column.words:
                lines.append(f"{column.name}: the mean is that of {column.words}")
        return lines


def columns_from(record: Mapping[str, Mapping[str, Any]]) -> tuple[Column, ...]:
    """Return the columns of :meth:`Settled.to_dict`."""
    names = [item.name for item in fields(Column)]
    rows = [{name: row[name] for name in names} for row in record.values()]
    return tuple(Column(**row | {"sources": tuple(row["sources"])}) for row in rows)


def settle(
    columns: Sequence[Column],
    constraints: Sequence[Margin],
    reward_N: FloatArray,
    value_NJ: FloatArray,
    prompt_N: npt.NDArray[Any],
    *,
    beta: float,
    log_weight_N: FloatArray | None = None,
) -> Settled:
    """Find the τ of every ``cvar`` at which its constraint costs the least, and what its column's mean must reach.

    At the policy of a τ, the τ that serves it best is the α-quantile of its scores: the policy still meets the
    constraint there, so solving again costs no more. These steps are repeated from the best of some starts.

    Args:
        columns: J of them.
        constraints: what is demanded of each, in their order; of a ``cvar`` at least, not exactly.
        reward_N: r of every response.
        value_NJ: what each column makes of its scores; of a ``cvar`` without τ, the score itself.
        prompt_N: prompt ids.
        beta: KL weight β > 0.
        log_weight_N: as :func:`~can_dist.dual.solve_dual` takes it.

    Raises:
        ConfigError: an equality on a ``cvar``.
        InfeasibleConstraint: no policy on the table has such a CVaR.
    """
    if all(column.of != "cvar" for column in columns):
        return Settled(tuple(columns), tuple(constraints), {})
    table = ScoreTable.build(reward_N, value_NJ, prompt_N, log_weight_N, names=[column.name for column in columns])
    tails = [j for j, column in enumerate(columns) if column.of == "cvar"]
    raw_JN = {j: table.utility_JN[j] + table.spread(table.mean_utility_JP[j]) for j in tails}
    share_N = np.exp(table.log_weight_N) / table.num_prompts
    demanded, reference = list(constraints), {}
    for j in tails:
        if constraints[j].equal:
            raise ConfigError(
                f"constraints.{columns[j].name}: of cvar and equal.", "A CVaR is met at least; leave out equal."
            )
        reference[columns[j].name] = worst_mean(raw_JN[j], share_N, columns[j].alpha or 1.0)
        demanded[j] = _as_level(constraints[j], reference[columns[j].name])
        _check_attainable(table, columns[j], raw_JN[j], demanded[j], reference[columns[j].name])
    chosen, best = None, -math.inf
    for start in np.linspace(0.0, 0.95, _STARTS):
        taus = {j: quantile(raw_JN[j], share_N, 1 - (1 - (columns[j].alpha or 1.0)) * (1 - start)) for j in tails}
        value, weight_N = _solve(table, columns, raw_JN, taus, demanded, beta)
        if weight_N is not None and value > best:
            chosen, best = (taus, weight_N), value
    if chosen is None:
        taus = {j: _most_attainable(table, columns[j], raw_JN[j])[1] for j in tails}
        return Settled(_with_taus(columns, taus), tuple(demanded), reference)
    taus, weight_N = chosen
    for _ in range(_MAX_STEPS):
        following = {j: quantile(raw_JN[j], weight_N, columns[j].alpha or 1.0) for j in tails}
        value, next_N = _solve(table, columns, raw_JN, following, demanded, beta)
        if next_N is None or value <= best + _SETTLED * beta:
            break
        taus, weight_N, best = following, next_N, value
    return Settled(_with_taus(columns, taus), tuple(demanded), reference)


def quantile(value_N: FloatArray, share_N: FloatArray, level: float) -> float:
    """Return the smallest value that a share of at least ``level`` does not exceed; shares sum to 1."""
    order = np.argsort(value_N, kind="stable")
    reached = np.cumsum(share_N[order])
    return float(value_N[order[min(int(np.searchsorted(reached, level * (1 - 1e-12))), order.size - 1)]])


def worst_mean(value_N: FloatArray, share_N: FloatArray, alpha: float) -> float:
    """Return CVaR_α: the mean of the worst share α, max_τ τ − E max(0, τ − g)/α, attained at the α-quantile."""
    tau = quantile(value_N, share_N, alpha)
    return tau - float(share_N @ np.maximum(tau - value_N, 0.0)) / alpha


def _as_level(constraint: Margin, reference: float) -> Margin:
    if constraint.threshold is not None:
        return constraint
    return Margin(constraint.name, threshold=reference + float(constraint.margin or 0.0))


def _solve(
    table: ScoreTable,
    columns: Sequence[Column],
    raw_JN: Mapping[int, FloatArray],
    taus: Mapping[int, float],
    constraints: Sequence[Margin],
    beta: float,
) -> tuple[float, FloatArray | None]:
    """Return E r − β KL at the solution for these τ and each response's share of its policy; None without one."""
    shaped = _shaped(table, columns, raw_JN, taus)
    solution = solve_table(shaped, beta=beta, constraints=constraints, throw=False, estimator="empirical")
    if solution.status is not Status.OPTIMAL:
        return -math.inf, None
    weight_N = tilt(shaped, solution.lam_vector, beta).weight_N / table.num_prompts
    return solution.predicted["objective"], weight_N


def _shaped(
    table: ScoreTable, columns: Sequence[Column], raw_JN: Mapping[int, FloatArray], taus: Mapping[int, float]
) -> ScoreTable:
    """Return the table with h_τ in the place of every score whose tail is constrained."""
    utility_JN, mean_JP = table.utility_JN.copy(), table.mean_utility_JP.copy()
    weight_N = np.exp(table.log_weight_N)
    for j, tau in taus.items():
        value_N = replace(columns[j], tau=tau).values([raw_JN[j]])
        mean_JP[j] = table.sum_rows(weight_N * value_N)
        utility_JN[j] = value_N - table.spread(mean_JP[j])
    return replace(table, utility_JN=utility_JN, mean_utility_JP=mean_JP)


def _most_attainable(table: ScoreTable, column: Column, raw_N: FloatArray) -> tuple[float, float]:
    """Return the largest CVaR that a policy on the table can have, and its τ: every prompt answers with its best."""
    best_P = table.max_rows(raw_N)
    share_P = np.full(best_P.size, 1 / best_P.size)
    alpha = column.alpha or 1.0
    return worst_mean(best_P, share_P, alpha), quantile(best_P, share_P, alpha)


def _check_attainable(table: ScoreTable, column: Column, raw_N: FloatArray, demand: Margin, reference: float) -> None:
    most = _most_attainable(table, column, raw_N)[0]
    if float(demand.threshold or 0.0) > most:
        raise InfeasibleConstraint(
            f"no policy supported on this table meets the constraints.\n  {column.name}: the mean of the worst "
            f"{100 * (column.alpha or 1.0):g} % is to reach {demand.threshold:.6g}, at most {most:.6g} attainable (the "
            f"best response to every prompt); the reference has {reference:.6g}.\n",
            f"Do one of: lower constraints.{column.name}; raise alpha; raise generate.num_responses.",
        )


def _with_taus(columns: Sequence[Column], taus: Mapping[int, float]) -> tuple[Column, ...]:
    return tuple(replace(column, tau=taus.get(j)) for j, column in enumerate(columns))
