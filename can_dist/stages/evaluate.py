"""policy → report: fresh responses of policy and reference on held-out prompts, scored by the same scorers.

Every method is measured in the same way against the same reference, whose held-out responses and scores are made once
per run directory. What a dual predicted stands beside it where the policy was labelled with a dual's solution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.config import Constraint, Model, identity
from can_dist.modeling.loading import model_digest, resolve_precision
from can_dist.reporting.examination import examine
from can_dist.reporting.measures import (
    by_prompt,
    column,
    constraint_row,
    gains_table,
    improvement,
    interval,
    joint_confidence,
    lengths,
    refusals,
    safety_tails,
    win_rate,
)
from can_dist.reporting.predicted import (
    held_out_prediction,
    multipliers,
    prediction_source,
    predictions,
    score_table,
)
from can_dist.scoring.protocol import LogProb, ScorerSpec, scorer_identity
from can_dist.stages.generate import generate
from can_dist.stages.ingest import ingest_benign
from can_dist.stages.score import score
from can_dist.stages.solve import load_solution
from can_dist.stages.train import policy_model
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, digest_of, write_json, write_part
from can_dist.tables.quarantine import quarantined, scored_responses
from can_dist.training import CURVE
from can_dist.training.metrics import loss_above_start

REPORT, PAGE = "report.json", "report.html"
PACKAGES = ("can-dist", "torch", "transformers", "deepspeed", "ray", "numpy", "pyarrow")
TITLES = {
    "mocan": "MoCAN",
    "pecan": "PeCAN",
    "dpo_h": "DPO-H",
    "dpo_s": "DPO-S",
    "sacpo": "SACPO",
    "p_sacpo": "P-SACPO",
    "cdpo": "C-DPO",
    "caid": "CAID",
}
"""The methods as the papers write them, in the order of tables."""


@dataclass(frozen=True)
class Lineage:
    """The artifacts an evaluation sets beside the policy; those of a dual are None where the method has none.

    ``solution`` is the one the policy's preferences were labelled with, ``train_scores`` the table that gave it.
    """

    policy: Artifact
    prompts: Artifact
    solution: Artifact | None = None
    train_scores: Artifact | None = None


def lineage_of(policy: Artifact, prompts: Artifact) -> Lineage:
    """Find the dual's solution that a policy's preferences were labelled with, and the scores that gave it, if any."""
    found = policy
    for name in ("preferences", "solution"):
        if name not in found.manifest["inputs"]:
            return Lineage(policy, prompts)
        found = found.input(name)
    return Lineage(policy, prompts, found, found.input("scores"))


def evaluate(
    work: Workspace,
    lineage: Lineage,
    reference: Model,
    scorers: Mapping[str, ScorerSpec],
    constraints: Mapping[str, Constraint],
    *,
    reward: str,
    variant: str = "",
) -> Artifact:
    """Return the artifact with ``report.json``, ``report.html`` and a table of each held-out prompt's gains.

    Every interval is over prompts: a prompt's responses are averaged first, because the prompt is the unit that was
    sampled. The improvement is paired by prompt. Intervals hold at 95 %, those of several constraints jointly.
    ``variant`` names the policy among several of one method, such as 'q=0.25'.
    """
    policy = policy_model(lineage.policy, reference)
    before = generate(work, reference, lineage.prompts, split="test", role="reference")
    after = generate(work, policy, lineage.prompts, split="test", role="policy")
    logps: dict[str, ScorerSpec] = {"logp.reference": LogProb(model=reference), "logp.policy": LogProb(model=policy)}
    inputs = {
        "policy": lineage.policy,
        "responses_before": before,
        "responses_after": after,
        "scores_before": score(work, before, scorers, role="reference on test"),
        "scores_after": score(work, after, {**scorers, **logps}, role="policy on test"),
        **_benign_responses(work, reference, policy),
    }
    if lineage.solution is not None and lineage.train_scores is not None:
        inputs |= {"solution": lineage.solution, "train_scores": lineage.train_scores}
    what = {
        "method": work.config.method,
        "variant": variant,
        "samples": work.config.evaluate.num_samples,
        "reward": reward,
        "constraints": {name: identity(one, exclude=["scorer"]) for name, one in constraints.items()},
        "intervals": "Student and Hall",
    }
    stage = work.open("evaluate", method_title(work.config.method, variant), what, inputs)
    if stage.finished:
        return stage.finished
    work.release_actors()
    with work.timed("evaluate", method_title(work.config.method, variant)):
        from can_dist.reporting.html import write_report

        report = build_report(work, inputs, constraints, reward, variant)
        report["basis"] = _basis(work, inputs, reference, scorers)
        write_json(stage.path / REPORT, report)
        write_report(report, stage.path / PAGE)
        scored = inputs["scores_after"].table
        gains = gains_table(inputs["scores_before"].table, scored, [reward, *constraints], _log_ratio(scored))
        write_part(stage.path, 0, gains)
        kept = ("method", "variant", "constraints", "reward", "basis")
        return stage.commit([REPORT, PAGE], info={name: report[name] for name in kept})


def method_title(method: str, variant: str = "") -> str:
    """Return a method's name as the papers write it, with the variant in brackets: 'P-SACPO (q=0.25)'."""
    title = TITLES[method]
    return f"{title} ({variant})" if variant else title


