"""MoCAN on a configuration in one plain process: the library's arithmetic, without Ray, DeepSpeed, artifacts or pages.

    python benchmarks/plain_run.py CONFIG RUN    # prints λ*, the strength and the gains as JSON

The other side of ``overhead.py``. Each model is loaded once. Prompts and their splits are read from the finished RUN.
Nothing is watched, checked, kept or resumed: what that costs is a part of what the other side costs more.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import get_scheduler

from can_dist.config import Config, Model, load_config
from can_dist.config.walk import REWARD, named_scorers
from can_dist.dual import Margin, ScoreTable, choose_strength, demands_of, estimate_policy, solve_table
from can_dist.measuring.gains import improvement
from can_dist.modeling.formatter import Formatter, open_formatter
from can_dist.modeling.loading import load_causal_lm
from can_dist.modeling.logprobs import ResponseModel, choose_layout
from can_dist.modeling.packs import make_pack
from can_dist.modeling.sampling import row_seed, sample
from can_dist.modeling.segments import attend_by
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import LogProb, Response, Scorer
from can_dist.scoring.token_budget import Passes
from can_dist.stages.generate import prompts_of_split, response_text, sampling
from can_dist.stages.label import combined_score, labelled, loss_of
from can_dist.tables.schemas import LOGP_REFERENCE, RESPONSES
from can_dist.training.batches import Example, collate, global_batch, num_steps, rank_packs
from can_dist.training.objective import pack_losses

PRECISION = "fp32"


def main(path: Path, run: Path) -> dict[str, Any]:
    """Return what the method says of a configuration: λ*, α, and the gains on held-out prompts."""
    torch.set_num_threads(1)
    config = load_config(path)
    constraint_names = list(config.constraints)
    formatter = open_formatter(config.reference)
    reference, scored = _model(config.reference), _Scored(config, formatter)
    [prompts] = run.glob("prompts-*")

    def responses(model: ResponseModel, split: str) -> pa.Table:
        attend_by(model.lm, model.plain_attention)  # passes over packs leave another
        return _sampled(model.lm, formatter, prompts_of_split(prompts, split), config, split)

    train, validation = (scored(responses(reference, split), reference) for split in ("train", "validation"))
    margins = [Margin(name, c.margin, c.threshold, c.equal) for name, c in config.constraints.items()]
    table, beta = _table(train, constraint_names), config.beta
    solution = solve_table(table, beta=beta, constraints=margins, estimator=config.solve.estimator)
    policy = _trained(_model(config.reference), _examples(train, solution.lam, config, formatter), config)

    logp_N = scored.logp(policy, validation)
    held = _table(validation, constraint_names)
    ref_N = validation.column("logp_ref").to_numpy()
    estimate = estimate_policy(held, ref_N, logp_N, lam=solution.lam, beta=beta)
    by: Any = config.strength
    strength = choose_strength(estimate, demands_of(table, margins), confidence=by.confidence, max_strength=by.max)
    with torch.no_grad():
        for weight, weight_ref in zip(policy.parameters(), reference.parameters(), strict=True):
            weight.copy_(weight_ref + strength.alpha * (weight - weight_ref))
    estimate_policy(held, ref_N, scored.logp(policy, validation), lam=solution.lam, beta=beta)

    before = scored(responses(reference, "test"))
    after = scored(responses(policy, "test"), reference)
    kl_N = scored.logp(policy, after) - after.column("logp_ref").to_numpy()
    gains = {name: improvement(before, after, name)["mean"] for name in (REWARD, *constraint_names)}
    return {"lam": dict(solution.lam), "alpha": strength.alpha, "gains": gains, "kl": float(kl_N.mean())}


def _model(model: Model) -> ResponseModel:
    return ResponseModel(load_causal_lm(model, PRECISION).eval())


def _sampled(lm: Any, formatter: Formatter, prompts: pa.Table, config: Config, split: str) -> pa.Table:
    """Return the table of responses to prompts, as ``can_dist.stages.generate`` samples them, shard by shard."""
    options, rows = sampling(config, split), []
    for first in range(0, prompts.num_rows, options.shard_prompts):
        shard = prompts.slice(first, options.shard_prompts).to_pylist()
        asked = [(prompt, formatter.prompt_ids(prompt["messages"])) for prompt in shard]
        each = [(prompt, ids, k) for prompt, ids in asked for k in range(options.num_responses)]
        seeds = [row_seed(config.seed, prompt["prompt_id"], k) for prompt, _, k in each]
        ids_R = [ids for _, ids, _ in each]
        samples = sample(lm, formatter.tokenizer, ids_R, seeds, options, formatter.end_ids)
        for (prompt, _, k), (tokens, reason) in zip(each, samples, strict=True):
            made = {"text": response_text(formatter, tokens, options), "token_ids": tokens, "num_tokens": len(tokens)}
            name = {"prompt_id": prompt["prompt_id"], "response_id": f"{prompt['prompt_id']}/{k}"}
            rows.append({**name, "messages": prompt["messages"], **made, "finish_reason": reason})
    return pa.Table.from_pylist(rows, schema=RESPONSES)


class _Scored:
    """Every scorer, loaded once."""

    def __init__(self, config: Config, formatter: Formatter) -> None:
        specs = named_scorers(config.reward, config.constraints)
        self.scorers: dict[str, tuple[Any, Scorer]] = {
            name: (spec, load_scorer(spec, PRECISION)) for name, spec in specs.items()
        }
        self.formatter, self.tokens_per_pass = formatter, LogProb(model=config.reference).tokens_per_pass

    def __call__(self, responses: pa.Table, reference: ResponseModel | None = None) -> pa.Table:
        """Return responses with a column for every scorer, and with ``reference`` one of ln π_ref."""
        texts = [
            Response(row["response_id"], row["messages"], row["text"], row["token_ids"])
            for row in responses.to_pylist()
        ]
        scored = responses
        for name, (spec, scorer) in self.scorers.items():
            scored = scored.append_column(name, pa.array(scorer.score(texts) * getattr(spec, "sign", 1)))
        return scored if reference is None else scored.append_column("logp_ref", pa.array(self.logp(reference, scored)))

    @torch.inference_mode()
    def logp(self, model: ResponseModel, responses: pa.Table) -> np.ndarray:
        """Return ln π of responses under a model, in nats."""
        rows = responses.select(["messages", "token_ids"]).to_pylist()
        prompts = [tuple(self.formatter.prompt_ids(row["messages"])) for row in rows]
        passes = Passes(LOGP_REFERENCE, "shared", self.tokens_per_pass)

        def forward(pack: Sequence[Sequence[int]]) -> torch.Tensor:
            groups = [(prompts[members[0]], [rows[row]["token_ids"] for row in members]) for members in pack]
            logp_R: torch.Tensor = model(make_pack(groups, "shared"))
            return logp_R

        sizes = [(len(prompt), len(row["token_ids"])) for prompt, row in zip(prompts, rows, strict=True)]
        logp_N: np.ndarray = passes.run(prompts, sizes, forward).double().numpy()
        return logp_N


def _table(scored: pa.Table, names: Sequence[str]) -> ScoreTable:
    prompt_N = scored.column("prompt_id").combine_chunks().dictionary_encode().indices.to_numpy()
    utility_NJ = np.stack([scored.column(name).to_numpy() for name in names], axis=1)
    return ScoreTable.build(scored.column(REWARD).to_numpy(), utility_NJ, prompt_N, None, names=list(names))


def _examples(scored: pa.Table, lam: Mapping[str, float], config: Config, formatter: Formatter) -> list[Example]:
    """Return the training examples of s = r + ⟨λ, g⟩."""
    table = scored.append_column("score", pa.array(combined_score(scored, lam, REWARD, {})))
    made = labelled(table, config.label, config.seed, config.beta, loss_of(config.label))
    return [
        Example(
            row["example_id"],
            formatter.prompt_ids(row["messages"]),
            row["token_ids"],
            row["logp_ref"],
            row["target"],
            row["weight"],
        )
        for row, _ in made
        if row is not None and row["split"] == "train"
    ]


def _trained(policy: ResponseModel, examples: Sequence[Example], config: Config) -> ResponseModel:
    """Train on examples by a plain loop: the same batches, packs, losses, optimizer and schedule."""
    train, weights = config.train, [weight for weight in policy.parameters() if weight.requires_grad]
    total = num_steps(len(examples), train.batch_size, train.num_epochs, train.max_steps)
    optimizer = torch.optim.AdamW(
        weights, lr=train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    schedule = get_scheduler(train.schedule, optimizer, train.warmup_steps, total)
    layout = choose_layout(policy, policy, lambda _: None)
    policy.train()
    for step in range(total):
        chosen = [examples[number] for number in global_batch(len(examples), train.batch_size, config.seed, step)]
        for pack in rank_packs(chosen, train.tokens_per_pack, 0, 1):
            loss_B, _ = pack_losses(
                policy, collate(pack, layout), loss=loss_of(config.label), beta=config.beta, baseline=None
            )
            (loss_B.sum() / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(weights, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return policy.eval()


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
