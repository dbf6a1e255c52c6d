"""scores + λ → preferences: examples labelled by s = r + ⟨λ, g⟩, P(a ≻ b) = σ(s_a − s_b) (CAN, 2405.19544, eq. 9).

One row is one training example: a prompt, its responses, and a target per response. ``info["loss"]`` of the artifact
names the trainer's loss, and so the meaning of a target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from can_dist.config import Config, LogRatio
from can_dist.config.base import identity
from can_dist.config.sections import Label
from can_dist.config.walk import named_scorers
from can_dist.dual import Column
from can_dist.dual.estimators import within_covariance
from can_dist.errors import DataError
from can_dist.stages.examples import (
    Examples,
    Row,
    by_neighbour,
    by_prompt,
    commit,
    draw,
    example,
    join,
    listed,
    note,
    pair_id,
    stream,
    useless,
)
from can_dist.stages.solve import load_solution, score_table, solved_columns
from can_dist.stages.utilities import column_keys
from can_dist.tables.artifacts import Artifact
from can_dist.tables.utilities import with_utilities
from can_dist.training.targets import score_targets
from can_dist.workspace import Workspace

LOSS_OF = {"soft": "pairwise", "regression": "regression", "listwise": "listwise"}
"""The loss of an example that holds all responses of a prompt; all its pairs for a pass of each response."""

PAIR_LOSS_OF = {"soft": "sigmoid", "sampled": "sigmoid", "regression": "regression"}
"""The loss of an example that is a pair."""


def label(
    work: Workspace,
    responses: Artifact,
    scores: Artifact,
    lam: Artifact | Mapping[str, float],
    *,
    reward: str | None,
    beta: float,
    unit: Mapping[str, float] | None = None,
    columns: Sequence[Column] = (),
    name: str = "preferences",
) -> Artifact:
    """Return the ``preferences`` table of s = r + ⟨λ, g⟩.

    Empty responses, and pairs of equal tokens, teach nothing and are left out. Pairs of equal score (ties) are kept:
    their target holds the log-ratios equal. All of these are counted, and listed in ``noted_examples.json``.

    Args:
        work: The run.
        responses: The ``responses`` to compare, or the given pairs.
        scores: Their ``scores``, with ln π_ref.
        lam: A ``solve`` artifact, or λ by name of its score.
        reward: Name of the score r; None: s = ⟨λ, g⟩, for λ by name.
        beta: KL weight β; the weights of a list are softmax(s/β).
        unit: Divides scores by name first: the paper's code labels log-ratios without their β
            (``label.as_published``).
        columns: What the constraints are on, where λ is given by name; a solution knows what it was solved on.
        name: What messages call the labels.

    Raises:
        DataError: No example is left; all scores of every example are equal, so that there is nothing to learn; or the
            solution is of other scorers than those of ``scores``.
    """
    options = work.config.label
    identity_keys = {**identity(options, exclude=["preferences", "human"]), "seed": work.config.seed, "reward": reward}
    inputs = {"responses": responses, "scores": scores}
    if isinstance(lam, Artifact):
        inputs["solution"] = lam
        columns = solved_columns(lam)
    else:
        identity_keys |= {"lam": dict(lam), **column_keys(columns)}
    if unit:
        identity_keys["unit"] = dict(unit)
    loss = loss_of(options)
    if options.lists and loss != "listwise":
        identity_keys["examples"] = "lists"  # as a pair each, all pairs were other examples under the same keys
    stage = work.open("label", name, {**identity_keys, "beta": beta}, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("label", name):
        multipliers = load_solution(lam).lam if isinstance(lam, Artifact) else lam
        if isinstance(lam, Artifact):
            sources = [source for column in columns for source in column.sources]
            check_scorers(scores, lam.input("scores"), sources if reward is None else [reward, *sources])
        score_N = combined_score(
            with_utilities(scores.table, columns, str(scores.path)), multipliers, reward, unit or {}
        )
        table = join(responses, scores).append_column("score", pa.array(score_N))
        kept, noted = Examples(stage), []
        has_signal = False
        for row, reasons in labelled(table, options, work.config.seed, beta, loss):
            noted += reasons
            if row is not None:
                kept.add(row)
                has_signal |= len(set(row["scores"])) > 1
        if kept.splits.total() and not has_signal:
            raise DataError(
                f"{scores.path}: no preference signal: the scores of every example are equal ({listed(noted)}). "
                "Check the scorers: a constant score cannot say which response is better."
            )
        return commit(work, kept, noted, scores, loss=loss)


def loss_of(options: Label) -> str:
    """Return the loss that labels from scores are for."""
    return LOSS_OF[options.labels] if options.lists else PAIR_LOSS_OF[options.labels]


def combined_score(
    table: pa.Table, lam: Mapping[str, float], reward: str | None, unit: Mapping[str, float]
) -> np.ndarray:
    """Return s = r + ⟨λ, g⟩ of every response, (N,) float64, each score in its ``unit`` (1 where not named)."""
    total = np.zeros(table.num_rows)
    if reward is not None:
        total = table.column(reward).to_numpy().astype(np.float64) / unit.get(reward, 1.0)
    for name, value in lam.items():
        total = total + value * table.column(name).to_numpy() / unit.get(name, 1.0)
    return total


def label_alone(
    work: Workspace, responses: Artifact, scores: Artifact, solution: Artifact, name: str, *, reward: str, beta: float
) -> Artifact:
    """Return the ``preferences`` of the score of constraint ``name`` alone, s = c·g, without the reward.

    c gives c·g the spread of r within prompts. A cost in logits, whose spread is many times that of the reward, would
    saturate σ(s_a − s_b) otherwise; and without λ in it, the policy of these labels serves every margin.

    Raises:
        DataError: The reward, or the constraint's score, is the same for all responses of every prompt.
    """
    unit, columns = published_units(work.config), [c for c in solved_columns(solution) if c.name == name]
    table = score_table(scores.table, reward, columns, None, str(scores.path))
    spreads = []
    for score, value_N in ((reward, table.reward_N), (name, table.utility_JN[0])):
        spreads.append(math.sqrt(within_covariance(table, value_N, value_N).mean()) / unit.get(score, 1.0))
        if spreads[-1] == 0:
            raise DataError(
                f"{scores.path}: basis: {score} is the same for all responses of every prompt, so no policy of its "
                "own adds to that of r + ⟨λ, g⟩. Leave basis out."
            )
    scale = float(f"{spreads[0] / spreads[1]:.4g}")  # the last digits of a mean are a machine's own
    return label(
        work, responses, scores, {name: scale}, reward=None, beta=beta, unit=unit, columns=columns,
        name=f"preferences of {name}",
    )  # fmt: skip


def published_units(config: Config) -> dict[str, float]:
    """Return the β of each log-ratio where ``label.as_published``: the paper's code leaves it out of the labels."""
    if not config.label.as_published:
        return {}
    scorers = named_scorers(config.reward, config.constraints)
    return {name: scorer.beta for name, scorer in scorers.items() if isinstance(scorer, LogRatio)}


