"""A run directory up to its dual, without Ray: real scorers (words, calm words) of responses made by hand."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import scorers
from small_run import small_run

from can_dist.config import Config, dump_yaml, validate_config
from can_dist.run import named_scorers
from can_dist.scoring.kinds import scorer_identity, shown_name
from can_dist.stages.solve import solve
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.workspace import Workspace

PROMPTS = ["w0 w6", "w1 w7", "w2 w8"]
RESPONSES = [" ".join(words) for size in (1, 2, 3) for words in product(["w1", "w5", "w9"], repeat=size)]


def solved_run(folder: Path, **sections: Any) -> tuple[Path, Artifact, Config]:
    """Return the run, its solution and its configuration."""
    config = validate_config(small_run(folder, **sections))
    run = folder / "run"
    work = Workspace(run, config)
    specs = named_scorers(config.reward, config.constraints)
    rows = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]
    conversations = [[{"role": "user", "content": prompt}] for prompt, _ in rows]
    columns = {
        name: getattr(scorers, spec.function.split(":")[1])(conversations, [response for _, response in rows])
        for name, spec in specs.items()
    }
    info = {
        name: {"name": name, "model": shown_name(spec), **scorer_identity(spec, "fp32")} for name, spec in specs.items()
    }
    stage = open_stage(run, "scores", "reference on train", {}, {})
    ids = [f"{prompt}/{number}" for number, (prompt, _) in enumerate(rows)]
    write_part(stage.path, 0, pa.table({"prompt_id": [p for p, _ in rows], "response_id": ids, **columns}))
    scores = stage.commit(info={"scorers": info})
    solution = solve(work, scores, reward="reward", constraints=config.constraints, beta=config.beta)
    work.close()
    (run / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    return run, solution, config