def _benign_responses(work: Workspace, reference: Model, policy: Model) -> dict[str, Artifact]:
    """Return both models' responses to the benign prompts, where the configuration names some."""
    source = work.config.evaluate.benign_prompts
    if source is None:
        return {}
    prompts = ingest_benign(work, source)
    return {
        "benign_before": generate(work, reference, prompts, split="test", role="reference, benign prompts"),
        "benign_after": generate(work, policy, prompts, split="test", role="policy, benign prompts"),
    }


def _basis(
    work: Workspace, inputs: Mapping[str, Artifact], reference: Model, scorers: Mapping[str, ScorerSpec]
) -> dict[str, Any]:
    """Return what two evaluations must share to be compared: reference, held-out prompts, sampling, scorers."""
    options, precision = work.config.generate, resolve_precision(work.config.precision)
    prompts = sorted(set(inputs["scores_before"].table.column("prompt_id").to_pylist()))
    return {
        "reference": {"weights": model_digest(reference), "template": reference.template},
        "held_out_prompts": digest_of(prompts),
        "sampling": {name: getattr(options, name) for name in ("temperature", "top_p", "max_new_tokens")}
        | {"stop": list(options.stop)},
        "scorers": {name: scorer_identity(spec, precision) for name, spec in scorers.items()},
    }


