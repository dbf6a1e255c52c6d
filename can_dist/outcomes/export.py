"""Exports of a run: a policy or its adapter as a directory with a model card, and preferences for other trainers."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.outcomes.certificates import find_certificate, require_certificate
from can_dist.reporting.model_card import model_card
from can_dist.stages.certify import CERTIFICATE
from can_dist.stages.estimate import trained_policy, without_strength
from can_dist.stages.examples import pair_id
from can_dist.stages.mixture import ALONE, for_other_margins, weights_text
from can_dist.stages.report import lineage_of, method_title
from can_dist.stages.solve import load_solution
from can_dist.tables.artifacts import MANIFEST, Artifact, atomic_directory, atomic_file, load_artifact
from can_dist.training import ADAPTER, POLICY
from can_dist.training.targets import score_targets
from can_dist.workspace import REPORT

STAGES = ("train", "merge", "mixture", "strength", "evaluate")  # whose artifacts are policies, or lead to one


def export_policy(
    path: Path,
    out: Path,
    *,
    adapter: bool,
    max_shard_mb: int | None = None,
    certified: bool = False,
    expected: str = "",
) -> Path:
    """Write a policy, or the adapter it was merged from, with its model card into the new directory ``out``.

    ``path`` is a run with one policy, or an artifact of the stages train, merge, strength or evaluate. One file of
    weights is in memory at a time where ``max_shard_mb`` asks for other files than those of the run, none otherwise.
    ``certified`` writes nothing without a certificate of exactly this policy for the constraints of its run;
    ``expected`` is what the card of a policy that was not evaluated says of it.

    Raises:
        ConfigError: ``out`` exists or cannot be made.
        DataError: there is no policy, there are several, it has no adapter, it is damaged, or it is not certified.
    """
    check_new(out)
    policy, evaluation = find_policy(path)
    source = policy.path / (ADAPTER if adapter else POLICY)
    if not source.is_dir():
        raise DataError(f"{policy.path}: was trained without train.lora, so there is no adapter. Export the policy.")
    policy.check()
    certificate = find_certificate(policy)
    if certified:
        require_certificate(policy, certificate)
    report = evaluation.read_json(REPORT) if evaluation else None
    record = certificate.read_json(CERTIFICATE) if certificate else None
    facts = facts_of(policy, evaluation) | ({"expected": expected} if expected else {})
    card = model_card(facts, report, adapter=adapter, certificate=record)
    with atomic_directory(out) as built:
        resharded = max_shard_mb is not None and not adapter
        for name in policy.files_in(source.name):  # what lies there beside them is nobody's output
            if not (resharded and name.endswith((".safetensors", ".safetensors.index.json"))):
                (built / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, built / name)
        if resharded and max_shard_mb is not None:
            from can_dist.training.export import copy_in_shards

            copy_in_shards(source, built, max_shard_mb * 10**6)
        (built / "README.md").write_text(card, encoding="utf-8")
    return out


def check_new(out: Path) -> None:
    """Raise ``ConfigError`` unless the directory ``out`` can be made."""
    if out.exists() or not out.absolute().parent.is_dir():
        state = "already exists" if out.exists() else "has no parent directory"
        raise ConfigError(f"--out {out}: {state}. Give a new directory inside an existing one.")


def find_policy(path: Path) -> tuple[Artifact, Artifact | None]:
    """Return the policy at a path, and its evaluation where there is one.

    Raises:
        DataError: there is no policy, there are several in a run, or several evaluations of the policy.
    """
    run = path.parent if (path / MANIFEST).is_file() else path
    made = {name: [load_artifact(p.parent) for p in sorted(run.glob(f"{name}-*/{MANIFEST}"))] for name in STAGES}
    if run == path:
        evaluated = {artifact.input("policy").path for artifact in made["evaluate"]}
        whole = [
            artifact
            for stage in STAGES[:-1]
            for artifact in made[stage]
            if not (for_other_margins(artifact) or artifact.manifest["identity"]["label"].startswith(ALONE))
        ]
        parts = {
            artifact.path.parent / entry["artifact"]
            for artifact in (*made["mixture"], *made["strength"])
            for name, entry in artifact.manifest["inputs"].items()
            if name.startswith("policy")
        }
        policies = sorted(evaluated) or [policy.path for policy in whole if policy.path not in parts]
        if len(policies) != 1:
            names = ", ".join(policy.name for policy in policies) or "none"
            remedy = "Give the path of the one that is meant" if policies else "`can-dist run` makes it"
            raise DataError(f"{path}: expected one policy, found {names}. {remedy}.")
        policy = load_artifact(policies[0])
    else:
        policy = load_artifact(path)
        if policy.stage not in STAGES:
            raise DataError(
                f"{path}: an artifact of the stage {policy.stage}, which holds no policy. Give one of train."
            )
        if policy.stage == "evaluate":
            return policy.input("policy"), policy
    matching = [artifact for artifact in made["evaluate"] if artifact.input("policy").digest == policy.digest]
    if len(matching) > 1:
        names = ", ".join(evaluation.path.name for evaluation in matching)
        raise DataError(f"{policy.path}: evaluated more than once ({names}). Give the path of the evaluation to show.")
    return policy, matching[0] if matching else None


def adapters_text(lora: Mapping[str, Any] | None) -> str:
    """Return the model card's text on the adapters of a training."""
    if not lora:
        return "none, every weight"
    base = f", trained on (and fitting) the base in 4 bits, {lora['quantize']}" if lora.get("quantize") else ""
    return f"LoRA r = {lora['r']}{base}, merged"


