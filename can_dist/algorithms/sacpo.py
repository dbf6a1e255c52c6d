"""SACPO: stepwise alignment, helpfulness then safety or the other way round (arXiv 2404.11049).

    π_r   ∝ π_ref exp(r/β)                one alignment on helpfulness, with β
    π*    ∝ π_r exp(λg/β)                 one on safety, from π_r and relative to it, with β/λ

Tilting twice is tilting once by (r + λg)/β, in either order: for exact alignments this is the constrained optimum of
the λ that was chosen. Each alignment is a plain DPO or KTO on labels of one criterion; no λ is solved for, β/λ is an
option (at β/λ* the margin is met).

The assumption that can break: both steps are offline on the same pairs, so the second one is only as good where the
first policy still generates such responses; and the second step cannot correct the errors of the first.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.config import Model, Sacpo, Scorer
from can_dist.config.sections import Constraint
from can_dist.config.walk import REWARD
from can_dist.run import Run
from can_dist.stages.human_labels import Criterion
from can_dist.stages.train import Policy
from can_dist.tables.artifacts import Artifact


def sacpo(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: Sacpo,
) -> Artifact:
    """Return the policy of the second step; the first step's is its nearest ancestor of the stage ``train``.

    ``reward`` and ``constraints`` are read only where the labels are made from scores.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> policy = sacpo(run, **problem, options=config.sacpo)
    """
    kl_weight: dict[Criterion, float] = {"helpful": beta, "safe": options.beta_over_lambda}
    order: tuple[Criterion, Criterion] = ("helpful", "safe")
    if options.order == "safe_first":
        order = ("safe", "helpful")

    steps = dict(zip(order, (options.first, options.second), strict=True))
    pairs_of = run.step_pairs(reference, prompts, steps) if options.labels_from == "people" else {}

    policy: Policy = reference
    for criterion, step in steps.items():
        if options.labels_from == "people":
            pairs = pairs_of[criterion]
            logps = run.log_probs(pairs, policy)  # ln π of the policy that this step starts from
            preferences = run.label_human(pairs, logps, criterion, step)
        else:
            (safety,) = constraints
            pairs = run.pairs(reference, prompts)
            scores = run.score(pairs, reward, constraints, policy)
            score = REWARD if criterion == "helpful" else safety
            preferences = run.label(pairs, scores, {}, kl_weight[criterion], score=score)  # σ(Δr), or σ(Δg)
        policy = run.train(policy, preferences, kl_weight[criterion])  # from, and relative to, the policy before
    assert isinstance(policy, Artifact)
    return policy
