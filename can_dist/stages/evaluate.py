"""policy → report: fresh responses of policy and reference on held-out prompts, scored by the same scorers.

Every method is measured in the same way against the same reference; its held-out responses and scores are computed
once per run directory. A dual's prediction is shown beside the measurement of a policy that its solution labelled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from can_dist.config import Model
from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.measuring.gains import gains_table
from can_dist.measuring.verdicts import verdict_line
from can_dist.modeling.formatter import text_identity
from can_dist.modeling.loading import model_digest
from can_dist.modeling.precision import run_precision
from can_dist.scoring.kinds import scorer_identity
from can_dist.scoring.protocol import LogProb, ScorerSpec
from can_dist.stages.cost import made
from can_dist.stages.generate import generate
from can_dist.stages.ingest import ingest_benign
from can_dist.stages.profile import profile_inputs
from can_dist.stages.report import Lineage, build_report, log_ratio, method_title
from can_dist.stages.score import score
from can_dist.stages.train import policy_model
from can_dist.stages.utilities import column_keys, columns_of, measured
from can_dist.tables.artifacts import Artifact, digest_of, write_json, write_part
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.workspace import PAGE, REPORT, Workspace


def evaluate(
    work: Workspace,
    lineage: Lineage,
    reference: Model,
    scorers: Mapping[str, ScorerSpec],
    constraints: Mapping[str, Constraint],
    *,
    reward: str,
    variant: str = "",
    estimate: Artifact | None = None,
) -> Artifact:
    """Return the artifact with ``report.json``, ``report.html`` and a table of each held-out prompt's gains.

    Every interval is over prompts: a prompt's responses are averaged first, because the prompt is the unit that was
    sampled. The improvement is paired by prompt. Intervals hold at 95 %, those of several constraints jointly.
    ``variant`` names the policy among several of one method, such as 'q=0.25'. ``estimate`` is that of the policy on
    the validation prompts, shown beside.
    """
    policy = policy_model(lineage.policy, reference)
    before = generate(work, reference, lineage.prompts, split="test", role="reference")
    after = generate(work, policy, lineage.prompts, split="test", role="policy")
    logps: dict[str, ScorerSpec] = {LOGP_REFERENCE: LogProb(model=reference), LOGP_POLICY: LogProb(model=policy)}
    inputs = {
        "policy": lineage.policy,
        "responses_before": before,
        "responses_after": after,
        "scores_before": score(work, before, scorers, role="reference on test"),
        "scores_after": score(work, after, {**scorers, **logps}, role="policy on test"),
        **_benign_responses(work, lineage.prompts, reference, policy),
        **profile_inputs(work, lineage.prompts, reference, policy, scorers),
    }
    if lineage.solution is not None and lineage.train_scores is not None:
        inputs |= {"solution": lineage.solution, "train_scores": lineage.train_scores}
    if estimate is not None:
        inputs["estimate"] = estimate
    identity_keys = {
        "method": work.config.method,
        "variant": variant,
        "samples": work.config.evaluate.num_samples,
        "reward": reward,
        "constraints": {
            name: identity(constraint, exclude=["scorer", "others"]) for name, constraint in constraints.items()
        },
        "intervals": "Student and Hall",
    }
    stage = work.open("evaluate", method_title(work.config.method, variant), identity_keys, inputs)
    if stage.finished:
        return _shown(work, stage.finished)
    work.release_actors()
    from can_dist.reporting.run_page import page_values, write_report

    with work.timed("evaluate", method_title(work.config.method, variant)):
        report = build_report(work, inputs, constraints, reward, variant)
        columns = columns_of(constraints)
        report["basis"] = _basis(work, inputs, reference, scorers) | column_keys(columns)
        write_json(stage.path / REPORT, report)
        page = page_values(report)
        write_report(page, stage.path / PAGE)
        sides = (inputs["scores_before"], inputs["scores_after"])
        before, after = (measured(scores.table, columns, str(scores.path)) for scores in sides)
        gains = gains_table(before, after, [reward, *constraints], log_ratio(after))
        write_part(stage.path, 0, gains)
        shown = ("method", "variant", "constraints", "reward", "basis")
        evaluation = stage.commit([REPORT, PAGE], info={name: report[name] for name in shown})
    return _shown(work, evaluation, page)


def _shown(work: Workspace, evaluation: Artifact, values: Mapping[str, Any] | None = None) -> Artifact:
    """Return a finished evaluation: the run's own page becomes that of it, and its verdicts are said.

    Args:
        work: The run.
        evaluation: The artifact.
        values: Of its page, where they are made.
    """
    from can_dist.reporting.run_page import page_values, write_report

    page = work.directory / PAGE
    write_report(values or page_values(evaluation.read_json(REPORT)), page, made=made(evaluation))
    verdicts = "; ".join(verdict_line(row) for row in evaluation.info["constraints"])
    work.say(f"evaluate ({evaluation.info['method']}): {verdicts}; report: {page}")
    return evaluation


def _benign_responses(work: Workspace, prompts: Artifact, reference: Model, policy: Model) -> dict[str, Artifact]:
    """Return both models' responses to the benign prompts; empty where the configuration has none."""
    source = work.config.evaluate.benign_prompts
    if source is None:
        return {}
    benign = ingest_benign(work, source, prompts)
    return {
        "benign_before": generate(work, reference, benign, split="test", role="reference, benign prompts"),
        "benign_after": generate(work, policy, benign, split="test", role="policy, benign prompts"),
    }


def _basis(
    work: Workspace, inputs: Mapping[str, Artifact], reference: Model, scorers: Mapping[str, ScorerSpec]
) -> dict[str, Any]:
    """Return the values that comparable evaluations share: reference, held-out prompts, sampling, scorers."""
    options, precision = work.config.generate, run_precision(work.config)
    prompts = sorted(set(inputs["scores_before"].table.column("prompt_id").to_pylist()))
    return {
        "reference": {"weights": model_digest(reference), **text_identity(reference)},
        "held_out_prompts": digest_of(prompts),
        "sampling": {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
        | {"stop": list(options.stop)},
        "scorers": {name: scorer_identity(spec, precision) for name, spec in scorers.items()},
    }
