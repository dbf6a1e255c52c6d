"""samples of a policy + scores + λ → examples of a policy gradient: advantages among the responses to a prompt.

The return of a response is R = r + ⟨λ, g⟩ − β ln π/π_ref. Less the mean return of the other responses to its prompt it
is an unbiased advantage (RLOO, arXiv 2402.14740): no critic, and no division by a spread, which changes λ's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from can_dist.dual.table import FloatArray
from can_dist.errors import DataError
from can_dist.stages.examples import Examples, Row, by_prompt, commit, example, join, note
from can_dist.stages.label import combined_score
from can_dist.stages.utilities import column_keys, columns_of
from can_dist.tables.artifacts import Artifact
from can_dist.tables.schemas import LOGP_POLICY, LOGP_REFERENCE
from can_dist.tables.utilities import with_utilities
from can_dist.workspace import Workspace

ALONE = "less than two responses"


def label_advantages(
    work: Workspace, responses: Artifact, scores: Artifact, lam: Mapping[str, float], *, reward: str, beta: float
) -> Artifact:
    """Return the ``preferences`` table of advantages: a list of all responses per prompt (the loss ``clipped``).

    Its ``logp_ref`` are ln π of the policy that responded, relative to which the epoch is.

    Args:
        work: The run.
        responses: Samples of the policy.
        scores: Theirs, with ln π_ref, and with ln π (column ``LOGP_POLICY``) where the policy is not the reference.
        lam: λ by constraint, reward units per score unit.
        reward: Name of the score r.
        beta: KL weight β, reward units per nat.

    Raises:
        DataError: No prompt has two responses, or all responses to every prompt have the same return.
    """
    columns = columns_of(work.config.constraints)
    validation, seed = work.config.label.validation_fraction, work.config.seed
    decides = {"lam": dict(lam), "reward": reward, "beta": beta, "validation_fraction": validation, "seed": seed}
    inputs = {"responses": responses, "scores": scores}
    stage = work.open("label", "advantages", decides | column_keys(columns), inputs)
    if stage.finished:
        return stage.finished
    with work.timed("label", "advantages"):
        own = LOGP_POLICY if LOGP_POLICY in scores.table.column_names else LOGP_REFERENCE
        ref_N, logp_N = (scores.table.column(name).to_numpy() for name in (LOGP_REFERENCE, own))
        score_N = combined_score(with_utilities(scores.table, columns, str(scores.path)), lam, reward, {})
        table = join(responses, scores).drop_columns("logp_ref").append_column("logp_ref", pa.array(logp_N))
        table = table.append_column("score", pa.array(score_N - beta * (logp_N - ref_N)))
        kept, noted, has_signal = Examples(stage), list[Row](), False
        for members in by_prompt(table):
            if len(members) < 2:
                noted.append(note(members[0]["prompt_id"], ALONE, kept=False))
                continue
            advantage_K = leave_one_out(np.array([row["score"] for row in members]))
            has_signal |= bool(advantage_K.any())
            kept.add(example(members[0]["prompt_id"], members, advantage_K.tolist(), validation, seed))
        if kept.splits.total() and not has_signal:
            raise DataError(
                f"{scores.path}: the responses to every prompt have one and the same return, so no policy gradient is "
                "left.",
                "Check the scorers: a constant score cannot say which response is better. In a later round the policy "
                "may have collapsed to one response: lower primal_dual.step_size or train.learning_rate.",
            )
        return commit(work, kept, noted, scores, loss="clipped")


def leave_one_out(return_K: FloatArray) -> FloatArray:
    """Return each of K ≥ 2 returns less the mean of the others, (K,) in units of the reward."""
    num_responses = return_K.shape[0]
    advantage_K: FloatArray = (return_K - return_K.mean()) * (num_responses / (num_responses - 1))
    return advantage_K
