"""What a rank is told: everything that it needs, JSON-safe, the same on all ranks."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from can_dist.config import Model
from can_dist.config.sections import Train
from can_dist.dual import Column, Demand


class Steering(BaseModel):
    """How λ moves within a training, by the policy's estimated gains Ĝ.

    Attributes:
        steps: Optimizer steps after which it moves: λ ← [λ + step · H⁻¹(b − Ĝ)]₊.
        step: Share of the whole step.
        hessian_JJ: H, utility units squared per reward unit.
    """

    model_config = ConfigDict(frozen=True)

    steps: tuple[int, ...]
    step: float
    hessian_JJ: tuple[tuple[float, ...], ...]


class WatchSpec(BaseModel):
    """What the policy of a training is watched by: the reference's scored responses to validation prompts.

    Attributes:
        scores: Their artifact of scores, with ln π_ref.
        reward: Name of the score r.
        columns: What the constraints are on, in the order of ``lam``.
        log_weight: Column of log-weights of responses that list all that the reference can say, or None.
        lam: λ by constraint, by which the preferences are labelled.
        demands: What the constraints ask, in the order of ``lam``.
        steering: How λ moves; None: it stays.
        stop_every: Steps between the evaluations that end a training which is flat; None: it is not ended by them.
    """

    model_config = ConfigDict(frozen=True)

    scores: Path
    reward: str
    columns: tuple[Column, ...]
    log_weight: str | None
    lam: dict[str, float]
    demands: tuple[Demand, ...]
    steering: Steering | None
    stop_every: int | None = None


class TrainSpec(BaseModel):
    """Everything a rank needs.

    Attributes:
        directory: Of the training.
        preferences: The artifact of its examples.
        reference: The log-ratios are relative to it.
        start: The weights to start from; those of the reference unless a trained policy is trained further.
        train: The options.
        beta: KL weight β.
        seed: Root of the order of the examples and of dropout.
        precision: 'bf16' or 'fp32'.
        watch: What the policy is watched by; None where no responses are held out for it.
        hang_timeout_s: Seconds without a sign of life after which a rank is taken to hang.
    """

    model_config = ConfigDict(frozen=True)

    directory: Path
    preferences: Path
    reference: Model
    start: Model
    train: Train
    beta: float
    seed: int
    precision: str
    watch: WatchSpec | None = None
    hang_timeout_s: float = 1800.0
