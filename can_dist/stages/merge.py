"""Two policies → the policy of their mean weights θ = q·θ_a + (1 − q)·θ_b (P-SACPO, arXiv 2404.11049, 4.2)."""

from __future__ import annotations

import shutil

from can_dist.tables.artifacts import Artifact
from can_dist.training import POLICY
from can_dist.workspace import Workspace


def merge(work: Workspace, policy_a: Artifact, policy_b: Artifact, *, q: float) -> Artifact:
    """Return the artifact whose ``policy/`` is the merge, laid out like that of ``train``; ``q`` weighs ``policy_a``.

    Raises:
        ConfigError: q is not a finite number.
        DataError: The policies differ in architecture or tokenizer, or a file of them is damaged.
    """
    from can_dist.training.merge import merge_policies

    stage = work.open("merge", f"q={q:g}", {"q": q}, {"policy_a": policy_a, "policy_b": policy_b})
    if stage.finished:
        return stage.finished
    policy_a.check()
    policy_b.check()
    out = stage.path / POLICY
    shutil.rmtree(out, ignore_errors=True)  # a kill may have left it without a manifest
    with work.timed("merge", f"q={q:g}"):
        largest = work.config.train.max_shard_size_mb
        merge_policies(policy_a.path / POLICY, policy_b.path / POLICY, out, q, largest)
        files = sorted(str(path.relative_to(stage.path)) for path in out.rglob("*") if path.is_file())
        return stage.commit(files, info={"q": q})
