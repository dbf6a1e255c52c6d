"""A run: the stages bound to one directory and one configuration, and the whole method in one function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from can_dist.config import Config, Constraint, Model, Scorer
from can_dist.errors import DataError
from can_dist.scoring.protocol import LogProb, ScorerSpec
from can_dist.stages import evaluate, generate, ingest, label, score, solve, train
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, load_artifact

REWARD = "reward"


class StageReached(Exception):
    """Control flow of ``Run(until=...)``: the stage that was asked for is finished."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(str(artifact.path))
        self.artifact = artifact


class Run:
    """The stages of one run directory; each method returns an artifact, finished work is returned as it is.

    Use as a context manager: the directory is held by one process at a time.

        with Run("runs/mine", load_config("my.yaml")) as run:
            policy = mocan(run, prompts=run.prompts(), reference=..., reward=..., constraints=..., beta=0.1)
    """

    def __init__(
        self, directory: str | Path, config: Config, *, until: str | None = None, only_stage: str | None = None
    ) -> None:
        self.config = config
        self._work = Workspace(Path(directory), config, only_stage=only_stage)
        self._until = until

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work.close()

    def prompts(self) -> Artifact:
        """Read the configured prompts and hold some out."""
        return ingest.ingest_prompts(self._work, self.config.prompts)

    def generate(self, model: Model, prompts: Artifact) -> Artifact:
        """Sample K responses of ``model`` per training prompt."""
        return self._reached("generate", generate.generate(self._work, model, prompts, split="train", role="reference"))

    def score(
        self, responses: Artifact, reward: Scorer, constraints: Mapping[str, Constraint], reference: Model
    ) -> Artifact:
        """Score responses with the reward, every constraint, and ln π_ref."""
        scorers: dict[str, ScorerSpec] = {
            **named_scorers(reward, constraints),
            "logp.reference": LogProb(model=reference),
        }
        role = "given pairs" if responses.stage == "pairs" else "reference on train"
        return self._reached("score", score.score(self._work, responses, scorers, role=role))

    def solve(
        self, scores: Artifact, constraints: Mapping[str, Constraint], beta: float, *, log_weight: str | None = None
    ) -> Artifact:
        """Minimise the dual over the scores; raises when the margins cannot be met."""
        solution = solve.solve(
            self._work, scores, reward=REWARD, constraints=constraints, beta=beta, log_weight=log_weight
        )
        return self._reached("solve", solution)

    def pairs(self, reference: Model, prompts: Artifact, responses: Artifact) -> Artifact:
        """Return the responses to be paired: the sampled ones, or those of the configured preference data set."""
        if self.config.label.preferences is None:
            return responses
        return ingest.ingest_pairs(self._work, self.config.label.preferences, reference, prompts)

    def label(self, responses: Artifact, scores: Artifact, solution: Artifact) -> Artifact:
        """Pair responses and label the pairs with σ(s_a − s_b), s = r + ⟨λ*, g⟩."""
        return self._reached("label", label.label(self._work, responses, scores, solution, reward=REWARD))

    def train(self, reference: Model, preferences: Artifact, beta: float) -> Artifact:
        """Fine-tune the reference once on the preferences."""
        return self._reached("train", train.train(self._work, reference, preferences, beta=beta))

    def evaluate(
        self,
        policy: Artifact,
        prompts: Artifact,
        reference: Model,
        reward: Scorer,
        constraints: Mapping[str, Constraint],
    ) -> Artifact:
        """Measure the policy on held-out prompts and write the report."""
        solution = self.ancestor(policy, "solve")
        lineage = evaluate.Lineage(policy, solution, self.ancestor(solution, "scores"), prompts)
        scorers = named_scorers(reward, constraints)
        return self._reached("evaluate", evaluate.evaluate(self._work, lineage, reference, scorers, reward=REWARD))

    def ancestor(self, artifact: Artifact, stage: str) -> Artifact:
        """Return the nearest artifact of ``stage`` that ``artifact`` was made from."""
        level = [artifact]
        while level:
            inputs = [
                load_artifact(self._work.directory / entry["artifact"])
                for one in level
                for entry in one.manifest["inputs"].values()
            ]
            for found in inputs:
                if found.stage == stage:
                    return found
            level = inputs
        raise DataError(f"{artifact.path}: not made from a {stage!r} artifact.")

    def _reached(self, stage: str, artifact: Artifact) -> Artifact:
        if self._until == stage:
            raise StageReached(artifact)
        return artifact


def named_scorers(reward: Scorer, constraints: Mapping[str, Constraint]) -> dict[str, ScorerSpec]:
    """Return every scorer by the name of its score column."""
    return {REWARD: reward, **{name: constraint.scorer for name, constraint in constraints.items()}}
