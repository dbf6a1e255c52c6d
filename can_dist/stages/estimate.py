"""policy → estimate: what it does, from the reference's scored validation responses and one pass of log-probabilities.

Nothing is generated. The responses are those of prompts that nothing was trained on: of the training's own responses,
which a policy memorises, the same numbers would say nothing of fresh ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from can_dist.config import Model
from can_dist.dual import PolicyEstimate, estimate_line, estimate_policy
from can_dist.modeling.loading import model_directory
from can_dist.scoring.log_ratio import check_same_text
from can_dist.scoring.protocol import LogProb
from can_dist.stages.score import score
from can_dist.stages.solve import demands, labelled_lam, load_solution, score_table, solved_columns
from can_dist.stages.train import Policy, policy_model
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.tables.quarantine import quarantined, without
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.workspace import Workspace

ESTIMATE = "estimate.json"
MIXTURE = "mixture.json"
"""Of a stage ``mixture``: coefficients, what they do to second order, and how well mixing held."""


def estimate(
    work: Workspace, policy: Policy, reference: Model, solution: Artifact, validation: Artifact, *, reward: str
) -> Artifact:
    """Return the artifact of what a policy does on the validation prompts (``estimate.json``); say it in a line.

    ``policy`` is a trained one, or any model directory of the reference's architecture and tokenizer. ``validation``
    are the scores, with ln π_ref, of the reference's validation responses. Length and direction are along the score
    that a trained policy was labelled with, and for any other model along that of ``solution``.

    Raises:
        DataError: A model that was given has not the reference's tensors or tokenizer, every prompt has one response,
            or a log-probability is not finite.
    """
    if isinstance(policy, Model):
        check_comparable(policy, reference)
    name = _shown(policy)
    log_probs = validation_log_probs(work, policy_model(policy, reference), validation, name)
    lam, solved = lam_of(policy, solution), load_solution(solution)
    inputs = {"validation": validation, "log_probs": log_probs, "solution": solution}
    if isinstance(policy, Artifact):
        inputs["policy"] = policy
    stage = work.open("estimate", name, {"reward": reward, "lam": dict(lam), "beta": solved.beta}, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("estimate", name):
        rows = with_log_probs(validation, {LOGP_POLICY: log_probs})
        log_weight = solution.manifest["identity"]["log_weight"]
        estimate = estimate_policy(
            score_table(rows, reward, solved_columns(solution), log_weight, str(validation.path)),
            rows.column(LOGP_REFERENCE).to_numpy(),
            rows.column(LOGP_POLICY).to_numpy(),
            lam=lam,
            beta=solved.beta,
        )
        write_json(stage.path / ESTIMATE, estimate.to_dict())
        line = estimate_line(estimate, demands(solution))
        work.say(f"estimate: {line} ({estimate.num_prompts} validation prompts). {estimate.sentence}")
        return stage.commit([ESTIMATE])


def load_estimate(artifact: Artifact) -> PolicyEstimate:
    """Return the estimate of an ``estimate`` artifact."""
    return PolicyEstimate.from_dict(artifact.read_json(ESTIMATE))


def trained_policy(policy: Artifact) -> Artifact:
    """Return the training that a policy is a strength or a mixture of, the first of several; itself where it is one."""
    while policy.stage in ("strength", "mixture", "merge"):
        policy = policy.input("policy_a" if policy.stage == "merge" else "policy")
    return policy


def without_strength(policy: Artifact) -> Artifact:
    """Return the policy that a strength was given to; any other as it is."""
    return policy.input("policy") if policy.stage == "strength" else policy


def lam_of(policy: Policy, solution: Artifact) -> Mapping[str, float]:
    """Return λ of the score that a policy was last trained, or mixed, towards; of the solution for any other model."""
    if isinstance(policy, Artifact):
        if (mixed := without_strength(policy)).stage == "mixture":
            mu: Mapping[str, float] = mixed.read_json(MIXTURE)["mu"]
            return mu
        trained = trained_policy(policy)
        steered: Mapping[str, float] | None = trained.info.get("summary", {}).get(
            "lam"
        )  # λ at the end of a training it moved in
        return steered or labelled_lam(trained.input("preferences"), solution)
    return load_solution(solution).lam


def check_comparable(policy: Model, reference: Model) -> None:
    """Raise ``DataError`` unless a model has the tensors and reads the text of the reference."""
    from can_dist.training.stretch import comparable_tensors

    check_same_text(policy, reference)
    comparable_tensors(model_directory(reference), model_directory(policy))


def _shown(policy: Policy) -> str:
    if isinstance(policy, Model):
        return Path(policy.model).name
    if policy.stage == "strength":
        return f"policy at strength {policy.info['alpha']:.3g}"
    return "mixture" if policy.stage == "mixture" else "policy"


def validation_log_probs(work: Workspace, model: Model, validation: Artifact, name: str) -> Artifact:
    """Score the validation responses with ln π of a model; ``name`` is what messages call it."""
    responses = validation.input("responses")
    return score(work, responses, {LOGP_POLICY: LogProb(model=model)}, role=f"{name} on validation")


def with_log_probs(validation: Artifact, log_probs: Mapping[str, Artifact]) -> pa.Table:
    """Return the validation scores with log-probabilities as columns by name, less what any of them leaves out."""
    left_out = dict(quarantined(validation))
    for scores in log_probs.values():
        left_out |= quarantined(scores)
    table = without(validation.table, left_out)
    for name, scores in log_probs.items():
        logp = without(scores.table, left_out)
        assert table.column("response_id").equals(logp.column("response_id")), "all are scores of the same responses"
        table = table.append_column(name, logp.column(LOGP_POLICY))
    return table
