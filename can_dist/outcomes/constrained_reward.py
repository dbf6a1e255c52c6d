"""A finished dual and the scorers of its run → r + ⟨λ*, g⟩ as a reward function of other people's trainers."""

from __future__ import annotations

from pathlib import Path

from can_dist.config import LogRatio, load_config
from can_dist.config.walk import named_scorers
from can_dist.errors import ConfigError, DataError
from can_dist.modeling.precision import run_precision
from can_dist.outcomes.estimate import CONFIG, find_solution
from can_dist.outcomes.export import find_policy
from can_dist.scoring.constrained import ConstrainedReward
from can_dist.scoring.kinds import scorer_identity
from can_dist.stages.solve import load_solution, solved_columns
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact


def constrained_reward(run: str | Path) -> ConstrainedReward:
    """Return r + ⟨λ*, g⟩ of a run as a reward function, by the scorers that its dual was solved on.

    Args:
        run: A run directory with one dual's solution, or an artifact of the stage ``solve``.

    Raises:
        ConfigError: A scorer is a log-ratio of policies, whose number needs tokens that a reward function is not given.
        DataError: The run has no dual; or its scorers are no longer those that λ* was solved on.

    >>> from can_dist import Run, load_config
    >>> config = load_config("my.yaml")
    >>> with Run("runs/solved", config) as run:
    ...     responses = run.generate(config.reference, run.prompts())
    ...     scores = run.score(responses, config.reward, config.constraints, config.reference)
    ...     solution = run.solve(scores, config.constraints, config.beta)
    >>> reward = constrained_reward("runs/solved")
    >>> len(reward(prompts=["Say tea.", "Say no."], completions=["tea", "no"]))
    2
    """
    solution = run_solution(Path(run))
    config = load_config(solution.path.parent / CONFIG)
    scorers, solved = named_scorers(config.reward, config.constraints), solution.input("scores").info["scorers"]
    weights = weights_of(solution)
    for name in weights:
        if isinstance(scorer := scorers.get(name), LogRatio):
            raise ConfigError(
                f"{solution.path}: score {name!r} is a log-ratio of policies, which needs the tokens of a response.",
                "Use a run whose scorers read texts.",
            )
        now = {} if scorer is None else scorer_identity(scorer, run_precision(config))
        if scorer is None or any(solved[name].get(key) != value for key, value in now.items()):
            raise DataError(
                f"{solution.path}: λ* was solved on scores of another scorer {name!r} than {CONFIG} has now.",
                "Solve again.",
            )
    return ConstrainedReward(weights, scorers, config)


def run_solution(path: Path) -> Artifact:
    """Return the dual's solution at a path: an artifact of ``solve``, or the one of a run.

    Raises:
        DataError: There is none, or several and no single policy that one of them belongs to.
    """
    if (path / MANIFEST).is_file():
        artifact = load_artifact(path)
        return artifact if artifact.stage == "solve" else find_solution(find_policy(path)[0])
    solutions = [load_artifact(made.parent) for made in sorted(path.glob(f"solve-*/{MANIFEST}"))]
    if not solutions:
        raise DataError(
            f"{path}: has no dual's solution (solve-...), so there is no λ* and no weight to give.",
            "Give a run of a method that solves the dual, such as mocan; or run 'can-dist solve' there first.",
        )
    if len(solutions) == 1:
        return solutions[0]
    try:
        return find_solution(find_policy(path)[0])
    except DataError:
        names = ", ".join(artifact.path.name for artifact in solutions)
        raise DataError(
            f"{path}: expected one dual's solution, found {names}.", "Give the path of the one that is meant."
        ) from None


def weights_of(solution: Artifact) -> dict[str, float]:
    """Return the weight of each score in r + ⟨λ*, g⟩: 1 for the reward, λ*_j for constraint j.

    Raises:
        ConfigError: A constraint is on more than the mean of a score, so no weighted sum of scores is the reward.
    """
    if derived := [column.name for column in solved_columns(solution) if column.of != "mean"]:
        raise ConfigError(
            f"{solution.path}: {derived[0]} is a constraint on more than the mean of a score (of), and a weighted sum "
            "of scores cannot say it.",
            "Use a run whose constraints are of: mean.",
        )
    return {str(solution.manifest["identity"]["reward"]): 1.0, **load_solution(solution).lam}
