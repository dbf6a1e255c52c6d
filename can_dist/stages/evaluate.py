"""policy → report: fresh responses of policy and reference on held-out prompts, scored by the same scorers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from can_dist.config import Model, identity
from can_dist.dual import DualSolution, Prediction, ScoreTable, predict
from can_dist.reporting.examination import examine
from can_dist.scoring.protocol import LogProb, ScorerSpec
from can_dist.stages.generate import generate
from can_dist.stages.score import score
from can_dist.stages.solve import load_solution
from can_dist.stages.train import policy_model
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.training.metrics import METRICS, loss_above_start, read_metrics

REPORT, PAGE = "report.json", "report.html"
CONFIDENCE = 0.95
PACKAGES = ("can-dist", "torch", "transformers", "deepspeed", "ray", "numpy", "pyarrow")


@dataclass(frozen=True)
class Lineage:
    """The artifacts an evaluation sets beside the policy."""

    policy: Artifact
    solution: Artifact
    train_scores: Artifact
    prompts: Artifact


def evaluate(
    work: Workspace, lineage: Lineage, reference: Model, scorers: Mapping[str, ScorerSpec], *, reward: str
) -> Artifact:
    """Return the artifact with ``report.json`` and ``report.html``.

    Every interval is a 95 % t-interval over prompts: a prompt's responses are averaged first, because the prompt is
    the unit that was sampled. The improvement is paired by prompt.
    """
    policy = policy_model(lineage.policy, reference)
    prompts = lineage.prompts
    before = generate(work, reference, prompts, split="test", role="reference")
    after = generate(work, policy, prompts, split="test", role="policy")
    logps: dict[str, ScorerSpec] = {"logp.reference": LogProb(model=reference), "logp.policy": LogProb(model=policy)}
    scores_before = score(work, before, scorers, role="reference on test")
    scores_after = score(work, after, {**scorers, **logps}, role="policy on test")
    inputs = {
        "policy": lineage.policy,
        "solution": lineage.solution,
        "train_scores": lineage.train_scores,
        "responses_before": before,
        "responses_after": after,
        "scores_before": scores_before,
        "scores_after": scores_after,
    }
    what = {"samples": work.config.evaluate.num_samples, "reward": reward}
    stage = work.open("evaluate", "policy", what, inputs)
    if stage.finished:
        return stage.finished
    work.release_actors()
    with work.timed("evaluate", "report"):
        from can_dist.reporting.html import write_report

        report = build_report(work, inputs, reward)
        write_json(stage.path / REPORT, report)
        write_report(report, stage.path / PAGE)
        return stage.commit([REPORT, PAGE], info={"constraints": report["constraints"], "reward": report["reward"]})


def build_report(work: Workspace, inputs: Mapping[str, Artifact], reward: str) -> dict[str, Any]:
    """Compute every number of the report from the committed tables."""
    solution = load_solution(inputs["solution"])
    before, after = inputs["scores_before"].table, inputs["scores_after"].table
    names = [reward, *solution.lam]
    examination = examine(training_table(inputs, reward, solution), solution, reward_name=reward)
    held_out = held_out_prediction(before, reward, solution)
    predicted, kl = predictions(held_out, examination, reward, solution)
    equal = {
        name: bool(one.get("equal")) for name, one in inputs["solution"].manifest["identity"]["constraints"].items()
    }
    kl_P = _by_prompt(after, _column(after, "logp.policy") - _column(after, "logp.reference"))[1]
    kl["realised"] = interval(kl_P)
    reference_info = inputs["responses_before"].info
    return {
        "format_version": 2,
        "title": f"{work.config.method.upper().replace('MOCAN', 'MoCAN')}: predicted and realised",
        "method": work.config.method,
        "beta": work.config.beta,
        "num_train_prompts": solution.diagnostics["num_prompts"],
        "num_test_prompts": reference_info["num_prompts"],
        "num_responses": work.config.generate.num_responses,
        "models": _models(inputs),
        "solution": solution.to_dict(),
        "examination": examination,
        "prediction": _prediction_source(examination, solution, before),
        "constraints": [
            constraint_row(name, solution, predicted[name], improvement(before, after, name), equal=equal[name])
            for name in solution.lam
        ],
        "reward": {"name": reward, **predicted[reward], "realised": improvement(before, after, reward)},
        "kl": kl,
        "win_rate": {name: win_rate(before, after, name) for name in names},
        "lengths": {"reference": _lengths(before), "policy": _lengths(after)},
        "scores": {name: {"reference": _list(before, name), "policy": _list(after, name)} for name in names},
        "training": _training(inputs["policy"]),
        "counts": {},
        "warnings": _warnings(work, solution, before, after) + _drift(kl, inputs["policy"]),
        "samples": _samples(inputs, names, work.config.evaluate.num_samples),
        "config": identity(work.config, exclude=["cluster"]),
        "versions": {name: version(name) for name in PACKAGES},
    }


def interval(values_P: np.ndarray) -> dict[str, float]:
    """Return mean, standard error and 95 % t-interval of one value per prompt."""
    num_prompts = len(values_P)
    mean, se = float(np.mean(values_P)), float(np.std(values_P, ddof=1) / np.sqrt(num_prompts))
    reach = float(stats.t.ppf(0.5 + CONFIDENCE / 2, num_prompts - 1)) * se
    return {"mean": mean, "se": se, "low": mean - reach, "high": mean + reach}


def improvement(before: pa.Table, after: pa.Table, name: str) -> dict[str, float]:
    """Return the paired improvement of a score's mean, policy minus reference, clustered by prompt."""
    prompts, before_P = _by_prompt(before, _column(before, name))
    same, after_P = _by_prompt(after, _column(after, name))
    assert np.array_equal(prompts, same)
    return interval(after_P - before_P)


