"""Does the estimate that needs no generation agree with fresh samples? Policies of real_margins.py, and other prompts.

    python benchmarks/estimate_agreement.py run     # after real_margins.py, whose run directory it reads; goes on
    python benchmarks/estimate_agreement.py show

Every policy with an evaluation is estimated three times: on the validation prompts that chose its strength; on prompts
that its seed neither trained on, nor held out, nor chose by, scored for this; and on the held-out prompts themselves,
from the reference's responses. The first two are independent of the fresh samples, so they agree where the two 95 %
intervals of a difference hold 0. The third shares its prompts with them, so it shows the estimator without the prompts.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from real_margins import CELL, FEEDBACK, TITLES, TWO, agrees
from real_margins import RESULT as MARGINS
from real_runs import AS_MEASURED, RECIPE, RESULTS, command, read_rows, save_rows, span

from can_dist import load_config
from can_dist.config import Model
from can_dist.dual import ScoreTable, estimate_policy
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import LogProb, Response
from can_dist.tables.artifacts import Artifact, load_artifact
from can_dist.tables.foreign.messages import prompt_id
from can_dist.tables.scores import score_arrays
from can_dist.training import POLICY

RESULT = RESULTS / "estimate_agreement.json"
SUBJECT = "policies of real_margins.json, estimated and realised"
BASES = {"validation": "the prompts that chose", "others": "other prompts", "test": "the held-out prompts themselves"}


@dataclass(frozen=True)
class Scored:
    """Responses of the reference with their scores and ln π_ref."""

    table: ScoreTable
    responses: list[Response]
    log_prob_N: np.ndarray

    @classmethod
    def of(cls, scores: Artifact, names: list[str]) -> Scored:
        """Read a table of scores and the responses that it scores."""
        rows = scores.input("responses").table.to_pylist()
        assert [row["response_id"] for row in rows] == scores.table.column("response_id").to_pylist()
        responses = [Response(row["response_id"], row["messages"], row["text"], row["token_ids"]) for row in rows]
        arrays = score_arrays(scores.table, "reward", names, str(scores.path))
        table = ScoreTable.build(arrays.reward_N, arrays.utility_NJ, arrays.prompt_N, names=names)
        return cls(table, responses, log_prob(load_config(RECIPE).reference.model, responses))

    def estimate(self, policy: str, lam: Mapping[str, float]) -> dict[str, Any]:
        """Return a policy's estimated gains and KL with their intervals, and how they were made."""
        policy_logp_N = log_prob(policy, self.responses)
        estimate = estimate_policy(self.table, self.log_prob_N, policy_logp_N, lam=lam, beta=1.0)
        return {
            "prompts": estimate.num_prompts,
            "estimator": estimate.estimator,
            "ess": estimate.ess,
            "constraints": {name: span(vars(gain)) for name, gain in estimate.improvement.items()},
            "reward": span(vars(estimate.reward_improvement)),
            "kl": span(vars(estimate.kl)),
        }


@click.group(help=(__doc__ or "").split("\n")[0])
def main() -> None:
    """Measure and show."""


@main.command()
@click.option(
    "--run", "others_dir", default="runs/pku_stories3M_others", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--others", "num_others", default=400, show_default=True, help="Other prompts of each seed.")
def run(others_dir: Path, num_others: int) -> None:
    """Estimate every policy of real_margins.py that has no row yet."""
    scored: dict[tuple[Any, ...], Scored] = {}
    for cell in read_rows(MARGINS):
        rows = read_rows(RESULT)
        if any(row["evaluation"] == cell["evaluation"] for row in rows):
            continue
        evaluation = load_artifact(Path(cell["run"]) / cell["evaluation"])
        names = list(cell["constraints"])
        places = {"others": (cell["seed"], *names), "test": ("test", cell["seed"], *names)}
        if places["others"] not in scored:
            others = score_others(others_dir, evaluation, cell["seed"], num_others)
            scored[places["others"]] = Scored.of(others, names)
            scored[places["test"]] = Scored.of(evaluation.input("scores_before"), names)
        policy = str(evaluation.input("policy").path / POLICY)
        lam = {name: gain["lam"] for name, gain in cell["constraints"].items()}
        estimates = {base: scored[place].estimate(policy, lam) for base, place in places.items()}
        row = {key: cell[key] for key in (*CELL, "alpha", "evaluation", "constraints")} | {"estimates": estimates}
        save_rows(RESULT, [*rows, row], SUBJECT)
        click.echo(json.dumps(row))


def score_others(others_dir: Path, evaluation: Artifact, seed: int, number: int) -> Artifact:
    """Sample and score the reference on prompts of a seed that its run left aside; return the scores.

    The run orders prompts by a hash of seed and id and takes its splits from the front, so these come next.
    """
    config = load_config(RECIPE)
    assert config.prompts is not None
    prompts = evaluation.input("responses_after").input("prompts")
    used = {row["prompt_id"] for row in prompts.table.to_pylist()}
    texts = [json.loads(line)["prompt"] for line in Path(config.prompts.source).read_text("utf-8").splitlines()]
    ids = {prompt_id([{"role": "user", "content": text}]): text for text in texts}
    order = sorted(ids, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())
    assert set(order[: len(used)]) == used
    source = others_dir / f"seed_{seed}.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    left = order[len(used) : len(used) + number]
    source.write_text("".join(json.dumps({"prompt": ids[key]}) + "\n" for key in left), "utf-8")
    settings = AS_MEASURED | {
        "seed": seed,
        "prompts.source": str(source),
        "prompts.num_train": "null",
        "prompts.num_test": 2,  # the least there can be: these stay aside
        "prompts.num_validation": 0,
        "strength": 1,
        **{key: value for key, value in TWO.items() if key not in FEEDBACK},
    }
    finished = subprocess.run(command("score", others_dir, settings), stdout=subprocess.PIPE, text=True, check=True)
    return load_artifact(Path(finished.stdout.split()[-1]))


def log_prob(model: str, responses: list[Response]) -> np.ndarray:
    """Return ln π of the responses under a model directory, nats."""
    return load_scorer(LogProb(model=Model(model=model)), "fp32").score(responses)


@main.command()
def show() -> None:
    """Print every policy's gain of safety, fresh and estimated, and how many of the estimates agree."""
    rows = sorted(read_rows(RESULT), key=lambda row: (row["seed"], row["way"], row["margin"]))
    click.echo(f"| way | margin | seed | fresh samples | {' | '.join(BASES.values())} |")
    click.echo("|---|---|---|---|---|---|---|")
    for row in rows:
        fresh = row["constraints"]["safety"]
        cells = [TITLES.get(row["way"], row["way"]), row["margin"], row["seed"], plus_minus(fresh)]
        cells += [f"{plus_minus(value)}{'' if agrees(value, fresh) else ' ✗'}" for value in by_base(row).values()]
        click.echo(f"| {' | '.join(str(cell) for cell in cells)} |")
    for base, title in BASES.items():
        agreeing = sum(agrees(by_base(row)[base], row["constraints"]["safety"]) for row in rows)
        click.echo(f"\n{title}: {agreeing} of {len(rows)} agree")


def by_base(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return a policy's estimated gain of safety by what it was estimated on."""
    chosen = {"validation": row["constraints"]["safety"]["estimate"]}
    return chosen | {base: made["constraints"]["safety"] for base, made in row["estimates"].items()}


def plus_minus(value: dict[str, float]) -> str:
    """Return a mean and the half-width of its interval."""
    return f"{value['mean']:+.3f} ± {(value['high'] - value['low']) / 2:.3f}"


if __name__ == "__main__":
    main()
