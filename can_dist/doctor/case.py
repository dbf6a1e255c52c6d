"""What the files are that somebody names at the start: which data, which models, and so which configuration fits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from can_dist.config import DataSource
from can_dist.config.scorers import Model, SequenceClassifier
from can_dist.doctor.inputs import check_function, check_model
from can_dist.errors import ConfigError, DataError
from can_dist.tables.artifacts import MANIFEST
from can_dist.tables.foreign.known_formats import find_format
from can_dist.tables.foreign.rows import ANSWERED
from can_dist.tables.foreign.sources import open_shards

Kind = Literal["scores", "responses", "pairs", "prompts"]
ID = "prompt_id"


@dataclass(frozen=True)
class Data:
    """A data set as it was read.

    Attributes:
        kind: scores (a table of numbers by prompt), responses (brought), pairs (with people's labels), or prompts.
        announcement: how the source was read.
        num_prompts: distinct prompts; 0 for scores.
        num_responses: brought responses of each prompt; 0 for other kinds.
        criteria: what people labelled its pairs by; ``chosen`` where the data set does not say.
    """

    kind: Kind
    announcement: str
    num_prompts: int = 0
    num_responses: int = 0
    criteria: tuple[str, ...] = ()


def look_at_data(source: DataSource) -> Data:
    """Read a data set whole, by the reader that its columns call for.

    Raises:
        DataError: it cannot be read, or its columns fit no format; names those found, those known and the nearest.
        ConfigError: it is of the hub and has no revision.
        EnvironmentProblem: the hub cannot be reached.
    """
    from can_dist.stages.ingest import source_identity
    from can_dist.tables.foreign.formats import read_preferences, read_prompts, read_responses

    source_identity(source)
    if (Path(source.source).expanduser() / MANIFEST).is_file():
        return Data("scores", f"{source.source}: an artifact of a run")
    options: dict[str, Any] = {"split": source.split, "subset": source.subset, "revision": source.revision}
    shard = next(open_shards(source.source, **options))
    if set(ANSWERED.needs) <= set(shard.columns):
        brought = read_responses(source.source, **options)
        return Data("responses", brought.announcement, len(brought.texts), _each(source, brought.texts))
    try:
        form = find_format(shard.columns, shard.name)
    except DataError as unknown:
        if ID not in shard.columns:
            raise
        scores = score_columns(Path(source.source).expanduser())
        if len(scores) < 2:
            raise unknown from None
        return Data("scores", f"{source.source}: a table of scores ({', '.join(scores)})")
    if not form.pairs:
        prompts = read_prompts(source.source, **options)
        return Data("prompts", prompts.announcement, prompts.table.num_rows)
    pairs = read_preferences(source.source, **options)
    return Data("pairs", pairs.announcement, pairs.counts["prompts"], criteria=_criteria(pairs))


def score_columns(path: Path) -> list[str]:
    """Return the columns of a table that hold numbers and are scores, by their names."""
    import pyarrow as pa

    from can_dist.config.root import RESERVED_SCORE_NAMES
    from can_dist.tables.scores import read_score_table

    schema = read_score_table(path).schema
    numbers = [f.name for f in schema if pa.types.is_floating(f.type) or pa.types.is_integer(f.type)]
    others = set(RESERVED_SCORE_NAMES) - {"reward"}
    return [name for name in numbers if name not in others and not name.startswith("logp.")]


def _each(source: DataSource, texts: dict[str, list[str]]) -> int:
    """Return how many responses every prompt has."""
    counts = {len(responses) for responses in texts.values()}
    if len(counts) > 1:
        raise DataError(
            f"{source.source}: the prompts have from {min(counts)} to {max(counts)} responses each.",
            "Bring the same number for every prompt.",
        )
    return counts.pop()


def _criteria(pairs: Any) -> tuple[str, ...]:
    if not pairs.names_criteria:
        return ("chosen",)
    labelled = {"helpful": "better", "safe": "safer"}
    return tuple(
        name for name, column in labelled.items() if any(label >= 0 for label in pairs.table.column(column).to_pylist())
    )


def language_model(name: str, template: str | None) -> tuple[dict[str, Any], int, int]:
    """Return the keys of a reference model, the longest sequence that it takes, in tokens, and its width.

    Raises:
        DataError: it is no causal language model with its tokenizer, or it has no chat template and none is given.
        EnvironmentProblem: it is of the hub, which cannot be reached.
    """
    from can_dist.modeling.loading import check_causal_lm, context_length, load_model_config

    keys = _with_template({"model": name}, template)
    check_causal_lm(Model(**keys))
    check_model(Model(**keys))
    config = load_model_config(Model(**keys), "causal language model")
    return keys, context_length(config), int(config.get_text_config().hidden_size)


def score_model(name: str, template: str | None, *, is_cost: bool) -> dict[str, Any]:
    """Return the keys of a scorer: its kind by its checkpoint, its sign, and the text that it reads.

    Args:
        name: a model, or a Python function ``module:function``.
        template: for a model without a chat template.
        is_cost: whether more of it is worse.

    Raises:
        DataError: the model gives no score, or several.
        ConfigError: a model has no chat template and none is given, or a cost model has no sign to turn.
        EnvironmentProblem: it is of the hub, which cannot be reached.
    """
    from can_dist.config import Beaver, Guard
    from can_dist.modeling.beaver import ARCHITECTURES
    from can_dist.modeling.loading import has_own_marks, load_model_config, load_tokenizer

    sign = {"sign": -1} if is_cost else {}
    is_function = ":" in name and "/" not in name and not Path(name).exists()
    if is_function:
        check_function(name)
        return {"kind": "callable", "function": name, **sign}
    config = load_model_config(Model(model=name), "score model")
    architectures = config.architectures or []
    if set(architectures) & set(ARCHITECTURES):
        costs = is_cost or getattr(config, "score_type", None) == "cost"
        beaver = {"kind": "beaver", "model": name, **({"sign": -1} if costs else {})}
        check_model(Beaver.model_validate(beaver))
        return beaver
    if any(architecture.endswith("ForCausalLM") for architecture in architectures):
        if is_cost:
            raise ConfigError(f"{name}: a language model that judges (guard) gives no cost.", "Name it by --safety.")
        guard = {"kind": "guard", "model": name}
        check_model(Guard.model_validate(guard))
        return guard
    outputs = list(getattr(config, "id2label", {}).values())
    if len(outputs) > 1 and any(entry.endswith("ForSequenceClassification") for entry in architectures):
        raise DataError(
            f"{name}: has {len(outputs)} outputs ({', '.join(map(str, outputs))}), and only you know which is meant.",
            "Write the file with another model in its place, then give it 'kind: multi_head' and 'output: NAME'.",
        )
    plain = {"model": name, **sign}
    tokenizer = load_tokenizer(SequenceClassifier(model=name))
    if template is None and not tokenizer.chat_template and has_own_marks(tokenizer):
        keys: dict[str, Any] = {**plain, "text_pair": True}
    else:
        keys = _with_template(plain, template)
    check_model(SequenceClassifier.model_validate(keys))
    return keys


def _with_template(keys: dict[str, Any], template: str | None) -> dict[str, Any]:
    """Return the keys of a model, with a template where its tokenizer has none."""
    from can_dist.modeling.loading import load_tokenizer

    if load_tokenizer(Model(model=keys["model"])).chat_template:
        return keys
    if template is None:
        raise ConfigError(
            f"{keys['model']}: its tokenizer has no chat template, so nothing says how it writes a conversation.",
            "Give --template, such as 'USER: {prompt} ASSISTANT:', as the model was trained.",
        )
    return {**keys, "template": template}
