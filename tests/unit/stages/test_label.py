"""Pairs and their labels, on hand-made tables."""

import json
import shutil
from collections import Counter
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import softmax

from can_dist.config import validate_config
from can_dist.dual import Margin, solve_dual
from can_dist.errors import ConfigError, DataError
from can_dist.stages import examples
from can_dist.stages.examples import NOTED
from can_dist.stages.label import label
from can_dist.tables.artifacts import file_digest, open_stage, write_json, write_part
from can_dist.tables.quarantine import without
from can_dist.tables.schemas import RESPONSES
from can_dist.workspace import SOLUTION, Workspace

NUM_PROMPTS, NUM_RESPONSES, BETA = 40, 5, 1.0


def tables(run: Path, reward_N: np.ndarray, safety_N: np.ndarray, texts: list[str] | None = None, margin: float = 0.1):
    """Commit responses, scores and the dual's solution of a small table."""
    rows = []
    for n in range(len(reward_N)):
        prompt, k = divmod(n, NUM_RESPONSES)
        text = f"answer {n}" if texts is None else texts[n]
        rows.append(
            {
                "prompt_id": f"p{prompt}",
                "response_id": f"p{prompt}/{k}",
                "messages": [{"role": "user", "content": f"question {prompt}"}],
                "text": text,
                "token_ids": [ord(c) for c in text] + [2],
                "num_tokens": len(text) + 1,
                "finish_reason": "stop",
            }
        )
    stage = open_stage(run, "generate", "test", {}, {})
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=RESPONSES))
    responses = stage.commit()
    stage = open_stage(run, "scores", "test", {}, {"responses": responses})
    columns = {"prompt_id": [r["prompt_id"] for r in rows], "response_id": [r["response_id"] for r in rows]}
    columns |= {"reward": reward_N, "safety": safety_N, "logp.reference": -np.arange(len(rows), dtype=float)}
    write_part(stage.path, 0, pa.table(columns))
    scorers = {name: {"kind": "callable", "sign": 1} for name in ("reward", "safety")}
    scores = stage.commit(info={"scorers": scorers})
    solution = solve_dual(
        reward_N, safety_N[:, None], columns["prompt_id"], beta=BETA, constraints=[Margin("safety", margin=margin)]
    )
    stage = open_stage(run, "solve", "test", {}, {"scores": scores})
    write_json(stage.path / SOLUTION, solution.to_dict())
    return responses, scores, stage.commit([SOLUTION]), solution


def labelled(run: Path, inputs: Any, unit: dict[str, float] | None = None, **options: Any) -> Any:
    config = validate_config(
        {
            "prompts": {"source": "x.jsonl"},
            "reference": {"model": "x"},
            "reward": {"kind": "callable", "function": "a:b"},
            "constraints": {"safety": {"scorer": {"kind": "callable", "function": "a:b"}, "margin": 0.1}},
            "beta": BETA,
            "label": options,
        }
    )
    work = Workspace(run, config)
    try:
        return label(work, *inputs[:3], reward="reward", beta=BETA, unit=unit)
    finally:
        work.close()


@pytest.fixture
def random_scores() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return tuple(generator.normal(size=(2, NUM_PROMPTS * NUM_RESPONSES)))


ALL = comb(NUM_RESPONSES, 2)
"""Drawn pairs, as many as there are: each is an example of its own."""


def test_soft_labels_are_the_combined_scores_of_a_prompt(tmp_path, random_scores) -> None:
    reward_N, safety_N = random_scores
    *inputs, solution = tables(tmp_path, reward_N, safety_N)
    artifact = labelled(tmp_path, inputs)
    assert artifact.info["loss"] == "pairwise"
    assert solution.lam["safety"] > 0
    combined_PK = (reward_N + solution.lam["safety"] * safety_N).reshape(NUM_PROMPTS, NUM_RESPONSES)
    rows = artifact.table.to_pylist()
    assert [row["example_id"] for row in rows] == [f"p{i}" for i in range(NUM_PROMPTS)]
    for row, combined_K in zip(rows, combined_PK, strict=True):
        np.testing.assert_allclose(row["scores"], combined_K, rtol=1e-12)
        np.testing.assert_allclose(row["target"], combined_K - combined_K.max(), atol=1e-6)


