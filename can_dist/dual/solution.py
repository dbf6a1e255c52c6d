"""What a solve is asked and what it returns: margins, the status whose members are the messages, the solution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypedDict

import numpy as np

from can_dist.dual.table import FloatArray
from can_dist.errors import ConfigError, DataError


class Status(Enum):
    """How a solve ended; the value says it in words."""

    OPTIMAL = "solved: the optimality conditions hold to the tolerance."
    INFEASIBLE = "infeasible: no policy supported on the score table meets the constraints."
    BOUNDARY = "boundary: the constraints are met only in the limit of infinite lambda, by the best responses alone."
    MAX_STEPS = "not converged: the steps ran out, or rounding stopped them, before the tolerance was reached."
    NONFINITE = "not finite: the dual left the finite numbers; the scores are too large for beta."


@dataclass(frozen=True)
class Margin:
    """One constraint: E_π g − E_{π_ref} g ≥ margin, or E_π g ≥ threshold. Exactly one of the two is given.

    Attributes:
        name: name of the utility column, for the solution and for messages.
        margin: b, improvement over the reference, utility units.
        threshold: τ, absolute level, utility units; b = τ − ḡ.
        equal: meet it exactly, not at least: its multiplier may have either sign.

    Raises:
        ConfigError: neither or both given, a value that is not finite, or an empty name.

    >>> Margin("safety", margin=0.5)  # improve by at least half a unit over the reference
    Margin(name='safety', margin=0.5, threshold=None, equal=False)
    >>> Margin("safety", threshold=0.0).threshold  # reach a mean of zero
    0.0
    """

    name: str
    margin: float | None = None
    threshold: float | None = None
    equal: bool = False

    def turned(self, sign: float) -> Margin:
        """Return the constraint on sign · g."""
        margin = None if self.margin is None else sign * self.margin
        threshold = None if self.threshold is None else sign * self.threshold
        return replace(self, margin=margin, threshold=threshold)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ConfigError(f"constraint name: found {self.name!r}, expected text; name the utility column.")
        if (self.margin is None) == (self.threshold is None):
            given = "neither" if self.margin is None else f"margin {self.margin} and threshold {self.threshold}"
            raise ConfigError(
                f"constraints.{self.name}: found {given}, expected one of them; give margin (improvement over the "
                "reference) or threshold (absolute level)."
            )
        kind, value = ("margin", self.margin) if self.threshold is None else ("threshold", self.threshold)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not math.isfinite(value):
            raise ConfigError(f"constraints.{self.name}.{kind}: found {value!r}, expected a finite number; correct it.")


class Mean(TypedDict):
    """A predicted mean and its standard error over prompts."""

    mean: float
    se: float


class Predicted(TypedDict):
    """What π_λ does on the table that gave λ: means over prompts, raw units; KL in nats."""

    reward: float
    reward_improvement: float
    reward_improvement_se: float
    improvement: dict[str, Mean]
    kl: float
    objective: float


class FeasibilityReport(TypedDict):
    """t*, the certificate v and the attainable margin of each constraint, raw units."""

    t_star: float
    certificate: dict[str, float]
    attainable: dict[str, float]


class Delivered(TypedDict):
    """Mean of a utility under π_λ on new prompts: interval, and ``bias``, the part of each arm for the finite K."""

    mean: float
    se: float
    low: float
    high: float
    bias: float


class Judgement(TypedDict):
    """What a table can vouch for (``dual.belief.trust``), by constraint; ``objection``: why it cannot.

    ``kl`` is KL(π_λ‖π_ref) in nats, corrected for the finite K.

    ``lam_error`` is relative to λ, and ``lam_bias``, in the units of λ, the part of it for the finite K; ``delivered``
    is the improvement, or the mean where ``level`` (a threshold).
    """

    objection: str
    delivered: dict[str, Delivered]
    level: dict[str, bool]
    kl: Delivered
    lam_error: dict[str, float]
    lam_bias: dict[str, float]
    lam_known: bool
    ess: dict[str, float]
    carriers: dict[str, float]
    shape: float
    num_flat: int


class Summary(TypedDict):
    """The table and its weights at λ in numbers; ``verdict`` says in words what may be believed."""

    num_prompts: int
    num_responses: int
    num_single_response_prompts: int
    responses_per_prompt: dict[str, float]
    ess: dict[str, float]
    kl_over_log_k: float
    sd_over_beta: float
    verdict: str


class Diagnostics(Summary, total=False):
    """What the table can support; no ``judgement`` where responses are no samples, or a streamed table's."""

    judgement: Judgement


