"""Two criteria from one data set that does not tell them apart: refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tiny import make_tiny_lm

from can_dist.config import Config, validate_config
from can_dist.errors import DataError
from can_dist.run import Run
from can_dist.stages.human_labels import Criterion
from can_dist.tables.artifacts import Artifact, open_stage, write_part
from can_dist.tables.schemas import PROMPTS

WORDS = [f"w{i}" for i in range(8)]
CHOSEN = [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "w3"} for i in range(4)]
DOUBLE = [
    {"prompt": f"w{i}", "response_0": "w1", "response_1": "w2", "better_response_id": 0, "safer_response_id": 1}
    for i in range(4)
]
SCORER = {"kind": "callable", "function": "scorers:num_words"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("criteria")
    make_tiny_lm(folder / "lm", WORDS)
    for name, rows in {"chosen": CHOSEN, "harmless": CHOSEN[::-1], "double": DOUBLE}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configure(folder: Path, method: str, preferences: str | None, **sections: Any) -> Config:
    label = {"label": {"preferences": source(folder, preferences)}} if preferences else {}
    return validate_config(
        {
            "method": method,
            "prompts": {"source": "unused"},
            "reference": {"model": str(folder / "lm")},
            "reward": SCORER,
            "constraints": {"safety": {"scorer": SCORER, "margin": 0.1}},
            **label,
            **sections,
        }
    )


def source(folder: Path, name: str) -> dict[str, str]:
    return {"source": str(folder / f"{name}.jsonl")}


def no_prompts(run_dir: Path) -> Artifact:
    stage = open_stage(run_dir, "prompts", "prompts", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist([], schema=PROMPTS))
    return stage.commit()


def sacpo_pairs(run_dir: Path, config: Config) -> dict[Criterion, Artifact]:
    run_dir.mkdir()
    with Run(run_dir, config) as run:
        steps: dict[Criterion, Any] = {"helpful": config.sacpo.first, "safe": config.sacpo.second}
        return run.step_pairs(config.reference, no_prompts(run_dir), steps)


def test_sacpo_refuses_to_learn_the_chosen_responses_twice(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        sacpo_pairs(tmp_path / "run", configure(folder, "sacpo", "chosen"))
    assert str(refused.value).startswith(str(tmp_path / "run" / "pairs-"))
    assert str(refused.value).endswith(
        "the data set says which response was chosen, not by what criterion, and SACPO would learn the same labels as "
        "'helpful' and as 'safe'. Name a data set of its own in sacpo.second.preferences."
    )


def test_kto_does_not_hide_that_the_labels_are_the_same(folder: Path, tmp_path: Path) -> None:
    """KTO reads the pairs in another form; the labels are still those of one data set."""
    with pytest.raises(DataError, match=r"learn the same labels as 'helpful' and as 'safe'"):
        sacpo_pairs(tmp_path / "run", configure(folder, "sacpo", "chosen", sacpo={"second": {"loss": "kto"}}))


@pytest.mark.parametrize("first", ["chosen", None])
def test_each_step_can_have_a_data_set_of_its_own(folder: Path, tmp_path: Path, first: str | None) -> None:
    steps = {"second": {"preferences": source(folder, "harmless")}}
    if first is None:  # then label.preferences is not needed
        steps["first"] = {"preferences": source(folder, "chosen")}
    pairs = sacpo_pairs(tmp_path / "run", configure(folder, "sacpo", first, sacpo=steps))
    prompts = {name: found.table.column("messages")[0].as_py()[0]["content"] for name, found in pairs.items()}
    assert prompts == {"helpful": "w0", "safe": "w3"}


def test_double_labels_are_two_criteria(folder: Path, tmp_path: Path) -> None:
    pairs = sacpo_pairs(tmp_path / "run", configure(folder, "sacpo", "double"))
    assert pairs["helpful"].digest == pairs["safe"].digest
    assert pairs["safe"].info["names_criteria"]


def test_pecan_refuses_one_policy_for_both_criteria(folder: Path, tmp_path: Path) -> None:
    helpful, safe = ({"kind": "log_ratio", "beta": 0.1, "criterion": name} for name in ("helpful", "safe"))
    constraints = {"safety": {"scorer": safe, "margin": 0.1}}
    config = configure(folder, "pecan", "chosen", reward=helpful, constraints=constraints)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Run(run_dir, config) as run, pytest.raises(DataError) as refused:
        run.aligned(config.reference, no_prompts(run_dir), config.reward, config.constraints)
    assert "PeCAN would learn the same labels as 'helpful' and as 'safe'" in str(refused.value)
    assert str(refused.value).endswith("Name a data set of its own in each scorer's preferences.")
    assert not list(run_dir.glob("train-*"))
