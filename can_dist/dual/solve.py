"""The exact dual of constrained alignment on a table of scores: λ* = argmin_{λ≥0} D(λ) (docs/dual.md, 2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from can_dist.dual import messages
from can_dist.dual.belief.choice import choose
from can_dist.dual.belief.trust import judge
from can_dist.dual.columns import Scores
from can_dist.dual.estimators import check_estimator, estimate, prediction_from, with_level
from can_dist.dual.feasibility import Feasibility
from can_dist.dual.frame import Frame, score_table
from can_dist.dual.predict import Prediction, check_beta, lambda_standard_error, predict
from can_dist.dual.problem import Outcome, Problem
from can_dist.dual.solution import Diagnostics, DualSolution, Margin, Predicted, Status
from can_dist.dual.table import FloatArray
from can_dist.dual.weights import turned_diagnostics, weight_diagnostics
from can_dist.errors import ConfigError, InfeasibleConstraint, NumericalError

_MAX_RAISES = 40


def solve_dual(
    reward_N: npt.ArrayLike | Frame,
    utility_NJ: npt.ArrayLike | None = None,
    prompt_N: npt.ArrayLike | None = None,
    *,
    beta: float,
    constraints: Sequence[Margin],
    reward: str = "reward",
    prompt: str = "prompt_id",
    log_weight_N: npt.ArrayLike | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-8,
    throw: bool = True,
    estimator: str = "auto",
    confidence: float | None = None,
) -> DualSolution:
    """Solve max_π E[r − β KL(π‖π_ref)] subject to E_π g_j − E_{π_ref} g_j ≥ b_j through its dual.

    Takes a table with named columns, a constraint's utility in the column of its name, or the three arrays.

    Args:
        reward_N: r(x,y) of each response, higher is better; or the table (pandas, polars, pyarrow, a dict of arrays).
        utility_NJ: g_j(x,y), higher is better, one column per constraint in their order.
        prompt_N: prompt id of each row, strings or integers; rows in any order, any number of responses per prompt.
        beta: KL weight β > 0, reward units per nat.
        constraints: the J constraints; none is allowed and gives the unconstrained prediction. One with ``equal``
            is met exactly, with a multiplier of either sign.
        reward: column of the table that holds r.
        prompt: column of the table that holds the prompt ids.
        log_weight_N: ln of each response's weight under π_ref within its prompt, up to a constant; uniform if absent.
        max_steps: most Newton steps.
        tolerance: largest KKT residual, in within-prompt standard deviations of each utility.
        throw: raise where no finite λ* was reached; otherwise return a solution whose status says why.
        estimator: ``auto``: the jackknife, and the paper's where that has no solution; or by name ``empirical`` (the
            paper's: the softmax weights over the table), ``jackknife``, ``gaussian`` (both remove the bias of a finite
            K, see :mod:`can_dist.dual.estimators`). All ask first whether the margins can be met on the table itself.
        confidence: meet every margin with this joint confidence over the draw of the prompts: each margin is raised
            to the fixed point b + z·SE of its improvement (Bonferroni over constraints). None meets them in the mean.

    Returns:
        λ* in raw score units, its standard error, predictions, feasibility and diagnostics.

    Raises:
        ConfigError: shapes, names, β, max_steps or tolerance that cannot mean anything (whatever ``throw``).
        DataError: no rows, or scores that are not finite (whatever ``throw``).
        InfeasibleConstraint: no policy on the table meets the margins, or only the limit λ → ∞ does.
        NumericalError: steps exhausted, or overflow.

    Examples:
        Two responses to each of two prompts; safety costs reward on the first prompt only.

        >>> scores = {
        ...     "prompt_id": ["a", "a", "b", "b"],
        ...     "reward": [1.0, 0.0, 0.5, 0.0],
        ...     "safety": [0.0, 1.0, 1.0, 0.0],
        ... }
        >>> solution = solve_dual(scores, beta=1.0, constraints=[Margin("safety", margin=0.2)])
        >>> round(solution.lam["safety"], 4)
        0.714
        >>> round(solution.predicted["improvement"]["safety"]["mean"], 4)
        0.2
    """
    names = _names(constraints)
    table = score_table(reward_N, utility_NJ, prompt_N, log_weight_N, names=names, reward=reward, prompt=prompt)
    return solve_table(
        table,
        beta=beta,
        constraints=constraints,
        max_steps=max_steps,
        tolerance=tolerance,
        throw=throw,
        estimator=estimator,
        confidence=confidence,
    )


def solve_table(
    table: Scores,
    *,
    beta: float,
    constraints: Sequence[Margin],
    max_steps: int = 100,
    tolerance: float = 1e-8,
    throw: bool = True,
    estimator: str = "auto",
    confidence: float | None = None,
) -> DualSolution:
    """Solve on a table already grouped, or on columns of any size; the rest as in :func:`solve_dual`.

    :class:`~can_dist.dual.columns.ColumnScores` take every estimator but ``gaussian``.
    """
    names = _names(constraints)
    check_beta(beta)
    if len(names) != table.num_constraints:
        raise ConfigError(f"constraints: {len(names)} given for a table of {table.num_constraints} utilities.")
    if max_steps < 1 or not tolerance > 0:
        raise ConfigError(f"max_steps = {max_steps}, tolerance = {tolerance}: expected at least 1 and above 0.")
    check_estimator(estimator, table)
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ConfigError(f"confidence = {confidence}: expected at least 0.5 and below 1, or none.")
    request = _Request(table, float(beta), tuple(constraints), max_steps, tolerance, estimator)
    if any(constraint.equal for constraint in constraints):
        if confidence is not None:
            raise ConfigError("confidence: an equality has no safe side to move to; leave confidence or equal out.")
        return _solve_equalities(request, throw)
    margin = margins(table, constraints)
    outcome = request.solve(margin)
    if confidence is not None and names:
        margin, outcome = _raise_margins(request, margin, outcome, confidence)
    if throw:
        _raise(outcome, request, margin)
    return _report(outcome, request, margin, confidence)


@dataclass(frozen=True)
class _Request:
    """What stays the same while margins move."""

    table: Scores
    beta: float
    constraints: tuple[Margin, ...]
    max_steps: int
    tolerance: float
    estimator: str

    @property
    def level_J(self) -> FloatArray:
        """1 where the constraint is an absolute level, whose ḡ is estimated from the same prompts."""
        return np.array([float(c.threshold is not None) for c in self.constraints])

    def solve(self, margin_J: FloatArray) -> Outcome:
        """Solve on the table, then correct by the estimator."""
        problem = Problem.standardise(self.table, self.beta, margin_J)
        if problem is None:
            none_J = np.full(margin_J.size, math.nan)
            return Outcome(Status.NONFINITE, None, Feasibility(math.nan, none_J, none_J, math.nan, False))
        outcome = problem.solve(self.max_steps, self.tolerance)
        if self.estimator == "empirical" or outcome.status is not Status.OPTIMAL or outcome.point is None:
            return outcome
        start_J = outcome.point.lam_J
        if self.estimator == "auto":
            chosen, reason = choose(self.table, self.beta, margin_J, start_J, self.level_J)
            return replace(outcome, corrected=chosen, reason=reason)
        corrected = estimate(self.table, self.beta, margin_J, self.estimator, start_J, self.level_J)
        return replace(outcome, corrected=corrected, status=Status.OPTIMAL if corrected.converged else Status.MAX_STEPS)

    def prediction(self, outcome: Outcome, margin_J: FloatArray) -> Prediction | None:
        """Predict with the estimator that gave λ; None where there is no λ."""
        if outcome.corrected is not None:
            corrected = outcome.corrected
            return prediction_from(self.table, corrected.moments, self.beta, margin_J) if corrected.converged else None
        return None if outcome.point is None else predict(self.table, outcome.point.lam_J, self.beta, margin_J)


def _solve_equalities(request: _Request, throw: bool) -> DualSolution:
    """Solve with multipliers of free sign for the equalities, orthant by orthant.

    In one orthant every multiplier is ≥ 0 after the sign of its utility. Where an equality stops at λ_j = 0 with slack
    above zero, D falls across that face, so its sign is turned and the solve repeated; D decreases each time, so no
    orthant comes twice, and at the end ∇_jD = 0 for every equality.
    """
    equal_J = np.array([constraint.equal for constraint in request.constraints])
    spread_J = request.table.spread_J
    sign_J = np.ones(equal_J.size)
    for _ in range(2**equal_J.size + 1):
        solution = solve_table(
            request.table.signed(sign_J),
            beta=request.beta,
            constraints=[
                replace(c.turned(sign), equal=False) for c, sign in zip(request.constraints, sign_J, strict=True)
            ],
            max_steps=request.max_steps,
            tolerance=request.tolerance,
            throw=False,
            estimator=request.estimator,
        )
        if solution.status is not Status.OPTIMAL:
            break
        slack_J = np.array(list(solution.slack.values()))
        turn = equal_J & (solution.lam_vector == 0) & (slack_J > request.tolerance * spread_J)
        if not turn.any():
            break
        sign_J[np.flatnonzero(turn)[0]] *= -1
    if throw and solution.status is not Status.OPTIMAL:
        ends = [request.table.signed(sign * np.ones(equal_J.size)).attainable_J * sign for sign in (-1.0, 1.0)]
        margin_J = margins(request.table, request.constraints)
        text = messages.equality_message(solution.status, request.constraints, margin_J, ends[0], ends[1])
        infeasible = solution.status in (Status.INFEASIBLE, Status.BOUNDARY)
        raise (InfeasibleConstraint if infeasible else NumericalError)(text)
    sign = dict(zip(solution.lam, sign_J.tolist(), strict=True))
    turned = solution.turned(sign_J, [constraint.threshold for constraint in request.constraints])
    return replace(turned, diagnostics=turned_diagnostics(solution.diagnostics, sign))


def _raise_margins(
    request: _Request, margin_J: FloatArray, outcome: Outcome, confidence: float
) -> tuple[FloatArray, Outcome]:
    """Iterate b ← b₀ + z·SE(improvement at λ(b)) until it moves by less than a thousandth of the SE (section 2)."""
    quantile = float(ndtri(1 - (1 - confidence) / margin_J.size))
    raised_J = margin_J
    for _ in range(_MAX_RAISES):
        prediction = request.prediction(outcome, raised_J)
        if outcome.status is not Status.OPTIMAL or prediction is None:
            return raised_J, outcome
        if request.table.num_prompts < 2:
            raise ConfigError("confidence: one prompt has no standard error; score more prompts or leave it out.")
        slack_PJ = with_level(request.table, prediction.slack_PJ, request.level_J)
        error_J = slack_PJ.std(axis=0, ddof=1) / math.sqrt(request.table.num_prompts)
        following_J = margin_J + quantile * error_J
        settled = np.all(np.abs(following_J - raised_J) <= 1e-3 * error_J)
        if settled and np.all(raised_J >= margin_J):
            return raised_J, outcome
        raised_J = following_J
        outcome = request.solve(raised_J)
    return raised_J, replace(outcome, status=Status.MAX_STEPS)


def _names(constraints: Sequence[Margin]) -> list[str]:
    names = [constraint.name for constraint in constraints]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"constraints: name {repeated[0]!r} is given twice; every constraint needs its own name.")
    return names


def margins(table: Scores, constraints: Sequence[Margin]) -> FloatArray:
    """Return b_j, shape (J,); a threshold τ means b = τ − ḡ of this table."""
    values = []
    for constraint, centre in zip(constraints, table.centre_J, strict=True):
        if constraint.threshold is not None:
            values.append(float(constraint.threshold) - float(centre))
        elif constraint.margin is not None:
            values.append(float(constraint.margin))
    return np.array(values, dtype=np.float64)


def _raise(outcome: Outcome, request: _Request, margin_J: FloatArray) -> None:
    table = request.table
    if outcome.status in (Status.INFEASIBLE, Status.BOUNDARY):
        spread = np.maximum(table.spread_J, 1e-200)
        say = messages.infeasible_message if outcome.status is Status.INFEASIBLE else messages.boundary_message
        raised_J = margin_J - margins(table, request.constraints)
        raise InfeasibleConstraint(say(table, request.constraints, margin_J, outcome.feasibility, spread, raised_J))
    if outcome.status is Status.NONFINITE:
        raise NumericalError(messages.nonfinite_message(table.peak, request.beta))
    if outcome.status is Status.MAX_STEPS and outcome.corrected is not None:
        raise NumericalError(messages.estimator_message(outcome.corrected))
    if outcome.status is Status.MAX_STEPS and outcome.point is not None:
        raise NumericalError(messages.max_steps_message(outcome.point, request.max_steps, request.tolerance))


def _report(outcome: Outcome, request: _Request, margin_J: FloatArray, confidence: float | None) -> DualSolution:
    table, constraints = request.table, request.constraints
    names = [constraint.name for constraint in constraints]
    none_J = np.full(len(names), math.nan)
    point, corrected, feasibility = outcome.point, outcome.corrected, outcome.feasibility
    prediction = request.prediction(outcome, margin_J)
    lam_J = error_J = none_J
    value = residual = math.nan
    steps = 0
    if point is not None:
        lam_J, value, residual, steps = point.lam_J, point.at.value, point.residual, point.num_steps
    if corrected is not None:
        lam_J, error_J = corrected.lam_J, corrected.lam_se_J
        log_norm = float(corrected.moments.log_norm_P.mean())
        value = request.beta * log_norm + table.mean_reward - float(lam_J @ margin_J)
        residual, steps = corrected.residual, steps + corrected.num_steps
    elif point is not None and prediction is not None:
        slack_PJ = with_level(table, prediction.slack_PJ, request.level_J)
        error_J = lambda_standard_error(slack_PJ, point.at.hessian_JJ, lam_J)

    def by_name(values: npt.ArrayLike) -> dict[str, float]:
        return dict(zip(names, np.asarray(values, dtype=np.float64).tolist(), strict=True))

    return DualSolution(
        status=outcome.status,
        lam=by_name(lam_J),
        lam_se=by_name(error_J),
        value=value,
        slack=by_name(none_J if prediction is None else prediction.slack_J),
        centre=by_name(table.centre_J),
        margin=by_name(margin_J),
        threshold={c.name: None if c.threshold is None else float(c.threshold) for c in constraints},
        beta=request.beta,
        kkt_residual=residual,
        num_steps=steps,
        predicted=_predicted(prediction, names),
        feasibility={
            "t_star": feasibility.t_star,
            "certificate": by_name(feasibility.certificate_J),
            "attainable": by_name(feasibility.attainable_J),
        },
        diagnostics=_diagnostics(outcome, request, lam_J, margin_J, prediction),
        estimator=_estimator(outcome, request),
        estimator_reason=outcome.reason,
        lam_paper=by_name(none_J if point is None else point.lam_J),
        confidence=confidence,
        safety_margin=by_name(margin_J - margins(table, constraints)) if confidence is not None else {},
    )


def _estimator(outcome: Outcome, request: _Request) -> str:
    """Return the estimator that gave λ̂: ``auto`` is replaced by its choice."""
    if request.estimator != "auto":
        return request.estimator
    return "empirical" if outcome.corrected is None else outcome.corrected.estimator


def _diagnostics(
    outcome: Outcome, request: _Request, lam_J: FloatArray, margin_J: FloatArray, prediction: Prediction | None
) -> Diagnostics:
    """Summarise the weights, and judge λ̂ where the table's responses are samples."""
    table, names = request.table, [constraint.name for constraint in request.constraints]
    trust = None
    if prediction is not None and names and not table.weighted:
        used = outcome.corrected or estimate(table, request.beta, margin_J, "empirical", lam_J, request.level_J)
        trust = judge(table, request.beta, margin_J, used, request.level_J)
    levels = dict(zip(names, request.level_J, strict=True))
    return weight_diagnostics(table, lam_J, request.beta, prediction, trust, levels)


def _predicted(prediction: Prediction | None, names: list[str]) -> Predicted:
    if prediction is None:
        return {
            "reward": math.nan,
            "reward_improvement": math.nan,
            "reward_improvement_se": math.nan,
            "improvement": {name: {"mean": math.nan, "se": math.nan} for name in names},
            "kl": math.nan,
            "objective": math.nan,
        }
    pairs = zip(names, prediction.improvement_J.tolist(), prediction.improvement_se_J.tolist(), strict=True)
    return {
        "reward": prediction.reward,
        "reward_improvement": prediction.reward_improvement,
        "reward_improvement_se": prediction.reward_improvement_se,
        "improvement": {name: {"mean": mean, "se": se} for name, mean, se in pairs},
        "kl": prediction.kl,
        "objective": prediction.objective,
    }
