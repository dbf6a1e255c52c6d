"""The record of an evaluation: all values that the report, the comparison and the model card show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.config import METHODS
from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.dual import Column, estimate_line, verdict
from can_dist.measuring.examination import examine, influential
from can_dist.measuring.gains import (
    SIDES,
    by_prompt,
    column,
    constraint_row,
    improvement,
    interval,
    joint_confidence,
    lengths,
    refusals,
    safety_tails,
    win_rate,
)
from can_dist.measuring.predicted import held_out_prediction, multipliers, prediction_source, predictions, shifted
from can_dist.measuring.ray import ray
from can_dist.stages.estimate import MIXTURE, load_estimate, without_strength
from can_dist.stages.profile import profile_record
from can_dist.stages.samples import beginnings, chosen_samples, crossings
from can_dist.stages.solve import cvar_offset, demands, load_solution, solved_columns, solved_table
from can_dist.stages.strength import STRENGTH
from can_dist.stages.train import drift_warning
from can_dist.stages.utilities import columns_of, measured
from can_dist.tables.artifacts import Artifact
from can_dist.tables.quarantine import quarantined
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.tables.utilities import with_utilities
from can_dist.training import CURVE
from can_dist.training.metrics import ESTIMATE
from can_dist.workspace import Workspace

ESTIMATED = f"{ESTIMATE}."
PACKAGES = ("can-dist", "torch", "transformers", "deepspeed", "ray", "numpy", "pyarrow")


@dataclass(frozen=True)
class Lineage:
    """The artifacts that an evaluation reads beside the policy; those of a dual are None where the method has none.

    ``solution`` labelled the policy's preferences; ``train_scores`` is the table that it was solved on.
    """

    policy: Artifact
    prompts: Artifact
    solution: Artifact | None = None
    train_scores: Artifact | None = None


def lineage_of(policy: Artifact, prompts: Artifact) -> Lineage:
    """Find the dual's solution that labelled a policy's preferences, or a mixture is for, and its scores, if any."""
    ancestor = without_strength(policy)
    if ancestor.stage == "mixture":
        solution = ancestor.input("solution")
        return Lineage(policy, prompts, solution=solution, train_scores=solution.input("scores"))
    for name in ("preferences", "solution"):
        if name not in ancestor.manifest["inputs"]:
            return Lineage(policy, prompts)
        ancestor = ancestor.input(name)
    return Lineage(policy, prompts, solution=ancestor, train_scores=ancestor.input("scores"))


def as_trained(policy: Artifact) -> Artifact:
    """Return the training of all scores that a strength, or a mixture, was made of; any other policy as it is."""
    policy = without_strength(policy)
    return policy.input("policy") if policy.stage == "mixture" else policy


def method_title(method: str, variant: str = "") -> str:
    """Return a method's name as the papers write it, with the variant in brackets: 'P-SACPO (q=0.25)'."""
    title = METHODS[method].title
    return f"{title} ({variant})" if variant else title


def build_report(
    work: Workspace, inputs: Mapping[str, Artifact], constraints: Mapping[str, Constraint], reward: str, variant: str
) -> dict[str, Any]:
    """Compute every number of the report from the committed tables."""
    columns, names = columns_of(constraints), [reward, *constraints]
    sides = {who: inputs[f"scores_{who}"] for who in ("before", "after")}
    before, after = (with_utilities(scores.table, columns, str(scores.path)) for scores in sides.values())
    measured_before, measured_after = (measured(s.table, columns, str(s.path)) for s in sides.values())
    dual = _dual(inputs, reward, work.config.method)
    kl = dual["kl"] | {"realised": interval(by_prompt(after, log_ratio(after))[1])}
    worst = [made for made in columns if made.of == "worst_of"]
    title, tails = method_title(work.config.method, variant), _tails(sides, worst, constraints)
    borders = {name: float(row["border"]) for name, row in tails.items()}
    profile = _profile(inputs, worst, borders)
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
            constraint_row(made.name, constraint, measured_before, measured_after, joint_confidence(len(columns)))
            | dual["lam"].get(made.name, {})
            | dual["scores"].get(made.name, {})
            | {"utility": made.words}
            for made, constraint in zip(columns, constraints.values(), strict=True)
        ],
        "reward": {"name": reward, **dual["scores"].get(reward, {}), "realised": improvement(before, after, reward)},
        "kl": kl,
        "win_rate": {name: win_rate(before, after, name) for name in names},
        "tails": tails,
        "refusals": _refusals(inputs, profile),
        "profile": profile,
        "lengths": {"reference": lengths(before), "policy": lengths(after)},
        "scores": {
            name: {"reference": column(before, name).tolist(), "policy": column(after, name).tolist()} for name in names
        },
        "training": _training(as_trained(inputs["policy"])),
        "estimate": _estimated(inputs, reward),
        "counts": _counts(inputs),
        "warnings": _warnings(work, before, after) + _drift(kl, as_trained(inputs["policy"]), dual["examination"]),
        "crossings": crossings(inputs, borders, worst),
        "samples": chosen_samples(inputs, names, borders, work.config.evaluate.num_samples, worst),
        "config": identity(work.config, exclude=["cluster", "methods"]),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _tails(
    sides: Mapping[str, Artifact], worst: Sequence[Column], constraints: Mapping[str, Constraint]
) -> dict[str, Any]:
    """Return the tails of every constraint's score as it was given, or of the smallest of several."""
    before, after = (with_utilities(scores.table, worst, str(scores.path)) for scores in sides.values())
    return safety_tails(before, after, constraints)


