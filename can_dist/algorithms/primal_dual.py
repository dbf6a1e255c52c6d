"""Primal–dual: the online loop that one-shot dualisation replaces (Safe-RLHF, arXiv 2310.12773, in today's short form).

    y_1, ..., y_K ~ π                                          sample from the policy as it is
    λ ← [λ − η(E_π g − E_{π_ref} g − b)]_+                     a step of the dual, or of ln λ
    A_k = R_k − mean_{l≠k} R_l,  R = r + ⟨λ, g⟩ − β ln π/π_ref     leave-one-out advantages (RLOO, arXiv 2402.14740)
    π ← one epoch of min(ρA, clip(ρ)A),  ρ = π_θ/π             PPO's step, with a response as one action

PPO-Lagrangian without critics. Its fixed point is MoCAN's: where all advantages are 0, π ∝ π_ref exp((r + ⟨λ, g⟩)/β)
and where λ rests, the slack is zero or λ is. MoCAN gets there from one table; the loop pays a sampling, a scoring and
an epoch per round, and in return it learns from the responses of the policy that it has, not of the reference.

The assumption that can break: the policy must follow λ. Both move at once, each towards where the other was, so λ
overshoots while the policy lags; and from η = 2/L on, L the dual's curvature, even a policy that follows at once swings
for ever. Such a loop is stopped, with its trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.ascent import diverges, moved
from can_dist.config import Model, PrimalDual, Scorer
from can_dist.config.sections import Constraint
from can_dist.config.walk import REWARD
from can_dist.errors import NumericalError
from can_dist.run import Run
from can_dist.stages.advantages import label_advantages
from can_dist.stages.examples import stream
from can_dist.stages.slack import largest_step, measure
from can_dist.stages.train import Policy
from can_dist.stages.trajectory import ReferenceData, Round
from can_dist.tables.artifacts import Artifact


def primal_dual(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: PrimalDual,
) -> Artifact:
    """Return the policy of the last round.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> policy = primal_dual(run, **problem, options=config.primal_dual)

    Raises:
        NumericalError: λ swings without an end. The trajectory of the rounds until then is in the run directory.
    """
    data = run.reference_data(prompts, reference, reward, constraints, beta)
    step_size = run.step_sizes(data, options.step_size)
    if options.form == "log" and options.step_size == "1/H":  # the curvature along ln λ is λ*² times that along λ
        step_size = {name: eta / (data.lam[name] ** 2 or 1.0) for name, eta in step_size.items()}

    def measured(scores: Artifact) -> Artifact:
        return run.stage("measure", measure, scores, data.scores, constraints, reward=REWARD)

    lam: Mapping[str, float] = dict.fromkeys(constraints, options.start)
    policy: Policy = reference
    responses, scores = data.pairs, data.scores
    slack = measured(scores)
    rounds: list[Round] = []
    for number in range(1, options.rounds + 1):
        lam = moved(lam, slack.info["constraints"], step_size, form=options.form)
        examples = run.stage("label", label_advantages, responses, scores, lam, reward=REWARD, beta=beta)
        policy = run.train(policy, examples, beta, epochs=options.epochs, watched=data.watched)
        # noise of its own: with that of the round before, the policy would learn the noise
        responses = run.generate(policy, prompts, seed=stream(run.config.seed, f"round {number}") >> 1)
        scores = run.score(responses, reward, constraints, reference, policy=policy)
        slack = measured(scores)
        rounds.append(Round(lam, policy, slack))
        if name := diverges(rounds):
            run.trajectory(rounds, is_settled=False)
            raise _diverged(data, name, rounds, step_size, options)
    run.trajectory(rounds)
    return run.strength(rounds[-1].policy, reference, data.solution, data.validation)


def _diverged(
    data: ReferenceData, name: str, rounds: list[Round], step_size: Mapping[str, float], options: PrimalDual
) -> NumericalError:
    of_logarithm, course = options.form == "log", ", ".join(_shown(rounds, name))
    bound = largest_step(data.scores, data.solution, reward=REWARD, of_logarithm=of_logarithm)
    curvature = f"the dual's curvature along {'ln λ' if of_logarithm else 'λ'} at its λ*"
    limit = f"a policy that follows λ at once allows less than 2/L = {bound:.3g}, L {curvature}"
    if step_size[name] >= bound:
        remedy = f"Set primal_dual.step_size below {bound:.3g}; '1/H' is half of it for one constraint."
    else:
        remedy = (
            "The step is below it, so the policy does not follow: lower primal_dual.step_size, or let the policy go "
            "further in a round (train.learning_rate, primal_dual.epochs)."
        )
    return NumericalError(
        f"primal_dual: λ of {name} swings and its swings do not shrink: {course}. η is {step_size[name]:.3g}; {limit}. "
        f"Stopped after round {len(rounds)} of {options.rounds}; the trajectory and all policies are kept.",
        remedy,
    )


def _shown(rounds: list[Round], name: str) -> list[str]:
    return [f"{turn.lam[name]:.3g}" for turn in rounds[-8:]]
