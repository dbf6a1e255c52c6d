"""From a configuration to a report: the method that the configuration names, then its evaluation."""

from __future__ import annotations

from pathlib import Path

from can_dist.algorithms.mocan import mocan
from can_dist.config import Config
from can_dist.run import Run, StageReached
from can_dist.stages.preflight import preflight
from can_dist.tables.artifacts import Artifact


def run_pipeline(
    directory: Path, config: Config, until: str = "evaluate", *, only_stage: str | None = None
) -> Artifact:
    """Run the configured method up to and including a stage; return that stage's artifact."""
    reference, reward, constraints = config.reference, config.reward, config.constraints
    with Run(directory, config, until=until, only_stage=only_stage) as run:
        try:
            prompts = run.prompts()
            preflight(config)
            policy = mocan(
                run, prompts=prompts, reference=reference, reward=reward, constraints=constraints, beta=config.beta
            )
            return run.evaluate(policy, prompts, reference, reward, constraints)
        except StageReached as reached:
            return reached.artifact
