"""C-DPO: constrained DPO by dual ascent around whole trainings (arXiv 2403.02475, algorithm 1).

    p(y_a ≻ y_b) = σ(Δ(r + ⟨λ, g⟩))        relabel
    π_λ: a whole DPO from π_ref            train
    λ ← [λ − η(E_π g − E_{π_ref} g − b)]_+     measure on fresh samples, step

With exact trainings the slack is the gradient of MoCAN's dual, so the loop's limit is MoCAN's λ*; the loop pays one
training and one generation per step; MoCAN computes the same λ from one table. In return the slack is that of the
trained policy, with all errors of its training.

The assumption that can break: η must not exceed 2/D''. '1/H' takes the curvature of the table's dual at its λ*; a
trained policy that moves further than π_λ has more curvature, and λ then swings from round to round.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.ascent import next_lam, settled
from can_dist.config import Cdpo, Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.stages.trajectory import Round
from can_dist.tables.artifacts import Artifact


def cdpo(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: Cdpo,
) -> Artifact:
    """Return the policy of the last round: the one whose safety settled, or that of ``options.rounds``.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> policy = cdpo(run, **problem, options=config.cdpo)
    """
    data = run.reference_data(prompts, reference, reward, constraints, beta)
    step_size = run.step_sizes(data, options.step_size)
    lam: Mapping[str, float] = data.lam if options.warm_start else dict.fromkeys(constraints, 0.0)

    rounds: list[Round] = []
    is_settled = False
    while not is_settled and len(rounds) < options.rounds:
        preferences = run.label(data.pairs, data.pair_scores, lam, beta)  # p(y_a ≻ y_b) = σ(Δ(r + ⟨λ, g⟩))
        policy = run.train(reference, preferences, beta, watched=data.watched)  # a whole DPO, from π_ref
        slack = run.measure(policy, prompts, data.scores, reward, constraints)
        rounds.append(Round(lam, policy, slack))
        is_settled = settled(rounds[-1], options.tolerance, options.standard_errors)
        lam = next_lam(rounds[-1], step_size)  # [λ − η·slack]_+
    run.trajectory(rounds, is_settled=is_settled)
    return run.strength(rounds[-1].policy, reference, data.solution, data.validation)
