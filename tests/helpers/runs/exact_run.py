"""A run on a table of all responses with exact trainings: for what a method is in the limit, in seconds.

Sampling, scoring and gradient descent are replaced by enumeration and by the closed form ln π = ln π_from + s/β + a
constant; solving, measuring, stepping and recording are the product's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import logsumexp

from can_dist.config import Model, validate_config
from can_dist.config.walk import REWARD
from can_dist.run import Run
from can_dist.stages import slack as measure
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import LOGP_REFERENCE

SCORER = {"kind": "callable", "function": "builtins:len"}
PROMPTS_ARE_UNUSED: Any = None


def make_config(beta: float, margins: Mapping[str, float], method: str, **sections: Any) -> Any:
    return validate_config(
        {
            "method": method,
            "prompts": {"source": "prompts.jsonl", "num_validation": 0},
            "strength": 1,
            "reference": {"model": "lm"},
            "reward": SCORER,
            "constraints": {name: {"scorer": SCORER, "margin": margin} for name, margin in margins.items()},
            "beta": beta,
            **sections,
        }
    )


def normalised(logp_PK: np.ndarray) -> np.ndarray:
    return logp_PK - logsumexp(logp_PK, axis=1, keepdims=True)


class ExactRun(Run):
    """Scores by name of their column, (P, K); a policy is a table of ln π(y|x)."""

    def __init__(self, directory: Path, config: Any, ref_PK: np.ndarray, scores: Mapping[str, np.ndarray]) -> None:
        super().__init__(directory, config)
        self.directory, self.log_ref_PK, self.table = directory, np.log(ref_PK), dict(scores)

    def generate(self, policy: Any, prompts: Any) -> Artifact:
        return open_stage(self.directory, "generate", "all", {}, {}).commit()

    def pairs(self, reference: Any, prompts: Any, responses: Artifact | None = None) -> Artifact:
        return responses or self.generate(reference, prompts)

    def score(self, responses: Any, reward: Any, constraints: Any, policy: Any, aligned: Any = None) -> Artifact:
        return self._written("scores", {**self.table, LOGP_REFERENCE: self.logp(policy)})

    def solve(self, scores: Artifact, constraints: Any, beta: float, *, log_weight: Any = None) -> Artifact:
        return super().solve(scores, constraints, beta, log_weight=LOGP_REFERENCE)

    def label(self, responses: Any, scores: Artifact, lam: Any, beta: float, *, score: str = REWARD) -> Any:
        """Return s = r + ⟨λ, g⟩, (P, K), instead of pairs that are labelled by it."""
        lam = measure.load_solution(lam).lam if isinstance(lam, Artifact) else lam
        return self.table[score] + sum((value * self.table[name] for name, value in lam.items()), np.float64(0))

    def train(self, reference: Any, score_PK: Any, beta: float, **unused: Any) -> Artifact:
        """Return the policy that every loss of the trainer has as its minimiser."""
        self.trained = getattr(self, "trained", 0) + 1
        return self._written("train", {LOGP_REFERENCE: normalised(self.logp(reference) + score_PK / beta)})

    def measure(self, policy: Any, prompts: Any, reference_scores: Artifact, reward: Any, constraints: Any) -> Artifact:
        scores = self.score(None, reward, constraints, policy)
        return measure.measure(
            self._work, scores, reference_scores, constraints, reward=REWARD, log_weight=LOGP_REFERENCE
        )

    def logp(self, policy: Any) -> np.ndarray:
        """ln π of the reference, or of a trained policy, (P, K)."""
        if isinstance(policy, Model):
            return self.log_ref_PK
        return policy.table.column(LOGP_REFERENCE).to_numpy().reshape(self.log_ref_PK.shape)

    def _written(self, stage: str, columns: Mapping[str, np.ndarray]) -> Artifact:
        num_prompts, num_responses = self.log_ref_PK.shape
        table = pa.table(
            {
                "prompt_id": np.repeat(np.arange(num_prompts), num_responses),
                "num_tokens": np.full(num_prompts * num_responses, 2),
                **{name: values.ravel() for name, values in columns.items()},
            }
        )
        identity = {"values": {name: values.tolist() for name, values in columns.items()}}
        place = open_stage(self.directory, stage, "exact", identity, {})
        write_part(place.path, 0, table)
        return place.finished or place.commit()


def arguments(config: Any, names: Sequence[str] = ("reward", "constraints")) -> dict[str, Any]:
    """Return what a method takes besides its own options."""
    given = {name: getattr(config, name) for name in names}
    return {"prompts": PROMPTS_ARE_UNUSED, "reference": config.reference, "beta": config.beta, **given}
