"""CAID: MoCAN, then feedback from measurements of its policy (multi-shot constrained alignment, arXiv 2505.19387).

    λ ← λ*, π ← MoCAN's policy
    repeat:  slack of fresh samples of π;   λ ← [λ − η·slack]_+;   one more epoch from π on labels of r + ⟨λ, g⟩

The labels are of the reference data and the log-ratios relative to π_ref throughout, so the policy aimed at is
π_λ ∝ π_ref exp((r + ⟨λ, g⟩)/β), and λ moves by the measured slack of the trained policy. ``rounds: 1`` is one step of
feedback after MoCAN.

The slack can be read off the reference's validation responses instead (``slack: estimate``), and λ then moved between
the epochs of one training (``within``), as in the paper: one optimizer, one schedule, one training.

The assumption that can break: an epoch must bring the policy near the new π_λ. When the trainings stop short, the
feedback compensates with a λ beyond λ*: the slack is as wanted, but λ is no longer that of the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from can_dist.algorithms.ascent import next_lam
from can_dist.config import Caid, Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.stages.trajectory import Round
from can_dist.stages.watch import Ascent, Watched
from can_dist.tables.artifacts import Artifact


def caid(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: Caid,
) -> Artifact:
    """Return the policy of the last feedback step.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> policy = caid(run, **problem, options=config.caid)
    """
    data = run.reference_data(prompts, reference, reward, constraints, beta)
    step_size = run.step_sizes(data, options.step_size)

    preferences = run.label(data.pairs, data.pair_scores, data.solution, beta)
    if options.within:
        policy = _within(run, reference, preferences, beta, data.watched, step_size, options)
        return run.strength(policy, reference, data.solution, data.validation)

    def slack(policy: Artifact) -> Artifact:
        if options.slack == "estimate":
            return run.estimated_slack(policy, reference, data)
        return run.measure(policy, prompts, data.scores, reward, constraints)

    policy = run.train(reference, preferences, beta, watched=data.watched)  # MoCAN's, of λ*
    rounds = [Round(data.lam, policy, slack(policy))]
    for _ in range(options.rounds):
        lam = next_lam(rounds[-1], step_size)  # [λ − η·slack]_+
        preferences = run.label(data.pairs, data.pair_scores, lam, beta)
        policy = run.train(reference, preferences, beta, start=policy, epochs=options.epochs, watched=data.watched)
        rounds.append(Round(lam, policy, slack(policy)))
    run.trajectory(rounds)
    return run.strength(policy, reference, data.solution, data.validation)


def _within(
    run: Run,
    reference: Model,
    preferences: Artifact,
    beta: float,
    watched: Watched,
    step_size: Mapping[str, float],
    options: Caid,
) -> Artifact:
    """Train once: MoCAN's epochs, and those of every round, with λ ← [λ − η·slack]_+ before each round."""
    first = run.config.train.num_epochs
    moves = tuple(first + number * options.epochs for number in range(options.rounds))
    ascending = replace(watched, ascent=Ascent(step_size, moves))
    return run.train(reference, preferences, beta, epochs=moves[-1] + options.epochs, watched=ascending)
