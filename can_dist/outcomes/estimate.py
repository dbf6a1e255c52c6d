"""A finished run and a policy → its estimate, as an artifact of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from can_dist.config import Model, load_config
from can_dist.config.walk import REWARD
from can_dist.dual import estimate_line, verdict
from can_dist.errors import ConfigError, DataError
from can_dist.outcomes.export import find_policy
from can_dist.run import Run
from can_dist.stages.estimate import load_estimate
from can_dist.stages.report import lineage_of
from can_dist.stages.solve import demands, load_solution, solved_columns
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact
from can_dist.tables.schemas import LOGP_REFERENCE

CONFIG = "config.yaml"


def run_estimate(path: Path, policy: Path | None = None) -> Artifact:
    """Return the estimate of a run's policy, or of the model directory ``policy``, on its validation responses.

    ``path`` is a run with one policy, or an artifact of the stages train, strength or evaluate.

    Raises:
        ConfigError: ``policy`` is no directory.
        DataError: The run has no policy, several, no dual's solution or no validation scores; or ``policy`` has not the
            reference's tensors or tokenizer.
    """
    if policy is not None and not policy.is_dir():
        raise ConfigError(f"--policy {policy}: no such directory. Give one with config.json and safetensors.")
    own, _ = find_policy(path)
    solution = find_solution(own)
    validation = find_validation(own.path.parent, solution)
    config = load_config(own.path.parent / CONFIG)
    with Run(own.path.parent, config) as run:
        model = own if policy is None else Model(model=str(policy.resolve()), template=config.reference.template)
        return run.estimate(model, config.reference, solution, validation)


def find_solution(policy: Artifact) -> Artifact:
    """Return the dual's solution that a policy was made for; raise ``DataError`` where there was none."""
    solution = policy.input("solution") if policy.stage == "strength" else lineage_of(policy, policy).solution
    estimates = (load_artifact(path.parent) for path in sorted(policy.path.parent.glob(f"estimate-*/{MANIFEST}")))
    of_policy = (e for e in estimates if e.manifest["inputs"].get("policy", {}).get("digest") == policy.digest)
    if solution is None and (estimate := next(of_policy, None)):  # of a loop on λ, whose evaluation estimated it
        return estimate.input("solution")
    if solution is None:
        raise DataError(
            f"{policy.path}: was labelled with no dual's solution, so there is no margin and no λ to estimate it by.",
            "Give the policy of a MoCAN or PeCAN run, or one of C-DPO or CAID that was evaluated with validation "
            "prompts.",
        )
    return solution


def find_validation(run: Path, solution: Artifact) -> Artifact:
    """Return a run's scores of the validation responses, by the scorers and for the prompts of a solution.

    Raises:
        DataError: There are none.
    """
    scores = solution.input("scores")
    tables = [load_artifact(estimate.parent) for estimate in sorted(run.glob(f"scores-*/{MANIFEST}"))]
    names = [REWARD, *(name for c in solved_columns(solution) for name in c.sources), LOGP_REFERENCE]
    for table in tables:
        if (
            table.manifest["identity"]["label"] == "reference on validation"
            and _prompts(table) == _prompts(scores)
            and _scorers(table, names) == _scorers(scores, names)
        ):
            return table
    raise DataError(
        f"{run}: no scored validation responses beside {scores.path.name}. They are made where prompts.num_validation "
        "is not 0; it decides which prompts are trained on, so run again with it, in a directory of its own."
    )


def estimate_text(artifact: Artifact) -> str:
    """Return an estimate as lines: the numbers, how they were made, the verdict with its cause, the artifact."""
    estimate, solution = load_estimate(artifact), artifact.input("solution")
    demanded, predicted = demands(solution), float(load_solution(solution).predicted["kl"])
    return "\n".join(
        [
            estimate_line(estimate, demanded),
            f"{estimate.num_prompts} validation prompts. {estimate.sentence}",
            verdict(estimate, demanded, predicted_kl=predicted),
            str(artifact.path),
        ]
    )


def _prompts(scores: Artifact) -> str:
    return str(scores.input("responses").manifest["inputs"].get("prompts", {}).get("digest"))


def _scorers(scores: Artifact, names: Sequence[str]) -> list[object]:
    return [scores.info["scorers"].get(name) for name in names]
