"""SafeDPO: helpfulness among safe responses, by one DPO on relabelled preferences (arXiv 2505.20065).

    max_π E[r] − β KL(π‖π_ref)   s.t.   π gives unsafe responses no mass     π* ∝ π_ref exp(r/β) · [y is safe]

People's preferences of helpfulness are relabelled by safety flags: where the preferred response is unsafe and the
other one safe, the two change places; a pair of two unsafe responses is dropped; any other is kept. Then

    min_π −E ln σ(β[ln π/π_ref(y_w) − ln π/π_ref(y_l)] − Δ·[y_l is unsafe])

Its minimiser is π* for every Δ: a safe response always wins against an unsafe one, so their log-ratios part without
end, and Δ says how soon. No dual, no λ, no margin: the constraint is that nothing unsafe is said at all.

The assumption that can break: flags of responses in the data say nothing of unsafe responses that the data lacks, and
π_ref may have most of its mass there. How safe the policy is, the evaluation measures.
"""

from __future__ import annotations

from collections.abc import Mapping

from can_dist.config import Constraint, Model, SafeDpo
from can_dist.run import Run
from can_dist.stages.safe_pairs import label_safe
from can_dist.tables.artifacts import Artifact


def safedpo(
    run: Run,
    *,
    prompts: Artifact,
    reference: Model,
    constraints: Mapping[str, Constraint],
    beta: float,
    options: SafeDpo,
) -> Artifact:
    """Return the policy trained on people's preferences of helpfulness, relabelled by flags of safety.

    With ``config`` and an open ``run`` as in the example of :func:`can_dist.mocan`:

    >>> problem = {"prompts": run.prompts(), "reference": config.reference, "constraints": config.constraints}
    >>> policy = safedpo(run, **problem, beta=config.beta, options=config.safedpo)
    """
    pairs = run.human_pairs(reference, prompts)  # y_a, y_b, which is more helpful, which are safe
    judges = {
        name: constraints[name].scorer for name in options.thresholds or ()
    }  # in the place of the data's own flags
    scores = run.log_probs(pairs, reference, judges)  # ln π_ref, and their scores
    preferences = run.stage("label", label_safe, pairs, scores, options)  # keep, swap, drop; Δ
    return run.train(reference, preferences, beta)
