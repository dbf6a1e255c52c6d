"""scores + λ* → preferences: pairs with s = r + ⟨λ*, g⟩ and P(a ≻ b) = σ(s_a − s_b) (CAN, arXiv 2405.19544, eq. 9)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from can_dist.config import Label, identity
from can_dist.dual import DualSolution
from can_dist.errors import DataError
from can_dist.stages.solve import load_solution
from can_dist.stages.workspace import Workspace
from can_dist.tables.artifacts import Artifact, write_json, write_part
from can_dist.tables.schemas import PREFERENCES

NOTED = "noted_pairs.json"


def label(work: Workspace, responses: Artifact, scores: Artifact, solution: Artifact, *, reward: str) -> Artifact:
    """Return the ``preferences`` table.

    Pairs with an empty response, or with twice the same tokens, teach nothing and are set aside. Pairs of equal score
    (ties) are kept: their target ½ holds the log-ratios equal. All of them are counted, and listed in
    ``noted_pairs.json``.

    Raises
    ------
    DataError
        When no pair is left, or all scores of every prompt are equal, so that there is nothing to learn.
    """
    options = work.config.label
    what = {**identity(options, exclude=["preferences"]), "seed": work.config.seed, "reward": reward}
    inputs = {"responses": responses, "scores": scores, "solution": solution}
    stage = work.open("label", "preferences", what, inputs)
    if stage.finished:
        return stage.finished
    with work.timed("label", "preferences"):
        rows = _joined(responses, scores, combined_score(scores, load_solution(solution), reward))
        kept, noted = _label_pairs(rows, options, work.config.seed)
        counts = Counter(entry["reason"] for entry in noted)
        counts["pairs"] = len(kept)
        _require_signal(kept, counts, str(scores.path))
        write_part(stage.path, 0, pa.Table.from_pylist(kept, schema=PREFERENCES))
        write_json(stage.path / NOTED, noted)
        splits = Counter(pair["split"] for pair in kept)
        work.say("label: " + ", ".join(f"{n} {what}" for what, n in (counts | splits).items()))
        return stage.commit([NOTED], info={"counts": dict(counts), "splits": dict(splits)})


def combined_score(scores: Artifact, solution: DualSolution, reward: str) -> np.ndarray:
    """Return s = r + ⟨λ*, g⟩ of every response, (N,) float64."""
    table = scores.table
    total: np.ndarray = table.column(reward).to_numpy().astype(np.float64)
    for name, lam in solution.lam.items():
        total = total + lam * table.column(name).to_numpy()
    return total


def _joined(responses: Artifact, scores: Artifact, combined_N: np.ndarray) -> list[dict[str, Any]]:
    if not responses.table.column("response_id").equals(scores.table.column("response_id")):
        raise DataError(f"{scores.path}: its response ids are not those of {responses.path}.")
    rows: list[dict[str, Any]] = responses.table.to_pylist()
    logp = scores.table.column("logp.reference").to_pylist()
    for row, total, logp_ref in zip(rows, combined_N.tolist(), logp, strict=True):
        row["score"], row["logp_ref"] = total, logp_ref
    return rows


def _label_pairs(
    rows: list[dict[str, Any]], options: Label, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    kept, noted = [], []
    for a, b in _pairs(rows, options, seed):
        pair_id = f"{a['response_id']}|{b['response_id'].rsplit('/', 1)[1]}"
        if not a["text"].strip() or not b["text"].strip():
            noted.append({"pair_id": pair_id, "reason": "empty response", "kept": False})
        elif a["token_ids"] == b["token_ids"]:
            noted.append({"pair_id": pair_id, "reason": "equal responses", "kept": False})
        else:
            kept.append(_preference(pair_id, a, b, options, seed))
            if a["score"] == b["score"]:
                noted.append({"pair_id": pair_id, "reason": "tie", "kept": True})
    return kept, noted


def _pairs(rows: list[dict[str, Any]], options: Label, seed: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the pairs: neighbouring rows of given pairs, else all or some pairs of each prompt's responses."""
    if options.pairs == "preferences":
        yield from zip(rows[::2], rows[1::2], strict=True)
        return
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for prompt_id, members in by_prompt.items():
        pairs = list(combinations(members, 2))
        if options.pairs_per_prompt != "all" and options.pairs_per_prompt < len(pairs):
            random = np.random.default_rng(_stream(seed, f"pairs:{prompt_id}"))
            chosen = sorted(random.choice(len(pairs), size=options.pairs_per_prompt, replace=False).tolist())
            pairs = [pairs[index] for index in chosen]
        yield from pairs


def _preference(pair_id: str, a: dict[str, Any], b: dict[str, Any], options: Label, seed: int) -> dict[str, Any]:
    gap = a["score"] - b["score"]
    target = _sigmoid(gap)
    if options.labels == "sampled":
        target = float(np.random.default_rng(_stream(seed, f"label:{pair_id}")).random() < target)
    held = np.random.default_rng(_stream(seed, f"validation:{a['prompt_id']}")).random() < options.validation_fraction
    return {
        "pair_id": pair_id,
        "prompt_id": a["prompt_id"],
        "split": "validation" if held else "train",
        "messages": a["messages"],
        "text_a": a["text"],
        "text_b": b["text"],
        "token_ids_a": a["token_ids"],
        "token_ids_b": b["token_ids"],
        "score_gap": gap,
        "target": target,
        "logp_ref_a": a["logp_ref"],
        "logp_ref_b": b["logp_ref"],
    }


def _sigmoid(x: float) -> float:
    return float(0.5 * (1.0 + np.tanh(0.5 * x)))  # never overflows


def _stream(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def _require_signal(kept: list[dict[str, Any]], counts: Counter[str], where: str) -> None:
    listed = ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "none"
    if not any(pair["split"] == "train" for pair in kept):
        raise DataError(f"{where}: no pair is left to train on ({listed}). Sample more responses or prompts.")
    if all(pair["score_gap"] == 0 for pair in kept):
        raise DataError(
            f"{where}: no preference signal: the two scores of every pair are equal ({listed}). "
            "Check the scorers: a constant score cannot say which response is better."
        )
