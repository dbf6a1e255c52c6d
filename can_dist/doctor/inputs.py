"""The configuration's models, data and files, looked at before a run spends hours on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from can_dist.config import Config, DataSource, Guard, Model, PythonCallable, SequenceClassifier
from can_dist.config.endpoints import Endpoint, GenerateEndpoint
from can_dist.config.sections import Lora, Profile, Prompts
from can_dist.config.walk import ReadAs, endpoints, models, read_as, scorers, sources
from can_dist.doctor.finding import Finding, Severity, note, ok, refusal
from can_dist.errors import CanDistError, DataError

# of one trained parameter in a checkpoint: weight, its fp32 copy and AdamW's two averages; and of an exported one
CHECKPOINT_BYTES, POLICY_BYTES = 16, 4
NUM_CHECKPOINTS = 3  # two are kept while the next is written


def check_inputs(config: Config) -> list[Finding]:
    """Check every model, data source, Python scorer and the DeepSpeed file of a configuration."""
    findings = [checked(key, partial(check_model, spec)) for key, spec in models(config).items()]
    findings += [checked(key, partial(check_data, read_as(key), source)) for key, source in sources(config).items()]
    findings += [checked(key, partial(check_endpoint, key, endpoint)) for key, endpoint in endpoints(config).items()]
    for key, scorer in scorers(config).items():
        if isinstance(scorer, PythonCallable):
            findings.append(checked(key, partial(check_function, scorer.function)))
    if all(finding.severity < Severity.ERROR for finding in findings):  # else it would say the same again
        findings += conversations(config)
        if config.train.lora is not None:
            findings.append(checked("train.lora", partial(check_lora, config.reference, config.train.lora)))
    return [*findings, checked("train.ds_config", partial(check_ds_config, config.train.ds_config))]


def checked(name: str, check: Callable[[], str]) -> Finding:
    """Run a check, which returns the state of ``name``; an error of ours becomes a finding."""
    try:
        return ok(name, check())
    except CanDistError as problem:
        return refusal(name, problem)


def conversations(config: Config) -> list[Finding]:
    """Write one prompt of each kind by every template that will read it, as a run does before it samples."""
    from can_dist.doctor.conversations import check_conversations

    try:
        notes = check_conversations(config)
    except CanDistError as problem:
        return [refusal("conversations", problem)]
    return [note("conversations", line) for line in notes] or [
        ok("conversations", "every template writes every message of each kind of prompt")
    ]


def check_lora(reference: Model, lora: Lora) -> str:
    """Check that adapters can be merged; return where they go."""
    from can_dist.modeling.adapters import check_adapters

    check_adapters(reference, lora)
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return f"adapters on {targets} can be merged"


def check_data(kind: ReadAs, source: DataSource) -> str:
    """Read a data source whole; return what it holds. Of a run's prompts some must be left to train on."""
    from can_dist.stages.ingest import held_out_validation, source_identity
    from can_dist.tables.foreign.formats import read_preferences, read_prompts, read_responses
    from can_dist.tables.foreign.profiles import read_profile

    source_identity(source)  # a missing file is named in the same words by every command
    if isinstance(source, Profile):
        of_hub = {"subset": source.subset, "revision": source.revision}
        return read_profile(source.set, source.source, split=source.split, **of_hub).announcement
    readers: dict[ReadAs, Callable[..., Any]] = {
        "pairs": read_preferences,
        "responses": read_responses,
    }
    read = readers.get(kind, read_prompts)
    done = read(source.source, split=source.split, subset=source.subset, revision=source.revision)
    if isinstance(source, Prompts):
        held_out_validation(done.table.num_rows, source)
    return str(done.announcement)


def check_function(function: str) -> str:
    """Import a Python scorer; return what it is."""
    from can_dist.scoring.python_callable import import_callable

    import_callable(function)
    return f"{function} can be imported"


def check_endpoint(key: str, endpoint: Endpoint) -> str:
    """Check the secret of an endpoint, as far as it takes one, and the proxy on the way; nothing is sent."""
    from can_dist.endpoints import open_client

    address = endpoint.base_url if isinstance(endpoint, GenerateEndpoint) else getattr(endpoint, "url", "")
    open_client(key, address, endpoint).close()
    return f"{getattr(endpoint, 'model', '')} at {address}; nothing was sent to it"


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
        model_digest(spec)  # its error names the missing file
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
    from can_dist.modeling.stored import stored_tensors

    try:
        tensors = stored_tensors(Path(config.reference.model).expanduser()).values()
    except DataError:  # check_model reports it
        return None
    checkpoints = 0 if config.train.lora is not None else NUM_CHECKPOINTS * CHECKPOINT_BYTES
    return sum(math.prod(tensor.shape) for tensor in tensors) * (checkpoints + POLICY_BYTES)
