"""P-SACPO: mixtures of SACPO's two policies in the space of weights (arXiv 2404.11049, section 4.2).

    θ_q = q·θ_{r+λg} + (1 − q)·θ_r

One pair of trainings gives a curve from helpful (q = 0) to safe (q = 1), without another gradient step.

The assumption that can break: the two policies must lie in one basin, where the loss is nearly linear between them;
a safety step that went far leaves mixtures worse than both ends. So every q is evaluated, none is trusted.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.algorithms.sacpo import sacpo
from can_dist.config import Model, PSacpo, Sacpo, Scorer
from can_dist.config.sections import Constraint
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact


def p_sacpo(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    reward: Scorer,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: Sacpo,
    mixture: PSacpo,
) -> dict[float, Artifact]:
    """Return the mixed policy of every q, in the order given; q weighs the safe policy.

    With ``config``, an open ``run`` and its arguments ``problem`` as in the example of :func:`can_dist.mocan`:

    >>> mixed = p_sacpo(run, **problem, options=config.sacpo, mixture=config.p_sacpo)
    >>> list(mixed)
    [0.25, 0.5, 0.75]
    """
    safe = sacpo(
        run,
        prompts=prompts,
        reference=reference,
        reward=reward,
        constraints=constraints,
        beta=beta,
        options=options,
    )
    helpful = run.ancestor(safe, "train")
    return {q: run.merge(safe, helpful, q) for q in mixture.q}
