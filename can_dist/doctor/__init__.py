"""The doctor: findings about everything a run depends on, each with its remedy."""

from __future__ import annotations

from pathlib import Path

from can_dist.config import Cluster, Config
from can_dist.doctor.environment import check_environment
from can_dist.doctor.filesystem import check_filesystem
from can_dist.doctor.finding import Finding, Severity
from can_dist.doctor.inputs import check_inputs, needed_bytes
from can_dist.doctor.ray_cluster import check_ray

__all__ = ["Finding", "Severity", "examine"]


def examine(run: Path | None, config: Config | None, *, clean: bool = False) -> list[Finding]:
    """Return the findings about this machine, and about the run directory and the configuration if given."""
    from can_dist.doctor.advice import check_scores, scores_of  # torch, which `status` needs not

    findings = check_environment(config)
    findings += check_ray(config.cluster if config else Cluster())
    if run is not None:
        findings += check_filesystem(run, needed_bytes(config) if config else None, clean=clean)
    if config is not None:
        findings += check_inputs(config)
    if run is not None and config is not None and (scores := scores_of(run, config)) is not None:
        findings += check_scores(scores, config)
    return findings