def facts_of(policy: Artifact, evaluation: Artifact | None) -> dict[str, Any]:
    """Return the model card's facts about a policy's origin, all read from manifests."""
    trained, mixed = trained_policy(policy), without_strength(policy)
    identity, summary = trained.manifest["identity"], trained.info["summary"]
    solution = lineage_of(policy, policy).solution or lineage_of(trained, trained).solution
    lam = load_solution(solution).lam if solution else None
    steered = ", ".join(f"{name} {value:.4g} at the end" for name, value in summary.get("lam", {}).items())
    base = method = ""
    made_from: list[tuple[str, str]] = []
    if evaluation is not None:
        report = evaluation.read_json(REPORT)
        method = method_title(evaluation.info["method"], evaluation.info["variant"])
        base = report["config"]["reference"]["model"]
        source, count = report["config"]["prompts"]["source"], report["num_train_prompts"] or "all"
        made_from += [("prompts", f"{_shown(source)}, {count} for training")]
        made_from += [
            (role, f"{_shown(model['model'])} ({model['digest'][:16]})") for role, model in report["models"].items()
        ]
        made_from += [("software", ", ".join(f"{name} {v}" for name, v in report["versions"].items()))]
    options = identity["train"]
    training = f"{summary['num_steps']} steps, {summary['num_examples']} examples, {summary['num_tokens']} tokens"
    made_from += [
        ("training", training),
        ("learning rate", f"{options['learning_rate']:g}"),
        *([("λ, steered in the training", steered)] if steered else []),
        *([("mixture", weights_text(mixed.info["coefficient"]))] if mixed.stage == "mixture" else []),
        *([("strength", f"{policy.info['alpha']:.4g} times what was trained")] if policy.stage == "strength" else []),
        ("adapters", adapters_text(options.get("lora"))),
        ("text", "the tokenizer's chat template" if identity["template"] is None else repr(identity["template"])),
        ("artifact", f"{policy.path.name} (manifest sha256 {policy.digest[:16]})"),
    ]
    return {
        "title": ", ".join(filter(None, [Path(base).name or "A policy", method])),
        "method": method,
        "base": _shown(base),
        "is_hub_model": bool(base) and _shown(base) == base,
        "beta": identity["beta"],
        "lam": lam,
        "made_from": made_from,
    }


def _shown(source: str) -> str:
    """Return the name of a hub repository, or the last part of a path: a user's directories are private."""
    path = Path(source)
    return path.name if path.exists() or path.is_absolute() or source.count("/") > 1 else source


