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
from can_dist.dual import DualSolution, ScoreTable, dual_curve, predict
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
    held_out = held_out_prediction(before, reward, solution)
    constraints = []
    for index, name in enumerate(solution.lam):
        realised = improvement(before, after, name)
        constraints.append(
            {
                "name": name,
                "margin": solution.margin[name],
                "threshold": solution.threshold[name],
                "centre": solution.centre[name],
                "lam": solution.lam[name],
                "lam_se": _number(solution.lam_se[name]),
                "predicted": interval(held_out.slack_PJ[:, index] + solution.margin[name]),
                "realised": realised,
                "verdict": verdict(realised, solution.margin[name]),
            }
        )
    kl_P = _by_prompt(after, _column(after, "logp.policy") - _column(after, "logp.reference"))[1]
    reference_info = inputs["responses_before"].info
    return {
        "format_version": 1,
        "title": f"{work.config.method.upper().replace('MOCAN', 'MoCAN')}: predicted and realised",
        "method": work.config.method,
        "beta": work.config.beta,
        "num_train_prompts": solution.diagnostics["num_prompts"],
        "num_test_prompts": reference_info["num_prompts"],
        "num_responses": work.config.generate.num_responses,
        "models": _models(inputs),
        "solution": solution.to_dict(),
        "constraints": constraints,
        "reward": {
            "name": reward,
            "predicted": interval(held_out.reward_gain_P),
            "realised": improvement(before, after, reward),
        },
        "kl": {"predicted": solution.predicted["kl"], "realised": interval(kl_P)},
        "win_rate": {name: win_rate(before, after, name) for name in names},
        "lengths": {"reference": _lengths(before), "policy": _lengths(after)},
        "scores": {name: {"reference": _list(before, name), "policy": _list(after, name)} for name in names},
        "dual_curves": _curves(inputs["train_scores"].table, reward, solution),
        "training": _training(inputs["policy"]),
        "counts": {},
        "warnings": _warnings(work, solution, before, after) + _drift(interval(kl_P), solution, inputs["policy"]),
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


def verdict(realised: Mapping[str, float], margin: float) -> str:
    """Say whether a margin was met, given the realised improvement's interval."""
    if realised["low"] >= margin:
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


def held_out_prediction(before: pa.Table, reward: str, solution: DualSolution) -> Any:
    """Predict the policy of λ* on the held-out prompts, from the reference's responses to them."""
    prompts, utilities = before.column("prompt_id").to_numpy(zero_copy_only=False), _utilities(before, solution)
    table = ScoreTable.build(_column(before, reward), utilities, prompts)
    return predict(table, solution.lam_vector, solution.beta, solution.margin_vector)


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


def _curves(table: pa.Table, reward: str, solution: DualSolution) -> dict[str, dict[str, list[float]]]:
    """Return D along each constraint's axis through λ*."""
    prompts = table.column("prompt_id").to_numpy(zero_copy_only=False)
    scores = ScoreTable.build(_column(table, reward), _utilities(table, solution), prompts)
    curves = {}
    for axis, (name, lam) in enumerate(solution.lam.items()):
        grid = np.linspace(0.0, max(2.5 * lam, 1.0), 101)
        values = dual_curve(
            scores,
            beta=solution.beta,
            margin_J=solution.margin_vector,
            lam_J=solution.lam_vector,
            axis=axis,
            lam_grid=grid,
        )
        curves[name] = {"lam": grid.tolist(), "value": values.tolist()}
    return curves


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


def _drift(kl: Mapping[str, float], solution: DualSolution, policy: Artifact) -> list[str]:
    """Pairs fix only differences of log-ratios, so a policy can fit them and still leave the reference behind."""
    warnings = []
    predicted = solution.predicted["kl"]
    if kl["low"] > 2 * predicted:
        warnings.append(
            f"The policy is {kl['mean']:.2f} nats from the reference, more than twice the {predicted:.2f} predicted: "
            "training drifted. Lower train.learning_rate or add train.warmup_steps."
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
