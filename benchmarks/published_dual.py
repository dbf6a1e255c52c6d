"""The dual by the rules of the CAN authors' code, so that a reader can set our λ* beside theirs.

(shuoli90/CAN, safe_rlhf/trainers/model_based.py and the notebooks beside it.) Own implementation of its behaviour:

- λ starts at 1 and moves by λ ← max(0, λ − η·∂D/∂λ), at most 200 times (``num_iters``; the ``max_iters`` that the
  authors' calls pass is not read by their solver);
- the step η is twice the ``lr`` passed (1 when none is passed; the authors pass 2, so η = 4);
- it stops when, after at least 11 steps, λ is within 1e-5 of each of the last five λ;
- otherwise it starts again at λ = 1 with the step divided by 2, then by a further 4, 8, ... (the division compounds),
  and gives up after five rounds (ten in the notebooks);
- there is one constraint, an absolute level: E_π g ≥ threshold.

Leaner than the original, which also records the objective and both means at every step.

    python benchmarks/published_dual.py --scores s.parquet --reward reward --constraint safety --threshold 1 --beta 0.1
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from can_dist.cli.scores import read_scores
from can_dist.cli.text import solution_text
from can_dist.dual.predict import predict
from can_dist.dual.solution import DualSolution, Margin
from can_dist.dual.solve import solve_table
from can_dist.dual.table import FloatArray, ScoreTable
from can_dist.errors import ConfigError, NumericalError


@dataclass(frozen=True)
class Descent:
    """λ (None where it gave up), the last λ it stood at, the gradient steps over all rounds, and the rounds."""

    lam: float | None
    last_lam: float
    num_steps: int
    num_rounds: int


def published_pgd(
    reward_PK: FloatArray,
    utility_PK: FloatArray,
    threshold: float,
    beta: float,
    *,
    lr: float | None = 2.0,
    num_iters: int = 200,
    tolerance: float = 1e-5,
    max_rounds: int = 5,
) -> Descent:
    """Solve for λ as the authors' code does; ``lr=None`` is their default of η = 1.

    A reward of −∞ marks a response that is not there, so that prompts may have different numbers of responses.
    """
    step = 1.0 if lr is None else 2.0 * lr
    total = 0
    lam = 1.0
    for round_index in range(max_rounds):
        step /= 2.0**round_index
        lam, history = 1.0, []
        for index in range(num_iters):
            weight_PK = softmax((reward_PK + (utility_PK - threshold) * lam) / beta, axis=1)
            gradient = float(np.sum(weight_PK * (utility_PK - threshold), axis=1).mean())
            lam = max(lam - step * gradient, 0.0)
            history.append(lam)
            total += 1
            if index >= 10 and max(abs(lam - past) for past in history[-5:]) < tolerance:
                return Descent(lam, lam, total, round_index + 1)
    return Descent(None, lam, total, max_rounds)


@dataclass(frozen=True)
class Comparison:
    """The authors' λ beside the exact λ* on one table.

    Attributes:
        name: the constraint.
        lam: λ of the published descent, reward units per utility unit.
        kkt_residual: its violation of the optimality conditions, in the unit of ``exact.kkt_residual``.
        num_steps: its gradient steps over all rounds.
        num_rounds: its rounds.
        exact: our solution, with the threshold in it.
    """

    name: str
    lam: float
    kkt_residual: float
    num_steps: int
    num_rounds: int
    exact: DualSolution

    @property
    def difference(self) -> float:
        """Published λ minus λ*."""
        return self.lam - self.exact.lam[self.name]

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values."""
        published = {
            "lam": {self.name: self.lam},
            "kkt_residual": self.kkt_residual,
            "num_steps": self.num_steps,
            "num_rounds": self.num_rounds,
            "difference": {self.name: self.difference},
        }
        return {"published": published, "exact": self.exact.to_dict()}


