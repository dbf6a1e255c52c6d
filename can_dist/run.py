"""A run: the stages bound to one directory and one configuration, and the whole method in one function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from can_dist.config import Config, Constraint, Model, Scorer
from can_dist.errors import ConfigError, DataError
from can_dist.scoring.protocol import LogProb, ScorerSpec
from can_dist.stages import evaluate, generate, human_labels, ingest, label, score, solve, train
from can_dist.stages.human_labels import Criterion
from can_dist.stages.train import Policy
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, load_artifact

REWARD = "reward"
LOGP = "logp.reference"


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

    def generate(self, policy: Policy, prompts: Artifact) -> Artifact:
        """Sample K responses of the reference, or of a trained policy, per training prompt."""
        role = "reference" if isinstance(policy, Model) else "policy"
        model = train.policy_model(policy, self.config.reference)
        return self._reached("generate", generate.generate(self._work, model, prompts, split="train", role=role))

    def score(
        self, responses: Artifact, reward: Scorer, constraints: Mapping[str, Constraint], reference: Policy
    ) -> Artifact:
        """Score responses with the reward, every constraint, and ln π_ref."""
        logp = LogProb(model=train.policy_model(reference, self.config.reference))
        return self._score(responses, {**named_scorers(reward, constraints), LOGP: logp})

    def log_probs(self, responses: Artifact, policy: Policy) -> Artifact:
        """Score responses with ln π alone, of the reference or of a trained policy, for a training relative to it."""
        return self._score(responses, {LOGP: LogProb(model=train.policy_model(policy, self.config.reference))})

    def solve(
        self, scores: Artifact, constraints: Mapping[str, Constraint], beta: float, *, log_weight: str | None = None
    ) -> Artifact:
        """Minimise the dual over the scores; raises when the margins cannot be met."""
        solution = solve.solve(
            self._work, scores, reward=REWARD, constraints=constraints, beta=beta, log_weight=log_weight
        )
        return self._reached("solve", solution)

    def pairs(self, reference: Model, prompts: Artifact, responses: Artifact) -> Artifact:
        """Return the responses to be compared: the sampled ones, or those of the configured preference data set."""
        if self.config.label.pairs == "responses":
            return responses
        return self._given_pairs(reference, prompts, mismatched=False)

    def human_pairs(self, reference: Model, prompts: Artifact) -> Artifact:
        """Return the response pairs of the configured preference data set, with people's labels."""
        return self._given_pairs(reference, prompts, mismatched=self.config.label.human.loss == "kto")

    def label(
        self, responses: Artifact, scores: Artifact, lam: Artifact | Mapping[str, float], beta: float
    ) -> Artifact:
        """Label responses by s = r + ⟨λ, g⟩; λ is that of a solution, or given by name of its constraint."""
        return self._reached("label", label.label(self._work, responses, scores, lam, reward=REWARD, beta=beta))

    def label_human(self, pairs: Artifact, logps: Artifact, criterion: Criterion) -> Artifact:
        """Label a data set's own pairs as people did: which response is more 'helpful', or 'safe'."""
        return self._reached("label", human_labels.label_human(self._work, pairs, logps, criterion=criterion))

    def train(self, reference: Policy, preferences: Artifact, beta: float, *, start: Policy | None = None) -> Artifact:
        """Fine-tune on the preferences, relative to ``reference``, from its weights or from those of ``start``."""
        policy = train.train(self._work, reference, preferences, beta=beta, start=start)
        return self._reached("train", policy)

    def evaluate(
        self,
        policy: Artifact,
        prompts: Artifact,
        reference: Model,
        reward: Scorer,
        constraints: Mapping[str, Constraint],
        *,
        variant: str = "",
    ) -> Artifact:
        """Measure the policy on held-out prompts and write the report; ``variant`` names it among several policies."""
        lineage = evaluate.lineage_of(policy, prompts)
        scorers = named_scorers(reward, constraints)
        return evaluate.evaluate(self._work, lineage, reference, scorers, constraints, reward=REWARD, variant=variant)

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

    def _given_pairs(self, reference: Model, prompts: Artifact, *, mismatched: bool) -> Artifact:
        source = self.config.label.preferences
        if source is None:
            raise ConfigError("label.preferences: required, not given. Name the data set whose pairs are to be read.")
        return ingest.ingest_pairs(self._work, source, reference, prompts, mismatched=mismatched)

    def _score(self, responses: Artifact, scorers: Mapping[str, ScorerSpec]) -> Artifact:
        role = responses.manifest["identity"]["label"]  # whose responses they are
        return self._reached("score", score.score(self._work, responses, scorers, role=role))

    def _reached(self, stage: str, artifact: Artifact) -> Artifact:
        if self._until == stage:
            raise StageReached(artifact)
        return artifact


def named_scorers(reward: Scorer, constraints: Mapping[str, Constraint]) -> dict[str, ScorerSpec]:
    """Return every scorer by the name of its score column."""
    return {REWARD: reward, **{name: constraint.scorer for name, constraint in constraints.items()}}
