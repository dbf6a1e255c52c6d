"""What a run is: strict models with bounds, read from YAML, every problem reported at once.

The fields marked ``runtime`` (actor counts, logging, checkpoint frequency) do not change what is computed, only
where and how it is watched; they are left out of a stage's identity, so editing them recomputes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from can_dist.config_keys import explain
from can_dist.errors import ConfigError

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def runtime(default: Any, description: str, **bounds: Any) -> Any:
    """Declare a field that is not part of any stage's identity."""
    return Field(default, description=description, json_schema_extra={"runtime": True}, **bounds)


class Strict(BaseModel):
    """Base of every configuration model: frozen, unknown keys rejected, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are no value for this key")
        return value


class Model(Strict):
    """A causal language model and the text convention it is used with."""

    model: str = Field(description="Local directory or hub id of a causal language model with a tokenizer.")
    revision: str | None = Field(None, description="Hub commit or tag; pin it for anything you publish.")
    template: str | None = Field(
        None,
        description="Plain template, e.g. 'USER: {prompt} ASSISTANT:'; default: the tokenizer's chat template.",
    )
    trust_remote_code: bool = Field(False, description="Run code shipped with the model; off unless you have read it.")

    @field_validator("template")
    @classmethod
    def _names_the_prompt(cls, template: str | None) -> str | None:
        if template is not None and "{prompt}" not in template:
            raise ValueError("must contain {prompt}")
        return template


class SequenceClassifier(Model):
    """A Hugging Face sequence-classification reward or cost model: one score per (prompt, response)."""

    kind: Literal["sequence_classifier"] = Field("sequence_classifier", description="Kind of scorer.")
    sign: Literal[1, -1] = Field(1, description="-1 for a cost model: every score must be 'higher is better'.")
    max_length: int | None = Field(
        None, ge=8, description="Refuse longer texts (tokens); default: the model's context."
    )
    batch_size: int = Field(16, ge=1, description="Texts per forward pass.")


class PythonCallable(Strict):
    """A Python function ``module:function`` taking (conversations, responses) and returning one float each."""

    kind: Literal["callable"] = Field("callable", description="Kind of scorer.")
    function: str = Field(
        pattern=r"^[\w.]+:\w+$", description="module:function, importable where the command is started."
    )
    sign: Literal[1, -1] = Field(1, description="-1 for a cost: every score must be 'higher is better'.")
    batch_size: int = Field(256, ge=1, description="Responses handed to the function at once.")


def _kind(scorer: Any) -> Any:
    return scorer.get("kind", "sequence_classifier") if isinstance(scorer, Mapping) else getattr(scorer, "kind", None)


Scorer = Annotated[
    Annotated[SequenceClassifier, Tag("sequence_classifier")] | Annotated[PythonCallable, Tag("callable")],
    Discriminator(_kind),
]


class Constraint(Strict):
    """A demand on the mean of one safety score: a margin over the reference, or an absolute threshold."""

    scorer: Scorer = Field(description="What measures this constraint; higher is safer.")
    margin: float | None = Field(None, description="Improvement of the mean score over the reference that is demanded.")
    threshold: float | None = Field(None, description="Absolute mean score that is demanded, instead of a margin.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Constraint:
        if (self.margin is None) == (self.threshold is None):
            raise ValueError("give exactly one of margin (improvement over the reference) and threshold (absolute)")
        return self


class DataSource(Strict):
    """A data set, local or on the hub; its format is found by its columns."""

    source: str = Field(description="Local JSONL/Parquet/Arrow file or directory, or a hub data set id.")
    split: str = Field("train", description="Split of a hub data set or directory.")
    subset: str | None = Field(None, description="Subset (configuration) of a hub data set.")
    revision: str | None = Field(None, description="Revision of a hub data set.")


class Prompts(DataSource):
    """Where the prompts come from and how many are held out."""

    num_train: int | None = Field(
        None, ge=1, description="Prompts for scoring and training; default: all but num_test."
    )
    num_test: int = Field(64, ge=2, description="Prompts held out for the evaluation, chosen by hash of seed and id.")


class Generate(Strict):
    """How responses are sampled from the reference (and from the policy when it is evaluated)."""

    num_responses: int = Field(8, ge=1, description="K, responses per training prompt.")
    temperature: float = Field(1.0, gt=0, le=10, description="Sampling temperature; 1 samples the reference itself.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass; 1 samples the reference itself.")
    max_new_tokens: int = Field(128, ge=1, description="Longest response, in tokens.")
    stop: tuple[str, ...] = Field((), description="Strings that end a response; the text before them is kept.")
    batch_prompts: int = Field(4, ge=1, description="Prompts per forward batch (each with its K responses).")
    shard_prompts: int = Field(32, ge=1, description="Prompts per shard, the unit of commit and retry.")

    @model_validator(mode="after")
    def _whole_batches(self) -> Generate:
        if self.shard_prompts % self.batch_prompts:
            raise ValueError(f"shard_prompts ({self.shard_prompts}) must be a multiple of batch_prompts")
        return self


class Label(Strict):
    """How scores become preferences."""

    labels: Literal["soft", "sampled"] = Field("soft", description="soft: p = σ(s_a − s_b); sampled: one draw of it.")
    pairs: Literal["responses", "preferences"] = Field(
        "responses", description="Pair the K responses of a prompt, or take a preference data set's own pairs."
    )
    preferences: DataSource | None = Field(None, description="The data set, when pairs is 'preferences'.")
    pairs_per_prompt: int | Literal["all"] = Field("all", description="Pairs drawn per prompt, or all K(K−1)/2.")
    validation_fraction: float = Field(0.05, ge=0, lt=1, description="Share of prompts whose pairs only measure loss.")

    @model_validator(mode="after")
    def _source_given(self) -> Label:
        if (self.pairs == "preferences") != (self.preferences is not None):
            raise ValueError("label.preferences names the data set when label.pairs is 'preferences', and only then")
        if self.pairs_per_prompt != "all" and self.pairs_per_prompt < 1:
            raise ValueError(f"pairs_per_prompt must be 'all' or at least 1, not {self.pairs_per_prompt}")
        return self


class Lora(Strict):
    """Low-rank adapters through peft; merged into the exported policy."""

    r: int = Field(8, ge=1, description="Rank.")
    alpha: float = Field(16, gt=0, description="Scale numerator.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Names of the modules that get adapters."
    )


Momentum = Annotated[float, Field(ge=0, lt=1)]


class Train(Strict):
    """One preference optimisation with DeepSpeed ZeRO-3."""

    learning_rate: float = Field(1e-6, gt=0, lt=1, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    num_epochs: int = Field(1, ge=1, description="Passes over the training pairs.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Pairs per optimizer step, over all ranks.")
    micro_batch_size: int = runtime(4, "Pairs per forward pass on one rank.", ge=1)
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    betas: tuple[Momentum, Momentum] = Field((0.9, 0.999), description="AdamW's averaging coefficients, below 1.")
    max_grad_norm: float = Field(1.0, gt=0, description="Global gradient norm is clipped to this.")
    activation_checkpointing: bool = runtime(False, "Recompute activations in the backward pass.")
    lora: Lora | None = Field(None, description="Train adapters; default: every weight.")
    ds_config: str | None = Field(None, description="DeepSpeed JSON (see ds_configs/); default: plain ZeRO-3.")
    checkpoint_every: int = runtime(200, "Steps between checkpoints; the two newest are kept.", ge=1)
    eval_every: int = runtime(50, "Steps between evaluations of the validation loss.", ge=1)
    log_every: int = runtime(5, "Steps between lines of metrics.", ge=1)
    tensorboard: bool = runtime(True, "Write TensorBoard events beside the metrics.")
    wandb_project: str | None = runtime(None, "Also log to this Weights & Biases project (extra [wandb]).")
    max_shard_size_mb: int = Field(4000, ge=1, description="Largest safetensors file of the exported policy.")


class Evaluate(Strict):
    """The measurement on held-out prompts."""

    num_responses: int = Field(8, ge=1, description="Fresh responses per held-out prompt, of policy and reference.")
    num_samples: int = Field(8, ge=0, description="Prompts shown with both responses in the report.")


class Cluster(Strict):
    """Where the work runs; nothing here changes a result."""

    address: str | None = runtime(None, "Ray address; default: RAY_ADDRESS, else a local Ray is started.")
    num_actors: int = runtime(2, "Ray actors that generate and score.", ge=1)
    cpus_per_actor: float = runtime(1, "CPUs of each actor.", gt=0)
    gpus_per_actor: float = runtime(0, "GPUs of each actor.", ge=0)
    num_workers: int = runtime(2, "DeepSpeed ranks.", ge=1)
    cpus_per_worker: float = runtime(1, "CPUs of each rank.", gt=0)
    gpus_per_worker: float = runtime(0, "GPUs of each rank (0 or 1).", ge=0, le=1)
    shard_attempts: int = runtime(3, "Times a shard is tried before the stage fails.", ge=1)
    max_failures: int = runtime(1, "Restarts of the training group before the run fails.", ge=0)
    wait_resources_s: float = runtime(300, "Seconds to wait for the resources asked for.", gt=0)


class Config(Strict):
    """A whole run."""

    method: Literal["mocan"] = Field("mocan", description="The alignment method.")
    seed: int = Field(0, ge=0, lt=2**63, description="Root of every random stream.")
    precision: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on GPUs, fp32 on CPU.")
    beta: float = Field(0.1, gt=0, description="KL weight β, used by the dual and by DPO alike.")
    prompts: Prompts = Field(description="The prompts.")
    reference: Model = Field(description="The model to be aligned, π_ref.")
    reward: Scorer = Field(description="What measures helpfulness.")
    constraints: dict[str, Constraint] = Field(min_length=1, description="Safety constraints by name.")
    generate: Generate = Field(default_factory=lambda: Generate(), description="Sampling.")
    label: Label = Field(default_factory=lambda: Label(), description="Preferences.")
    train: Train = Field(default_factory=lambda: Train(), description="Fine-tuning.")
    evaluate: Evaluate = Field(default_factory=lambda: Evaluate(), description="Evaluation.")
    cluster: Cluster = Field(default_factory=lambda: Cluster(), description="Resources.")

    @field_validator("constraints")
    @classmethod
    def _plain_names(cls, constraints: dict[str, Constraint]) -> dict[str, Constraint]:
        bad = [name for name in constraints if not NAME.fullmatch(name) or name in RESERVED_SCORE_NAMES]
        if bad:
            raise ValueError(
                f"constraint name {', '.join(map(repr, bad))}: expected a letter, then letters, digits, '_' or '-'; "
                f"and none of {', '.join(RESERVED_SCORE_NAMES)}"
            )
        return constraints


RESERVED_SCORE_NAMES = ("reward", "prompt_id", "response_id", "num_tokens", "finish_reason")


def identity(model: BaseModel, *, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON-safe fields of ``model`` that decide what is computed (runtime fields left out)."""
    dumped: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        extra = field.json_schema_extra
        if name in exclude or (isinstance(extra, dict) and extra.get("runtime")):
            continue
        dumped[name] = _plain(getattr(model, name))
    return dumped


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, validate.

    Raises
    ------
    ConfigError
        Naming every problem of the file at once: unknown keys with the nearest valid one, duplicates, bounds.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file. Give the path of a YAML file; recipes/ holds examples.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}). Give a YAML file.") from None
    raw = _parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top level, found {type(raw).__name__}.")
    for override in overrides:
        _apply_override(raw, override)
    return validate_config(raw, str(path))


def validate_config(raw: Mapping[str, Any], where: str = "configuration") -> Config:
    """Build a ``Config`` from plain data, or raise one ``ConfigError`` that lists all problems."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = explain(error.errors(), raw, Config)
        lines = "\n".join(f"  {line}" for line in problems)
        raise ConfigError(f"{where}: {len(problems)} problem{'s' * (len(problems) > 1)}.\n{lines}") from None


def dump_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    import io

    from ruamel.yaml import YAML

    stream = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 120
    yaml.dump(json.loads(config.model_dump_json()), stream)
    return stream.getvalue()


def _parse_yaml(text: str, where: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        key = re.search(r'duplicate key "([^"]*)"', str(error.problem))
        raise ConfigError(
            f"{where}, line {line}: key {key.group(1) if key else '?'!r} is given twice. Keep one."
        ) from None
    except YAMLError as error:
        text = str(error).replace('in "<unicode string>", ', "")
        raise ConfigError(f"{where}: not valid YAML: {text}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not all([*parents, last]):
        raise ConfigError(f"--set {override}: expected key=value, for example constraints.safety.margin=2.0.")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {parent!r} holds a value, not a group of keys.")
    value = _parse_yaml(text, f"--set {override}")
    node[last] = value
