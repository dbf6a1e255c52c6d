"""A finished run → the policy of another strength, or of another margin, as a directory; nothing is trained."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from can_dist.config import Model, StrengthChoice, load_config
from can_dist.dual import Demand, DualSolution, Margin, PolicyEstimate, at_strength, choose_strength, solve_table
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.loading import model_digest, model_directory
from can_dist.outcomes.estimate import CONFIG, find_solution
from can_dist.outcomes.export import check_new, facts_of, find_policy
from can_dist.reporting.model_card import model_card
from can_dist.stages.estimate import load_estimate, without_strength
from can_dist.stages.solve import cvar_offset, demands, solved_table
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact
from can_dist.training import ADAPTER, POLICY

SHARD_MB = 4000
"""Largest file of weights, in MB, where none is given."""


@dataclass(frozen=True)
class Stretched:
    """A policy of another strength.

    Attributes:
        path: the directory written.
        alpha: its strength, 1 for the policy as trained.
        sentences: what is expected of it, and what the dual's frontier would pay for the same gains.
    """

    path: Path
    alpha: float
    sentences: tuple[str, ...]


def export_strength(
    path: Path,
    out: Path,
    *,
    strength: float | None = None,
    margins: Mapping[str, float] | None = None,
    adapter: bool = False,
    max_shard_mb: int = SHARD_MB,
) -> Stretched:
    """Write θ_ref + α(θ − θ_ref) of a run's training, or its adapter at that scale, into the new directory ``out``.

    Args:
        path: a run with one policy, or an artifact of the stages train, strength or evaluate.
        out: directory to make.
        strength: α; leave out where ``margins`` are given.
        margins: other margins by constraint, '' for the only one; α is the least that meets all of the constraints.
        adapter: write the LoRA adapter alone.
        max_shard_mb: largest file of weights, in MB.

    Raises:
        ConfigError: both or neither of strength and margins, a constraint that is not the run's, or a bad ``out``.
        DataError: the run has no policy, several, no adapter or no estimate; or the reference is another one now.
        InfeasibleConstraint: the training's direction cannot meet the margins, or no policy can on the run's table.
    """
    if (strength is None) == (not margins):
        raise ConfigError("--strength and --margin: expected one of them, since a margin sets the strength.")
    if strength is not None and not (math.isfinite(strength) and strength > 0):
        raise ConfigError(f"--strength {strength}: expected a number above 0; 1 is the policy as trained.")
    check_new(out)
    policy, _ = find_policy(path)
    trained, reference = without_strength(policy), load_config(policy.path.parent / CONFIG).reference
    source = trained.path / (ADAPTER if adapter else POLICY)
    if not source.is_dir():
        raise DataError(f"{trained.path}: was trained without train.lora, so there is no adapter. Export the policy.")
    _check_scalable(trained, adapter=adapter)
    _check_reference(trained, reference)
    trained.check()
    solution, estimate = find_solution(policy), find_estimate(policy)
    demanded = _replaced(demands(solution), margins or {}, cvar_offset(solution))
    if strength is None:
        frontier_at(solution, {demand.name: demand.margin for demand in demanded})  # tells of what nothing could attain
    alpha = strength or choose_strength(load_estimate(estimate), demanded, max_strength=StrengthChoice().max).alpha
    sentences = expectations(load_estimate(estimate), solution, alpha)
    facts = facts_of(trained, None)
    made_from = [("strength", f"{alpha:.4g} times what was trained"), ("expected", sentences[0]), *facts["made_from"]]
    with tempfile.TemporaryDirectory(prefix=".tmp-export-", dir=out.absolute().parent) as scratch:
        built = Path(scratch) / out.name
        _write(source, model_directory(reference), built, alpha, adapter=adapter, max_shard_mb=max_shard_mb)
        card = model_card({**facts, "made_from": made_from, "expected": sentences[0]}, None, adapter=adapter)
        (built / "README.md").write_text(card, encoding="utf-8")
        built.rename(out)
    return Stretched(out, alpha, sentences)


def find_estimate(policy: Artifact) -> Artifact:
    """Return the estimate of a run's training at strength 1.

    Raises:
        DataError: there is none.
    """
    if policy.stage == "strength":
        return policy.input("estimate")
    run = policy.path.parent
    for manifest in sorted(run.glob(f"estimate-*/{MANIFEST}")):
        artifact = load_artifact(manifest.parent)
        if artifact.manifest["inputs"].get("policy", {}).get("digest") == policy.digest:
            return artifact
    raise DataError(
        f"{policy.path}: no estimate on validation prompts, so what another strength does is not known. Run "
        f"'can-dist estimate {policy.path}' first."
    )


def expectations(estimate: PolicyEstimate, solution: Artifact, alpha: float) -> tuple[str, ...]:
    """Return what the linear law expects at a strength, how far that is from what was asked, and the frontier's price.

    Raises:
        InfeasibleConstraint: no policy attains these gains on the run's table.
    """
    point = at_strength(estimate, alpha)
    gains = ", ".join(f"{name} {gain.mean:+.3g}" for name, gain in point.improvement.items())
    expected = f"{gains}, reward {point.reward_improvement.mean:+.3g}, KL {point.kl.mean:.3g} nats"
    own = {demand.name: demand.margin for demand in demands(solution)}
    far = ", ".join(
        f"{gain.mean / own[name]:.2f} times the margin of {name} it was trained for ({own[name]:+.3g})"
        for name, gain in point.improvement.items()
        if own[name] > 0
    )
    dual = frontier_at(solution, {name: gain.mean for name, gain in point.improvement.items()})
    reward, kl = float(dual.predicted["reward_improvement"]), float(dual.predicted["kl"])
    return (
        f"{expected} by the linear law, not measured",
        *([far] if far else []),
        f"at these gains the dual's frontier has reward {reward:+.3g}, KL {kl:.3g} nats",
    )


def frontier_at(solution: Artifact, margins: Mapping[str, float]) -> DualSolution:
    """Solve the dual of a run's table for other margins.

    Raises:
        InfeasibleConstraint: no policy attains them on the table.
    """
    identity = solution.manifest["identity"]
    return solve_table(
        solved_table(solution),
        beta=float(identity["beta"]),
        constraints=[Margin(name, margin=value) for name, value in margins.items()],
        estimator=identity["estimator"],
    )


def _replaced(
    demanded: tuple[Demand, ...], margins: Mapping[str, float], offset: Mapping[str, float]
) -> tuple[Demand, ...]:
    """Return the demands with other margins; that of a CVaR is ``offset`` more of the mean of its column."""
    given = named_margins([demand.name for demand in demanded], margins)
    return tuple(
        replace(demand, margin=given[demand.name] + offset.get(demand.name, 0.0), error=0.0)
        if demand.name in given
        else demand
        for demand in demanded
    )


def named_margins(names: Sequence[str], margins: Mapping[str, float]) -> dict[str, float]:
    """Return margins by the name of a constraint, which may be left out ('') where there is one.

    Raises:
        ConfigError: it is left out and there are several, or there is no such constraint.
    """
    if "" in margins and len(names) > 1:
        raise ConfigError(f"--margin: the run has several constraints ({', '.join(names)}). Give --margin NAME=VALUE.")
    given = {name or names[0]: value for name, value in margins.items()}
    if unknown := [name for name in given if name not in names]:
        raise ConfigError(f"--margin {unknown[0]}=…: no constraint of the run. Its constraints: {', '.join(names)}.")
    return given


def _check_scalable(trained: Artifact, *, adapter: bool) -> None:
    lora = trained.manifest["identity"]["train"].get("lora")
    if lora and lora.get("quantize") and not adapter:
        raise DataError(
            f"{trained.path}: its adapters are merged into the base as 4 bits hold it ({lora['quantize']}), so the "
            "policy is not the reference plus a difference that could be scaled. Its adapter can be: "
            "'can-dist export adapter RUN --strength A'."
        )


def _check_reference(trained: Artifact, reference: Model) -> None:
    if trained.manifest["identity"]["reference"] != model_digest(reference):
        raise DataError(
            f"reference {reference.model!r}: its weights are not those that {trained.path} was trained from. Bring "
            "those back: a strength is counted from them."
        )


def _write(source: Path, reference: Path, out: Path, alpha: float, *, adapter: bool, max_shard_mb: int) -> None:
    from can_dist.training.stretch import scale_adapter, stretch_policy

    if adapter:
        scale_adapter(source, out, alpha)
    else:
        stretch_policy(reference, source, out, alpha, max_shard_mb)