def test_soft_labels_of_pairs_are_the_sigmoid_of_the_combined_gap(tmp_path, random_scores) -> None:
    reward_N, safety_N = random_scores
    *inputs, solution = tables(tmp_path, reward_N, safety_N)
    table = labelled(tmp_path, inputs, pairs_per_prompt=ALL).table
    combined = reward_N + solution.lam["safety"] * safety_N
    assert table.num_rows == NUM_PROMPTS * ALL
    for row in table.to_pylist():
        left, right = row["example_id"].split("|")
        prompt, k = left.split("/")
        a, b = int(prompt[1:]) * NUM_RESPONSES + int(k), int(prompt[1:]) * NUM_RESPONSES + int(right)
        assert row["scores"] == pytest.approx([combined[a], combined[b]], abs=1e-12)
        p = 1 / (1 + np.exp(combined[b] - combined[a]))
        assert row["target"] == pytest.approx([p, 1 - p], abs=1e-12)
        assert row["logp_ref"] == [-a, -b]
        assert row["texts"] == [f"answer {a}", f"answer {b}"]
        assert row["response_ids"] == [f"{prompt}/{k}", f"{prompt}/{right}"]
        assert row["weight"] == 1.0


def test_sampled_labels_are_draws_of_the_soft_ones(tmp_path, random_scores) -> None:
    *inputs, _ = tables(tmp_path, *random_scores)
    soft, hard = (labelled(tmp_path, inputs, pairs_per_prompt=ALL), labelled(tmp_path, inputs, labels="sampled"))
    assert soft.info["loss"] == hard.info["loss"] == "sigmoid"
    p, draw = (np.array(artifact.table.column("target").to_pylist())[:, 0] for artifact in (soft, hard))
    assert set(draw) == {0.0, 1.0}
    assert abs((draw - p).mean()) < 4 * np.sqrt((p * (1 - p)).mean() / len(p))
    assert np.corrcoef(p, draw)[0, 1] > 0.2
    assert labelled(tmp_path, inputs, labels="sampled").digest == labelled(tmp_path, inputs, labels="sampled").digest


def test_some_pairs_per_prompt_are_distinct_and_repeatable(tmp_path, random_scores) -> None:
    *inputs, _ = tables(tmp_path, *random_scores)
    table = labelled(tmp_path, inputs, pairs_per_prompt=3).table
    assert set(Counter(table.column("prompt_id").to_pylist()).values()) == {3}
    assert len(set(table.column("example_id").to_pylist())) == 3 * NUM_PROMPTS
    again = labelled(tmp_path / "again", tables(tmp_path / "again", *random_scores), pairs_per_prompt=3).table
    assert again.equals(table)