def _dual(inputs: Mapping[str, Artifact], reward: str, method: str) -> dict[str, Any]:
    """Return the dual's part of the record: its solution, its examination, and its prediction by score."""
    record: dict[str, Any] = {"solution": None, "examination": None, "prediction": None, "unpredicted": None}
    record |= {"lam": {}, "scores": {}, "kl": {}, "num_prompts": None}
    if "solution" not in inputs:
        return record | {"unpredicted": _why_unpredicted(method)}
    solution, columns = load_solution(inputs["solution"]), solved_columns(inputs["solution"])
    examination = examine(solved_table(inputs["solution"]), solution, reward_name=reward)
    for made in columns:  # at one τ; the frontier of a CVaR has another at every margin
        examination["frontier"] |= {made.name: None} if made.tau is not None else {}
    examination["beginnings"] = beginnings(inputs["train_scores"], influential(examination))
    record |= {"solution": solution.to_dict(), "examination": examination, "lam": multipliers(solution)}
    record["num_prompts"] = solution.diagnostics["num_prompts"]
    solved, judged = (inputs[name].info["scorers"] for name in ("train_scores", "scores_before"))
    sources = [name for made in columns for name in made.sources]
    if any(solved[name] != judged.get(name) for name in (reward, *sources)):
        unpredicted = "λ* was solved with other scores than those measured here, so its prediction is in other units."
        return record | {"unpredicted": unpredicted}
    before, place = inputs["scores_before"].table, str(inputs["scores_before"].path)
    as_solved = with_utilities(before, columns, place)
    scores, kl = predictions(held_out_prediction(as_solved, reward, solution), examination, reward, solution)
    for name, offset in cvar_offset(inputs["solution"]).items():
        own = measured(before, [made for made in columns if made.name == name], place)
        elsewhere = float(by_prompt(own, column(own, name) - column(as_solved, name))[1].mean())
        scores[name] = {
            "predicted": shifted(scores[name]["predicted"], -offset),
            "predicted_held_out": shifted(scores[name]["predicted_held_out"], -elsewhere),
        }
    return record | {"prediction": prediction_source(examination, solution, before), "scores": scores, "kl": kl}


def _estimated(inputs: Mapping[str, Artifact], reward: str) -> dict[str, Any] | None:
    """Return what the validation responses say of this policy, its strength, and of every other on its ray.

    None where there is no estimate, or where it is of other scores than those measured here.
    """
    if "estimate" not in inputs:
        return None
    final, policy = inputs["estimate"], inputs["policy"]
    start = policy.input("estimate") if policy.stage == "strength" else final
    solved, judged = (artifact.info["scorers"] for artifact in (final.input("validation"), inputs["scores_before"]))
    estimate, solution = load_estimate(start), final.input("solution")
    sources = [name for made in solved_columns(solution) for name in made.sources]
    if any(solved[name] != judged.get(name) for name in (reward, *sources)):
        return None
    demanded, mixed = demands(solution), without_strength(policy)
    return {
        "mixture": mixed.read_json(MIXTURE) if mixed.stage == "mixture" else None,
        "strength": policy.read_json(STRENGTH) if policy.stage == "strength" else None,
        "policy": load_estimate(final).to_dict(),
        "line": estimate_line(load_estimate(final), demanded),
        "verdict": verdict(estimate, demanded, predicted_kl=float(load_solution(solution).predicted["kl"])),
        "ray": ray(estimate, demanded),
    }


