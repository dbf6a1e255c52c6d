"""The basis that MoCAN and PeCAN can train beside their policy: one policy of each constraint's score alone.

    θ(a) = θ_ref + Σ_i a_i (θ_i − θ_ref),    a = Σ⁻¹ (v_r + Σ_j μ_j v_j)/β

Near the reference mixing weights mixes log-ratios, so policies trained once on r + ⟨λ, g⟩ and on each g_j span what
lies between, and a is in closed form from covariances on validation responses (docs/dual.md).

The assumption that can break: far from the reference weights do not mix log-ratios. The mixed policy is measured, and
refused where they do not.
"""

from __future__ import annotations

from can_dist.config import Model
from can_dist.config.walk import REWARD
from can_dist.run import Run
from can_dist.stages.label import label_alone
from can_dist.stages.mixture import check_validation, policy_name
from can_dist.tables.artifacts import Artifact


def mixed(
    run: Run,
    policy: Artifact,
    reference: Model,
    pairs: Artifact,
    scores: Artifact,
    solution: Artifact,
    validation: Artifact | None,
    beta: float,
) -> Artifact:
    """Return the mixture of a policy with one of each constraint that meets the margins; itself without ``basis``."""
    if not run.config.basis:
        return policy
    held_out = check_validation(validation, policy)
    run.estimate(policy, reference, solution, held_out)  # what its strength alone would reach
    policies = {"": policy}
    for name in run.config.constraints:
        # s = c·g_j, in the spread of r
        preferences = run.stage("label", label_alone, pairs, scores, solution, name, reward=REWARD, beta=beta)
        policies[name] = run.train(reference, preferences, beta, name=policy_name(name))
    return run.mixture(policies, reference, solution, held_out)
