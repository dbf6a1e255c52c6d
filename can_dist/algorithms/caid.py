"""CAID: MoCAN, then feedback from measurements of its policy (multi-shot constrained alignment, arXiv 2505.19387).

    λ ← λ*, π ← MoCAN's policy
    repeat:  slack of fresh samples of π;   λ ← [λ − η·slack]_+;   one more epoch from π on labels of r + ⟨λ, g⟩

The labels are of the reference data and the log-ratios relative to π_ref throughout, so the policy aimed at is
π_λ ∝ π_ref exp((r + ⟨λ, g⟩)/β), and λ moves by the measured slack of the trained policy. ``rounds: 1`` is one step of
feedback after MoCAN.

The assumption that can break: an epoch must bring the policy near the new π_λ. When the trainings stop short, the
feedback compensates with a λ beyond λ*: the slack is as wanted, but λ is no longer that of the optimum.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.ascent import next_lam
from can_dist.config import Caid, Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.stages.trajectory import Round
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
    policy = run.train(reference, preferences, beta, watched=data.watched)  # MoCAN's, of λ*
    rounds = [Round(data.lam, policy, run.measure(policy, prompts, data.scores, reward, constraints))]
    for _ in range(options.rounds):
        lam = next_lam(rounds[-1], step_size)  # [λ − η·slack]_+
        preferences = run.label(data.pairs, data.pair_scores, lam, beta)
        policy = run.train(reference, preferences, beta, start=policy, epochs=options.epochs, watched=data.watched)
        rounds.append(Round(lam, policy, run.measure(policy, prompts, data.scores, reward, constraints)))
    run.trajectory(rounds)
    return run.strength(policy, reference, data.solution, data.validation)
