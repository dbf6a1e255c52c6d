"""From a configuration to a report: the method that the configuration names, then its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from can_dist.algorithms import RUN
from can_dist.config import METHODS, Config, dump_yaml, for_method
from can_dist.config.methods import check_stage
from can_dist.doctor.advice import check_scores
from can_dist.doctor.preflight import check_pinned, check_sources, preflight
from can_dist.errors import ConfigError
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact, atomic_file
from can_dist.workspace import StageReached


def run_pipeline(
    directory: Path, config: Config, until: str = "evaluate", *, only_stage: str | None = None
) -> Artifact:
    """Run the configured method up to and including a stage; return that stage's artifact.

    If the method repeats the stage, the run ends at its first time; at ``train``, with the method's last training.
    P-SACPO has several policies: all are evaluated, and the artifact of the last q of ``p_sacpo.q`` is returned.

    Raises:
        ConfigError: The method has no such stage, or trains several times and a launcher started it.
    """
    return run_method(directory, config, until, only_stage=only_stage)[-1]


def run_methods(directory: Path, config: Config, methods: Sequence[str]) -> list[Artifact]:
    """Run methods one after the other in one run directory; return the evaluations of all their policies.

    Each method runs with its own keys (``methods.<name>``). All are measured with the scorers, and judged by the
    constraints, of the configuration itself, so that they can be compared. Shared stages are computed once.

    Raises:
        ConfigError: A name is not a method, or a method cannot be run with its keys; nothing is computed.
    """
    own_configs = [for_method(config, method) for method in methods]
    evaluations = [artifact for own in own_configs for artifact in run_method(directory, own, measured_by=config)]
    with atomic_file(directory / "config.yaml") as temporary:  # each method wrote its own configuration there
        temporary.write_text(dump_yaml(config), encoding="utf-8")
    return evaluations


def run_method(
    directory: Path,
    config: Config,
    until: str = "evaluate",
    *,
    only_stage: str | None = None,
    measured_by: Config | None = None,
) -> list[Artifact]:
    """Run the configured method up to and including a stage; return its artifacts, one per policy.

    The evaluation uses the scorers and constraints of ``measured_by``, by default those of ``config``.

    Raises:
        ConfigError: The method has no such stage, or trains several times and a launcher started it.
    """
    stages, measured = METHODS[config.method].stages, measured_by or config
    check_stage(config.method, until)
    if only_stage == "train" and (METHODS[config.method].trains_again or config.basis):
        cause = "basis: true" if config.basis else f"method {config.method}"
        raise ConfigError(
            f"{cause} trains several times, with other stages in between, and a launcher can only run one training.",
            "Start it with 'can-dist run', which starts the ranks by Ray.",
        )
    with Run(directory, config, until=until, only_stage=only_stage) as run:
        try:
            check_pinned(config)
            check_sources(config)
            prompts = run.prompts()
            # launched ranks look at compiled extensions together, each on its node
            trains = only_stage is None and "train" in stages[: stages.index(until) + 1]
            for note in preflight(config, prompts, trains=trains):
                run.say(note)
            policies = RUN[config.method](run, config, prompts)
        except StageReached as reached:
            for finding in check_scores(reached.artifact, config) if until == "score" else ():
                run.say(
                    f"score: {finding.subject}: {finding.state}" + (f". {finding.remedy}" if finding.remedy else "")
                )
            return [reached.artifact]
        if until == "evaluate":
            policies = {
                variant: run.evaluate(
                    policy, prompts, config.reference, measured.reward, measured.constraints, variant=variant
                )
                for variant, policy in policies.items()
            }
        if len(policies) > 1:
            for variant, artifact in policies.items():
                run.say(f"{config.method}, {variant}: {artifact.path}")
        return list(policies.values())
