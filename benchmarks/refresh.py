"""A refresh after MoCAN: does regression on fresh samples of the policy beat a longer training, at equal tokens?

    python benchmarks/refresh.py              # the world of the tests, where π* is known: some minutes on one core

All ways train at the exact λ* from K sampled responses per prompt, by the product's own packs and losses, for the same
number of tokens, and end with the strength whose exact gain is the margin, so that what differs is the direction.
``MoCAN`` spends all tokens on K responses of the reference. ``refresh`` spends half of them, samples K responses of
that policy, and goes on from it by least squares (A*-PO, arXiv 2505.20686, algorithm 1):

    (β ln π_θ/π_ref(y) − (s(y) − V))²,     V = β ln mean_k exp(s(y_k)/β) over the K responses of the reference

``exact V`` is told V by enumeration; ``pairs`` regresses differences of fresh samples, which need no V; ``2K`` spends
the samples of a refresh on the reference before anything is trained.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import machine
from scipy.optimize import brentq
from scipy.special import logsumexp, softmax
from transformers import AutoModelForCausalLM, get_scheduler

from can_dist.modeling.logprobs import ResponseModel
from can_dist.training.batches import Example, Slot, collate
from can_dist.training.losses import example_losses
from can_dist.training.objective import log_ratios
from can_dist.training.targets import score_targets

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "refresh_enumerable.json"
BETA, MARGIN, RATE = 1.0, 0.3, 5e-3
WAYS = ("MoCAN", "MoCAN, 2K responses", "refresh", "refresh, exact V", "refresh, pairs")
STRONGEST = 10.0

sys.path.insert(0, str(ROOT / "tests" / "helpers" / "worlds"))


@dataclass(frozen=True)
class World:
    """π_ref (P, K), π* (P, K) and s = r + λ*g (P, K) of all responses; the reference's directory."""

    reference: Path
    ref_PK: np.ndarray
    optimum_PK: np.ndarray
    score_PK: np.ndarray


