"""MoCAN: model-based one-shot safety alignment by optimal dualization (CAN, arXiv 2405.19544, algorithm 2).

    max_π E[ E_π r − β KL(π‖π_ref) ]   s.t.   E[ E_π g_j − E_{π_ref} g_j ] ≥ b_j

Its dual D(λ) is smooth and convex in one variable per constraint and needs only scores of samples of π_ref. The
policy of λ* = argmin_{λ≥0} D(λ) is π* ∝ π_ref exp((r + ⟨λ*, g⟩)/β): an unconstrained alignment with the reward
r + ⟨λ*, g⟩, which one DPO with the same β reaches.

The assumption that can break: the K samples of a prompt must cover π*. When the scores' spread is many times β, the
weights fall on one response and λ* describes best-of-K; the solution's verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.basis import mixed
from can_dist.config import Model, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.stages.watch import Watched
from can_dist.tables.artifacts import Artifact


def mocan(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
) -> Artifact:
    """Return the policy that maximises ``reward`` subject to ``constraints``, trained once.

    >>> from can_dist import Run, load_config
    >>> config = load_config("my.yaml")
    >>> with Run("runs/mine", config) as run:
    ...     problem = {
    ...         "prompts": run.prompts(),
    ...         "reference": config.reference,
    ...         "reward": config.reward,
    ...         "constraints": config.constraints,
    ...         "beta": config.beta,
    ...     }
    ...     policy = mocan(run, **problem)
    >>> (policy.path / "policy" / "model.safetensors").is_file()
    True
    """
    responses = run.generate(reference, prompts)  # y_ik ~ π_ref(·|x_i)
    scores = run.score(responses, reward, constraints, reference)  # r, g_j, ln π_ref
    solution = run.solve(scores, constraints, beta)  # λ* = argmin_{λ≥0} D(λ)
    validation = run.validation(reference, prompts, reward, constraints)  # the same of prompts not trained on
    pairs = run.pairs(reference, prompts, responses)  # the same samples, or a data set's own response pairs
    if pairs is not responses:
        scores = run.score(pairs, reward, constraints, reference)
    preferences = run.label(pairs, scores, solution, beta)  # p(y_a ≻ y_b) = σ(s_a − s_b)
    policy = run.train(reference, preferences, beta, watched=Watched(solution, validation))  # one DPO, same β
    policy = mixed(run, policy, reference, pairs, scores, solution, validation, beta)  # with basis: true
    return run.strength(policy, reference, solution, validation)  # θ_ref + α(θ − θ_ref), α = max_j b_j/Ĝ_j
