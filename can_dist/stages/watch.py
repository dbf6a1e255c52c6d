"""What a training is watched by: scored validation responses, what the constraints ask, and how λ moves."""

from __future__ import annotations

from dataclasses import dataclass

from can_dist.config.sections import Train
from can_dist.dual import evaluate
from can_dist.dual.feedback import MAX_CONDITION, STEP, check_regular
from can_dist.errors import ConfigError
from can_dist.stages.solve import demands, labelled_lam, load_solution, solved_table
from can_dist.tables.artifacts import Artifact
from can_dist.training.spec import Steering, WatchSpec


@dataclass(frozen=True)
class Watched:
    """What a training is watched by.

    Attributes:
        solution: The dual's solution, of which λ* and the demands are.
        validation: Scores, with ln π_ref, of the reference's responses to prompts that nothing is trained on; None
            where there are none, and nothing is watched.
    """

    solution: Artifact
    validation: Artifact | None


def watch_spec(watched: Watched | None, preferences: Artifact, options: Train, total: int) -> WatchSpec | None:
    """Return what the ranks of a training of ``total`` steps on ``preferences`` are told; None to watch nothing.

    Raises:
        ConfigError: ``train.feedback`` is asked for, and the training ends before the first evaluation.
        NumericalError: The table of scores cannot tell two constraints apart, so λ cannot be steered.
    """
    if watched is None or watched.validation is None:
        return None
    identity, demanded = watched.solution.manifest["identity"], demands(watched.solution)
    lam = labelled_lam(preferences, watched.solution)
    return WatchSpec(
        scores=watched.validation.path.resolve(),
        reward=identity["reward"],
        log_weight=identity["log_weight"],
        lam={demand.name: lam[demand.name] for demand in demanded},
        demands=demanded,
        steering=_feedback(watched.solution, options.eval_every, total) if options.feedback else None,
    )


def _feedback(solution: Artifact, every: int, total: int) -> Steering:
    """Return the steps after which λ moves, and the dual's curvature at λ*."""
    steps = tuple(range(every, total, every))
    if not steps:
        raise ConfigError(
            f"train.feedback: lambda moves every train.eval_every = {every} steps, and this training has {total}, so "
            f"it would never move. Lower train.eval_every: an eighth of the training is {max(1, total // 8)}."
        )
    solved = load_solution(solution)
    hessian_JJ = evaluate(solved_table(solution), solved.lam_vector, solved.beta, solved.margin_vector).hessian_JJ
    check_regular(hessian_JJ, list(solved.lam), MAX_CONDITION, "lambda cannot be steered (train.feedback)")
    return Steering(steps=steps, step=STEP, hessian_JJ=tuple(map(tuple, hessian_JJ.tolist())))
