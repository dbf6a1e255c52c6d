"""The whole configuration of a run, and what its sections demand of each other."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from can_dist.config.base import Strict, added, changed, runtime
from can_dist.config.cluster import Cluster
from can_dist.config.methods import (
    DEFAULT_METHOD,
    METHODS,
    OWN_SECTIONS,
    Caid,
    Cdpo,
    MethodName,
    PrimalDual,
    PSacpo,
    Sacpo,
    SafeDpo,
    Step,
    method_of,
)
from can_dist.config.scorers import LogRatio, Model, Scorer, check_learners, check_scorer
from can_dist.config.sections import (
    Constraint,
    Evaluate,
    Generate,
    Label,
    Prompts,
    Solve,
    Strength,
    StrengthChoice,
    Train,
)

NAME = re.compile(r"-?[A-Za-z][A-Za-z0-9_-]*")


class Config(Strict):
    """A whole run."""

    method: MethodName = Field(
        DEFAULT_METHOD,
        description="The algorithm; dpo_h, dpo_s: plain DPO on people's helpfulness or safety preferences.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Root of every random stream.")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on GPUs, fp32 on CPU.")
    pinned: bool = runtime(False, "Refuse hub models and data sets whose revision is no commit (40 hex digits).")
    beta: float = Field(0.1, gt=0, description="KL weight β, used by the dual and by DPO alike.")
    prompts: Prompts = Field(description="The prompts.")
    reference: Model = Field(description="The model to be aligned, π_ref.")
    reward: Scorer = Field(description="What measures helpfulness.")
    constraints: dict[str, Constraint] = Field(min_length=1, description="Safety constraints by name.")
    generate: Generate = Field(default_factory=lambda: Generate(), description="Sampling.")
    solve: Solve = Field(default_factory=lambda: Solve(), description="The dual.")
    safedpo: SafeDpo = Field(default_factory=lambda: SafeDpo(), description="SafeDPO's offset and flags.")
    sacpo: Sacpo = Field(default_factory=lambda: Sacpo(), validate_default=True, description="SACPO's two steps.")
    p_sacpo: PSacpo = Field(default_factory=lambda: PSacpo(), description="P-SACPO's mixtures.")
    cdpo: Cdpo = Field(default_factory=lambda: Cdpo(), description="C-DPO's loop.")
    caid: Caid = Field(default_factory=lambda: Caid(), description="CAID's feedback.")
    primal_dual: PrimalDual = Field(
        default_factory=lambda: PrimalDual(), validate_default=True, description="The online loop."
    )
    label: Label = Field(default_factory=lambda: Label(), validate_default=True, description="Preferences.")
    train: Train = Field(default_factory=lambda: Train(), validate_default=True, description="Fine-tuning.")
    strength: Strength = Field(
        default_factory=lambda: StrengthChoice(),
        validate_default=True,
        description="α of θ_ref + α(θ − θ_ref): chosen so that the margins are met, or a number; 1: as trained.",
    )
    basis: bool = added(
        False,
        "Train a policy of each constraint's score alone as well, and mix: every margin without another training.",
    )
    evaluate: Evaluate = Field(default_factory=lambda: Evaluate(), description="Evaluation.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="Resources.")
    methods: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Keys that differ for a method, by its name; for run --methods."
    )

    @field_validator("reward")
    @classmethod
    def _reward_fits(cls, reward: Scorer, info: ValidationInfo) -> Scorer:
        check_scorer(reward, *method_of(info))
        return reward

    @field_validator("constraints")
    @classmethod
    def _scorers_fit(cls, constraints: dict[str, Constraint], info: ValidationInfo) -> dict[str, Constraint]:
        for name, constraint in constraints.items():
            check_scorer(constraint.scorer, *method_of(info), f"{name}.scorer: ")
            for other, scorer in constraint.others.items():
                check_scorer(scorer, *method_of(info), f"{name}.others.{other}: ")
        return constraints

    @field_validator("constraints")
    @classmethod
    def _a_tail_has_its_tau(cls, constraints: dict[str, Constraint], info: ValidationInfo) -> dict[str, Constraint]:
        method, row = method_of(info)
        tails = [name for name, constraint in constraints.items() if constraint.of == "cvar"]
        if tails and row.steers:
            raise ValueError(
                f"{tails[0]}.of: method {method} moves λ by the mean of a score, and the tau of a CVaR would have to "
                "move with it; give of: mean or of: rectified, or set method to mocan"
            )
        return constraints

    @field_validator("constraints")
    @classmethod
    def _plain_names(cls, constraints: dict[str, Constraint]) -> dict[str, Constraint]:
        bad = [name for name in constraints if not NAME.fullmatch(name) or name in RESERVED_SCORE_NAMES]
        if bad:
            raise ValueError(
                f"constraint name {', '.join(map(repr, bad))}: expected a letter, then letters, digits, '_' or '-'; "
                f"'-' before it for a cost that should fall; and none of {', '.join(RESERVED_SCORE_NAMES)}"
            )
        if clash := [name for name, c in constraints.items() if name == "logp" and c.others]:
            raise ValueError(f"constraint name {clash[0]!r}: columns of log-probabilities begin so; give another name")
        if twice := [name for name in constraints if name.startswith("-") and name[1:] in constraints]:
            raise ValueError(f"{twice[0]} and {twice[0][1:]} are one score and its negative; leave one of them out")
        return {name: c.of_a_cost(name) if name.startswith("-") else c for name, c in constraints.items()}

    @field_validator(*OWN_SECTIONS)
    @classmethod
    def _section_of_its_method(cls, section: Strict, info: ValidationInfo) -> Strict:
        (method, row), name = method_of(info), str(info.field_name)
        if name not in row.sections and section != type(section)():
            users = " or ".join(user for user, other in METHODS.items() if name in other.sections)
            raise ValueError(f"method {method} does not use this section; leave out, or set method to {users}")
        if isinstance(section, Caid) and section.slack == "estimate":
            _check_validation("slack 'estimate'", info)
        if isinstance(section, PrimalDual) and name in row.sections:
            _check_own_samples(method, section, info)
        return section

    @field_validator("sacpo")
    @classmethod
    def _sacpo_fits(cls, sacpo: Sacpo, info: ValidationInfo) -> Sacpo:
        (method, row), names = method_of(info), list(info.data.get("constraints", ()))
        if row.mixes and sacpo.order != "helpful_first":
            raise ValueError(f"method {method} mixes with the helpful policy; order must be 'helpful_first'")
        if str(info.field_name) in row.sections and sacpo.labels_from == "scores" and len(names) > 1:
            raise ValueError(f"labels_from 'scores' follows one safety score, but constraints has {', '.join(names)}")
        tails = [name for name, c in info.data.get("constraints", {}).items() if c.of == "cvar"]
        if str(info.field_name) in row.sections and sacpo.labels_from == "scores" and tails:
            raise ValueError(
                f"labels_from 'scores' labels by {tails[0]} itself, which is of: cvar, and no dual is solved that "
                "would find its tau; give of: mean or of: rectified, or set method to mocan"
            )
        return sacpo

    @field_validator("safedpo")
    @classmethod
    def _thresholds_of_constraints(cls, safedpo: SafeDpo, info: ValidationInfo) -> SafeDpo:
        names = list(info.data.get("constraints", ()))
        if unknown := [name for name in safedpo.thresholds or () if names and name not in names]:
            raise ValueError(
                f"thresholds names {', '.join(unknown)}, which constraints does not have; its names: {', '.join(names)}"
            )
        return safedpo

    @field_validator("label")
    @classmethod
    def _fits_the_method(cls, label: Label, info: ValidationInfo) -> Label:
        method, row = method_of(info)
        if any(name not in info.data for name in row.sections):
            return label  # a section that was refused says nothing of the labels
        steps = [info.data.get(name) for name in row.sections]
        sacpo = next((section for section in steps if isinstance(section, Sacpo)), None)
        source = sacpo.labels_from if sacpo else row.learns_from
        learners = _learners(info)
        check_learners(learners, label.human.loss, label.validation_fraction)
        people = source == "people" or bool(learners)
        readers: list[LogRatio | Step] = [
            *learners,
            *([sacpo.first, sacpo.second] if sacpo and sacpo.labels_from == "people" else []),
        ]
        own = bool(readers) and all(reader.preferences is not None for reader in readers)
        if people and not own and label.preferences is None:
            raise ValueError(f"method {method} learns from a data set's own labels; name it in label.preferences")
        if (own or not people) and (label.pairs == "preferences") != (label.preferences is not None):
            raise ValueError("label.preferences names the data set when label.pairs is 'preferences', and only then")
        labelled = source == "scores" and not any(isinstance(section, PrimalDual) for section in steps)
        unused = [] if labelled else ["labels", "pairs", "pairs_per_prompt"]
        unused += [key for other in METHODS.values() for key in other.label_keys if key not in row.label_keys]
        own_labels = any(isinstance(section, Sacpo | SafeDpo) for section in steps)
        unused += [] if people and not own_labels else ["human"]
        if given := changed(label, unused):
            raise ValueError(f"method {method} does not use {', '.join(f'label.{name}' for name in given)}; leave out")
        return label

    @field_validator("solve")
    @classmethod
    def _equality_has_no_safe_side(cls, solve: Solve, info: ValidationInfo) -> Solve:
        equal = [name for name, constraint in info.data.get("constraints", {}).items() if constraint.equal]
        if solve.confidence is not None and equal:
            fields = " and ".join(f"constraints.{name}.equal" for name in equal)
            raise ValueError(
                f"confidence {solve.confidence:g} raises the margins to their safe side, and an equality has none; "
                f"leave out solve.confidence or {fields}"
            )
        return solve

    @field_validator("train")
    @classmethod
    def _lam_can_be_steered(cls, train: Train, info: ValidationInfo) -> Train:
        (method, row), label = method_of(info), info.data.get("label")
        sections = (info.data.get(name) for name in row.sections)
        within = any(isinstance(section, Caid) and section.within for section in sections)
        if train.feedback is None and not within:
            return train
        if train.feedback is not None and row.steers:
            raise ValueError(
                f"feedback moves λ within a training, and method {method} between its trainings; leave out"
            )
        if "solve" not in row.stages:
            raise ValueError(
                f"feedback recomputes the labels for each λ, and method {method} learns labels that hold for none; "
                "leave out, or set method to mocan or pecan"
            )
        if label is not None and (label.labels == "sampled" or label.as_published):
            key = "label.labels 'sampled'" if label.labels == "sampled" else "label.as_published"
            raise ValueError(
                f"{'caid.within' if within else 'feedback'} recomputes the labels for each λ, which {key} does not "
                "allow; give labels soft, regression or listwise, without as_published"
            )
        _check_validation("feedback", info)
        return train

    @field_validator("train")
    @classmethod
    def _flatness_can_be_seen(cls, train: Train, info: ValidationInfo) -> Train:
        if train.stop == "epochs":
            return train
        method, row = method_of(info)
        sections = [info.data.get(name) for name in row.sections]
        if "solve" not in row.stages:
            raise ValueError(
                f"stop 'flat' is by the estimate of r + ⟨λ, g⟩, and method {method} has no λ; leave out, or set method "
                "to mocan or pecan"
            )
        if any(isinstance(section, PrimalDual) for section in sections):
            raise ValueError(f"stop 'flat': method {method} trains on samples of each round's own; leave out")
        if train.feedback is not None or any(isinstance(section, Caid) and section.within for section in sections):
            key = "feedback" if train.feedback is not None else "caid.within"
            raise ValueError(
                f"stop 'flat' compares evaluations of a policy that is trained towards one λ, and {key} moves λ "
                "between them; leave one of both out"
            )
        if _learners(info):
            raise ValueError(
                "stop 'flat' is by scores, and a log_ratio without a model is first trained on people's labels, by "
                "none; leave out, or name the model of each log_ratio"
            )
        _check_validation("stop 'flat'", info)
        return train

    @field_validator("strength")
    @classmethod
    def _strength_can_be_chosen(cls, strength: float | StrengthChoice, info: ValidationInfo) -> float | StrengthChoice:
        method, row = method_of(info)
        if "strength" not in row.stages:
            if strength not in (1.0, StrengthChoice()):
                raise ValueError(f"method {method} keeps its policy as trained; leave out, or give 1")
            return 1.0
        if strength == 1.0:
            return strength
        prompts, generate, train = (info.data.get(name) for name in ("prompts", "generate", "train"))
        if prompts is not None and prompts.num_validation == 0:
            raise ValueError(
                "strength is chosen and checked on validation prompts, and prompts.num_validation is 0; give it (128 "
                "are advised), or strength: 1 for the policy as trained"
            )
        if generate is not None and generate.num_responses == 1:
            raise ValueError(
                "strength is chosen by which of a prompt's responses are preferred, and generate.num_responses is 1; "
                "give at least 2, or strength: 1 for the policy as trained"
            )
        if train is not None and train.lora is not None and train.lora.quantize is not None:
            raise ValueError(
                "strength cannot be given with train.lora.quantize: the adapters are merged into the base as 4 bits "
                "hold it, so the policy is not the reference plus a difference that could be scaled. Its adapter can "
                "be scaled: give strength: 1, then 'can-dist export adapter RUN --strength A'"
            )
        return strength

    @field_validator("basis")
    @classmethod
    def _policies_can_be_mixed(cls, basis: bool, info: ValidationInfo) -> bool:
        if not basis:
            return basis
        method, row = method_of(info)
        if not row.basis:
            users = " or ".join(name for name, other in METHODS.items() if other.basis)
            raise ValueError(
                f"method {method} trains no policy of one score alone that could be mixed; leave out, or set method to "
                f"{users}"
            )
        _check_validation("basis", info)
        train = info.data.get("train")
        if train is not None and train.stop == "flat":
            raise ValueError(
                "basis trains on each constraint's score alone, which no estimate of r + ⟨λ, g⟩ is of; leave out, or "
                "give train.stop: epochs"
            )
        if train is not None and train.lora is not None and train.lora.quantize is not None:
            raise ValueError(
                "basis mixes what policies differ from the reference by, and with train.lora.quantize the adapters are "
                "merged into the base as 4 bits hold it; leave one of both out"
            )
        return basis

    @field_validator("cluster")
    @classmethod
    def _whole_gpus_for_vllm(cls, cluster: Cluster, info: ValidationInfo) -> Cluster:
        generate, gpus = info.data.get("generate"), cluster.gpus_per_actor
        if generate is not None and generate.engine == "vllm" and gpus != int(gpus):
            raise ValueError(f"generate.engine vllm takes whole GPUs; gpus_per_actor is {gpus:g}, set 1 or more, or 0")
        return cluster


def _learners(info: ValidationInfo) -> list[LogRatio]:
    """Return the scorers whose policy is first trained on people's labels."""
    scorers = [info.data.get("reward"), *(c.scorer for c in info.data.get("constraints", {}).values())]
    return [scorer for scorer in scorers if isinstance(scorer, LogRatio) and scorer.learns]


