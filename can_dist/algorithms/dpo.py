"""DPO-H and DPO-S: direct preference optimisation on people's labels, of helpfulness or of safety (arXiv 2305.18290).

    min_π −E ln σ(β[ln π/π_ref(y_w) − ln π/π_ref(y_l)])        y_w preferred to y_l by people

If people prefer as Bradley and Terry say, P(y_w ≻ y_l) = σ(r(x, y_w) − r(x, y_l)), the policy is π_ref exp(r/β) up to
its normalisation, for a reward r that is never fitted. These are the baselines that the constrained methods stand
beside: each follows one criterion and is blind to the other.

The assumption that can break: labels that are never contradicted (one label per pair) are best explained by infinite
rewards, so the log-ratios grow for as long as one trains and β no longer bounds them. Label smoothing ε bounds each
margin at ln((1 − ε)/ε); few epochs do it in practice.
"""

from __future__ import annotations

from can_dist.config import Model
from can_dist.run import Run
from can_dist.stages.human_labels import Criterion
from can_dist.tables.artifacts import Artifact


def dpo(run: Run, *, prompts: Artifact, reference: Model, criterion: Criterion, beta: float) -> Artifact:
    """Return the policy trained on people's preferences by ``criterion``: 'helpful' (DPO-H) or 'safe' (DPO-S).

    With ``config`` and an open ``run`` as in the example of :func:`can_dist.mocan`:

    >>> policy = dpo(run, prompts=run.prompts(), reference=config.reference, criterion="safe", beta=config.beta)
    """
    pairs = run.human_pairs(reference, prompts)  # y_a, y_b and people's labels of them
    logps = run.log_probs(pairs, reference)  # ln π_ref
    preferences = run.label_human(pairs, logps, criterion)  # 1 − ε on the preferred one
    return run.train(reference, preferences, beta)
