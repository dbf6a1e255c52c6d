"""From a configuration to a report: the method that the configuration names, then its evaluation."""

from __future__ import annotations

from pathlib import Path

from can_dist.algorithms.dpo import dpo
from can_dist.algorithms.mocan import mocan
from can_dist.config import Config
from can_dist.errors import ConfigError
from can_dist.run import Run, StageReached
from can_dist.stages.human_labels import Criterion
from can_dist.stages.preflight import preflight
from can_dist.tables.artifacts import Artifact

# what a method can be stopped after
STAGES = {
    "mocan": ("generate", "score", "solve", "label", "train", "evaluate"),
    "dpo_h": ("score", "label", "train", "evaluate"),
    "dpo_s": ("score", "label", "train", "evaluate"),
}


def run_pipeline(
    directory: Path, config: Config, until: str = "evaluate", *, only_stage: str | None = None
) -> Artifact:
    """Run the configured method up to and including a stage; return that stage's artifact.

    Raises
    ------
    ConfigError
        When the method has no such stage.
    """
    stages = STAGES[config.method]
    if until not in stages:
        raise ConfigError(f"method {config.method} has no stage {until!r}. Its stages: {', '.join(stages)}.")
    with Run(directory, config, until=until, only_stage=only_stage) as run:
        try:
            prompts = run.prompts()
            preflight(config)
            policy = _run_method(run, config, prompts)
            return run.evaluate(policy, prompts, config.reference, config.reward, config.constraints)
        except StageReached as reached:
            return reached.artifact


def _run_method(run: Run, config: Config, prompts: Artifact) -> Artifact:
    reference, beta = config.reference, config.beta
    if config.method == "mocan":
        return mocan(
            run,
            prompts=prompts,
            reference=reference,
            reward=config.reward,
            constraints=config.constraints,
            beta=beta,
        )
    criterion: Criterion = "helpful" if config.method == "dpo_h" else "safe"
    return dpo(run, prompts=prompts, reference=reference, criterion=criterion, beta=beta)
