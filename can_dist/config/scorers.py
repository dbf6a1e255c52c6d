"""What other parts of a configuration refer to: language models, data sets, and scorers of every kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from can_dist.config.base import Strict, runtime
from can_dist.config.endpoints import Address, Endpoint
from can_dist.config.methods import METHODS, Method
from can_dist.config.sources import DataSource

SET_HERE = {"conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
"""Arguments of transformers' ``apply_chat_template`` that are no options of a template."""


class Model(Strict):
    """A causal language model and the text convention it is used with."""

    model: str = Field(description="Local directory or hub id of a causal language model with a tokenizer.")
    revision: str | None = Field(None, description="Hub commit or tag; pin it for anything you publish.")
    template: str | None = Field(
        None,
        description="Plain template, e.g. 'USER: {prompt} ASSISTANT:'; default: the tokenizer's chat template.",
    )
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="Passed to the chat template, e.g. {enable_thinking: false}."
    )
    trust_remote_code: bool = Field(False, description="Run code shipped with the model; off unless you have read it.")

    @field_validator("model")
    @classmethod
    def _at_home(cls, model: str) -> str:
        try:
            return str(Path(model).expanduser()) if model.startswith("~") else model
        except RuntimeError:
            raise ValueError("there is no such home directory; write the path without '~'") from None

    @field_validator("template")
    @classmethod
    def _names_the_prompt(cls, template: str | None) -> str | None:
        if template is not None and "{prompt}" not in template:
            raise ValueError("must contain {prompt}")
        if template is not None and "{response}" in template:
            raise ValueError("ends where the response begins; leave out {response}, which follows it by itself")
        return template

    @field_validator("template_options")
    @classmethod
    def _read_by_the_template(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if taken := sorted(SET_HERE & options.keys()):
            raise ValueError(f"{', '.join(taken)}: set by can-dist; give what the chat template itself reads")
        if options and info.data.get("template") is not None:
            raise ValueError("a plain template reads no options; leave out template or template_options")
        return options


class SequenceClassifier(Model):
    """A Hugging Face sequence-classification reward or cost model: one score per (prompt, response).

    >>> SequenceClassifier(model="my-cost-model", sign=-1).template is None  # the tokenizer's own chat template
    True
    """

    kind: Literal["sequence_classifier"] = Field("sequence_classifier", description="Kind of scorer.")
    sign: Literal[1, -1] = Field(1, description="-1 for a cost model: every score must be 'higher is better'.")
    max_length: int | None = Field(
        None, ge=8, description="Refuse longer texts (tokens); default: the model's context."
    )
    text_pair: bool | None = Field(
        None,
        description="Encoders: true reads tokenizer(prompt, response), two texts; false reads one text, by template.",
    )
    tokens_per_pass: int = runtime(4096, "Tokens of one forward pass; halved for good where they do not fit.", ge=1)
    min_accuracy: float | None = runtime(
        None, "Least held-out accuracy of a model of fit-scorer; default: what it was fitted for; 0: any.", ge=0, le=1
    )

    @model_validator(mode="after")
    def _pair_or_template(self) -> SequenceClassifier:
        if self.text_pair and (self.template is not None or self.template_options):
            raise ValueError("text_pair reads the prompt and the response as they are; leave out template")
        return self


class MultiHead(SequenceClassifier):
    """A sequence classifier with several outputs: one of them, or a weighted sum, is the score.

    >>> MultiHead(model="my-heads", weights={"helpful": 0.7, "correct": 0.3}).weights
    {'helpful': 0.7, 'correct': 0.3}
    """

    kind: Literal["multi_head"] = Field("multi_head", description="Kind of scorer.")  # type: ignore[assignment]
    output: int | str | None = Field(None, description="The output that is the score: number, or name in id2label.")
    weights: dict[str, float] | None = Field(
        None, min_length=1, description="Weight of each output by its name in id2label; their sum is the score."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> MultiHead:
        if (self.output is None) == (self.weights is None):
            raise ValueError("give exactly one of output (number or name) and weights (by name)")
        return self


class Beaver(SequenceClassifier):
    """A Beaver reward or cost model (PKU-Alignment, Safe RLHF): a Llama body and a linear ``score_head``.

    >>> Beaver(model="beaver-cost", sign=-1).template
    'BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:'
    """

    kind: Literal["beaver"] = Field("beaver", description="Kind of scorer.")  # type: ignore[assignment]
    template: str | None = Field(
        "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:", description="The text these models were trained on."
    )


class Guard(Model):
    """A guard model: a causal language model whose first word tells a safe conversation from an unsafe one.

    >>> Guard(model="my-guard", safe_word="No", unsafe_word="Yes").output
    'log_odds'
    """

    kind: Literal["guard"] = Field("guard", description="Kind of scorer.")
    safe_word: str = Field("safe", min_length=1, description="Verdict on a safe conversation, one token.")
    unsafe_word: str = Field("unsafe", min_length=1, description="Verdict on an unsafe conversation, one token.")
    before_verdict: str = Field("", description="What the model writes before its verdict, after its chat template.")
    template: None = Field(None, description="Always the tokenizer's chat template.")
    output: Literal["log_odds", "probability"] = Field(
        "log_odds", description="log_odds: ln P(safe)/P(unsafe) (nats, unbounded); probability: P(safe) of the two."
    )
    max_length: int | None = Field(
        None, ge=8, description="Refuse longer texts (tokens); default: the model's context."
    )
    tokens_per_pass: int = runtime(4096, "Tokens of one forward pass; halved for good where they do not fit.", ge=1)


PLACEHOLDERS = ("{prompt}", "{response}", "{text}", "{messages}")


class HttpScorer(Endpoint):
    """An HTTP endpoint that answers JSON: vLLM, SGLang, a moderation service, or one's own.

    >>> HttpScorer(
    ...     url="http://localhost:9000/score", model="mine", request={"answer": "{response}"}, value="score"
    ... ).batch_size
    1
    """

    kind: Literal["http"] = Field("http", description="Kind of scorer.")
    url: Address = Field(description="Whole address that is posted to, such as http://localhost:8000/classify.")
    model: str = Field(description="The model behind it; you declare it, nothing else tells one model from another.")
    revision: str | None = Field(None, description="Its revision, declared likewise: another one is scored again.")
    request: dict[str, Any] = Field(
        description="JSON to send; a value '{prompt}', '{response}', '{text}' or '{messages}' is replaced."
    )
    value: str = Field(
        description="Dotted path of the number in the answer, '*' for the place in the batch: data.*.probs.0."
    )
    template: str | None = Field(
        None, description="What '{text}' is, with {prompt} and {response} in it; special tokens written out."
    )
    batch_size: int = Field(1, ge=1, description="Responses per request; above 1, lists are sent and value has a '*'.")
    sign: Literal[1, -1] = Field(1, description="-1 for a cost: every score must be 'higher is better'.")

    @model_validator(mode="after")
    def _batches_fit(self) -> HttpScorer:
        used = placeholders(self.request)
        if not used & {"{response}", "{text}", "{messages}"}:
            raise ValueError("request holds no response; give a key the value '{response}', '{text}' or '{messages}'")
        texts = [part for part in _parts(self.request) if isinstance(part, str) and part not in used]
        if partly := [text for text in texts if any(name in text for name in PLACEHOLDERS)]:
            raise ValueError(
                f"request value {partly[0]!r}: only a whole value is replaced; put such a text in template"
            )
        lists = [part for part in _parts(self.request) if isinstance(part, list)]
        if "*" in self.value.split(".") and placeholders(lists):
            raise ValueError(
                "request has a placeholder inside a list, where a batch has no place; value must have no '*'"
            )
        if ("{text}" in used) != (self.template is not None):
            raise ValueError("'{text}' in request and template belong together; give both or neither")
        if self.template is not None and not all(name in self.template for name in ("{prompt}", "{response}")):
            raise ValueError("template must contain {prompt} and {response}")
        if self.value.split(".").count("*") > 1 or not all(self.value.split(".")):
            raise ValueError(f"value {self.value!r} is no dotted path with at most one '*'")
        if self.batch_size > 1 and "*" not in self.value.split("."):
            raise ValueError(f"batch_size {self.batch_size} sends lists; value needs a '*', for example data.*.score")
        return self


def placeholders(value: Any) -> set[str]:
    """Return those of ``PLACEHOLDERS`` that occur as values anywhere in plain data."""
    return {part for part in _parts(value) if isinstance(part, str)} & set(PLACEHOLDERS)


def _parts(value: Any) -> Iterator[Any]:
    """Yield plain data and everything inside it."""
    yield value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in inside:
        yield from _parts(part)


class PythonCallable(Strict):
    """A Python function ``module:function`` taking (conversations, responses) and returning one float each.

    >>> PythonCallable(function="my_scorers:politeness").sign
    1
    """

    kind: Literal["callable"] = Field("callable", description="Kind of scorer.")
    function: str = Field(
        pattern=r"^[\w.]+:\w+$", description="module:function, importable where the command is started."
    )
    sign: Literal[1, -1] = Field(1, description="-1 for a cost: every score must be 'higher is better'.")
    batch_size: int = Field(256, ge=1, description="Responses handed to the function at once.")


class LogRatio(Strict):
    """A policy aligned from the reference as a scorer: a·β_m·(ln π_m(y|x) − ln π_ref(y|x)) (PeCAN).

    >>> LogRatio(beta=0.1, model=Model(model="my-safe-dpo")).learns
    False
    >>> LogRatio(beta=0.1, criterion="safe").learns  # trained in the run, by DPO on people's labels
    True
    """

    kind: Literal["log_ratio"] = Field("log_ratio", description="Kind of scorer.")
    beta: float = Field(gt=0, description="β that the aligned policy was, or is to be, trained with.")
    model: Model | None = Field(None, description="The aligned policy; default: trained by DPO on people's labels.")
    criterion: Literal["helpful", "safe"] | None = Field(
        None, description="Which label of people it is trained and calibrated on; required for either."
    )
    preferences: DataSource | None = Field(
        None, description="The data set it is trained and calibrated on; default: label.preferences."
    )
    calibrate: bool = Field(
        False, description="Multiply the score by the a that fits held-out preferences best; default: a = 1."
    )

    @property
    def learns(self) -> bool:
        """Whether people's preferences are needed."""
        return self.model is None or self.calibrate

    @model_validator(mode="after")
    def _says_what_it_learns(self) -> LogRatio:
        if self.learns and self.criterion is None:
            raise ValueError("give a model, or the criterion ('helpful' or 'safe') by which it is trained")
        if not self.learns and (self.criterion or self.preferences):
            raise ValueError("a given model without calibrate learns nothing; leave out criterion and preferences")
        return self


def _kind(scorer: Any) -> Any:
    return scorer.get("kind", "sequence_classifier") if isinstance(scorer, Mapping) else getattr(scorer, "kind", None)


Scorer = Annotated[
    Annotated[SequenceClassifier, Tag("sequence_classifier")]
    | Annotated[MultiHead, Tag("multi_head")]
    | Annotated[Beaver, Tag("beaver")]
    | Annotated[Guard, Tag("guard")]
    | Annotated[HttpScorer, Tag("http")]
    | Annotated[PythonCallable, Tag("callable")]
    | Annotated[LogRatio, Tag("log_ratio")],
    Discriminator(_kind),
]


def check_scorer(scorer: Scorer, method: str, row: Method, key: str = "") -> None:
    """Raise ``ValueError`` when the method of this name and row cannot use a scorer of this kind."""
    if row.needs_ratios and not isinstance(scorer, LogRatio):
        raise ValueError(f"{key}method {method} takes scorers of kind 'log_ratio', this one is {scorer.kind!r}")
    if not row.needs_ratios and isinstance(scorer, LogRatio) and scorer.learns:
        learner = " or ".join(name for name, other in METHODS.items() if other.needs_ratios)
        raise ValueError(
            f"{key}only method {learner} trains or calibrates a log_ratio; give its model and leave out calibrate, "
            f"or set method to {learner}"
        )


def check_learners(scorers: Sequence[LogRatio], loss: str, validation_fraction: float) -> None:
    """Raise ``ValueError`` when the options of ``label`` do not fit log-ratios that learn from people."""
    if scorers and loss != "dpo":
        raise ValueError(f"method pecan aligns its policies by DPO on pairs; human.loss must be 'dpo', not {loss!r}")
    if any(scorer.calibrate for scorer in scorers) and validation_fraction == 0:
        raise ValueError("calibrate needs preferences that nothing is trained on; set validation_fraction above 0")