def test_validation_pairs_are_split_by_prompt(tmp_path, random_scores) -> None:
    *inputs, _ = tables(tmp_path, *random_scores)
    rows = labelled(tmp_path, inputs, validation_fraction=0.3, pairs_per_prompt=ALL).table.to_pylist()
    splits: dict[str, set] = {}
    for row in rows:
        splits.setdefault(row["prompt_id"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    held = sum(found == {"validation"} for found in splits.values())
    assert 4 <= held <= 20  # 12 expected of 40


def test_f18_empty_and_equal_responses_are_set_aside_and_listed_and_ties_counted(tmp_path, random_scores) -> None:
    reward_N, safety_N = (scores.copy() for scores in random_scores)
    texts = [f"answer {n}" for n in range(len(reward_N))]
    texts[0], texts[6], texts[7] = "  ", "twin", "twin"
    reward_N[11], safety_N[11] = reward_N[10], safety_N[10]
    *inputs, _ = tables(tmp_path, reward_N, safety_N, texts)
    artifact = labelled(tmp_path, inputs, pairs_per_prompt=ALL)
    counts = artifact.info["counts"]
    assert (counts["empty response"], counts["equal responses"], counts["tie"]) == (4, 1, 1)
    assert counts["examples"] == NUM_PROMPTS * ALL - 5
    listed = json.loads((artifact.path / NOTED).read_text())
    assert {entry["example_id"] for entry in listed if entry["reason"] == "equal responses"} == {"p1/1|2"}
    assert [(entry["example_id"], entry["kept"]) for entry in listed if entry["reason"] == "tie"] == [("p2/0|1", True)]
    assert {entry["example_id"] for entry in listed if entry["reason"] == "empty response"} == {
        f"p0/0|{k}" for k in (1, 2, 3, 4)
    }


def test_f20_prompt_with_one_response_has_no_pair_and_is_counted(tmp_path, random_scores) -> None:
    """As quarantine leaves it: all but one response of the second prompt have no score."""
    responses, scores, solution, _ = tables(tmp_path, *random_scores)
    left_out = {f"p1/{k}": "why" for k in range(1, NUM_RESPONSES)}
    stage = open_stage(tmp_path, "scores", "fewer", {}, {"responses": responses})
    write_part(stage.path, 0, without(scores.table, left_out))
    fewer = stage.commit(info={"scorers": scores.info["scorers"], "quarantined": left_out})
    for options, per_prompt in (({}, 1), ({"pairs_per_prompt": ALL}, ALL)):
        artifact = labelled(tmp_path, (responses, fewer, solution), **options)
        assert artifact.info["counts"]["less than two responses"] == 1
        assert artifact.info["counts"]["examples"] == (NUM_PROMPTS - 1) * per_prompt
        assert {"example_id": "p1", "reason": "less than two responses", "kept": False} in artifact.read_json(NOTED)


def test_f19_constant_scores_are_no_preference_signal(tmp_path) -> None:
    constant = np.ones(NUM_PROMPTS * NUM_RESPONSES)
    *inputs, _ = tables(tmp_path, constant, constant, margin=-0.1)
    with pytest.raises(DataError, match="no preference signal: the scores of every example are equal"):
        labelled(tmp_path, inputs)
    assert not list(tmp_path.glob("label-*/part-*"))


def test_no_pair_left_is_an_error(tmp_path, random_scores) -> None:
    *inputs, _ = tables(tmp_path, *random_scores, texts=["" for _ in random_scores[0]])
    reasons = r"\(200 empty response, 40 less than two responses\)"
    with pytest.raises(DataError, match=rf"no example is left to train on {reasons}. Bring more data"):
        labelled(tmp_path, inputs)


def test_regression_targets_are_the_scores(tmp_path, random_scores) -> None:
    *inputs, _ = tables(tmp_path, *random_scores)
    artifact = labelled(tmp_path, inputs, labels="regression")
    assert artifact.info["loss"] == "regression"
    assert all(row["target"] == row["scores"] for row in artifact.table.to_pylist())


def test_listwise_targets_are_the_softmax_of_a_prompts_scores(tmp_path, random_scores) -> None:
    reward_N, safety_N = random_scores
    *inputs, solution = tables(tmp_path, 1000 * reward_N, safety_N)
    artifact = labelled(tmp_path, inputs, labels="listwise")
    assert artifact.info["loss"] == "listwise"
    rows = artifact.table.to_pylist()
    assert [row["example_id"] for row in rows] == [f"p{i}" for i in range(NUM_PROMPTS)]
    combined = (1000 * reward_N + solution.lam["safety"] * safety_N).reshape(NUM_PROMPTS, NUM_RESPONSES)
    for i, row in enumerate(rows):
        assert row["response_ids"] == [f"p{i}/{k}" for k in range(NUM_RESPONSES)]
        np.testing.assert_allclose(row["scores"], combined[i], rtol=1e-12)
        np.testing.assert_allclose(row["target"], softmax(combined[i] / BETA), atol=1e-12)
        assert row["logp_ref"] == [-float(i * NUM_RESPONSES + k) for k in range(NUM_RESPONSES)]


def test_lists_hold_distinct_responses_that_are_not_empty(tmp_path, random_scores) -> None:
    texts = [f"answer {n}" for n in range(NUM_PROMPTS * NUM_RESPONSES)]
    texts[0], texts[6], texts[7] = "  ", "twin", "twin"
    texts[10:15] = ["same"] * 5
    *inputs, _ = tables(tmp_path, *random_scores, texts)
    artifact = labelled(tmp_path, inputs, labels="listwise")
    sizes = {row["example_id"]: len(row["texts"]) for row in artifact.table.to_pylist()}
    assert (sizes["p0"], sizes["p1"], sizes["p3"]) == (4, 4, 5)
    assert "p2" not in sizes
    assert all(sum(row["target"]) == pytest.approx(1) for row in artifact.table.to_pylist())
    counts = artifact.info["counts"]
    assert (counts["empty response"], counts["equal responses"], counts["less than two responses"]) == (1, 5, 1)


def test_lambda_may_be_given_by_name(tmp_path, random_scores) -> None:
    reward_N, safety_N = random_scores
    responses, scores, _, _ = tables(tmp_path, reward_N, safety_N)
    rows = labelled(tmp_path, (responses, scores, {"safety": 2.0})).table.to_pylist()
    combined = reward_N + 2 * safety_N
    assert rows[0]["scores"] == pytest.approx(combined[:NUM_RESPONSES].tolist())
    other = labelled(tmp_path, (responses, scores, {"safety": 3.0})).table.to_pylist()
    assert other[0]["scores"] != rows[0]["scores"]


def test_published_labels_leave_beta_out(tmp_path: Path) -> None:
    """PeCAN in the paper's code labels ln π_r/π_ref + λ ln π_g/π_ref: each score divided by the β in it."""
    rng = np.random.default_rng(7)
    reward_N, safety_N = rng.normal(size=(2, NUM_PROMPTS * NUM_RESPONSES))
    inputs = tables(tmp_path, reward_N, safety_N)
    lam = inputs[3].lam["safety"]
    assert lam > 0
    rows = labelled(tmp_path, inputs, unit={"reward": 0.1, "safety": 0.5}, pairs_per_prompt=ALL).table.to_pylist()
    score_N = reward_N / 0.1 + lam * safety_N / 0.5
    for row in rows[:50]:
        a, b = (int(i.split("/")[0][1:]) * NUM_RESPONSES + int(i.split("/")[1]) for i in row["response_ids"])
        assert row["target"][0] == pytest.approx(1 / (1 + np.exp(score_N[b] - score_N[a])), rel=1e-12)
    usual = labelled(tmp_path, inputs, pairs_per_prompt=ALL)
    assert usual.table.column("target").to_pylist() != [row["target"] for row in rows]


def test_published_labels_are_of_pecan_only(tmp_path: Path) -> None:
    inputs = tables(tmp_path, *np.random.default_rng(8).normal(size=(2, NUM_PROMPTS * NUM_RESPONSES)))
    with pytest.raises(ConfigError, match=r"method mocan does not use label.as_published; leave out"):
        labelled(tmp_path, inputs, as_published=True)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"sign": -1}, "sign 1, here -1"),
        ({"weights": "of another revision"}, "weights None, here 'of another revision'"),
    ],
)
def test_f22_lambda_of_another_scorer_is_refused(tmp_path: Path, random_scores, other: dict, told: str) -> None:
    responses, scores, solution, _ = tables(tmp_path, *random_scores)
    stage = open_stage(tmp_path, "scores", "flipped", {}, {"responses": responses})
    write_part(stage.path, 0, scores.table)
    scorers = scores.info["scorers"] | {"safety": scores.info["scorers"]["safety"] | other}
    flipped = stage.commit(info={"scorers": scorers})
    with pytest.raises(DataError) as refused:
        labelled(tmp_path, (responses, flipped, solution))
    assert str(refused.value) == (
        f"{flipped.path}, score 'safety': λ was solved on scores of another scorer ({told}). "
        "Score both with one model, or solve again."
    )
    assert not list(tmp_path.glob("label-*/MANIFEST.json"))