def _why_unpredicted(method: str) -> str:
    """Return why a policy that no dual's solution labelled has no prediction."""
    title = method_title(method)
    if METHODS[method].steers:
        return (
            f"{title} chose this policy’s λ by measurements of its trained policies, not by the dual, so the dual's "
            "prediction for λ* is not one for it; the trajectory in the run directory has each round's measurements."
        )
    return f"{title} trained this policy for no dual’s solution, so nothing predicted it."


def log_ratio(after: pa.Table) -> np.ndarray:
    """Return ln π(y|x) − ln π_ref(y|x) of the policy's own responses; its mean is the KL divergence."""
    return column(after, LOGP_POLICY) - column(after, LOGP_REFERENCE)


def _profile(
    inputs: Mapping[str, Artifact], worst: Sequence[Column], borders: Mapping[str, float]
) -> dict[str, Any] | None:
    sides = {side: inputs[f"profile_scores_{side}"] for side in SIDES if f"profile_scores_{side}" in inputs}
    tables = {side: with_utilities(scores.table, worst, str(scores.path)) for side, scores in sides.items()}
    return profile_record(inputs, tables, borders)


def _refusals(inputs: Mapping[str, Artifact], profile: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return how often benign prompts are refused: those of the configuration, or the safe ones of a set."""
    if "benign_before" not in inputs:
        if profile is None or profile["over_refusal"] is None:
            return None
        safe = next(row for row in profile["rows"] if row["refused"] == profile["over_refusal"])
        return {"num_prompts": safe["num_prompts"], **profile["over_refusal"]}
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
        "estimates": {name.removeprefix(ESTIMATED): curve[name] for name in curve if name.startswith(ESTIMATED)},
        "lam": summary.get("lam"),
    }


def _counts(inputs: Mapping[str, Artifact]) -> dict[str, int]:
    """Return the counts of responses (in = scored + quarantined) and of training examples, by name."""
    named = {
        "train_scores": "training responses",
        "scores_before": "held-out responses of the reference",
        "scores_after": "held-out responses of the policy",
    }
    counts: dict[str, int] = {}
    for name, title in named.items():
        if name in inputs:
            scored, left_out = inputs[name].num_rows, len(quarantined(inputs[name]))
            counts |= {title: scored + left_out, f"{title}, scored": scored, f"{title}, quarantined": left_out}
    trained = as_trained(inputs["policy"])
    if "preferences" in trained.manifest["inputs"]:
        labelled = trained.input("preferences").info["counts"]
        counts |= {f"preferences: {reason}": number for reason, number in labelled.items()}
    return counts


def _models(inputs: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    scorers = inputs["scores_after"].info["scorers"]
    models = {"policy": {"model": inputs["policy"].path.name, "digest": inputs["policy"].digest}}
    for name, info in scorers.items():
        if name != LOGP_POLICY:
            role = "reference" if name == LOGP_REFERENCE else name
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
        length = lengths(table)
        means[who] = length["mean"]
        if length["truncated_fraction"] > 0.05:
            warnings.append(
                f"{length['truncated_fraction']:.0%} of the {who}'s responses were cut at generate.max_new_tokens = "
                f"{options.max_new_tokens}; their scores may depend on the missing text."
            )
    longer = means["policy"] / max(means["reference"], 1.0)
    if not 0.67 < longer < 1.5:
        warnings.append(
            f"The policy's responses are {longer:.2f} times as long as the reference's: look for length bias."
        )
    return warnings


def _drift(kl: Mapping[str, Any], policy: Artifact, examination: Mapping[str, Any] | None) -> list[str]:
    """Return warnings of drift: pairs fix only differences of log-ratios, so a policy can fit them and still drift.

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
    if "summary" in policy.info:
        warning = drift_warning(policy.read_json(CURVE), policy.input("preferences").info["loss"])
        warnings += [warning[0].upper() + warning[1:]] if warning else []
    return warnings
