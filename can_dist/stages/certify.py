"""policy → certificate: fresh responses to prompts that nothing else has read, and what is then sure of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from can_dist.config import Model
from can_dist.config.base import identity
from can_dist.config.sections import Constraint
from can_dist.dual import Column
from can_dist.errors import ConfigError, DataError
from can_dist.measuring.certificate import Demand, answer_of, judge, num_bounds, sentences
from can_dist.measuring.gains import FloatArray, by_prompt, column, ids
from can_dist.measuring.tails import cross_fitted_tail
from can_dist.modeling.formatter import text_identity
from can_dist.modeling.loading import model_digest
from can_dist.modeling.precision import run_precision
from can_dist.scoring.kinds import scorer_identity
from can_dist.scoring.protocol import ScorerSpec
from can_dist.stages.generate import ELSEWHERE, generate, sampling
from can_dist.stages.report import PACKAGES
from can_dist.stages.score import score
from can_dist.stages.sealed import SPLIT, Look, check_unread, record_look
from can_dist.stages.train import policy_model
from can_dist.stages.utilities import column_keys, columns_of, measured
from can_dist.tables.artifacts import Artifact, digest_of, write_json, write_text
from can_dist.tables.quarantine import quarantined
from can_dist.tables.utilities import with_utilities
from can_dist.workspace import Workspace

CERTIFICATE, CERTIFICATE_PAGE = "certificate.json", "certificate.html"


def certify(
    work: Workspace,
    policy: Artifact,
    prompts: Artifact,
    scorers: Mapping[str, ScorerSpec],
    *,
    delta: float | None,
    tolerance: float | None,
) -> Artifact:
    """Return the artifact with ``certificate.json`` and ``certificate.html`` of a policy.

    The look at the sealed prompts is recorded before anything is generated for them; the same measurement again is the
    same look. Responses of the reference are sampled where a margin is asked of the improvement over it. Every
    constraint has one bound, an equality two, and they share the error that the look may spend.

    Args:
        work: The run.
        policy: A trained policy, a strength of one, or a mixture.
        prompts: The table that it was trained on a split of; it has sealed prompts.
        scorers: By score; those of the constraints are used.
        delta: Joint error of all looks of the run; None: that of the first look, or 0.05.
        tolerance: Half-width, in units of the score, within which an equality counts as met.

    Raises:
        ConfigError: An equality has no tolerance, or ``delta`` is not that of the first look.
        DataError: A sealed prompt was read by another stage, the ledger is damaged, or a response has no score.
    """
    reference, constraints = work.config.reference, work.config.constraints
    scorers = {name: scorers[name] for constraint, c in constraints.items() for name in c.scorers(constraint)}
    demands = {name: Demand.of(constraint, tolerance) for name, constraint in constraints.items()}
    _check_equalities(constraints, tolerance)
    check_unread(work.directory, prompts)
    model = policy_model(policy, reference)
    models = {"policy": model} | ({"reference": reference} if any(d.is_margin for d in demands.values()) else {})
    measurement = _measurement(work, policy, prompts, models, scorers, demands)
    look = record_look(work.directory, policy, [model_digest(m) for m in models.values()], measurement, delta)
    work.say(
        f"certify: look {look.number} at {prompts.info['counts'][SPLIT]} sealed prompts, of error {look.error:.3g}"
    )
    inputs = {"policy": policy, "prompts": prompts}
    for who, responder in models.items():
        responses = generate(work, responder, prompts, split=SPLIT, role=who)
        inputs[f"responses_{who}"] = responses
        inputs[f"scores_{who}"] = _all_scored(score(work, responses, scorers, role=f"{who} on {SPLIT}"))
    keys = {
        "look": look.number,
        "delta": look.delta,
        "demands": {name: vars(demand) for name, demand in demands.items()},
        "bounds": "Student, Hall and Gaffke",
        **column_keys(columns_of(constraints)),
    }
    stage = work.open("certify", "certificate", keys, inputs)
    if stage.finished:
        return stage.finished
    work.release_actors()
    with work.timed("certify", "certificate"):
        from can_dist.reporting.certificate_page import render_certificate

        record = _record(work, inputs, demands, look) | {"measurement": measurement}
        record["sentences"] = sentences(record)
        write_json(stage.path / CERTIFICATE, record)
        write_text(stage.path / CERTIFICATE_PAGE, render_certificate(record))
        given = {name: identity(constraint) for name, constraint in constraints.items()}
        info = {"answer": record["answer"], "look": look.number, "constraints": given}
        return stage.commit([CERTIFICATE, CERTIFICATE_PAGE], info=info)


def _check_equalities(constraints: Mapping[str, Constraint], tolerance: float | None) -> None:
    equal = [name for name, constraint in constraints.items() if constraint.equal]
    if equal and tolerance is None:
        raise ConfigError(
            f"constraints.{equal[0]}.equal: no number of prompts shows that a mean is exactly a number.",
            "Give --tolerance T, in units of the score: the certificate then says that it lies within T of it.",
        )
    if tolerance is not None and not equal:
        raise ConfigError(f"--tolerance {tolerance:g}: belongs to constraints with equal: true, and there is none.")
    if tolerance is not None and not tolerance > 0:
        raise ConfigError(f"--tolerance {tolerance:g}: expected above 0.")


def _measurement(
    work: Workspace,
    policy: Artifact,
    prompts: Artifact,
    models: Mapping[str, Model],
    scorers: Mapping[str, ScorerSpec],
    demands: Mapping[str, Demand],
) -> dict[str, Any]:
    """Return all that decides the measured numbers; margins do not, since the bounds hold for all of them at once."""
    precision = run_precision(work.config)
    return {
        "policy": policy.digest,
        "prompts": prompts.digest,
        "models": {who: {"weights": model_digest(model), **text_identity(model)} for who, model in models.items()},
        "seed": work.config.seed,
        "precision": precision,
        "sampling": identity(sampling(work.config, SPLIT), exclude=ELSEWHERE),
        "scorers": {name: scorer_identity(spec, precision) for name, spec in scorers.items()},
        "demands": {
            name: {"is_margin": demand.is_margin, "is_equality": demand.tolerance is not None}
            for name, demand in demands.items()
        },
        **column_keys(columns_of(work.config.constraints)),
    }


def _all_scored(scores: Artifact) -> Artifact:
    """Return scores of every response; raise ``DataError`` where one is quarantined."""
    if left_out := quarantined(scores):
        raise DataError(
            f"{scores.path}: {len(left_out)} response(s) to sealed prompts have no score: "
            f"{', '.join(list(left_out)[:5])}. A mean without them is not the policy's.",
            "Mend the scorer, set cluster.max_quarantine to 0, delete the score artifacts of these responses, and give "
            "the command again.",
        )
    return scores


def _record(
    work: Workspace, inputs: Mapping[str, Artifact], demands: Mapping[str, Demand], look: Look
) -> dict[str, Any]:
    """Return ``certificate.json`` but for its sentences."""
    error = look.error / num_bounds(list(demands.values()))
    tables = {who: inputs[f"scores_{who}"].table for who in ("policy", "reference") if f"scores_{who}" in inputs}
    columns = columns_of(work.config.constraints)
    rows = [
        judge(made.name, demands[made.name], _values(tables, made, demands[made.name]), error)
        | ({"utility": made.words} if made.words else {})
        for made in columns
    ]
    responses, policy = inputs["responses_policy"], inputs["policy"]
    sealed = sorted(set(tables["policy"].column("prompt_id").to_pylist()))
    return {
        "format_version": 1,
        "answer": answer_of(rows),
        "policy": {"artifact": policy.path.name, "digest": policy.digest},
        "num_prompts": responses.info["num_prompts"],
        "num_responses": sampling(work.config, SPLIT).num_responses,
        "num_cut": responses.info["finish_reason"].get("length", 0),
        "sealed_prompts": digest_of(sealed),
        "look": {"number": look.number, "delta": look.delta, "error": look.error, "ledger": look.before},
        "constraints": rows,
        "artifacts": {name: artifact.path.name for name, artifact in inputs.items()},
        "versions": {name: version(name) for name in PACKAGES},
    }


def _values(tables: Mapping[str, pa.Table], made: Column, demand: Demand) -> FloatArray:
    """Return one value per sealed prompt, in order of the ids: the policy's mean, less the reference's for a margin.

    Of a CVaR the policy's values are at a τ that other prompts chose, so that their mean promises no more than the
    CVaR, and the reference's at its own on these prompts, which makes theirs no less.
    """
    policy = tables["policy"]
    utility_N = column(with_utilities(policy, [made], "policy"), made.name)
    if made.of == "cvar":
        utility_N = cross_fitted_tail(made, utility_N, ids(policy))
    prompts, value_P = by_prompt(policy, utility_N)
    if not demand.is_margin:
        return value_P
    before = measured(tables["reference"], [made], "reference")
    same, before_P = by_prompt(before, column(before, made.name))
    assert (prompts == same).all(), "both models answer the same prompts"
    return value_P - before_P
