"""Which labels reach the optimum with the fewest training tokens: soft, sampled, regression, listwise.

    python benchmarks/losses.py enumerable          # the world of the tests, where π* is known: about 5 minutes
    python benchmarks/losses.py real RUN            # the MoCAN evaluations of a run directory: seconds

``enumerable`` trains in one process with the product's own packs and losses, at λ*, for a growing number of tokens,
each with its own cosine schedule; the margin is 0.6. ``real`` reads what runs have measured on held-out prompts: with
s = r + ⟨λ*, g⟩ it is KL(π_θ‖π*) = KL(π_θ‖π_ref) − E_{π_θ} s/β + E_x ln E_{π_ref} exp(s/β), the last term from the K
reference responses of each held-out prompt. K responses understate it, by the same amount for every loss.

Tokens count a prompt once for all responses that are compared, as the trainer does.
"""

from __future__ import annotations

import json
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from machine import machine
from scipy.special import expit, logsumexp
from transformers import AutoModelForCausalLM, get_scheduler

from can_dist.modeling.logprobs import ResponseModel
from can_dist.stages.label import LOSS_OF, PAIR_LOSS_OF
from can_dist.training.batches import Example, Slot, collate, global_batch
from can_dist.training.objective import pack_losses
from can_dist.training.targets import score_targets

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARGIN = 0.6
LABELS = ("soft", "sampled", "regression", "listwise")
TOKENS = (15_000, 30_000, 60_000, 120_000, 240_000)
BETA = 0.5


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure the losses."""


@main.command()
@click.option("--tokens", multiple=True, type=int, default=TOKENS, show_default=True, help="Tokens to train on.")
@click.option("--seeds", default=2, show_default=True, help="Runs of each, with other batches and draws.")
def enumerable(tokens: tuple[int, ...], seeds: int) -> None:
    """Train on the enumerable world and compare with the closed form."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers" / "worlds"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        reference = make_reference(Path(scratch) / "reference")
        rows = [
            train(reference, labels, budget, seed) for labels in LABELS for budget in tokens for seed in range(seeds)
        ]
    save("losses_enumerable", rows, f"Enumerable world: 3 prompts, 64 responses, margin {MARGIN}, one process.")


def make_reference(directory: Path) -> Path:
    """Save the tests' reference model."""
    import enumerable_world as world

    return world.make_reference(directory)


def train(reference: Path, labels: str, budget: int, seed: int) -> dict[str, Any]:
    """Train with one kind of label on λ*'s score; returns the trained tokens, the slack and KL(π_θ‖π*)."""
    import enumerable_world as world

    ref_PK = world.probabilities(reference)
    lam, optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
    examples = label(labels, world.REWARD_PK + lam[0] * world.HARMLESS_PK, ref_PK, seed)
    loss, batch_size = (PAIR_LOSS_OF[labels], 192) if labels == "sampled" else (LOSS_OF[labels], 3)
    steps = max(1, budget // sum(example.num_tokens for example in examples[:batch_size]))
    model = ResponseModel(AutoModelForCausalLM.from_pretrained(reference))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, min(20, steps // 4), steps)
    done = 0
    for step in range(steps):
        chosen = [examples[index] for index in global_batch(len(examples), batch_size, seed, step)]
        batch = collate([Slot(example, 1.0) for example in chosen], "shared")
        loss_B, _ = pack_losses(model, batch, loss=loss, beta=BETA, baseline=None)
        optimizer.zero_grad()
        loss_B.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        done += sum(example.num_tokens for example in chosen)
    model.lm.set_attn_implementation("sdpa")
    model.lm.save_pretrained(reference.parent / "trained")
    trained_PK = world.probabilities(reference.parent / "trained")
    return report(
        labels,
        steps=steps,
        seed=seed,
        tokens=done,
        slack=world.gain(trained_PK, ref_PK, world.HARMLESS_PK) - MARGIN,
        kl_optimum=world.kl(trained_PK, optimum_PK),
    )


def label(labels: str, score_PK: np.ndarray, ref_PK: np.ndarray, seed: int) -> list[Example]:
    """Return the training examples of one kind of label, over all pairs or lists."""
    import enumerable_world as world

    random = np.random.default_rng(seed)
    ids_K = [[world.WORDS.index(word) for word in text.split()] for text in world.RESPONSES]
    examples = []
    for row, prompt in enumerate(world.PROMPTS):
        prompt_ids, s_K = [world.WORDS.index(word) for word in prompt.split()], score_PK[row]
        if labels == "sampled":
            members = [list(pair) for pair in combinations(range(len(ids_K)), 2)]
            p_V = expit(np.array([s_K[a] - s_K[b] for a, b in members]))
            drawn_V = (random.random(len(p_V)) < p_V).astype(float)
            targets = [[p, 1 - p] for p in drawn_V]
        else:
            members, targets = [list(range(len(ids_K)))], [score_targets(LOSS_OF[labels], s_K, BETA)]
        for number, (member, target) in enumerate(zip(members, targets, strict=True)):
            logp_ref = [float(np.log(ref_PK[row, k])) for k in member]
            responses = [ids_K[k] for k in member]
            examples.append(Example(f"{prompt}/{number}", prompt_ids, responses, logp_ref, target, 1.0))
    return examples


@main.command()
@click.argument("run_dir", metavar="RUN", type=click.Path(path_type=Path, exists=True))
def real(run_dir: Path) -> None:
    """Read the MoCAN evaluations of a run directory."""
    from can_dist.outcomes.compare import find_evaluations

    evaluations = [evaluation for evaluation in find_evaluations([run_dir]) if evaluation.info["method"] == "mocan"]
    save(
        "losses_real",
        [measured(evaluation) for evaluation in evaluations],
        "Held-out prompts of recipes/pku_stories3M/compare.yaml.",
    )


def measured(evaluation: Any) -> dict[str, Any]:
    """Return one evaluation's trained tokens, slack and estimate of KL(π_θ‖π*)."""
    from can_dist.stages.report import as_trained
    from can_dist.stages.solve import load_solution
    from can_dist.workspace import REPORT

    read = evaluation.read_json(REPORT)
    solution, beta = load_solution(evaluation.input("solution")), read["beta"]
    before, after = (evaluation.input(name).table.to_pandas() for name in ("scores_before", "scores_after"))
    for table in (before, after):
        table["s"] = table[read["reward"]["name"]] + sum(lam * table[name] for name, lam in solution.lam.items())
    log_normaliser = before.groupby("prompt_id")["s"].apply(
        lambda s_K: logsumexp(s_K.to_numpy() / beta) - np.log(len(s_K))
    )
    kl = read["kl"]["realised"]["mean"] - after.groupby("prompt_id")["s"].mean().mean() / beta + log_normaliser.mean()
    policy = as_trained(evaluation.input("policy"))
    (constraint,) = read["constraints"]
    return report(
        read["config"]["label"]["labels"],
        steps=policy.info["summary"]["num_steps"],
        seed=read["config"]["seed"],
        tokens=policy.info["summary"]["num_tokens"],
        slack=constraint["realised"]["mean"] - constraint["margin"],
        kl_optimum=float(kl),
    )


def report(labels: str, **numbers: float) -> dict[str, Any]:
    """Print a row and return it."""
    told = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
    click.echo(f"{labels}: {told}")
    return {"labels": labels, **numbers}


def save(name: str, rows: list[dict[str, Any]], title: str) -> None:
    """Write the rows as JSON, with the machine and the date."""
    record = {"what": title, "machine": machine(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