@dataclass(frozen=True)
class DualSolution:
    """λ* and everything a reader needs to judge it. Numbers that do not exist are NaN (null in JSON).

    Attributes:
        status: how the solve ended.
        lam: λ* by constraint, reward units per utility unit; NaN unless a finite λ was reached.
        lam_se: sandwich standard error of λ* (docs/estimators.md, 7); NaN at the bound λ = 0.
        value: D(λ*), reward units.
        slack: ∇D(λ*) = predicted improvement − margin.
        centre: ḡ, the mean of each utility under the reference.
        margin: b, as solved for.
        threshold: τ where the constraint was given so, else None.
        beta: KL weight.
        kkt_residual: violation of the optimality conditions, each slack divided by the power of two next above the
            within-prompt standard deviation of its utility.
        num_steps: Newton steps taken.
        predicted: what π_λ* does on this table (in sample: the improvement of an active constraint is its margin).
        feasibility: whether and by how much the margins can be met.
        diagnostics: whether to trust the prediction.
        estimator: which estimator gave λ* (``auto`` is replaced by what it chose).
        estimator_reason: why ``auto`` did not take the jackknife; empty otherwise.
        lam_paper: λ of the paper's estimator (``empirical``) at the same margins; empty in solutions of older versions.
        confidence: with which each margin is met, all of them jointly; None where they are met in expectation.
        safety_margin: what was added to each margin for that confidence, included in ``margin``.

    >>> from can_dist import solve_dual
    >>> table = {"prompt_id": ["a", "a"], "reward": [1.0, 0.0], "safety": [0.0, 1.0]}
    >>> solution = solve_dual(table, beta=1.0, constraints=[Margin("safety", margin=0.25)], estimator="empirical")
    >>> round(solution.lam["safety"], 6)  # ln 3 + 1: three quarters of the weight on the safe response
    2.098612
    >>> solution.status.name, DualSolution.from_dict(solution.to_dict()).lam == solution.lam
    ('OPTIMAL', True)
    """

    status: Status
    lam: dict[str, float]
    lam_se: dict[str, float]
    value: float
    slack: dict[str, float]
    centre: dict[str, float]
    margin: dict[str, float]
    threshold: dict[str, float | None]
    beta: float
    kkt_residual: float
    num_steps: int
    predicted: Predicted
    feasibility: FeasibilityReport
    diagnostics: Diagnostics
    estimator: str = "empirical"
    estimator_reason: str = ""
    lam_paper: dict[str, float] = field(default_factory=dict)
    confidence: float | None = None
    safety_margin: dict[str, float] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: λ*, margin, predicted improvement, verdict."""
        from can_dist.dual.face import solution_html

        return solution_html(self.to_dict())

    @property
    def lam_vector(self) -> FloatArray:
        """λ* as an array, in the order of the constraints."""
        return np.array(list(self.lam.values()), dtype=np.float64)

    @property
    def margin_vector(self) -> FloatArray:
        """The margins b as an array, in the order of the constraints."""
        return np.array(list(self.margin.values()), dtype=np.float64)

    def turned(self, sign_J: FloatArray, threshold_J: Sequence[float | None]) -> DualSolution:
        """Return the solution for the utilities before each was multiplied by its sign, as in ``threshold_J``."""

        def back(values: Mapping[str, float]) -> dict[str, float]:
            return {name: sign * value for (name, value), sign in zip(values.items(), sign_J.tolist(), strict=True)}

        gains = self.predicted["improvement"]
        means = back({name: gain["mean"] for name, gain in gains.items()})
        predicted = self.predicted | {
            "improvement": {name: {"mean": means[name], "se": gain["se"]} for name, gain in gains.items()}
        }
        feasibility = self.feasibility | {
            "certificate": back(self.feasibility["certificate"]),
            "attainable": back(self.feasibility["attainable"]),
        }
        return replace(
            self,
            lam=back(self.lam),
            lam_paper=back(self.lam_paper),
            slack=back(self.slack),
            centre=back(self.centre),
            margin=back(self.margin),
            threshold=dict(zip(self.threshold, threshold_J, strict=True)),
            predicted=predicted,
            feasibility=feasibility,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain, JSON-safe values: the status by name, null for what is not a finite number."""
        record = {item.name: json_safe(getattr(self, item.name)) for item in fields(self)}
        return record | {"status": self.status.name, "message": self.status.value}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> DualSolution:
        """Rebuild a solution from :meth:`to_dict`, null becoming NaN (except in ``threshold`` and ``confidence``).

        Raises:
            DataError: a field is missing or the status is unknown.
        """
        needed = [item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
        missing = [name for name in needed if name not in record]
        if missing:
            raise DataError(f"dual solution: fields missing: {', '.join(missing)}; solve again to write a whole one.")
        if record["status"] not in Status.__members__:
            known = ", ".join(Status.__members__)
            raise DataError(f"dual solution: status {record['status']!r} is unknown, expected one of {known}.")
        values = {item.name: with_nan(record[item.name]) for item in fields(cls) if item.name in record}
        values["status"] = Status[record["status"]]
        values["threshold"] = dict(record["threshold"])
        values["confidence"] = record.get("confidence")
        return cls(**values)


def json_safe(value: Any) -> Any:
    """Return the value with every number that is not finite as None, in mappings too."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def with_nan(value: Any) -> Any:
    """Undo :func:`json_safe`: None becomes NaN."""
    if isinstance(value, Mapping):
        return {key: with_nan(item) for key, item in value.items()}
    return math.nan if value is None else value