def build_report(
    work: Workspace, inputs: Mapping[str, Artifact], constraints: Mapping[str, Constraint], reward: str, variant: str
) -> dict[str, Any]:
    """Compute every number of the report from the committed tables."""
    before, after = inputs["scores_before"].table, inputs["scores_after"].table
    names = [reward, *constraints]
    dual = _dual(inputs, before, reward, work.config.method)
    kl = dual["kl"] | {"realised": interval(by_prompt(after, _log_ratio(after))[1])}
    title = method_title(work.config.method, variant)
    return {
        "format_version": 3,
        "title": f"{title}: predicted and realised" if dual["prediction"] else f"{title}: measured",
        "method": work.config.method,
        "variant": variant,
        "name": title,
        "beta": work.config.beta,
        "num_train_prompts": dual["num_prompts"],
        "num_test_prompts": inputs["responses_before"].info["num_prompts"],
        "num_responses": work.config.generate.num_responses if dual["solution"] else None,
        "models": _models(inputs),
        "solution": dual["solution"],
        "examination": dual["examination"],
        "prediction": dual["prediction"],
        "unpredicted": dual["unpredicted"],
        "constraints": [
            constraint_row(name, one, before, after, joint_confidence(len(constraints)))
            | dual["lam"].get(name, {})
            | dual["scores"].get(name, {})
            for name, one in constraints.items()
        ],
        "reward": {"name": reward, **dual["scores"].get(reward, {}), "realised": improvement(before, after, reward)},
        "kl": kl,
        "win_rate": {name: win_rate(before, after, name) for name in names},
        "tails": safety_tails(before, after, constraints),
        "refusals": _refusals(inputs),
        "lengths": {"reference": lengths(before), "policy": lengths(after)},
        "scores": {
            name: {"reference": column(before, name).tolist(), "policy": column(after, name).tolist()} for name in names
        },
        "training": _training(inputs["policy"]),
        "counts": _counts(inputs),
        "warnings": _warnings(work, before, after) + _drift(kl, inputs["policy"], dual["examination"]),
        "samples": _samples(inputs, names, work.config.evaluate.num_samples),
        "config": identity(work.config, exclude=["cluster", "methods"]),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _dual(inputs: Mapping[str, Artifact], before: pa.Table, reward: str, method: str) -> dict[str, Any]:
    """Return what the dual says of this policy: its solution, its examination, and what it predicted by score."""
    found: dict[str, Any] = {"solution": None, "examination": None, "prediction": None, "unpredicted": None}
    found |= {"lam": {}, "scores": {}, "kl": {}, "num_prompts": None}
    if "solution" not in inputs:
        return found | {"unpredicted": _why_unpredicted(method)}
    solution = load_solution(inputs["solution"])
    log_weight = inputs["solution"].manifest["identity"]["log_weight"]
    table = score_table(inputs["train_scores"].table, reward, solution, log_weight)
    examination = examine(table, solution, reward_name=reward)
    found |= {"solution": solution.to_dict(), "examination": examination, "lam": multipliers(solution)}
    found["num_prompts"] = solution.diagnostics["num_prompts"]
    solved, measured = (inputs[name].info["scorers"] for name in ("train_scores", "scores_before"))
    if any(solved[name] != measured.get(name) for name in (reward, *solution.lam)):
        unpredicted = "λ* was solved with other scores than those measured here, so its prediction is in other units."
        return found | {"unpredicted": unpredicted}
    scores, kl = predictions(held_out_prediction(before, reward, solution), examination, reward, solution)
    return found | {"prediction": prediction_source(examination, solution, before), "scores": scores, "kl": kl}


def _why_unpredicted(method: str) -> str:
    """Return why a policy that was not labelled with a dual's own solution has no prediction beside it."""
    title = method_title(method)
    if method in ("cdpo", "caid"):
        return (
            f"{title} chose this policy’s λ by what its trained policies measured, not by the dual, so what the dual "
            "predicts of λ* is no prediction of it; the trajectory in the run directory has what each round measured."
        )
    return f"{title} trained this policy for no dual’s solution, so nothing predicted it."


def _log_ratio(after: pa.Table) -> np.ndarray:
    """Return ln π(y|x) − ln π_ref(y|x) of the policy's own responses; its mean is the KL divergence."""
    return column(after, "logp.policy") - column(after, "logp.reference")


def _refusals(inputs: Mapping[str, Artifact]) -> dict[str, Any] | None:
    if "benign_before" not in inputs:
        return None
    before, after = inputs["benign_before"], inputs["benign_after"]
    rates = {"reference": refusals(before.table), "policy": refusals(after.table)}
    return {"num_prompts": before.info["num_prompts"], **rates}


def _training(policy: Artifact) -> dict[str, Any] | None:
    """Return the losses of the training that made the policy; None for one that was not trained but merged."""
    if "summary" not in policy.info:
        return None
    curve, summary = policy.read_json(CURVE), policy.info["summary"]
    return {
        "num_steps": summary["num_steps"],
        "loss": curve["loss"],
        "eval_loss": curve["eval_loss"],
        "tokens": summary["num_tokens"],
    }


def _counts(inputs: Mapping[str, Artifact]) -> dict[str, int]:
    """Return what became of every response (in = scored + quarantined) and of the training examples."""
    named = {
        "train_scores": "training responses",
        "scores_before": "held-out responses of the reference",
        "scores_after": "held-out responses of the policy",
    }
    counts: dict[str, int] = {}
    for name, what in named.items():
        if name in inputs:
            scored, left_out = inputs[name].num_rows, len(quarantined(inputs[name]))
            counts |= {what: scored + left_out, f"{what}, scored": scored, f"{what}, quarantined": left_out}
    if "preferences" in inputs["policy"].manifest["inputs"]:
        labelled = inputs["policy"].input("preferences").info["counts"]
        counts |= {f"preferences: {reason}": number for reason, number in labelled.items()}
    return counts


def _models(inputs: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    scorers = inputs["scores_after"].info["scorers"]
    models = {"policy": {"model": inputs["policy"].path.name, "digest": inputs["policy"].digest}}
    for name, info in scorers.items():
        if name != "logp.policy":
            role = "reference" if name == "logp.reference" else name
            models[role] = {"model": info["model"], "digest": str(info.get("weights") or info.get("source"))}
    return models


def _warnings(work: Workspace, before: pa.Table, after: pa.Table) -> list[str]:
    warnings = []
    options = work.config.generate
    if options.temperature != 1 or options.top_p != 1:
        warnings.append(
            f"Responses were sampled with temperature {options.temperature} and top-p {options.top_p}: not from the "
            "models themselves, so the KL divergence shown is that of the sampled text under the untempered models."
        )
    means = {}
    for who, table in (("reference", before), ("policy", after)):
        found = lengths(table)
        means[who] = found["mean"]
        if found["truncated_fraction"] > 0.05:
            warnings.append(
                f"{found['truncated_fraction']:.0%} of the {who}'s responses were cut at generate.max_new_tokens = "
                f"{options.max_new_tokens}; their scores may depend on what is missing."
            )
    longer = means["policy"] / max(means["reference"], 1.0)
    if not 0.67 < longer < 1.5:
        warnings.append(
            f"The policy's responses are {longer:.2f} times as long as the reference's: look for length bias."
        )
    return warnings


def _drift(kl: Mapping[str, Any], policy: Artifact, examination: Mapping[str, Any] | None) -> list[str]:
    """Pairs fix only differences of log-ratios, so a policy can fit them and still leave the reference behind.

    A KL beyond its prediction is called drift only where the prediction can be believed: K responses cannot show a KL
    above ln K, so at few responses the exact policy itself lies far above it.
    """
    warnings = []
    judgement = ((examination or {}).get("diagnosis") or {}).get("judgement")
    if judgement and not judgement["objection"] and kl["realised"]["low"] > 2 * judgement["kl"]["high"]:
        warnings.append(
            f"The policy is {kl['realised']['mean']:.2f} nats from the reference, more than twice the "
            f"{judgement['kl']['high']:.2f} that the solve allows: training drifted. Lower train.learning_rate or add "
            "train.warmup_steps."
        )
    loss = loss_above_start(policy.read_json(CURVE)) if "summary" in policy.info else None
    if loss is not None:
        warnings.append(f"The last training loss, {loss:.3f}, is above its start at ln 2 = 0.693: the policy drifted.")
    return warnings


def _samples(inputs: Mapping[str, Artifact], names: list[str], count: int) -> list[dict[str, Any]]:
    """The first response of both models to the first prompts of the held-out split."""
    rows = {}
    for who in ("before", "after"):
        responses = scored_responses(inputs[f"responses_{who}"], inputs[f"scores_{who}"]).to_pylist()
        scores = inputs[f"scores_{who}"].table.to_pylist()
        first: dict[str, Any] = {}
        for response, scored in zip(responses, scores, strict=True):
            first.setdefault(response["prompt_id"], (response, scored))
        rows[who] = first
    samples = []
    for prompt_id, (response, scored) in list(rows["before"].items())[:count]:
        theirs, their_scores = rows["after"][prompt_id]
        samples.append(
            {
                "prompt": "\n\n".join(f"{m['role']}: {m['content']}" for m in response["messages"]),
                "reference": response["text"],
                "policy": theirs["text"],
                "scores": {name: [scored[name], their_scores[name]] for name in names},
            }
        )
    return samples