def _check_validation(key: str, info: ValidationInfo) -> None:
    """Raise ``ValueError`` where a key reads validation responses and none are asked for, or one per prompt."""
    prompts, generate = info.data.get("prompts"), info.data.get("generate")  # absent where they were refused
    if prompts is not None and prompts.num_validation == 0:
        raise ValueError(
            f"{key} is by validation prompts, and prompts.num_validation is 0; give it (128 are advised), or leave out"
        )
    if generate is not None and generate.num_responses == 1:
        raise ValueError(
            f"{key} is by which of a prompt's responses are preferred, and generate.num_responses is 1; give at least 2"
        )


def _check_own_samples(method: str, section: PrimalDual, info: ValidationInfo) -> None:
    """Raise ``ValueError`` where the samples of a loop would not be its policy's, or be alone, or λ be below 0."""
    generate = info.data.get("generate")
    if generate is not None and (generate.temperature != 1 or generate.top_p != 1):
        raise ValueError(
            f"method {method} learns from samples of the policy itself; generate.temperature and generate.top_p must "
            "be 1"
        )
    if generate is not None and generate.num_responses == 1:
        raise ValueError(
            f"method {method} compares a response with the others to its prompt, and generate.num_responses is 1; give "
            "at least 2"
        )
    equal = [name for name, constraint in info.data.get("constraints", {}).items() if constraint.equal]
    if section.form == "log" and equal:
        raise ValueError(f"form 'log' keeps λ above 0, and that of {equal[0]}, an equality, may be below; use linear")


RESERVED_SCORE_NAMES = ("reward", "prompt_id", "response_id", "num_tokens", "finish_reason")