def check_scorers(scores: Artifact, solved: Artifact, names: Sequence[str]) -> None:
    """Raise ``DataError`` unless the columns ``names`` of two tables of scores are of the same scorers.

    λ is a price in units of the scores it was solved on; it has no meaning for scores of another scorer.
    """
    mine, theirs = scores.info["scorers"], solved.info["scorers"]
    for name in names:
        both = mine[name] | theirs[name]
        differing = sorted(key for key in both if mine[name].get(key) != theirs[name].get(key))
        if differing == ["model"]:  # its name, as somebody typed it; what it is, the other keys say
            continue
        if differing:
            differences = ", ".join(
                f"{key} {theirs[name].get(key)!r}, here {mine[name].get(key)!r}" for key in differing
            )
            raise DataError(
                f"{scores.path}, score {name!r}: λ was solved on scores of another scorer ({differences}). "
                "Score both with one model, or solve again."
            )


# ------------------------------------------------------------------------------------------------ labels from scores


Labelled = tuple[Row | None, list[Row]]
"""An example, or None where none is kept, and the notes about it."""


def labelled(table: pa.Table, options: Label, seed: int, beta: float, loss: str) -> Iterator[Labelled]:
    """Yield the examples of scored responses (:func:`~can_dist.stages.examples.join`, with a column ``score``)."""
    if options.lists:
        for members in by_neighbour(table) if options.pairs == "preferences" else by_prompt(table):
            name = pair_id(*members) if options.pairs == "preferences" else members[0]["prompt_id"]
            yield _label_list(name, members, options, seed, beta, loss)
    elif options.pairs == "preferences":
        for a, b in by_neighbour(table):
            yield _label_pair(a, b, options, seed, loss)
    else:
        # first, as they were when all rows were in memory
        yield None, [note(name, "less than two responses", kept=False) for name in _alone(table)]
        for members in by_prompt(table):
            for a, b in _pairs(members, options, seed):
                yield _label_pair(a, b, options, seed, loss)


def _alone(table: pa.Table) -> list[str]:
    """Return the prompts with one response, in the order of the table."""
    counts = pc.value_counts(table.column("prompt_id").combine_chunks()).to_pylist()
    return [entry["values"] for entry in counts if entry["counts"] == 1]


def _label_pair(a: Row, b: Row, options: Label, seed: int, loss: str) -> Labelled:
    name = pair_id(a, b)
    if reason := useless(a, b):
        return None, [note(name, reason, kept=False)]
    row = example(name, [a, b], _pair_target(name, a, b, options, seed, loss), options.validation_fraction, seed)
    return row, [note(name, "tie", kept=True)] if a["score"] == b["score"] else []


def _pair_target(name: str, a: Row, b: Row, options: Label, seed: int, loss: str) -> tuple[float, float]:
    first, second = score_targets(loss, [a["score"], b["score"]])
    if options.labels == "sampled":
        first = float(draw(seed, f"label:{name}") < first)
        return first, 1.0 - first
    return first, second


def _label_list(name: str, members: list[Row], options: Label, seed: int, beta: float, loss: str) -> Labelled:
    """Label the distinct responses of a list together."""
    distinct: dict[tuple[int, ...], Row] = {}
    noted = []
    for row in members:
        tokens = tuple(row["token_ids"])
        if not row["text"].strip():
            noted.append(note(row["response_id"], "empty response", kept=False))
        elif tokens in distinct:
            noted.append(note(row["response_id"], "equal responses", kept=False))
        else:
            distinct[tokens] = row
    compared = list(distinct.values())
    if len(compared) < 2:
        return None, [*noted, note(name, "less than two responses", kept=False)]
    target = score_targets(loss, [row["score"] for row in compared], beta)
    return example(name, compared, target, options.validation_fraction, seed), noted


def _pairs(members: list[Row], options: Label, seed: int) -> list[tuple[Row, Row]]:
    """Return all or a draw of the pairs of a prompt's responses."""
    pairs = list(combinations(members, 2))
    if options.pairs_per_prompt == "all" or options.pairs_per_prompt >= len(pairs):
        return pairs
    random = np.random.default_rng(stream(seed, f"pairs:{members[0]['prompt_id']}"))
    chosen = sorted(random.choice(len(pairs), size=options.pairs_per_prompt, replace=False).tolist())
    return [pairs[index] for index in chosen]
