"""From a configuration to a report: the method that the configuration names, then its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from can_dist.algorithms import RUN
from can_dist.config import METHODS, Config, dump_yaml, for_method, margins_text, with_margins
from can_dist.config.methods import check_stage
from can_dist.doctor.advice import check_scores
from can_dist.doctor.preflight import check_pinned, check_sources, preflight
from can_dist.errors import REFUSALS, ConfigError, DataError, InfeasibleConstraint, NotBelieved, NumericalError
from can_dist.run import Run
from can_dist.tables.artifacts import Artifact, write_text
from can_dist.workspace import StageReached


def run_pipeline(
    directory: str | Path, config: Config, until: str = "evaluate", *, only_stage: str | None = None
) -> Artifact:
    """Run the configured method up to and including a stage; return that stage's artifact.

    If the method repeats the stage, the run ends at its first time; at ``train``, with the method's last training.
    P-SACPO has several policies: all are evaluated, and the artifact of the last q of ``p_sacpo.q`` is returned.

    Args:
        directory: Of the run; made if absent. Finished work in it is not repeated.
        config: The configuration.
        until: The last stage.
        only_stage: The one stage that may compute, where a launcher started this process.

    Raises:
        ConfigError: The method has no such stage, or trains several times and a launcher started it.

    >>> from can_dist import load_config
    >>> evaluation = run_pipeline("runs/mine", load_config("my.yaml"))
    >>> [row["name"] for row in evaluation.info["constraints"]], (evaluation.path / "report.html").is_file()
    (['safety'], True)
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
    write_text(directory / "config.yaml", dump_yaml(config))  # each method wrote its own configuration there
    return evaluations


def run_margins(directory: Path, config: Config, points: Sequence[Mapping[str, float]]) -> list[Artifact | Refusal]:
    """Run the configured method with one set of margins after another in one run directory, sharing what is equal.

    Args:
        directory: Of the run; prompts, responses and scores are made once.
        config: The configuration, whose margins are replaced.
        points: Margins by constraint.

    Returns:
        For each point its evaluation, or the error that says why these margins have no policy.

    Raises:
        ConfigError: The method solves for no margins, or a name is no constraint; nothing is computed.
        DataError: As :data:`Refusal`, of the first point where all are refused.
    """
    if "solve" not in METHODS[config.method].stages:
        raise ConfigError(f"method {config.method} solves for no margins, so there are none to go through.")
    own_configs = [with_margins(config, margins) for margins in points]
    outcomes: list[Artifact | Refusal] = []
    for number, own in enumerate(own_configs, 1):
        place = {"point": number, "points": [dict(margins) for margins in points]}
        try:
            outcomes.append(run_method(directory, own, place_in_sweep=place)[-1])
        except REFUSALS as refusal:
            outcomes.append(refusal)
    write_text(directory / "config.yaml", dump_yaml(config))
    first = outcomes[0]
    if isinstance(first, Exception) and all(isinstance(outcome, Exception) for outcome in outcomes):
        raise first
    return outcomes


Refusal = InfeasibleConstraint | NotBelieved | NumericalError | DataError


def run_method(
    directory: str | Path,
    config: Config,
    until: str = "evaluate",
    *,
    only_stage: str | None = None,
    measured_by: Config | None = None,
    place_in_sweep: Mapping[str, Any] | None = None,
) -> list[Artifact]:
    """Run the configured method up to and including a stage; return its artifacts, one per policy.

    The evaluation uses the scorers and constraints of ``measured_by``, by default those of ``config``.
    ``place_in_sweep`` says which ``point`` of which ``points`` this is, for the log.

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
        if place_in_sweep is not None:
            number, points = place_in_sweep["point"], place_in_sweep["points"]
            name = margins_text(points[number - 1])
            run.say(f"sweep: {name} ({number} of {len(points)})", event="sweep", **place_in_sweep)
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
