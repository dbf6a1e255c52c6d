"""A finished run with a basis → the policy of other margins, as artifacts of the run and as a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from can_dist.config import Config, StrengthChoice, load_config
from can_dist.config.sections import Constraint
from can_dist.config.walk import REWARD
from can_dist.dual.strength import plus_minus
from can_dist.errors import DataError
from can_dist.outcomes.estimate import CONFIG
from can_dist.outcomes.export import check_new, export_policy, find_policy
from can_dist.outcomes.stretch import Stretched, named_margins
from can_dist.run import Run
from can_dist.stages.estimate import MIXTURE, load_estimate, without_strength
from can_dist.stages.mixture import inputs_of, weights_text
from can_dist.stages.solve import load_solution, solve
from can_dist.stages.strength import check, strengthen
from can_dist.tables.artifacts import Artifact


def has_basis(path: Path) -> bool:
    """Return whether the policy of a run, or of an artifact in it, is a mixture of a basis."""
    return without_strength(find_policy(path)[0]).stage == "mixture"


def export_mixture(path: Path, out: Path, *, margins: Mapping[str, float], max_shard_mb: int | None) -> Stretched:
    """Mix the basis of a run for other margins, in the run, and write that policy into the new directory ``out``.

    The dual is solved for these margins, and mixture and strength are made as the run made its own: finished ones are
    reused, and a kill loses nothing that is finished.

    Args:
        path: a run whose policy is a mixture, or an artifact of it.
        out: directory to make.
        margins: other margins by constraint, '' for the only one; the others stay as the run has them.
        max_shard_mb: largest file of weights, in MB; None: as the run writes them.

    Raises:
        ConfigError: a constraint that is not the run's, or a bad ``out``.
        DataError: the run has no policy, several, or the reference is another one now.
        InfeasibleConstraint: no policy attains the margins on the run's table, or no mixture of this basis does.
    """
    check_new(out)
    own = without_strength(find_policy(path)[0])
    config, solution, validation = load_config(own.path.parent / CONFIG), own.input("solution"), own.input("validation")
    constraints = _replaced(config, solution, margins)
    options = config.strength if isinstance(config.strength, StrengthChoice) else StrengthChoice()
    identity = solution.manifest["identity"]
    with Run(own.path.parent, config) as run:
        solved = run.stage(
            "solve", solve, solution.input("scores"), reward=REWARD, constraints=constraints, beta=identity["beta"],
            log_weight=identity["log_weight"],
        )  # fmt: skip
        mixed = run.mixture(inputs_of(own, "policy"), config.reference, solved, validation)
        estimate = run.estimate(mixed, config.reference, solved, validation)
        policy = run.stage("strength", strengthen, mixed, config.reference, solved, estimate, options=options)
        if policy is not mixed:
            estimate = run.estimate(policy, config.reference, solved, validation)
            run.stage("strength", check, policy, solved, estimate)
    sentences = expectations(mixed, solved, estimate)
    export_policy(policy.path, out, adapter=False, max_shard_mb=max_shard_mb, expected=sentences[0])
    return Stretched(out, float(policy.info.get("alpha", 1.0)), sentences)


def expectations(mixed: Artifact, solution: Artifact, estimate: Artifact) -> tuple[str, ...]:
    """Return what the estimate expects of a mixture, what was mixed, and the frontier's price."""
    policy, record, predicted = load_estimate(estimate), mixed.read_json(MIXTURE), load_solution(solution).predicted
    gains = ", ".join(f"{name} {plus_minus(gain)}" for name, gain in policy.improvement.items())
    return (
        f"{gains}, reward {plus_minus(policy.reward_improvement)}, KL {policy.kl.mean:.3g} nats by "
        f"{policy.num_prompts} validation prompts, not measured",
        f"mixture of {weights_text(record['coefficient'])}; mixed weights and mixed log-ratios correlate by "
        f"{record['correlation']:.4f}",
        f"at these margins the dual's frontier has reward {predicted['reward_improvement']:+.3g}, KL "
        f"{predicted['kl']:.3g} nats",
    )


def _replaced(config: Config, solution: Artifact, margins: Mapping[str, float]) -> dict[str, Constraint]:
    """Return the constraints that a solution was solved for, some with other margins."""
    solved = solution.manifest["identity"]["constraints"]
    if list(solved) != list(config.constraints):
        raise DataError(
            f"{solution.path}: solved for {', '.join(solved)}, and the run's configuration now has "
            f"{', '.join(config.constraints)}. Run again with the configuration that trained the basis."
        )
    given = named_margins(list(solved), margins)
    changed = {name: {"margin": value, "threshold": None} for name, value in given.items()}
    return {
        name: config.constraints[name].model_copy(update=dict(demand) | changed.get(name, {}))
        for name, demand in solved.items()
    }