def push(directory: Path, repository: str) -> str:
    """Upload an exported directory to a private repository of the hub; return its address.

    Raises:
        ConfigError: ``repository`` is not a repository's name.
        EnvironmentProblem: there is no login, no network, the hub refuses, or the repository is there already and is
            public.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    if huggingface_hub.get_token() is None:
        raise EnvironmentProblem("--push: no login for the hub is found. Run 'hf auth login', or set HF_TOKEN.")
    try:
        made = huggingface_hub.create_repo(repository, private=True, exist_ok=True)
        is_private = huggingface_hub.model_info(made.repo_id).private
        if is_private:
            huggingface_hub.upload_folder(repo_id=made.repo_id, folder_path=directory)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: expected a name such as user/name. {_first_line(error)}") from None
    except (HTTPError, OfflineModeIsEnabled, OSError) as error:  # HTTPError: of the client that the hub's package uses
        raise EnvironmentProblem(
            f"--push {repository}: the hub did not take it ({_first_line(error)}). {directory} is kept; upload it "
            f"later with 'hf upload {repository} {directory}'."
        ) from None
    if not is_private:  # a repository that was there keeps what it is
        raise EnvironmentProblem(
            f"--push {repository}: this repository is there and is public. Nothing was uploaded, {directory} is kept. "
            "Name another, or make it private."
        )
    return str(made)


def _first_line(error: Exception) -> str:
    token = os.environ.get("HF_TOKEN", "")
    line = str(error).strip().partition("\n")[0]
    return line.replace(token, "<HF_TOKEN>") if token else line


def export_preferences(path: Path, out: Path, *, split: str = "train") -> dict[str, int]:
    """Write a run's preferences as a Parquet table that TRL reads; return the counts of rows and of undecided pairs.

    Pairs become TRL's conversational preference format (``prompt``, ``chosen``, ``rejected``) with the probability
    that the chosen one is better, ``p_chosen``, or SafeDPO's ``offset``, and ``score_chosen``, ``score_rejected``
    where scores made the labels. An example that holds all responses of a prompt becomes its K(K−1)/2 pairs.
    TRL reads a preference as certain: a pair with p = ½ says nothing there and is left out. KTO's examples become the
    unpaired format (``prompt``, ``completion``, ``label``), with the ``weight`` of each.

    Raises:
        DataError: there is no table of preferences, there are several, or it holds advantages.
    """
    preferences = _find_preferences(path)
    loss = preferences.info["loss"]
    if loss == "clipped":
        raise DataError(
            f"{preferences.path}: holds advantages of a policy gradient (primal_dual), which are no preferences.",
            "Give the label-... artifact of another method.",
        )
    rows, counts = [], Counter({"rows": 0, "undecided": 0})
    for example in preferences.table.to_pylist():
        if example["split"] != split:
            continue
        for row in [_unpaired(example)] if loss == "kto" else [_paired(pair, loss) for pair in _pairs(example)]:
            counts["rows" if row else "undecided"] += 1
            rows += [row] if row else []
    if not rows:
        raise DataError(f"{preferences.path}: nothing to export of the split {split!r}.")
    with atomic_file(out) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return dict(counts)


def _find_preferences(path: Path) -> Artifact:
    inside = [path] if (path / MANIFEST).is_file() else [p.parent for p in sorted(path.glob(f"label-*/{MANIFEST}"))]
    tables = [artifact for artifact in map(load_artifact, inside) if artifact.stage == "label"]
    if len(tables) != 1:
        names = ", ".join(artifact.path.name for artifact in tables) or "none"
        raise DataError(
            f"{path}: expected one table of preferences, found {names}. Give the path of a label-... artifact."
        )
    return tables[0]


def _pairs(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an example as pairs: itself, or the pairs of a list, whose targets are its scores."""
    if len(example["texts"]) == 2:
        return [example]
    pairs = []
    for a, b in combinations(range(len(example["texts"])), 2):
        of_pair = {name: [example[name][a], example[name][b]] for name in ("texts", "scores", "response_ids")}
        name = pair_id(*({"response_id": response_id} for response_id in of_pair["response_ids"]))
        pairs.append({**example, **of_pair, "target": of_pair["scores"], "example_id": name})
    return pairs


def _paired(example: dict[str, Any], loss: str) -> dict[str, Any] | None:
    """Return the pair with the better response as chosen; None for a tie. A target is p, an offset or a score."""
    a, b = example["target"]
    if a == b:
        return None
    better = int(b > a)
    texts, scores = example["texts"], example["scores"]
    row = {
        "prompt": example["messages"],
        "chosen": _said(texts[better]),
        "rejected": _said(texts[1 - better]),
        "example_id": example["example_id"],
    }
    if loss == "offset":
        row["offset"] = abs(a - b) - 1
    elif loss == "sigmoid":
        row["p_chosen"] = max(a, b)
    elif loss == "pairwise":
        row["p_chosen"] = max(score_targets("sigmoid", scores))
    return row | ({"score_chosen": scores[better], "score_rejected": scores[1 - better]} if scores else {})


def _unpaired(example: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": example["messages"],
        "completion": _said(example["texts"][0]),
        "label": example["target"][0] > 0,
        "weight": example["weight"],
        "example_id": example["example_id"],
    }


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
