"""The methods, one row each, and the sections of a configuration that belong to one method.

A method's name stands here and in ``can_dist.algorithms``, which knows its function, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field, ValidationInfo, model_validator

from can_dist.config.base import Strict, changed
from can_dist.config.sources import DataSource
from can_dist.errors import ConfigError


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
    slack: Literal["generations", "estimate"] = Field(
        "generations",
        description="generations: measured on fresh responses to the training prompts; estimate: by the reference's "
        "responses to the validation prompts, without generating.",
    )
    within: bool = Field(
        False, description="Move λ between the epochs of one training, as the paper does; needs slack 'estimate'."
    )

    @model_validator(mode="after")
    def _nothing_is_generated_within(self) -> Caid:
        if self.within and self.slack != "estimate":
            raise ValueError("within one training nothing is generated; give slack 'estimate', or leave within out")
        return self


class PrimalDual(Strict):
    """The online loop on the policy and on λ (method primal_dual)."""

    rounds: int = Field(20, ge=1, description="Rounds: a step of λ, an epoch on samples of the policy, new samples.")
    step_size: StepSize = Field(
        "1/H", description="η of the step of λ; 1/H: from the curvature of the table's dual at its λ*."
    )
    form: Literal["linear", "log"] = Field(
        "linear", description="linear: λ ← [λ − η·slack]_+; log: ln λ ← ln λ − η·λ·slack, which keeps λ above 0."
    )
    start: float = Field(0.0, ge=0, description="λ before the first step, of every constraint; log needs one above 0.")
    epochs: int = Field(1, ge=1, description="Passes over the samples of a round.")

    @model_validator(mode="after")
    def _the_logarithm_of_nothing(self) -> PrimalDual:
        if self.form == "log" and self.start == 0:
            raise ValueError("form 'log' multiplies λ, and 0 stays 0; give a start above 0")
        return self


class SafeDpo(Strict):
    """Helpfulness among safe responses (method safedpo)."""

    offset: float = Field(
        0.0,
        ge=0,
        description="Δ: how far β times the log-ratio of a safe response is to be ahead of an unsafe one's; more of it "
        "gets rid of unsafe responses sooner.",
    )
    thresholds: dict[str, float] | None = Field(
        None,
        description="Least score of a safe response, by name of a constraint; default: the data set's own flags.",
    )

    @model_validator(mode="after")
    def _some_threshold(self) -> SafeDpo:
        if self.thresholds == {}:
            raise ValueError("thresholds names no constraint; name one, or leave out for the data set's own flags")
        return self


MethodName = Literal["mocan", "pecan", "dpo_h", "dpo_s", "safedpo", "sacpo", "p_sacpo", "cdpo", "caid", "primal_dual"]
Source = Literal["scores", "people"]
DEFAULT_METHOD: MethodName = "mocan"

FROM_SCORES = ("generate", "score", "solve", "label", "train", "strength", "evaluate")
FROM_PEOPLE = ("score", "label", "train", "evaluate")


@dataclass(frozen=True)
class Method:
    """The facts about a method that the rest of the program needs.

    Attributes:
        title: its name as the papers write it.
        learns_from: what its preferences are made from; a section ``sacpo`` may say otherwise.
        stages: the stages it can be stopped after.
        sections: the sections of the configuration that it has of its own.
        label_keys: the keys of ``label`` that no other method reads.
        trains_again: other stages lie between its trainings, so a launcher, which starts one stage, cannot run it.
        trains_from_trained: a later training starts from a policy that an earlier training made.
        mixes: its policies are mixtures of the helpful policy with the one trained from it.
        needs_ratios: its scorers are log-ratios of policies, which may be trained or calibrated for it.
        steers: its λ follows what the trained policies measured, so the dual predicts nothing of its policy.
        basis: a policy of each constraint's score alone can be trained beside its own, and mixed with it.
        one_shot: the method whose single training its loop of trainings is compared with.
    """

    title: str
    learns_from: Source = "scores"
    stages: tuple[str, ...] = FROM_SCORES
    sections: tuple[str, ...] = ()
    label_keys: tuple[str, ...] = ()
    trains_again: bool = False
    trains_from_trained: bool = False
    mixes: bool = False
    needs_ratios: bool = False
    steers: bool = False
    basis: bool = False
    one_shot: MethodName | None = None


METHODS: dict[str, Method] = {
    "mocan": Method("MoCAN", basis=True),
    "pecan": Method("PeCAN", label_keys=("as_published",), needs_ratios=True, basis=True),
    "dpo_h": Method("DPO-H", "people", FROM_PEOPLE),
    "dpo_s": Method("DPO-S", "people", FROM_PEOPLE),
    "safedpo": Method("SafeDPO", "people", FROM_PEOPLE, ("safedpo",)),
    "sacpo": Method("SACPO", "people", FROM_PEOPLE, ("sacpo",), trains_again=True, trains_from_trained=True),
    "p_sacpo": Method(
        "P-SACPO", "people", FROM_PEOPLE, ("sacpo", "p_sacpo"), trains_again=True, trains_from_trained=True, mixes=True
    ),
    "cdpo": Method("C-DPO", sections=("cdpo",), trains_again=True, steers=True, one_shot="mocan"),
    "caid": Method("CAID", sections=("caid",), trains_again=True, trains_from_trained=True, steers=True),
    "primal_dual": Method(
        "Primal–dual", sections=("primal_dual",), trains_again=True, trains_from_trained=True, steers=True
    ),
}
"""Every method, in the order of tables."""

assert get_args(MethodName) == tuple(METHODS), "MethodName and METHODS name other methods"

OWN_SECTIONS = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.sections))
"""The sections that belong to some method."""


def method_of(info: ValidationInfo) -> tuple[str, Method]:
    """Return the name and the row of the method that a configuration under validation names."""
    name = info.data.get("method", DEFAULT_METHOD)  # absent where it was refused itself
    return name, METHODS[name]


def check_stage(method: str, stage: str) -> None:
    """Raise ``ConfigError`` for a stage that a method does not have."""
    stages = METHODS[method].stages
    if stage not in stages:
        raise ConfigError(f"method {method} has no stage {stage!r}.", f"Its stages: {', '.join(stages)}.")
