"""The configuration's models, data and files, looked at before a run spends hours on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from can_dist.config import (
    Config,
    DataSource,
    Guard,
    HttpScorer,
    LogRatio,
    Lora,
    Model,
    PythonCallable,
    SequenceClassifier,
)
from can_dist.config_endpoints import GenerateEndpoint
from can_dist.doctor.finding import Finding, Severity, error, note, ok
from can_dist.errors import CanDistError

# of one trained parameter in a checkpoint: weight, its fp32 copy and AdamW's two averages; and of an exported one
CHECKPOINT_BYTES, POLICY_BYTES = 16, 4
NUM_CHECKPOINTS = 3  # two are kept while the next is written


def check_inputs(config: Config) -> list[Finding]:
    """Check every model, data source, Python scorer and the DeepSpeed file of a configuration."""
    findings = [checked(role, partial(check_model, spec)) for role, spec in models(config)]
    for role, source in data_sources(config):
        findings.append(checked(role, partial(check_data, role, source)))
    for name, scorer in _scorers(config).items():
        if isinstance(scorer, PythonCallable):
            findings.append(checked(name, partial(check_function, scorer.function)))
        elif isinstance(scorer, HttpScorer):
            findings.append(checked(name, partial(check_endpoint, scorer)))
    if config.generate.endpoint is not None:
        findings.append(checked("generate.endpoint", partial(check_generate_endpoint, config.generate.endpoint)))
    if all(finding.severity < Severity.ERROR for finding in findings):  # else it would say the same again
        findings += conversations(config)
        if config.train.lora is not None:
            findings.append(checked("train.lora", partial(check_lora, config.reference, config.train.lora)))
    return [*findings, checked("train.ds_config", partial(check_ds_config, config.train.ds_config))]


def checked(name: str, check: Callable[[], str]) -> Finding:
    """Run a check that returns what there is; an error of ours becomes a finding."""
    try:
        return ok(name, check())
    except CanDistError as problem:
        return _problem(name, problem)


def _problem(name: str, problem: CanDistError) -> Finding:
    trouble, _, remedy = str(problem).partition(". ")
    return error(name, trouble, remedy or "Correct it.")


def conversations(config: Config) -> list[Finding]:
    """Write one prompt of each kind by every template that will read it, as a run does before it samples."""
    from can_dist.stages.conversations import check_conversations

    try:
        notes = check_conversations(config)
    except CanDistError as problem:
        return [_problem("conversations", problem)]
    return [note("conversations", line) for line in notes] or [
        ok("conversations", "every template writes every message of each kind of prompt")
    ]


def check_lora(reference: Model, lora: Lora) -> str:
    """Check that adapters can be merged; return where they go."""
    from can_dist.modeling.adapters import check_adapters

    check_adapters(reference, lora)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f"adapters on {targets} can be merged"


def check_generate_endpoint(endpoint: GenerateEndpoint) -> str:
    """Check the key of the endpoint that samples, and the proxy on the way; nothing is sent."""
    from can_dist.endpoints import open_client

    open_client(f"generate.endpoint {endpoint.model}", endpoint.base_url, endpoint).close()
    return f"{endpoint.model} at {endpoint.base_url}; nothing was sent to it"


def _scorers(config: Config) -> dict[str, Any]:
    return {"reward": config.reward, **{name: c.scorer for name, c in config.constraints.items()}}


def models(config: Config) -> Iterator[tuple[str, Model]]:
    """Yield every model of a configuration with its role."""
    yield "reference", config.reference
    for name, scorer in _scorers(config).items():
        if isinstance(scorer, SequenceClassifier | Guard):
            yield name, scorer
        elif isinstance(scorer, LogRatio) and scorer.model is not None:
            yield name, scorer.model


def data_sources(config: Config) -> Iterator[tuple[str, DataSource]]:
    """Yield every data source of a configuration with its key."""
    yield "prompts", config.prompts
    if config.evaluate.benign_prompts is not None:
        yield "evaluate.benign_prompts", config.evaluate.benign_prompts
    if config.label.preferences is not None:
        yield "label.preferences", config.label.preferences
    for name, scorer in _scorers(config).items():
        if isinstance(scorer, LogRatio) and scorer.preferences is not None:
            yield f"{name}.preferences", scorer.preferences


def check_data(role: str, source: DataSource) -> str:
    """Read a data source whole; return what it holds."""
    from can_dist.tables.formats import read_preferences, read_prompts

    read = read_preferences if role.endswith("preferences") else read_prompts
    done = read(source.source, split=source.split, subset=source.subset, revision=source.revision)
    return done.announcement


def check_function(function: str) -> str:
    """Import a Python scorer; return what it is."""
    from can_dist.scoring.python_callable import import_callable

    import_callable(function)
    return f"{function} can be imported"


def check_endpoint(scorer: HttpScorer) -> str:
    """Check that the key of an endpoint is in the environment, as far as it takes one; nothing is sent."""
    from can_dist.scoring.kinds import check_scorer_opens

    check_scorer_opens(scorer)
    return f"{scorer.model} at {scorer.url}; nothing was sent to it"


def check_ds_config(path: str | None) -> str:
    """Read a DeepSpeed file; return what it is."""
    from can_dist.training.deepspeed_config import read_ds_config

    read_ds_config(path)
    return f"{path} is usable" if path else "plain ZeRO-3"


def check_model(spec: Model) -> str:
    """Check that a model can be loaded without its weights, and that its tokenizer is the one it was made for.

    Raises:
        DataError: Files are missing or damaged, the model is an adapter, the checkpoint is not its configuration's, the
            tokenizer knows more tokens than the model has embeddings, a special token is beyond them, or a scorer is
            no classifier with one output.
        ConfigError: A conversation could not be written as text (no chat template and no ``template``), or the
            verdicts of a guard are no tokens.
    """
    from can_dist.modeling.formatter import open_formatter
    from can_dist.modeling.loading import check_causal_lm, check_vocabulary, looks_local, model_digest
    from can_dist.modeling.stored import refuse_adapter
    from can_dist.scoring.kinds import check_scorer_opens

    path = Path(spec.model).expanduser()
    refuse_adapter(path)
    has_files = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if not has_files and (path.is_dir() or looks_local(spec.model)):
        model_digest(spec)  # tells which is missing
    tokenizer, architecture = check_vocabulary(spec)
    if isinstance(spec, SequenceClassifier | Guard):
        check_scorer_opens(spec)
    else:
        check_causal_lm(spec)
        open_formatter(spec)
    rows = architecture.get_text_config().vocab_size
    return (
        f"{spec.model}: {architecture.model_type}, {len(tokenizer)} tokens for {rows} embeddings, {template_of(spec)}"
    )


def template_of(spec: Model) -> str:
    """Say where the text convention comes from."""
    if isinstance(spec, SequenceClassifier) and spec.text_pair:
        return "pairs of texts"
    return "plain template" if spec.template is not None else "chat template"


def needed_bytes(config: Config) -> int | None:
    """Estimate what checkpoints and policies take at most; None when the model's files are not here."""
    path = Path(config.reference.model).expanduser()
    count = sum(_parameters(file) for file in path.glob("*.safetensors"))
    if not count:
        return None
    checkpoints = 0 if config.train.lora is not None else NUM_CHECKPOINTS * CHECKPOINT_BYTES
    return count * (checkpoints + POLICY_BYTES)


def _parameters(file: Path) -> int:
    """Count the numbers in a safetensors file by its header."""
    with file.open("rb") as source:
        size = int.from_bytes(source.read(8), "little")
        if size > file.stat().st_size:
            return 0
        header = json.loads(source.read(size))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