def verdict(realised: Mapping[str, float], margin: float, *, equal: bool = False) -> str:
    """Say whether a margin was met, given the realised improvement's interval; ``equal``: exactly, on both sides."""
    if equal and realised["low"] > margin:
        return "not met"
    if realised["low"] >= margin and not equal:
        return "met"
    return "met within the interval" if realised["high"] >= margin else "not met"


def win_rate(before: pa.Table, after: pa.Table, name: str) -> dict[str, float]:
    """Return how often a policy's response scores above a reference's to the same prompt; ties count half."""
    groups_before, groups_after = _groups(before, _column(before, name)), _groups(after, _column(after, name))
    rates = []
    for prompt_id, theirs in groups_before.items():
        difference = groups_after[prompt_id][:, None] - theirs[None, :]
        rates.append(float(np.mean(0.5 + 0.5 * np.sign(difference))))
    return interval(np.array(rates))


def held_out_prediction(before: pa.Table, reward: str, solution: DualSolution) -> Prediction:
    """Predict the policy of λ* on the held-out prompts, from the reference's responses to them.

    Unbiased over prompts, but their few responses (``evaluate.num_responses``) understate what the policy changes.
    """
    return predict(_score_table(before, reward, solution), solution.lam_vector, solution.beta, solution.margin_vector)


def training_table(inputs: Mapping[str, Artifact], reward: str, solution: DualSolution) -> ScoreTable:
    """Return the table that gave the solution, with the reference weights it was solved with."""
    log_weight = inputs["solution"].manifest["identity"]["log_weight"]
    return _score_table(inputs["train_scores"].table, reward, solution, log_weight)