def solve_as_published(table: ScoreTable, *, beta: float, constraints: Sequence[Margin]) -> Comparison:
    """Solve for λ by the authors' rules and exactly, on a table of any number of responses per prompt.

    Raises:
        ConfigError: anything but one constraint with a threshold, reference weights, or a β that cannot mean anything.
        InfeasibleConstraint: no policy on the table reaches the threshold (the exact solver is asked first).
        NumericalError: the published descent gave up; the message has the exact λ*.
    """
    if len(constraints) != 1 or constraints[0].threshold is None or constraints[0].equal:
        raise ConfigError(
            "the published solver takes one constraint, an absolute level that the mean score must reach; found "
            f"{', '.join(map(_demand, constraints)) or 'none'}. Give one threshold (threshold = margin + reference "
            "mean)."
        )
    if table.weighted:
        raise ConfigError("the published solver has no reference weights; leave log_weight out.")
    constraint = constraints[0]
    threshold = float(constraint.threshold or 0.0)
    exact = solve_table(table, beta=beta, constraints=constraints, estimator="empirical")
    reward_PK, utility_PK = _rectangle(table)
    found = published_pgd(reward_PK, utility_PK, threshold, beta)
    if found.lam is None:
        raise NumericalError(
            f"the published projected gradient descent gave up on {constraint.name}: no convergence in "
            f"{found.num_rounds} rounds of steps 4 and smaller ({found.num_steps} gradient steps; it stood at lambda = "
            f"{found.last_lam:.6g}). The exact solver has lambda* = {exact.lam[constraint.name]:.6g}, KKT residual "
            f"{exact.kkt_residual:.1e}."
        )
    residual = _residual(table, found.lam, beta, exact.margin[constraint.name])
    return Comparison(constraint.name, found.lam, residual, found.num_steps, found.num_rounds, exact)


def _demand(constraint: Margin) -> str:
    kind, value = ("margin", constraint.margin) if constraint.threshold is None else ("threshold", constraint.threshold)
    return f"{constraint.name} with {'an exact ' if constraint.equal else ''}{kind} {value:.6g}"


def _rectangle(table: ScoreTable) -> tuple[FloatArray, FloatArray]:
    """Return reward and raw utility as (P, K); responses that a prompt does not have get reward −∞."""
    shape = table.num_prompts, int(table.num_responses_P.max())
    reward_PK, utility_PK = np.full(shape, -np.inf), np.zeros(shape)
    place = table.row_prompt_N, np.arange(table.num_rows) - table.start_P[table.row_prompt_N]
    reward_PK[place] = table.reward_N
    utility_PK[place] = table.utility_JN[0] + table.spread(table.mean_utility_JP[0])
    return reward_PK, utility_PK


def _residual(table: ScoreTable, lam: float, beta: float, margin: float) -> float:
    """Return the KKT residual in the solver's unit: the power of two next above the within-prompt deviation."""
    slack = float(predict(table, [lam], beta, [margin]).slack_J[0])
    spread = table.within_sd(table.utility_JN[0])
    scale = math.ldexp(1.0, math.frexp(spread)[1]) if spread > 0 else 1.0
    return max(abs(slack) if lam > 0 else -slack, 0.0) / scale


def comparison_text(found: Comparison) -> str:
    """Return the authors' λ beside the exact λ*, then the exact solution."""
    exact = found.exact
    lam = exact.lam[found.name]
    relative = f", {abs(found.difference) / lam:.1e} of lambda*" if lam > 0 else ""
    rounds = f"{found.num_rounds} round{'s' * (found.num_rounds > 1)}"
    return "\n".join(
        [
            f"threshold {exact.threshold[found.name]:.6g} on {found.name}, the absolute level of the published code: "
            f"margin {exact.margin[found.name]:.6g} over the reference mean {exact.centre[found.name]:.6g}",
            f"published lambda  {found.lam:.9g}, KKT residual {found.kkt_residual:.1e} "
            f"({found.num_steps} steps of projected gradient descent in {rounds})",
            f"exact     lambda* {lam:.9g}, KKT residual {exact.kkt_residual:.1e} ({exact.num_steps} Newton steps)",
            f"difference {found.difference:+.1e}{relative}",
            solution_text(exact),
        ]
    )


def main() -> None:
    """Solve one table by both, and print λ and KKT residuals beside each other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scores", type=Path, required=True, help="a table with prompt_id")
    parser.add_argument("--reward", required=True, help="column of the reward")
    parser.add_argument("--constraint", required=True, help="column of the utility")
    parser.add_argument("--threshold", type=float, required=True, help="absolute level of its mean")
    parser.add_argument("--beta", type=float, required=True, help="KL weight")
    options = parser.parse_args()
    arrays = read_scores(options.scores, options.reward, [options.constraint])
    table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=[options.constraint])
    demand = [Margin(options.constraint, threshold=options.threshold)]
    print(comparison_text(solve_as_published(table, beta=options.beta, constraints=demand)))


if __name__ == "__main__":
    main()
