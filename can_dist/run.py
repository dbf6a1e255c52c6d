"""A run: the stages bound to one directory and one configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from can_dist.config import METHODS, Config, DataSource, Human, LogRatio, Model, Scorer, Step
from can_dist.config.sections import Constraint
from can_dist.config.walk import REWARD, named_scorers
from can_dist.errors import ConfigError
from can_dist.scoring.log_ratio import score_columns
from can_dist.scoring.protocol import LogProb, PolicyRatio, ScorerSpec
from can_dist.stages import (
    align,
    belief,
    certify,
    estimate,
    evaluate,
    face,
    generate,
    human_labels,
    ingest,
    label,
    merge,
    mixture,
    report,
    score,
    slack,
    solve,
    strength,
    train,
    trajectory,
)
from can_dist.stages.brought_responses import bring_responses
from can_dist.stages.human_labels import Criterion
from can_dist.stages.served_responses import ask_for_responses
from can_dist.stages.slack import StepSize
from can_dist.stages.train import Policy
from can_dist.stages.trajectory import ReferenceData, Round
from can_dist.stages.utilities import columns_of
from can_dist.stages.watch import Watched
from can_dist.tables.artifacts import Artifact
from can_dist.tables.lineage import ancestor
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.workspace import StageReached, Workspace


class Run:
    """The stages of one run directory; each method returns an artifact, and a finished one is not recomputed.

    Use it as a context manager: one process at a time holds the directory. ``my.yaml`` is that of the README.

    Examples:
        >>> from can_dist import load_config
        >>> config = load_config("my.yaml")
        >>> with Run("runs/mine", config) as run:
        ...     responses = run.generate(config.reference, run.prompts())
        ...     scores = run.score(responses, config.reward, config.constraints, config.reference)
        ...     solution = run.solve(scores, config.constraints, config.beta)
        >>> scores.table.column_names[-3:]
        ['reward', 'safety', 'logp.reference']
        >>> sorted(solution.read_json("solution.json")["lam"])
        ['safety']
    """

    def __init__(
        self, directory: str | Path, config: Config, *, until: str | None = None, only_stage: str | None = None
    ) -> None:
        self.config = config
        self._work = Workspace(directory, config, only_stage=only_stage)
        self._until = until

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._work.ended(None if isinstance(error, StageReached) else error)
        finally:
            self._work.close()

    def _repr_html_(self) -> str:
        return face.run_html(self._work.directory)

    def prompts(self) -> Artifact:
        """Read the configured prompts; some are held out for the evaluation."""
        return ingest.ingest_prompts(self._work, self.config.prompts)

    def generate(
        self,
        policy: Policy,
        prompts: Artifact,
        *,
        split: Literal["train", "validation"] = "train",
        seed: int | None = None,
    ) -> Artifact:
        """Sample K responses of the reference, or of a trained policy, per training or validation prompt.

        The reference's may come from a data set (``generate.responses``) or from an endpoint. ``seed``: the draw's.
        """
        options = self.config.generate
        if isinstance(policy, Model) and options.responses is not None:
            return self._sampled(bring_responses(self._work, policy, prompts, options.responses, split=split))
        if isinstance(policy, Model) and options.endpoint is not None:
            return self._sampled(ask_for_responses(self._work, policy, prompts, options.endpoint, split=split))
        role = "reference" if isinstance(policy, Model) else "policy"
        model = train.policy_model(policy, self.config.reference)
        return self._sampled(generate.generate(self._work, model, prompts, split=split, role=role, seed=seed))

    def aligned(
        self, reference: Model, prompts: Artifact, reward: Scorer, constraints: Mapping[str, Constraint]
    ) -> dict[str, PolicyRatio]:
        """Return the policy of each scorer that is a log-ratio: given, or one DPO on people's preferences."""
        ratios = {
            name: scorer for name, scorer in named_scorers(reward, constraints).items() if isinstance(scorer, LogRatio)
        }
        learned = [
            (self._given_pairs(reference, prompts, scorer.preferences, mismatched=False), str(scorer.criterion))
            for scorer in ratios.values()
            if scorer.learns
        ]
        ingest.check_criteria(learned, "PeCAN", "Name a data set of its own in each scorer's preferences.")
        return {name: align.align(self._work, name, scorer, reference, prompts) for name, scorer in ratios.items()}

    def score(
        self,
        responses: Artifact,
        reward: Scorer,
        constraints: Mapping[str, Constraint],
        reference: Policy,
        aligned: Mapping[str, PolicyRatio] | None = None,
        policy: Artifact | None = None,
    ) -> Artifact:
        """Score responses with the reward, every constraint, ln π_ref, ln π of ``policy``; ``aligned``: log-ratios."""
        specs = {**self._specs(reward, constraints, aligned), LOGP_REFERENCE: self._log_prob(reference)}
        return self._score(responses, specs if policy is None else {**specs, LOGP_POLICY: self._log_prob(policy)})

    def validation(
        self,
        reference: Model,
        prompts: Artifact,
        reward: Scorer,
        constraints: Mapping[str, Constraint],
        aligned: Mapping[str, PolicyRatio] | None = None,
    ) -> Artifact | None:
        """Score samples of the reference for prompts that nothing is trained on; None without such prompts."""
        if self.config.prompts.num_validation == 0 or not prompts.info["counts"].get("validation"):
            return None
        responses = self.generate(reference, prompts, split="validation")
        return self.score(responses, reward, constraints, reference, aligned)

    def log_probs(self, responses: Artifact, policy: Policy, judges: Mapping[str, Scorer] | None = None) -> Artifact:
        """Score responses with ln π of the reference, or of a trained policy, and with other scorers by name."""
        columns = score_columns(judges or {}, {}, self.config.reference)
        return self._score(responses, {**columns, LOGP_REFERENCE: self._log_prob(policy)})

    def stage(self, name: str, stage: Callable[..., Artifact], *args: Any, **options: Any) -> Artifact:
        """Run a stage that belongs to one method alone; ``name`` is what ``until`` calls it."""
        return self._reached(name, stage(self._work, *args, **options))

    def _log_prob(self, policy: Policy) -> LogProb:
        """Return the scorer of ln π; a configured model is read in 4 bits where training reads it so."""
        lora = self.config.train.lora
        model = train.policy_model(policy, self.config.reference)
        return LogProb(model=model, quantize=lora.quantize if lora is not None and isinstance(policy, Model) else None)

    def solve(
        self, scores: Artifact, constraints: Mapping[str, Constraint], beta: float, *, log_weight: str | None = None
    ) -> Artifact:
        """Minimise the dual over the scores, and write the page that says whether to believe it.

        Margins that cannot be met raise ``InfeasibleConstraint``; ``NotBelieved`` is raised as ``solve.require`` asks.
        """
        solution = solve.solve(
            self._work, scores, reward=REWARD, constraints=constraints, beta=beta, log_weight=log_weight
        )
        return self._reached("solve", belief.believed(self._work, solution))

    def pairs(self, reference: Model, prompts: Artifact, responses: Artifact | None = None) -> Artifact:
        """Return the responses to compare: the sampled ones, or those of the configured preference data set."""
        if self.config.label.pairs == "responses":
            return responses or self.generate(reference, prompts)
        return self._given_pairs(reference, prompts, mismatched=False)

    def reference_data(
        self, prompts: Artifact, reference: Model, reward: Scorer, constraints: Mapping[str, Constraint], beta: float
    ) -> ReferenceData:
        """Sample and score the reference, solve the dual, and score the responses to compare, for loops on λ.

        Margins that cannot be met raise ``InfeasibleConstraint`` here, before any training.
        """
        responses = self.generate(reference, prompts)
        scores = self.score(responses, reward, constraints, reference)
        solution = self.solve(scores, constraints, beta)
        validation = self.validation(reference, prompts, reward, constraints)
        pairs = self.pairs(reference, prompts, responses)
        pair_scores = scores if pairs is responses else self.score(pairs, reward, constraints, reference)
        return ReferenceData(scores, solution, pairs, pair_scores, validation)

    def human_pairs(self, reference: Model, prompts: Artifact, step: Step | None = None) -> Artifact:
        """Return the response pairs of the configured preference data set, or that of a step, with people's labels."""
        loss = (step or self.config.label.human).loss
        return self._given_pairs(reference, prompts, step.preferences if step else None, mismatched=loss == "kto")

    def step_pairs(
        self, reference: Model, prompts: Artifact, steps: Mapping[Criterion, Step]
    ) -> dict[Criterion, Artifact]:
        """Return the response pairs of each step; two steps must not learn the same labels."""
        pairs = {criterion: self.human_pairs(reference, prompts, step) for criterion, step in steps.items()}
        learned = [(step_pairs, criterion) for criterion, step_pairs in pairs.items()]
        ingest.check_criteria(learned, "SACPO", "Name a data set of its own in sacpo.second.preferences.")
        return pairs

    def label(
        self,
        responses: Artifact,
        scores: Artifact,
        lam: Artifact | Mapping[str, float],
        beta: float,
        *,
        score: str = REWARD,
    ) -> Artifact:
        """Label responses by s = r + ⟨λ, g⟩; λ comes from a solution, or by name of its constraint.

        ``score`` names the score to use in the place of r.
        """
        unit, columns = label.published_units(self.config), columns_of(self.config.constraints)
        made = label.label(self._work, responses, scores, lam, reward=score, beta=beta, unit=unit, columns=columns)
        return self._reached("label", made)

    def label_human(
        self, pairs: Artifact, logps: Artifact, criterion: Criterion, human: Human | None = None
    ) -> Artifact:
        """Label a data set's own pairs as people did: which response is more 'helpful', or 'safe'.

        ``human`` holds the options, by default those of the section ``label.human``.
        """
        preferences = human_labels.label_human(self._work, pairs, logps, criterion=criterion, human=human)
        return self._reached("label", preferences)

    def train(
        self,
        reference: Policy,
        preferences: Artifact,
        beta: float,
        *,
        watched: Watched | None = None,
        start: Policy | None = None,
        epochs: int | None = None,
        name: str = "policy",
    ) -> Artifact:
        """Fine-tune on the preferences, relative to ``reference``, from its weights or from those of ``start``.

        Each evaluation estimates by the validation responses of ``watched`` how far the policy is from its margins, and
        with ``train.feedback`` λ is steered by it. ``epochs`` replaces ``train.num_epochs``; ``name`` is what messages
        call the policy. ``Run(until="train")`` continues to the method's last training.
        """
        return train.train(
            self._work, reference, preferences, beta=beta, start=start, epochs=epochs, watched=watched, name=name
        )

    def estimate(self, policy: Policy, reference: Model, solution: Artifact, validation: Artifact) -> Artifact:
        """Estimate what a policy does from the validation responses and its log-probabilities, without generating."""
        return estimate.estimate(self._work, policy, reference, solution, validation, reward=REWARD)

    def strength(self, policy: Artifact, reference: Model, solution: Artifact, validation: Artifact | None) -> Artifact:
        """Go as far along what was trained as the constraints ask, θ_ref + α(θ − θ_ref); one estimate is the check.

        Returns the policy as trained where ``strength`` is 1, and for ``Run(until="train")``.
        """
        if self.config.strength == 1.0 or self._until == "train":
            return policy
        if validation is None:
            self.say(strength.NOT_CHOSEN)
            return policy
        artifact = self.estimate(policy, reference, solution, validation)
        stretched = strength.strengthen(self._work, policy, reference, solution, artifact)
        if stretched is not policy:
            strength.check(self._work, stretched, solution, self.estimate(stretched, reference, solution, validation))
        return self._reached("strength", stretched)

    def mixture(
        self, policies: Mapping[str, Artifact], reference: Model, solution: Artifact, validation: Artifact
    ) -> Artifact:
        """Mix the policy '' with those of single constraints to meet the margins; not for ``Run(until="train")``."""
        trained = self._until == "train"
        return policies[""] if trained else mixture.mixture(self._work, policies, reference, solution, validation)

    def merge(self, policy_a: Artifact, policy_b: Artifact, q: float) -> Artifact:
        """Return the policy q·θ_a + (1 − q)·θ_b."""
        return merge.merge(self._work, policy_a, policy_b, q=q)

    def measure(
        self,
        policy: Artifact,
        prompts: Artifact,
        reference_scores: Artifact,
        reward: Scorer,
        constraints: Mapping[str, Constraint],
    ) -> Artifact:
        """Measure the slack of a trained policy on fresh responses to the training prompts."""
        scores = self._score(self.generate(policy, prompts), self._specs(reward, constraints))
        return slack.measure(self._work, scores, reference_scores, constraints, reward=REWARD)

    def estimated_slack(self, policy: Artifact, reference: Model, data: ReferenceData) -> Artifact:
        """Read the slack of a trained policy off the validation responses, without generating."""
        if data.validation is None:
            raise ConfigError("caid.slack: no validation prompts are held out.", "Give prompts.num_validation.")
        return slack.estimated(self._work, self.estimate(policy, reference, data.solution, data.validation))

    def step_sizes(self, data: ReferenceData, step_size: StepSize) -> dict[str, float]:
        """Return the step size η of each constraint: the given number, or for '1/H' from the table's dual."""
        return slack.step_sizes(data.scores, data.solution, step_size, reward=REWARD)

    def trajectory(self, rounds: Sequence[Round], *, is_settled: bool | None = None) -> Artifact:
        """Write λ and the measured slack of every round of a loop, as JSON and as a plot."""
        return trajectory.trajectory(self._work, rounds, is_settled=is_settled)

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
        lineage = report.lineage_of(policy, prompts)
        scorers = self._specs(reward, constraints, self.aligned(reference, prompts, reward, constraints))
        artifact = self._estimated(lineage, reference)
        return evaluate.evaluate(
            self._work, lineage, reference, scorers, constraints, reward=REWARD, variant=variant, estimate=artifact
        )

    def certify(self, policy: Artifact, prompts: Artifact, *, delta: float | None, tolerance: float | None) -> Artifact:
        """Certify a policy by the configured constraints on the sealed prompts, which nothing else reads."""
        config = self.config
        aligned = self.aligned(config.reference, prompts, config.reward, config.constraints)
        scorers = self._specs(config.reward, config.constraints, aligned)
        return certify.certify(self._work, policy, prompts, scorers, delta=delta, tolerance=tolerance)

    def _estimated(self, lineage: report.Lineage, reference: Model) -> Artifact | None:
        """Return the estimate of a policy on its run's validation responses; None where λ or they are missing."""
        policy, scorers = lineage.policy, (self.config.reward, self.config.constraints)
        if policy.stage in ("strength", "mixture"):
            made = policy.input("estimate") if policy.stage == "strength" else policy
            return self.estimate(policy, reference, policy.input("solution"), made.input("validation"))
        if METHODS[self.config.method].steers:  # λ of its last training is none of a solution
            solution = self.reference_data(lineage.prompts, reference, *scorers, self.config.beta).solution
        elif lineage.solution is None or "strength" not in METHODS[self.config.method].stages:
            return None
        else:
            solution = lineage.solution
        aligned = self.aligned(reference, lineage.prompts, *scorers)
        scores = self.validation(reference, lineage.prompts, *scorers, aligned)
        if scores is None:
            return None
        artifact = self.estimate(policy, reference, solution, scores)
        self.say(f"estimate: {strength.verdict_of(artifact)}")
        return artifact

    def say(self, message: str, **event: Any) -> None:
        """Print a line for the user, and log it."""
        self._work.say(message, **event)

    def ancestor(self, artifact: Artifact, stage: str) -> Artifact:
        """Return the nearest artifact of ``stage`` that an artifact was made from."""
        return ancestor(artifact, stage)

    def _given_pairs(
        self, reference: Model, prompts: Artifact, source: DataSource | None = None, *, mismatched: bool
    ) -> Artifact:
        source = source or self.config.label.preferences
        if source is None:
            raise ConfigError("label.preferences: required, not given. Name the data set whose pairs are to be read.")
        return ingest.ingest_pairs(self._work, source, reference, prompts, mismatched=mismatched)

    def _sampled(self, responses: Artifact) -> Artifact:
        return self._reached("generate", generate.check_truncated(self._work, responses))

    def _score(self, responses: Artifact, scorers: Mapping[str, ScorerSpec]) -> Artifact:
        role = responses.manifest["identity"]["label"]  # names the model that responded
        return self._reached("score", score.score(self._work, responses, scorers, role=role))

    def _specs(
        self, reward: Scorer, constraints: Mapping[str, Constraint], aligned: Mapping[str, PolicyRatio] | None = None
    ) -> dict[str, ScorerSpec]:
        return score_columns(named_scorers(reward, constraints), aligned or {}, self.config.reference)

    def _reached(self, stage: str, artifact: Artifact) -> Artifact:
        if self._until == stage:
            raise StageReached(artifact)
        return artifact
