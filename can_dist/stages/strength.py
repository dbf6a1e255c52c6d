"""policy → policy: θ_ref + α(θ − θ_ref), α the least strength that meets the constraints by the estimate at α = 1.

Gains grow as α and KL as α² near the reference, so one estimate gives the whole ray; that of the result is a check.
"""

from __future__ import annotations

import math
import shutil

from can_dist.config import Model, StrengthChoice
from can_dist.config.base import identity
from can_dist.dual import PolicyEstimate, Strength, at_strength, choose_strength, verdict
from can_dist.dual.strength import plus_minus
from can_dist.errors import DataError, InfeasibleConstraint
from can_dist.modeling.loading import model_directory
from can_dist.stages.estimate import load_estimate
from can_dist.stages.solve import demands, load_solution
from can_dist.tables.artifacts import Artifact, StageDirectory, write_json
from can_dist.training import ADAPTER, POLICY
from can_dist.workspace import Workspace

STRENGTH = "strength.json"
NOT_CHOSEN = (
    "strength: no prompts are held out for validation, so the policy stays as it was trained. Bring more prompts, or "
    "give prompts.num_validation; strength: 1 says that this is meant"
)


def strengthen(
    work: Workspace,
    policy: Artifact,
    reference: Model,
    solution: Artifact,
    estimate: Artifact,
    *,
    options: StrengthChoice | None = None,
) -> Artifact:
    """Return the policy of the configured strength: chosen from the estimate, or a number; itself where that is 1.

    ``options`` are how it is chosen, by default as the configuration says.

    Raises:
        InfeasibleConstraint: The direction is wrong, ``strength.max`` or ``strength.max_kl`` is exceeded, or no one
            strength meets all constraints. The policy as trained stays.
        DataError: The validation prompts are too few to say; or the policy is not the reference plus a difference.
    """
    estimated, by = load_estimate(estimate), options or work.config.strength
    if isinstance(by, StrengthChoice):
        work.say(f"strength: {judged(estimated, solution, by)}")
        strength = _choose(estimated, solution, by, policy)
    else:
        strength = Strength(by, math.nan, None, {}, at_strength(estimated, by), None, ())
    for note in strength.notes:
        work.say(f"strength: {note}")
    if strength.alpha == 1.0:
        work.say("strength: 1, the policy as trained")
        return policy
    label = f"strength {strength.alpha:.3g}"
    inputs = {"policy": policy, "estimate": estimate, "solution": solution}
    chosen_by = identity(by) if isinstance(by, StrengthChoice) else by
    stage = work.open("strength", "policy", {"alpha": strength.alpha, "strength": chosen_by}, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("strength", label):
        policy.check()
        return _write(work, stage, policy, reference, strength)


def check(work: Workspace, policy: Artifact, solution: Artifact, estimate: Artifact) -> Artifact:
    """Say when the estimate of a policy that was given a strength leaves a margin outside its interval; return it."""
    estimated = load_estimate(estimate)
    for demand in demands(solution):
        gain = estimated.improvement[demand.name]
        reach = math.hypot(gain.high - gain.mean, 2 * demand.error)
        distance = gain.mean - demand.margin
        if distance < -reach or (demand.equal and distance > reach):
            work.say(
                f"strength: warning: at strength {policy.info['alpha']:.3g} {demand.name} is {plus_minus(gain)} where "
                f"{demand.margin:+.3g} is asked: the law of small steps, by which it was chosen, ends before it. Train "
                "longer or on more prompts, so that less strength is needed."
            )
    return policy


def judged(estimated: PolicyEstimate, solution: Artifact, options: StrengthChoice) -> str:
    """Return how far a policy went, in which direction, and what strength would meet its margins."""
    return verdict(
        estimated,
        demands(solution),
        predicted_kl=float(load_solution(solution).predicted["kl"]),
        max_strength=options.max,
        max_kl=options.max_kl or math.inf,
    )


def verdict_of(estimate: Artifact) -> str:
    """Return the same for the estimate of a policy that keeps the strength it was trained to."""
    return judged(load_estimate(estimate), estimate.input("solution"), StrengthChoice())


def _choose(estimated: PolicyEstimate, solution: Artifact, options: StrengthChoice, policy: Artifact) -> Strength:
    try:
        return choose_strength(
            estimated,
            demands(solution),
            confidence=options.confidence,
            max_strength=options.max,
            max_kl=options.max_kl or math.inf,
        )
    except (InfeasibleConstraint, DataError) as refusal:
        raise type(refusal)(
            f"strength: {refusal}\n  The policy as trained is whole ({policy.path}); --set strength=1 goes on with it."
        ) from None


def _write(work: Workspace, stage: StageDirectory, policy: Artifact, reference: Model, strength: Strength) -> Artifact:
    from can_dist.training.stretch import scale_adapter, stretch_policy

    for folder in (POLICY, ADAPTER):
        shutil.rmtree(stage.path / folder, ignore_errors=True)  # whole, but left without a manifest by a kill
    largest = work.config.train.max_shard_size_mb
    stretch_policy(model_directory(reference), policy.path / POLICY, stage.path / POLICY, strength.alpha, largest)
    if (policy.path / ADAPTER).is_dir():
        scale_adapter(policy.path / ADAPTER, stage.path / ADAPTER, strength.alpha)
    write_json(stage.path / STRENGTH, strength.to_dict())
    written = [p for folder in (POLICY, ADAPTER) for p in (stage.path / folder).rglob("*") if p.is_file()]
    files = [STRENGTH, *(str(path.relative_to(stage.path)) for path in written)]
    gains = ", ".join(f"{name} {gain.mean:+.3g}" for name, gain in strength.predicted.improvement.items())
    limiting = f", which {strength.limiting} needs" if strength.limiting else ""
    work.say(f"strength: {strength.alpha:.3g}{limiting}: {gains}, KL {strength.predicted.kl.mean:.3g} expected")
    return stage.commit(files, info={"alpha": strength.alpha})
