"""scores + λ → preferences: examples labelled by s = r + ⟨λ, g⟩, P(a ≻ b) = σ(s_a − s_b) (CAN, 2405.19544, eq. 9).

One row is one training example: a prompt, its responses, and a target per response. ``info["loss"]`` of the artifact
names the trainer's loss, and so the meaning of a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

from can_dist.config.base import identity
from can_dist.config.sections import Label
from can_dist.errors import DataError
from can_dist.stages.examples import Row, commit, draw, example, join, listed, note, pair_id, stream, useless
from can_dist.stages.solve import load_solution
from can_dist.tables.artifacts import Artifact
from can_dist.training.targets import score_targets
from can_dist.workspace import Workspace

LOSS_OF = {"soft": "sigmoid", "sampled": "sigmoid", "regression": "regression", "listwise": "listwise"}


def label(
    work: Workspace,
    responses: Artifact,
    scores: Artifact,
    lam: Artifact | Mapping[str, float],
    *,
    reward: str,
    beta: float,
    unit: Mapping[str, float] | None = None,
) -> Artifact:
    """Return the ``preferences`` table of s = r + ⟨λ, g⟩.

    Empty responses, and pairs of equal tokens, teach nothing and are left out. Pairs of equal score (ties) are kept:
    their target holds the log-ratios equal. All of these are counted, and listed in ``noted_examples.json``.

    Args:
        work: The run.
        responses: The ``responses`` to compare, or the given pairs.
        scores: Their ``scores``, with ln π_ref.
        lam: A ``solve`` artifact, or λ by name of its score.
        reward: Name of the score r.
        beta: KL weight β; the weights of a list are softmax(s/β).
        unit: Divides scores by name first: the paper's code labels log-ratios without their β
            (``label.as_published``).

    Raises:
        DataError: No example is left; all scores of every example are equal, so that there is nothing to learn; or the
            solution is of other scorers than those of ``scores``.
    """
    options = work.config.label
    identity_keys = {**identity(options, exclude=["preferences", "human"]), "seed": work.config.seed, "reward": reward}
    inputs = {"responses": responses, "scores": scores}
    if isinstance(lam, Artifact):
        inputs["solution"] = lam
    else:
        identity_keys["lam"] = dict(lam)
    if unit:
        identity_keys["unit"] = dict(unit)
    stage = work.open("label", "preferences", {**identity_keys, "beta": beta}, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("label", "preferences"):
        multipliers = load_solution(lam).lam if isinstance(lam, Artifact) else lam
        if isinstance(lam, Artifact):
            check_scorers(scores, lam.input("scores"), [reward, *multipliers])
        rows = join(responses, scores)
        for row, score in zip(rows, combined_score(scores, multipliers, reward, unit or {}).tolist(), strict=True):
            row["score"] = score
        if options.labels == "listwise":
            kept, noted = _label_lists(rows, options, work.config.seed, beta)
        else:
            kept, noted = _label_pairs(rows, options, work.config.seed)
        if kept and all(len(set(example["scores"])) == 1 for example in kept):
            raise DataError(
                f"{scores.path}: no preference signal: the scores of every example are equal ({listed(noted)}). "
                "Check the scorers: a constant score cannot say which response is better."
            )
        return commit(work, stage, kept, noted, scores, loss=LOSS_OF[options.labels])


def combined_score(scores: Artifact, lam: Mapping[str, float], reward: str, unit: Mapping[str, float]) -> np.ndarray:
    """Return s = r + ⟨λ, g⟩ of every response, (N,) float64, each score in its ``unit`` (1 where not named)."""
    table = scores.table
    total: np.ndarray = table.column(reward).to_numpy().astype(np.float64) / unit.get(reward, 1.0)
    for name, value in lam.items():
        total = total + value * table.column(name).to_numpy() / unit.get(name, 1.0)
    return total


def check_scorers(scores: Artifact, solved: Artifact, names: Sequence[str]) -> None:
    """Raise ``DataError`` unless the columns ``names`` of two tables of scores are of the same scorers.

    λ is a price in units of the scores it was solved on; it has no meaning for scores of another scorer.
    """
    mine, theirs = scores.info["scorers"], solved.info["scorers"]
    for name in names:
        differing = sorted(key for key in mine[name] | theirs[name] if mine[name].get(key) != theirs[name].get(key))
        if differing:
            differences = ", ".join(
                f"{key} {theirs[name].get(key)!r}, here {mine[name].get(key)!r}" for key in differing
            )
            raise DataError(
                f"{scores.path}, score {name!r}: λ was solved on scores of another scorer ({differences}). "
                "Score both with one model, or solve again."
            )


# ------------------------------------------------------------------------------------------------ labels from scores


def _label_pairs(rows: list[Row], options: Label, seed: int) -> tuple[list[Row], list[Row]]:
    kept, noted = [], []
    if options.pairs == "responses":
        alone = [name for name, members in _by_prompt(rows).items() if len(members) == 1]
        noted += [note(name, "less than two responses", kept=False) for name in alone]
    for a, b in _pairs(rows, options, seed):
        name = pair_id(a, b)
        if reason := useless(a, b):
            noted.append(note(name, reason, kept=False))
            continue
        kept.append(example(name, [a, b], _pair_target(name, a, b, options, seed), options.validation_fraction, seed))
        if a["score"] == b["score"]:
            noted.append(note(name, "tie", kept=True))
    return kept, noted


def _pair_target(name: str, a: Row, b: Row, options: Label, seed: int) -> tuple[float, float]:
    first, second = score_targets(LOSS_OF[options.labels], [a["score"], b["score"]])
    if options.labels == "sampled":
        first = float(draw(seed, f"label:{name}") < first)
        return first, 1.0 - first
    return first, second


def _label_lists(rows: list[Row], options: Label, seed: int, beta: float) -> tuple[list[Row], list[Row]]:
    """Label the distinct responses of each prompt with softmax(s/β)."""
    kept, noted = [], []
    for name, members in _lists(rows, options):
        distinct: dict[tuple[int, ...], Row] = {}
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
            noted.append(note(name, "less than two responses", kept=False))
            continue
        target = score_targets("listwise", [row["score"] for row in compared], beta)
        kept.append(example(name, compared, target, options.validation_fraction, seed))
    return kept, noted


def _by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    return groups


def _lists(rows: list[Row], options: Label) -> Iterator[tuple[str, list[Row]]]:
    """Yield the id and the responses of each list: a given pair, else all responses of a prompt."""
    if options.pairs == "preferences":
        yield from ((pair_id(a, b), [a, b]) for a, b in _pairs(rows, options, 0))
        return
    yield from _by_prompt(rows).items()


def _pairs(rows: list[Row], options: Label, seed: int) -> Iterator[tuple[Row, Row]]:
    """Yield the pairs: neighbouring rows of given pairs, else all or a draw of the pairs of each prompt's responses."""
    if options.pairs == "preferences":
        yield from zip(rows[::2], rows[1::2], strict=True)
        return
    for prompt_id, members in _by_prompt(rows).items():
        pairs = list(combinations(members, 2))
        if options.pairs_per_prompt != "all" and options.pairs_per_prompt < len(pairs):
            random = np.random.default_rng(stream(seed, f"pairs:{prompt_id}"))
            chosen = sorted(random.choice(len(pairs), size=options.pairs_per_prompt, replace=False).tolist())
            pairs = [pairs[index] for index in chosen]
        yield from pairs
