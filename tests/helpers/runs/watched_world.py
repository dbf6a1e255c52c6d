"""A world of scored lists of responses, for trainings that are watched by validation responses and steered by them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import train_world as tw
from tiny import make_tiny_lm

from can_dist.config import Config, Model, validate_config
from can_dist.config.sections import Train
from can_dist.dual import Demand
from can_dist.stages.label import label
from can_dist.stages.solve import load_solution, solve
from can_dist.stages.watch import Watched, watch_spec
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.quarantine import QUARANTINED
from can_dist.tables.schemas import LOGP_REFERENCE, RESPONSES, SCORE_KEYS
from can_dist.training.spec import TrainSpec
from can_dist.workspace import Workspace

NUM_RESPONSES = 4
MARGINS = {"calm": 0.6, "short": 0.3}
SCORER = {"kind": "callable", "function": "builtins:len"}
SCORES = pa.schema([*SCORE_KEYS, *((name, pa.float64()) for name in ("reward", *MARGINS, LOGP_REFERENCE))])


def make_rows(num_prompts: int, seed: int) -> list[dict[str, Any]]:
    """Prompts with responses of random words, scored by which words they hold and how many."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(num_prompts):
        prompt = random.choice(tw.WORDS, size=random.integers(1, 6)).tolist()
        for k in range(NUM_RESPONSES):
            words = random.choice(tw.WORDS, size=random.integers(1, 7)).tolist()
            calm = float(np.mean([int(word[1:]) < 8 for word in words]))
            rows.append(
                {
                    "prompt_id": f"{seed}-{index}",
                    "response_id": f"{seed}-{index}/{k}",
                    "messages": [{"role": "user", "content": " ".join(prompt)}],
                    "text": " ".join(words),
                    "token_ids": [*tw.token_ids(words), tw.END],
                    "num_tokens": len(words) + 1,
                    "finish_reason": "stop",
                    "reward": float(np.mean([int(word[1:]) % 2 for word in words])),
                    "calm": calm * 2,
                    "short": 1 - len(words) / 6 + 0.3 * calm,
                }
            )
    return rows


def filled(rows: list[dict[str, Any]], reference: Path) -> list[dict[str, Any]]:
    """Return the rows with ln π_ref."""
    lists = tw.fill_reference([{**row, "token_ids": [row["token_ids"]]} for row in rows], reference)
    return [row | {LOGP_REFERENCE: alone["logp_ref"][0]} for row, alone in zip(rows, lists, strict=True)]


@dataclass
class Watching:
    """What a watched training needs: labels, the dual that made them, and scored validation responses."""

    root: Path
    config: Config
    reference: Path
    train_rows: list[dict[str, Any]]
    validation_rows: list[dict[str, Any]]
    scores: Artifact
    validation: Artifact
    solution: Artifact
    preferences: Artifact

    @property
    def lam(self) -> dict[str, float]:
        """λ* by constraint."""
        return load_solution(self.solution).lam

    @property
    def demands(self) -> list[Demand]:
        """The margins, as demands."""
        return [Demand(name, margin) for name, margin in MARGINS.items() if name in self.lam]

    def spec(self, name: str, total: int, *, watched: bool = True, **train: object) -> str:
        """Return the JSON of a ``TrainSpec`` of ``total`` steps in the directory ``name``."""
        (self.root / name).mkdir(exist_ok=True)
        options = Train(
            **{
                "learning_rate": 3e-3,
                "num_epochs": 9,
                "max_steps": total,
                "batch_size": 6,
                "tokens_per_pack": 60,
                "log_every": 1,
                "eval_every": 2,
                "ds_config": str(tw.ROOT / "ds_configs" / "zero3_cpu.json"),
                **train,
            }
        )
        both = Watched(self.solution, self.validation) if watched else None
        return TrainSpec(
            directory=self.root / name,
            preferences=self.preferences.path,
            reference=Model(model=str(self.reference)),
            start=Model(model=str(self.reference)),
            train=options,
            beta=tw.BETA,
            seed=3,
            precision="fp32",
            watch=watch_spec(both, self.preferences, options, total),
        ).model_dump_json()


def scored(
    run: Path, split: str, rows: list[dict[str, Any]], left_out: Sequence[str] = ()
) -> tuple[Artifact, Artifact]:
    """Return the artifacts of responses and of their scores, some of which were quarantined."""
    place = open_stage(run, "generate", f"reference on {split}", {}, {})
    write_part(place.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
    responses = place.finished or place.commit()
    place = open_stage(run, "scores", f"reference on {split}", {}, {"responses": responses})
    kept = [row for row in rows if row["response_id"] not in left_out]
    write_part(place.path, 0, pa.Table.from_pylist(kept, schema=SCORES))
    scorers = {name: {"model": name} for name in ("reward", *MARGINS, LOGP_REFERENCE)}
    info = {"scorers": scorers, QUARANTINED: dict.fromkeys(left_out, "killed the actor")}
    return responses, place.finished or place.commit(info=info)


def make_watching(
    root: Path,
    labels: str = "listwise",
    constraints: tuple[str, ...] = ("calm",),
    num_prompts: int = 15,
    *,
    alike: bool = False,
) -> Watching:
    """Write the world into ``root``; ``labels`` is ``label.labels``, ``alike`` makes both scores say the same."""
    reference = make_tiny_lm(root / "reference", tw.WORDS)
    config = validate_config(
        {
            "seed": 3,
            "beta": tw.BETA,
            "prompts": {"source": "prompts.jsonl"},
            "reference": {"model": str(reference)},
            "reward": SCORER,
            "constraints": {name: {"scorer": SCORER, "margin": MARGINS[name]} for name in constraints},
            "label": {"labels": labels, "validation_fraction": 0.2},
        }
    )
    train_rows, validation_rows = (filled(make_rows(num_prompts, seed), reference) for seed in (1, 2))
    for row in [*train_rows, *validation_rows] if alike else []:
        row["short"] = row["calm"] / 2
    work = Workspace(root / "run", config)
    responses, scores = scored(work.directory, "train", train_rows)
    _, validation = scored(work.directory, "validation", validation_rows)
    solution = solve(work, scores, reward="reward", constraints=config.constraints, beta=tw.BETA)
    preferences = label(work, responses, scores, solution, reward="reward", beta=tw.BETA)
    work.close()
    return Watching(root, config, reference, train_rows, validation_rows, scores, validation, solution, preferences)