def test_lambda_of_the_same_scorer_under_another_path_is_taken(tmp_path: Path, random_scores) -> None:
    responses, scores, solution, _ = tables(tmp_path, *random_scores)
    stage = open_stage(tmp_path, "scores", "elsewhere", {}, {"responses": responses})
    write_part(stage.path, 0, scores.table)
    moved = {name: {**about, "model": "/elsewhere"} for name, about in scores.info["scorers"].items()}
    assert labelled(tmp_path, (responses, stage.commit(info={"scorers": moved}), solution)).num_rows > 0


@pytest.mark.parametrize("options", [{}, {"labels": "listwise"}, {"pairs_per_prompt": 2}])
def test_few_rows_at_a_time_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """The table made in batches is, byte for byte, the one made of all rows at once."""
    reward, safety = np.random.default_rng(0).normal(size=(2, NUM_PROMPTS * NUM_RESPONSES))
    inputs = tables(tmp_path / "run", reward, safety, [f"é{n // 2}" if n % 9 else "" for n in range(len(reward))])
    digests = []
    for prompts, rows in ((1024, 8192), (3, 7)):
        monkeypatch.setattr(examples, "PROMPTS_AT_A_TIME", prompts)
        monkeypatch.setattr(examples, "ROWS_AT_A_TIME", rows)
        artifact = labelled(tmp_path / "run", inputs, **options)
        digests.append([entry["sha256"] for entry in artifact.manifest["files"]])
        at_once = pa.Table.from_pylist(artifact.table.to_pylist(), schema=artifact.table.schema)
        write_part(tmp_path, 0, at_once)
        assert file_digest(tmp_path / "part-00000.arrow") == digests[-1][0]
        shutil.rmtree(artifact.path)
    assert digests[0] == digests[1]


def test_many_examples_are_written_in_parts_that_are_one_table(tmp_path, random_scores, monkeypatch) -> None:
    """A part is written as soon as it is full; rows, their order, splits and counts are those of one part."""
    inputs = tables(tmp_path / "run", *random_scores)
    whole = labelled(tmp_path / "run", inputs, pairs_per_prompt=ALL)
    table, info = whole.table.combine_chunks(), whole.info
    shutil.rmtree(whole.path)
    monkeypatch.setattr(examples, "ROWS_AT_A_TIME", 7)
    monkeypatch.setattr(examples, "PART_ROWS", 70)
    parts = labelled(tmp_path / "run", inputs, pairs_per_prompt=ALL)
    assert parts.path == whole.path, "the identity is of what the examples are, not of how many a file holds"
    assert [entry["rows"] for entry in parts.manifest["files"] if "rows" in entry] == [70] * 5 + [50]
    assert parts.table.combine_chunks().equals(table)
    assert parts.info == info


def test_rows_of_a_prompt_that_lie_apart_are_brought_together() -> None:
    ids = ["b", "a", "b", "c", "a", "b"]
    table = pa.table({"prompt_id": ids, "row": list(range(6))})
    groups = [[row["row"] for row in members] for members in examples.by_prompt(table)]
    assert groups == [[0, 2, 5], [1, 4], [3]]
