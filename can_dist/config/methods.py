"""What each method has of its own in a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from can_dist.config.base import Strict, changed
from can_dist.config.sources import DataSource


class Human(Strict):
    """How the preferences that a data set brings are learned."""

    loss: Literal["dpo", "kto"] = Field(
        "dpo", description="dpo: compares the two responses of a pair; kto: each response is good or bad by itself."
    )
    smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="dpo: share ε of the labels taken to be wrong; the targets are 1 − ε and ε."
    )
    on_conflict: Literal["keep", "drop", "fail"] = Field(
        "keep", description="What to do with pairs whose safer response is flagged unsafe and the other one safe."
    )
    safe_flags: bool = Field(
        True, description="kto on safety: good is what is flagged safe; false: the safer response of its pair."
    )
    desirable_weight: float = Field(1.0, gt=0, description="kto: weight of a good response.")
    undesirable_weight: float | None = Field(
        None, gt=0, description="kto: weight of a bad response; default: both kinds weigh the same in all."
    )

    @model_validator(mode="after")
    def _keys_of_its_loss(self) -> Human:
        others = {"dpo": ("safe_flags", "desirable_weight", "undesirable_weight"), "kto": ("smoothing",)}[self.loss]
        if unused := changed(self, others):
            raise ValueError(f"loss {self.loss!r} does not use {', '.join(unused)}; leave out")
        return self


class Step(Human):
    """One of SACPO's alignments, when it follows people."""

    preferences: DataSource | None = Field(
        None, description="The data set whose labels this step learns; default: label.preferences."
    )


class Sacpo(Strict):
    """Two alignments, one after the other (methods sacpo, p_sacpo)."""

    order: Literal["helpful_first", "safe_first"] = Field(
        "helpful_first", description="What the first alignment follows; the second one follows the other."
    )
    labels_from: Literal["people", "scores"] = Field(
        "people", description="people: a data set's own labels; scores: P(a ≻ b) = σ(Δ) of the reward, of the safety."
    )
    first: Step = Field(default_factory=lambda: Step(), description="How people's labels are learned first.")
    second: Step = Field(default_factory=lambda: Step(), description="How people's labels are learned second.")
    beta_over_lambda: float = Field(
        0.025, gt=0, description="β/λ, the KL weight of the safety alignment; smaller is safer."
    )

    @model_validator(mode="after")
    def _people_only(self) -> Sacpo:
        if self.labels_from == "scores" and (unused := changed(self, ["first", "second"])):
            raise ValueError(f"labels_from 'scores' does not use {', '.join(unused)}; leave out")
        return self


class PSacpo(Strict):
    """Mixtures of SACPO's two policies (method p_sacpo)."""

    q: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.25, 0.5, 0.75), min_length=1, description="Weights of the safe policy; each gives a policy of its own."
    )

    @model_validator(mode="after")
    def _each_once(self) -> PSacpo:
        if len(set(self.q)) < len(self.q):
            raise ValueError("q names a weight twice")
        return self


StepSize = Annotated[float, Field(gt=0)] | Literal["1/H"]


class Cdpo(Strict):
    """The dual ascent around whole trainings (method cdpo)."""

    rounds: int = Field(5, ge=1, description="Most trainings; fewer when the safety settles before.")
    step_size: StepSize = Field(
        "1/H", description="η of λ ← [λ − η·slack]_+; 1/H: from the curvature of the table's dual at its λ*."
    )
    warm_start: bool = Field(False, description="Start at the table's λ* instead of 0.")
    tolerance: float = Field(0.0, ge=0, description="Stop when every measured slack is within this, in score units.")
    standard_errors: float = Field(1.0, ge=0, description="Stop when within so many standard errors of the slack.")


class Caid(Strict):
    """Feedback after the one-shot policy (method caid)."""

    rounds: int = Field(1, ge=1, description="Feedback steps, each with a measurement and a short training.")
    step_size: StepSize = Field(
        "1/H", description="η of λ ← [λ − η·slack]_+; 1/H: from the curvature of the table's dual at its λ*."
    )
    epochs: int = Field(1, ge=1, description="Passes over the examples in each feedback step.")


SECTIONS = {"sacpo": ("sacpo",), "p_sacpo": ("sacpo", "p_sacpo"), "cdpo": ("cdpo",), "caid": ("caid",)}
"""The sections of its own that a method reads."""
