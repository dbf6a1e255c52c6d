"""PeCAN: one-shot safety alignment from people's preferences alone (CAN, arXiv 2405.19544, algorithm 3).

    max_π E[ E_π r − β KL(π‖π_ref) ]   s.t.   E[ E_π g_j − E_{π_ref} g_j ] ≥ b_j

as MoCAN, without score models: a policy aligned from π_ref by DPO holds the reward it was aligned with,
r = β_r ln π_r/π_ref and g_j = β_gj ln π_gj/π_ref up to a term of the prompt alone, which cancels in the dual and in
the labels. The β of each policy is its own and none has to be that of the final training. A margin b_j is b_j/β_gj
nats of log-ratio.

The assumption that can break: β ln π/π_ref is a reward in people's units only where the DPO reached its optimum. A
policy trained too little understates it, one trained too long on labels that are never contradicted overstates it;
``calibrate`` measures the one number by which it is off. And as in MoCAN the K samples of a prompt must cover π*.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.basis import mixed
from can_dist.config import Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.stages.watch import Watched
from can_dist.tables.artifacts import Artifact


def pecan(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
) -> Artifact:
    """Return the policy that maximises ``reward`` subject to ``constraints``, all of them log-ratios.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> policy = pecan(run, **problem)
    """
    aligned = run.aligned(reference, prompts, reward, constraints)  # π_r, π_gj: given, or one DPO each
    responses = run.generate(reference, prompts)  # y_ik ~ π_ref(·|x_i)
    scores = run.score(responses, reward, constraints, reference, aligned)  # β_r ln π_r/π_ref, β_gj ln π_gj/π_ref
    solution = run.solve(scores, constraints, beta)  # λ* = argmin_{λ≥0} D(λ)
    validation = run.validation(reference, prompts, reward, constraints, aligned)  # the same of prompts not trained on
    pairs = run.pairs(reference, prompts, responses)  # the same samples, or a data set's own response pairs
    if pairs is not responses:
        scores = run.score(pairs, reward, constraints, reference, aligned)
    preferences = run.label(pairs, scores, solution, beta)  # p(y_a ≻ y_b) = σ(s_a − s_b)
    policy = run.train(reference, preferences, beta, watched=Watched(solution, validation))  # one DPO
    policy = mixed(run, policy, reference, pairs, scores, solution, validation, beta)  # with basis: true
    return run.strength(policy, reference, solution, validation)  # θ_ref + α(θ − θ_ref), α = max_j b_j/Ĝ_j
