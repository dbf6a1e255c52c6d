"""What a training is watched by: scored validation responses, what the constraints ask, and how λ moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from can_dist.config.sections import Train
from can_dist.dual import evaluate
from can_dist.dual.feedback import MAX_CONDITION, STEP, check_regular
from can_dist.errors import ConfigError, NumericalError
from can_dist.stages.solve import demands, labelled_lam, load_solution, solved_columns, solved_table
from can_dist.tables.artifacts import Artifact
from can_dist.training.spec import Steering, WatchSpec

STOPS_PER_EPOCH = 3
"""Evaluations of an epoch that can end a training, where an epoch has as many steps."""


@dataclass(frozen=True)
class Ascent:
    """λ ← [λ − η·slack]_+ between the epochs of a training (CAID, arXiv 2505.19387).

    Attributes:
        step_size: η by constraint.
        after_epochs: Numbers of epochs after which λ moves.
    """

    step_size: Mapping[str, float]
    after_epochs: tuple[int, ...]


@dataclass(frozen=True)
class Watched:
    """What a training is watched by.

    Attributes:
        solution: The dual's solution, of which λ* and the demands are.
        validation: Scores, with ln π_ref, of the reference's responses to prompts that nothing is trained on; None
            where there are none, and nothing is watched.
        ascent: How λ moves between epochs; None: it does not, or as ``train.feedback`` says.
    """

    solution: Artifact
    validation: Artifact | None
    ascent: Ascent | None = None


def steering_inputs(options: Train, watched: Watched | None) -> dict[str, Artifact]:
    """Return the inputs of a training that λ moves in or that ends when it is flat; what merely watches is none."""
    stop, feedback = options.stop == "flat", options.feedback is not None
    if watched is None or not (stop or feedback or watched.ascent):
        if stop:
            raise ConfigError("train.stop: flat: nothing watches this training.", "Leave it out.")
        return {}
    if watched.validation is None:
        key = "caid.within" if watched.ascent else "train.feedback" if feedback else "train.stop: flat"
        raise ConfigError(
            f"{key}: there are no validation responses to go by.",
            "Give prompts.num_validation (128 are advised) or bring more prompts; or leave it out.",
        )
    return {"validation": watched.validation, "solution": watched.solution}


def watch_spec(watched: Watched | None, preferences: Artifact, options: Train, total: int) -> WatchSpec | None:
    """Return what the ranks of a training of ``total`` steps on ``preferences`` are told; None to watch nothing.

    Raises:
        ConfigError: λ is to move, and the training ends before it would for the first time.
        NumericalError: The table of scores cannot tell two constraints apart, so λ cannot be steered.
    """
    if watched is None or watched.validation is None:
        return None
    identity, demanded = watched.solution.manifest["identity"], demands(watched.solution)
    lam = labelled_lam(preferences, watched.solution)
    epoch = -(-preferences.info["splits"]["train"] // options.batch_size)
    return WatchSpec(
        scores=watched.validation.path.resolve(),
        reward=identity["reward"],
        columns=solved_columns(watched.solution),
        log_weight=identity["log_weight"],
        lam={demand.name: lam[demand.name] for demand in demanded},
        demands=demanded,
        steering=_steering(watched, epoch, options, total),
        stop_every=max(1, epoch // STOPS_PER_EPOCH) if options.stop == "flat" else None,
    )


def _steering(watched: Watched, epoch: int, options: Train, total: int) -> Steering | None:
    if watched.ascent is not None:
        return _ascent(watched.ascent, epoch, total)
    return _feedback(watched.solution, options.eval_every, total) if options.feedback else None


def _ascent(ascent: Ascent, epoch: int, total: int) -> Steering:
    """Return the steps of an ascent whose epochs have ``epoch`` steps; λ + H⁻¹(b − Ĝ) with H = diag(1/η)."""
    steps = tuple(step for step in (epoch * number for number in ascent.after_epochs) if step < total)
    if not steps:
        raise ConfigError(
            f"caid.within: lambda moves after {ascent.after_epochs[0] * epoch} steps for the first time, and this "
            f"training has {total}, so it would never move.",
            "Raise train.max_steps, or leave it out.",
        )
    fixed = [name for name, eta in ascent.step_size.items() if eta == 0]
    if fixed:
        raise NumericalError(
            f"{', '.join(fixed)}: no variance within prompts, so no lambda can steer it.", "Leave it out."
        )
    hessian_JJ = np.diag([1 / eta for eta in ascent.step_size.values()])
    return Steering(steps=steps, step=1.0, hessian_JJ=tuple(map(tuple, hessian_JJ.tolist())))


def _feedback(solution: Artifact, every: int, total: int) -> Steering:
    """Return the steps after which λ moves, and the dual's curvature at λ*."""
    steps = tuple(range(every, total, every))
    if not steps:
        raise ConfigError(
            f"train.feedback: lambda moves every train.eval_every = {every} steps, and this training has {total}, so "
            "it would never move.",
            f"Lower train.eval_every: an eighth of the training is {max(1, total // 8)}.",
        )
    solved = load_solution(solution)
    hessian_JJ = evaluate(solved_table(solution), solved.lam_vector, solved.beta, solved.margin_vector).hessian_JJ
    check_regular(hessian_JJ, list(solved.lam), MAX_CONDITION, "lambda cannot be steered (train.feedback)")
    return Steering(steps=steps, step=STEP, hessian_JJ=tuple(map(tuple, hessian_JJ.tolist())))