@click.command(help=(__doc__ or "").split("\n")[0])
@click.option("--responses", multiple=True, type=int, default=(64,), show_default=True, help="K.")
@click.option("--tokens", multiple=True, type=int, default=(15_000,), show_default=True)
@click.option("--seeds", default=5, show_default=True, help="Draws of the responses.")
def main(responses: tuple[int, ...], tokens: tuple[int, ...], seeds: int) -> None:
    """Train every way on every draw, and write the rows."""
    import enumerable_world as world

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        reference = world.make_reference(Path(scratch) / "reference")
        ref_PK = world.probabilities(reference)
        (lam,), optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
        known = World(reference, ref_PK, optimum_PK, world.REWARD_PK + lam * world.HARMLESS_PK)
        rows = []
        for way, k, budget, seed in product(WAYS, responses, tokens, range(seeds)):
            rows.append(measured(known, way, k, budget, seed))
            click.echo(f"{rows[-1]}")
    what = f"Enumerable world: 3 prompts, 64 responses, margin {MARGIN}, exact λ*, strength by the exact gain."
    RESULT.write_text(json.dumps({"what": what, "machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8")
    for k in responses:
        for budget in tokens:
            for way in WAYS:
                chosen = [row for row in rows if (row["way"], row["responses"], row["budget"]) == (way, k, budget)]
                click.echo(f"K {k}, {budget} tokens, {way}: {told(chosen)}")


def told(rows: list[dict[str, Any]]) -> str:
    """Return the means of some rows, with standard errors over draws."""
    texts = []
    for name in ("kl_as_trained", "kl", "strength", "objective"):
        values = np.array([row[name] for row in rows if row[name] is not None])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        texts.append(f"{name} {values.mean():.3f} ± {error:.3f} ({len(values)})")
    return ", ".join(texts)


def measured(known: World, way: str, num_responses: int, budget: int, seed: int) -> dict[str, Any]:
    """Train one way; return KL(π‖π*) as trained and at the strength that meets the margin, with what that is."""
    model = ResponseModel(AutoModelForCausalLM.from_pretrained(known.reference))
    many = 2 * num_responses if "2K" in way else num_responses
    drawn_PK = sample(known.ref_PK, many, seed)
    half = budget // 2 if "refresh" in way else budget
    lists = examples(known, drawn_PK, lambda s_K, _: score_targets("listwise", s_K, BETA), unique=True)
    fit(model, lists, half, "listwise")
    if "refresh" in way:
        value_P = BETA * (logsumexp(np.take_along_axis(known.score_PK, drawn_PK, 1) / BETA, axis=1) - np.log(many))
        if "exact" in way:
            value_P = BETA * np.log((known.ref_PK * np.exp(known.score_PK / BETA)).sum(axis=1))
        fresh_PK = sample(probabilities_of(model, known), num_responses, 1000 + seed)
        targets = examples(known, fresh_PK, lambda s_K, row: (s_K - value_P[row]).tolist(), unique=False)
        fit(model, targets, half, "regression" if "pairs" in way else "pointwise")
    return {
        "way": way,
        "responses": num_responses,
        "budget": budget,
        "seed": seed,
        **at_the_margin(probabilities_of(model, known), known),
    }


def sample(policy_PK: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Return the numbers of the responses drawn for each prompt, (P, number)."""
    random = np.random.default_rng(seed)
    return np.stack([random.choice(len(p_K), size=number, p=p_K / p_K.sum()) for p_K in policy_PK])


def examples(
    known: World, drawn_PK: np.ndarray, target: Callable[[np.ndarray, int], list[float]], *, unique: bool
) -> list[Example]:
    """Return a list per prompt of the responses drawn; ``unique``: each once, as labels of lists are."""
    import enumerable_world as world

    ids = [[world.WORDS.index(word) for word in text.split()] for text in world.RESPONSES]
    made = []
    for row, (prompt, drawn_K) in enumerate(zip(world.PROMPTS, drawn_PK, strict=True)):
        members = np.unique(drawn_K) if unique else drawn_K
        made.append(
            Example(
                prompt,
                [world.WORDS.index(word) for word in prompt.split()],
                [ids[k] for k in members],
                np.log(known.ref_PK[row, members]).tolist(),
                target(known.score_PK[row, members], row),
                1.0,
            )
        )
    return made


def fit(model: ResponseModel, made: list[Example], budget: int, loss: str) -> None:
    """Train on all lists in every step, until the tokens are spent."""
    steps = max(1, budget // sum(example.num_tokens for example in made))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, min(10, steps // 4), steps)
    batch = collate([Slot(example, 1.0) for example in made], "shared")
    for _ in range(steps):
        ratio_BN, is_real_BN = log_ratios(model, batch)
        if loss == "pointwise":
            error_BN = (BETA * ratio_BN - batch.target_BN).square().masked_fill(~is_real_BN, 0.0)
            loss_B = error_BN.sum(dim=1) / is_real_BN.sum(dim=1)
        else:
            loss_B = example_losses(loss, ratio_BN, batch.target_BN, is_real_BN, BETA)
        optimizer.zero_grad()
        loss_B.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def probabilities_of(model: ResponseModel, known: World) -> np.ndarray:
    """Return π of all responses, (P, K)."""
    import enumerable_world as world

    everything = np.tile(np.arange(len(world.RESPONSES)), (len(world.PROMPTS), 1))
    made = examples(known, everything, lambda s_K, _: s_K.tolist(), unique=False)
    with torch.no_grad():
        ratio_PK, _ = log_ratios(model, collate([Slot(example, 1.0) for example in made], "shared"))
    policy_PK = known.ref_PK * np.exp(ratio_PK.double().numpy())
    return policy_PK / policy_PK.sum(axis=1, keepdims=True)


def at_the_margin(policy_PK: np.ndarray, known: World) -> dict[str, Any]:
    """Return KL(π‖π*) as trained and at the strength whose gain is the margin, and E r − βKL(π‖π_ref) there.

    The policy of a strength is π_ref exp(α ln π/π_ref)/Z, which mixing weights is to first order in what was trained.
    """
    import enumerable_world as world

    def at(alpha: float) -> np.ndarray:
        logit_PK = np.log(known.ref_PK) + alpha * np.log(policy_PK / known.ref_PK)
        strong_PK: np.ndarray = softmax(logit_PK, axis=1)
        return strong_PK

    def slack(alpha: float) -> float:
        return world.gain(at(alpha), known.ref_PK, world.HARMLESS_PK) - MARGIN

    row: dict[str, Any] = {"kl_as_trained": world.kl(policy_PK, known.optimum_PK)}
    if slack(STRONGEST) < 0:
        return row | {"kl": None, "strength": None, "objective": None}
    alpha = float(brentq(slack, 0.0, STRONGEST))
    met_PK = at(alpha)
    objective = world.gain(met_PK, known.ref_PK, world.REWARD_PK) - BETA * world.kl(met_PK, known.ref_PK)
    return row | {"kl": world.kl(met_PK, known.optimum_PK), "strength": alpha, "objective": objective}


if __name__ == "__main__":
    main()
