"""What the scores of a run say of its margins and β: findings for ``doctor``, lines for ``can-dist score``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from can_dist.config import Config
from can_dist.doctor.finding import Finding, note, ok, warning
from can_dist.dual import Margin
from can_dist.errors import DataError
from can_dist.measuring.advice import beta_advice, beta_words, margin_words
from can_dist.stages.solve import score_table
from can_dist.stages.utilities import columns_of
from can_dist.tables.artifacts import MANIFEST, Artifact, load_artifact

ON_TRAIN, REWARD = "reference on train", "reward"
"""The label of the scores that λ is solved on, and their column of the reward."""


def scores_of(run: Path, config: Config) -> Artifact | None:
    """Return the newest scores of the reference's training responses in a run directory, with every column needed."""
    fitting = []
    for manifest in run.glob(f"scores-*/{MANIFEST}"):
        try:
            artifact = load_artifact(manifest.parent)
        except DataError:  # `verify` reports it
            continue
        if artifact.manifest["identity"]["label"] == ON_TRAIN and _has_all(artifact, config):
            fitting.append((manifest.stat().st_mtime, artifact))
    return max(fitting, key=lambda item: item[0])[1] if fitting else None


def check_scores(scores: Artifact, config: Config) -> list[Finding]:
    """Say what each margin is in units of the scores, and which β keeps the weights spread."""
    if not _has_all(scores, config):  # a method that scores log-probabilities alone
        return []
    columns = columns_of(config.constraints)
    if any(column.of == "cvar" for column in columns):  # its tau is solve's to find
        return []
    table = score_table(scores.table, REWARD, columns, None, str(scores.path))
    margins = [Margin(name, c.margin, c.threshold, c.equal) for name, c in config.constraints.items()]
    advice = beta_advice(table, margins, config.beta, config.solve.estimator)
    words = beta_words(advice, config.beta, float(np.median(table.num_responses_P)))
    findings = [note(f"constraints.{m.name}", margin_words(table, index, m)) for index, m in enumerate(margins)]
    if advice.level == "trusted":
        return [*findings, ok("beta", words)]
    if advice.too_few:
        return [*findings, warning("beta", words, "Raise prompts.num_train.")]
    remedy = f"Set beta to {advice.spread:g}" if advice.spread else "Ask for a smaller margin"
    return [*findings, warning("beta", words, f"{remedy}, or raise generate.num_responses or prompts.num_train.")]


def _has_all(scores: Artifact, config: Config) -> bool:
    """Return whether a table holds the reward and every constraint."""
    return {REWARD, *config.constraints} <= set(scores.info.get("scorers", {}))