def predictions(
    held_out: Prediction, examination: Mapping[str, Any], reward: str, solution: DualSolution
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return what each score was predicted to do, by name, and the KL.

    ``predicted`` is what stands beside the realised value: cross-fitted on the training table, whose prompts have the
    responses λ* was solved with. ``predicted_held_out`` comes from the held-out prompts; it takes the other's place
    where cross-fitting has no solution. Each is a mean with SE and 95 % interval over prompts; the KL's ``predicted``
    is its mean, with ``predicted_interval`` beside it.
    """
    elsewhere = {
        name: interval(held_out.slack_PJ[:, index] + solution.margin[name]) for index, name in enumerate(solution.lam)
    }
    elsewhere[reward] = interval(held_out.reward_gain_P)
    inside, kl_elsewhere = elsewhere, interval(held_out.kl_P)
    kl_inside = kl_elsewhere
    if crossed := examination["cross_fit"]:
        inside = {**crossed["improvement"], reward: crossed["reward_improvement"]}
        kl_inside = crossed["kl"]
    scores = {name: {"predicted": inside[name], "predicted_held_out": elsewhere[name]} for name in elsewhere}
    kl = {"predicted": kl_inside["mean"], "predicted_interval": kl_inside, "predicted_held_out": kl_elsewhere}
    return scores, kl


def _prediction_source(
    examination: Mapping[str, Any], solution: DualSolution, before: pa.Table
) -> dict[str, str | int | None]:
    """Say exactly what ``predicted`` is: of which prompts, with how many responses each."""
    crossed = examination["cross_fit"]
    counts = solution.diagnostics["responses_per_prompt"]
    low, high = counts["min"], counts["max"]
    return {
        "source": "cross-fitted" if crossed else "held-out",
        "reason": examination["cross_fit_refused"],
        "num_folds": crossed["num_folds"] if crossed else None,
        "num_prompts": solution.diagnostics["num_prompts"],
        "num_responses": f"{low:g}" if low == high else f"{low:g} to {high:g}",
        "held_out_responses": int(np.median(np.unique(before.column("prompt_id"), return_counts=True)[1])),
    }


def constraint_row(
    name: str, solution: DualSolution, predicted: Mapping[str, Any], realised: Mapping[str, float], *, equal: bool
) -> dict[str, Any]:
    """Set one constraint's prediction beside what was realised, against the margin that was asked for.

    A solve with a confidence raises the margin it meets; the verdict is on the margin before that.
    """
    asked = solution.margin[name] - solution.safety_margin.get(name, 0.0)
    return {
        "name": name,
        "margin": asked,
        "threshold": solution.threshold[name],
        "centre": solution.centre[name],
        "lam": solution.lam[name],
        "lam_se": _number(solution.lam_se[name]),
        **predicted,
        "realised": realised,
        "verdict": verdict(realised, asked, equal=equal),
    }


def _score_table(table: pa.Table, reward: str, solution: DualSolution, log_weight: str | None = None) -> ScoreTable:
    prompts = table.column("prompt_id").to_numpy(zero_copy_only=False)
    weights = None if log_weight is None else _column(table, log_weight)
    return ScoreTable.build(
        _column(table, reward), _utilities(table, solution), prompts, weights, names=list(solution.lam)
    )


def _utilities(table: pa.Table, solution: DualSolution) -> np.ndarray:
    return np.stack([_column(table, name) for name in solution.lam], axis=1)


def _column(table: pa.Table, name: str) -> np.ndarray:
    column: np.ndarray = table.column(name).to_numpy()
    return column


def _list(table: pa.Table, name: str) -> list[float]:
    values: list[float] = _column(table, name).tolist()
    return values


def _by_prompt(table: pa.Table, values_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (prompt ids sorted, mean of the values of each)."""
    ids, index_N = np.unique(table.column("prompt_id").to_numpy(zero_copy_only=False), return_inverse=True)
    return ids, np.bincount(index_N, weights=values_N) / np.bincount(index_N)


def _groups(table: pa.Table, values_N: np.ndarray) -> dict[str, np.ndarray]:
    groups: dict[str, list[float]] = {}
    for prompt_id, value in zip(table.column("prompt_id").to_pylist(), values_N.tolist(), strict=True):
        groups.setdefault(prompt_id, []).append(value)
    return {prompt_id: np.array(values) for prompt_id, values in groups.items()}


def _lengths(table: pa.Table) -> dict[str, float]:
    cut = np.mean([reason == "length" for reason in table.column("finish_reason").to_pylist()])
    return {"mean": float(np.mean(_column(table, "num_tokens"))), "truncated_fraction": float(cut)}


def _training(policy: Artifact) -> dict[str, Any]:
    lines = read_metrics(policy.path / METRICS)
    summary = policy.info["summary"]
    return {
        "num_steps": summary["num_steps"],
        "loss": [[line["step"], line["loss"]] for line in lines if "loss" in line],
        "eval_loss": [[line["step"], line["eval_loss"]] for line in lines if "eval_loss" in line],
        "tokens": summary["num_tokens"],
    }


def _models(inputs: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    scorers = inputs["scores_after"].info["scorers"]
    models = {"policy": {"model": inputs["policy"].path.name, "digest": inputs["policy"].digest}}
    for name, info in scorers.items():
        if name != "logp.policy":
            role = "reference" if name == "logp.reference" else name
            models[role] = {"model": info["model"], "digest": str(info.get("weights") or info.get("source"))}
    return models


def _warnings(work: Workspace, solution: DualSolution, before: pa.Table, after: pa.Table) -> list[str]:
    warnings = []
    options = work.config.generate
    if options.temperature != 1 or options.top_p != 1:
        warnings.append(
            f"Responses were sampled with temperature {options.temperature} and top-p {options.top_p}: not from the "
            "models themselves, so the KL divergence shown is that of the sampled text under the untempered models."
        )
    for who, table in (("reference", before), ("policy", after)):
        cut = _lengths(table)["truncated_fraction"]
        if cut > 0.05:
            warnings.append(
                f"{cut:.0%} of the {who}'s responses were cut at generate.max_new_tokens = {options.max_new_tokens}; "
                "their scores may depend on what is missing."
            )
    longer = _lengths(after)["mean"] / max(_lengths(before)["mean"], 1.0)
    if not 0.67 < longer < 1.5:
        warnings.append(
            f"The policy's responses are {longer:.2f} times as long as the reference's: look for length bias."
        )
    return warnings


def _drift(kl: Mapping[str, Any], policy: Artifact) -> list[str]:
    """Pairs fix only differences of log-ratios, so a policy can fit them and still leave the reference behind."""
    warnings = []
    predicted, realised = kl["predicted"], kl["realised"]
    if realised["low"] > 2 * predicted:
        warnings.append(
            f"The policy is {realised['mean']:.2f} nats from the reference, more than twice the {predicted:.2f} "
            "predicted: training drifted. Lower train.learning_rate or add train.warmup_steps."
        )
    loss = loss_above_start(policy.path)
    if loss is not None:
        warnings.append(f"The last training loss, {loss:.3f}, is above its start at ln 2 = 0.693: the policy drifted.")
    return warnings


def _samples(inputs: Mapping[str, Artifact], names: list[str], count: int) -> list[dict[str, Any]]:
    """The first response of both models to the first prompts of the held-out split."""
    rows = {}
    for who in ("before", "after"):
        responses, scores = inputs[f"responses_{who}"].table.to_pylist(), inputs[f"scores_{who}"].table.to_pylist()
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


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None
