"""What a loop on λ starts from, and λ and the measured slack, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from can_dist.stages.slack import describe_slack
from can_dist.stages.solve import load_solution
from can_dist.stages.watch import Watched
from can_dist.tables.artifacts import Artifact, write_json
from can_dist.workspace import Workspace

TRAJECTORY, PLOT = "trajectory.json", "trajectory.svg"


@dataclass(frozen=True)
class ReferenceData:
    """The artifacts before any training: scored samples of π_ref, the dual's solution, scored responses to compare.

    ``validation`` are scored samples for prompts that nothing is trained on, None where there are none.
    """

    scores: Artifact
    solution: Artifact
    pairs: Artifact
    pair_scores: Artifact
    validation: Artifact | None

    @property
    def lam(self) -> dict[str, float]:
        """λ* of the table, by constraint."""
        return load_solution(self.solution).lam

    @property
    def watched(self) -> Watched:
        """What trainings are watched by."""
        return Watched(self.solution, self.validation)


@dataclass(frozen=True)
class Round:
    """A round of the loop: λ, the policy trained for it, and its measured slack."""

    lam: Mapping[str, float]
    policy: Artifact
    measurement: Artifact

    @property
    def constraints(self) -> Mapping[str, Mapping[str, Any]]:
        """Measured slack, its standard error and the means, by constraint."""
        measured: Mapping[str, Mapping[str, Any]] = self.measurement.info["constraints"]
        return measured


def trajectory(work: Workspace, rounds: Sequence[Round], *, is_settled: bool | None = None) -> Artifact:
    """Return the artifact of λ and the measured slack round by round: ``trajectory.json`` and ``trajectory.svg``.

    ``is_settled`` is whether the loop's stopping rule was met; None for a loop without one.
    """
    from can_dist.reporting.figures.trajectory import draw_trajectory

    inputs = {f"policy-{number}": turn.policy for number, turn in enumerate(rounds)}
    inputs |= {f"measurement-{number}": turn.measurement for number, turn in enumerate(rounds)}
    identity_keys = {"lam": [dict(turn.lam) for turn in rounds], "settled": is_settled}
    stage = work.open("trajectory", work.config.method, identity_keys, inputs)
    if stage.finished:
        return stage.finished
    turns = [{"lam": dict(turn.lam), "policy": turn.policy.path.name, **turn.measurement.info} for turn in rounds]
    write_json(stage.path / TRAJECTORY, {"method": work.config.method, "settled": is_settled, "rounds": turns})
    draw_trajectory(turns, stage.path / PLOT)
    if is_settled is False:
        work.say(
            f"{work.config.method}: warning: after {len(rounds)} round(s) the safety has not settled: "
            f"{describe_slack(rounds[-1].constraints)}. Allow more rounds, or lower the step size if λ swings."
        )
    work.say(f"{work.config.method}: λ and slack of every round: {stage.path / PLOT}")
    return stage.commit([TRAJECTORY, PLOT], info={"rounds": len(rounds), "settled": is_settled})
