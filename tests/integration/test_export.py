"""What leaves a run, in the hands of the tools it is for: transformers, peft, huggingface_hub, TRL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import serving_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from scipy.special import expit
from tiny import make_tiny_lm

from can_dist.cli import cli
from can_dist.config import validate_config
from can_dist.errors import ConfigError, DataError, EnvironmentProblem
from can_dist.outcomes.export import export_policy, export_preferences, find_policy, push
from can_dist.pipeline import run_pipeline
from can_dist.reporting.model_card import model_card
from can_dist.tables.artifacts import Artifact, open_stage, read_part, write_part
from can_dist.tables.schemas import PREFERENCES
from can_dist.training.export import copy_in_shards

WORDS = [f"w{i}" for i in range(12)]
SECRET = "hf_" + "Zx9" * 12


def can_dist(*arguments: str) -> Result:
    return CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """MoCAN with LoRA on a tiny model, evaluated: real Ray, two ranks of ZeRO-3."""
    folder = tmp_path_factory.mktemp("export")
    make_tiny_lm(folder / "lm", WORDS)
    rows = [json.dumps({"prompt": f"{a} {b}"}) + "\n" for a in WORDS[:4] for b in WORDS[8:]]
    (folder / "prompts.jsonl").write_text("".join(rows))
    config = validate_config(
        {
            "beta": 0.5,
            "prompts": {"source": str(folder / "prompts.jsonl"), "num_test": 4, "num_validation": 0},
            "strength": 1,
            "reference": {"model": str(folder / "lm")},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"calm": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "generate": {"num_responses": 4, "max_new_tokens": 6},
            "evaluate": {"num_responses": 2, "num_samples": 1},
            "train": {"learning_rate": 3e-2, "batch_size": 8, "max_steps": 4, "lora": {"r": 4}},
        }
    )
    run_pipeline(folder / "run", config)
    yield folder / "run"
    import ray

    ray.shutdown()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(5, 12)[None]).logits


@pytest.mark.slow
def test_policy_and_adapter_are_the_same_function_in_plain_transformers_and_peft(run: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for what in ("policy", "adapter"):
        done = can_dist("export", what, run, "--out", tmp_path / what)
        assert done.exit_code == 0, done.output
        assert done.output.splitlines()[-1] == str(tmp_path / what)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(run.parent / "lm", dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - logits(reference)).abs().max() > 1e-3, "training changed something"
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    sizes = {
        what: sum(p.stat().st_size for p in (tmp_path / what).glob("*.safetensors")) for what in ("policy", "adapter")
    }
    assert sizes["adapter"] < sizes["policy"] / 2


@pytest.mark.slow
def test_model_card_says_method_multiplier_margin_data_and_evaluation(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(export_policy(run, tmp_path / "out", adapter=False) / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None, "a local path is no name on the hub"
    assert "mocan" in card.data.tags
    report = json.loads(next(run.glob("evaluate-*/report.json")).read_text())
    row = report["constraints"][0]
    realised = row["realised"]
    line = f"| calm | +0.1 | {row['lam']:.4g} | {row['predicted']['mean']:+.3g} | {realised['mean']:+.3g} ["
    assert line in card.text
    assert f"] | {row['verdict']} |" in card.text
    for said in (
        "MoCAN",
        "β = 0.5",
        "prompts.jsonl, 12 for training",
        "LoRA r = 4, merged",
        "4 steps",
        "num_calm",
        "chat template",
    ):
        assert said in card.text, said
    train = next(run.glob("train-*"))
    unevaluated = export_policy(train, tmp_path / "again", adapter=False) / "README.md"
    assert line in unevaluated.read_text(), "the evaluation of an artifact is found"
    assert "peft" in (export_policy(run, tmp_path / "adapter", adapter=True) / "README.md").read_text()


@pytest.mark.slow
def test_what_cannot_be_exported_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"already exists\. Give a new directory"):
        export_policy(run, tmp_path, adapter=False)
    with pytest.raises(DataError, match="an artifact of the stage solve, which holds no policy"):
        export_policy(next(run.glob("solve-*")), tmp_path / "out", adapter=False)
    with pytest.raises(DataError, match="expected one policy, found none"):
        export_policy(tmp_path, tmp_path / "out", adapter=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trl_trains_on_exported_preferences(run: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    out = tmp_path / "preferences.parquet"
    done = can_dist("export", "preferences", run, "--out", out)
    assert done.exit_code == 0, done.output
    data = load_dataset("parquet", data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert f"{len(data)} rows" in done.output
    (table,) = run.glob("label-*/part-00000.arrow")
    ours = [row for row in read_part(table).to_pylist() if row["split"] == "train"]
    decided = {row["example_id"]: row for row in ours if row["target"][0] != row["target"][1]}
    assert {row["example_id"] for row in data} == set(decided)
    for row in data:
        source = decided[row["example_id"]]
        best = source["target"].index(max(source["target"]))
        assert row["chosen"] == [{"role": "assistant", "content": source["texts"][best]}]
        assert row["p_chosen"] == max(source["target"]) > 0.5
        assert row["score_chosen"] > row["score_rejected"]
    trainer = trl.DPOTrainer(
        model=str(run.parent / "lm"),
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
            report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, bf16=False, gradient_checkpointing=False,
        ),
        train_dataset=data,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 3
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------- without a run


def preferences(run: Path, loss: str, targets: list[list[float]], scores: bool = True) -> Artifact:
    stage = open_stage(run, "label", "preferences", {"loss": loss}, {})
    rows = [
        {
            "example_id": f"e{n}", "prompt_id": f"p{n}", "split": "train",
            "messages": [{"role": "user", "content": f"question {n}"}], "response_ids": ["a", "b"],
            "texts": ["one", "two"], "token_ids": [[1], [2]], "logp_ref": [0.0, 0.0],
            "scores": [2.0, 1.0] if scores else [], "target": target, "weight": 1.0,
        }
        for n, target in enumerate(targets)
    ]  # fmt: skip
    write_part(stage.path, 0, pa.Table.from_pylist(rows, schema=PREFERENCES))
    return stage.commit([], info={"loss": loss, "splits": {"train": len(rows)}})


@pytest.mark.parametrize(
    ("loss", "targets", "rows"),
    [
        ("offset", [[1.0, 0.0], [0.0, 3.5]], [("one", 0.0), ("two", 2.5)]),
        ("sigmoid", [[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]], [("one", 0.75), ("two", 1.0)]),
        ("regression", [[0.25, 0.75], [3.0, 1.0]], [("two", None), ("one", None)]),
    ],
)
def test_pairs_become_chosen_and_rejected(
    tmp_path: Path, loss: str, targets: list[list[float]], rows: list[tuple[str, float | None]]
) -> None:
    preferences(tmp_path, loss, targets, scores=False)
    counts = export_preferences(tmp_path, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["chosen"][0]["content"], row.get("p_chosen", row.get("offset"))) for row in found] == rows
    assert counts == {"rows": len(rows), "undecided": len(targets) - len(rows)}


def test_kto_examples_become_unpaired(tmp_path: Path) -> None:
    preferences(tmp_path, "kto", [[1.0, 0.0], [-1.0, 0.0]])
    export_preferences(tmp_path, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["label"], row["weight"]) for row in found] == [(True, 1.0), (False, 1.0)]
    assert found[0]["completion"] == [{"role": "assistant", "content": "one"}]


@pytest.mark.parametrize(
    ("loss", "targets", "p"),
    [
        ("pairwise", [0.0, -1.0, -3.0], expit),
        ("regression", [5.0, 4.0, 2.0], None),
        ("listwise", [0.7, 0.25, 0.05], None),
    ],
)
def test_lists_become_all_their_pairs(tmp_path: Path, loss: str, targets: list[float], p: Any) -> None:
    stage = open_stage(tmp_path, "label", "preferences", {"loss": loss}, {})
    row = {
        "example_id": "p0", "prompt_id": "p0", "split": "train", "messages": [{"role": "user", "content": "question"}],
        "response_ids": ["p0/0", "p0/1", "p0/2"], "texts": ["best", "good", "bad"], "token_ids": [[1], [2], [3]],
        "logp_ref": [0.0] * 3, "scores": [5.0, 4.0, 2.0], "target": targets, "weight": 1.0,
    }  # fmt: skip
    write_part(stage.path, 0, pa.Table.from_pylist([row], schema=PREFERENCES))
    stage.commit([], info={"loss": loss, "splits": {"train": 1}})
    assert export_preferences(tmp_path, tmp_path / "out.parquet") == {"rows": 3, "undecided": 0}
    written = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in written] == [
        ("best", "good"), ("best", "bad"), ("good", "bad"),
    ]  # fmt: skip
    assert [pair["example_id"] for pair in written] == ["p0/0|1", "p0/0|2", "p0/1|2"]
    assert [(pair["score_chosen"], pair["score_rejected"]) for pair in written] == [(5.0, 4.0), (5.0, 2.0), (4.0, 2.0)]
    if p is not None:
        assert [pair["p_chosen"] for pair in written] == pytest.approx([p(1.0), p(3.0), p(2.0)])


def test_advantages_are_no_preferences(tmp_path: Path) -> None:
    preferences(tmp_path, "clipped", [[0.75, -0.75]])
    with pytest.raises(DataError, match=r"holds advantages of a policy gradient .* which are no preferences"):
        export_preferences(tmp_path, tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()


def test_two_tables_are_told_apart_by_their_path(tmp_path: Path) -> None:
    one = preferences(tmp_path, "sigmoid", [[0.75, 0.25]])
    preferences(tmp_path, "regression", [[2.0, 1.0]])
    with pytest.raises(DataError, match=r"expected one table of preferences, found label-\w+, label-\w+"):
        export_preferences(tmp_path, tmp_path / "out.parquet")
    assert export_preferences(one.path, tmp_path / "out.parquet")["rows"] == 1


def test_two_evaluations_of_a_policy_are_told_apart_by_their_path(tmp_path: Path) -> None:
    """Which of them the card would show must not follow from their names' hashes."""
    policy = open_stage(tmp_path, "train", "policy", {}, {}).commit([])
    one, two = (open_stage(tmp_path, "evaluate", "report", {"n": n}, {"policy": policy}).commit([]) for n in range(2))
    with pytest.raises(DataError, match=r"evaluated more than once \(evaluate-\w+, evaluate-\w+\)\. Give the path"):
        find_policy(tmp_path)
    with pytest.raises(DataError, match="evaluated more than once"):
        find_policy(policy.path)
    for evaluation in (one, two):
        found, shown = find_policy(evaluation.path)
        assert (found.path, shown and shown.path) == (policy.path, evaluation.path)


def test_preferences_go_to_parquet_only(tmp_path: Path) -> None:
    done = can_dist("export", "preferences", tmp_path, "--out", tmp_path / "out.csv")
    assert isinstance(done.exception, ConfigError)
    assert "expected a name that ends in .parquet" in str(done.exception)


def test_weights_in_other_shards_are_the_same_weights(tmp_path: Path) -> None:
    policy, out = tmp_path / "policy", tmp_path / "out"
    policy.mkdir()
    out.mkdir()
    (policy / "config.json").write_text("{}")
    weights = {f"w{n}": torch.full((250,), float(n)) for n in range(6)}  # 1000 bytes each
    save_file({name: weights[name] for name in ("w0", "w1", "w2", "w3")}, policy / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in ("w4", "w5")}, policy / "model-00002-of-00002.safetensors")
    copy_in_shards(policy, out, 2500)
    files = sorted(out.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 6000
    for name, weight in weights.items():
        assert torch.equal(load_file(out / index["weight_map"][name])[name], weight)


def test_card_of_an_unevaluated_policy_claims_nothing_and_names_its_base() -> None:
    facts = {
        "title": "A policy", "method": "", "base": "my-org/my-model", "is_hub_model": True, "beta": 0.1,
        "lam": {"safety": 0.5}, "made_from": [("scorer", "a|b\n# heading")],
    }  # fmt: skip
    card = ModelCard(model_card(facts, None, adapter=True))
    assert card.data.base_model == "my-org/my-model"
    assert card.data.library_name == "peft"
    assert "This policy was not evaluated" in card.text
    assert "λ* = safety 0.5 at β = 0.1." in card.text
    assert "| scorer | a\\|b # heading |" in card.text
    assert "AutoPeftModelForCausalLM" in card.text


def test_names_in_a_card_are_text_only() -> None:
    hostile = "<img src=x onerror=a()> [here](http://evil) ![x](y) `code`"
    facts = {
        "title": hostile, "method": "", "base": hostile, "is_hub_model": False, "beta": 0.1, "lam": None,
        "made_from": [(hostile, hostile)], "expected": hostile,
    }  # fmt: skip
    card = model_card(facts, None, adapter=False)
    assert "<img" not in card
    assert "[here](" not in card
    assert "![x](" not in card
    assert card.count(r"\[here\](http://evil)") == 5


def test_card_shows_what_a_threshold_is_judged_by() -> None:
    """Its verdict goes by the policy's own mean, whose interval is another one than that of the paired gain."""
    row = {
        "name": "calm", "margin": 0.5, "threshold": -1.0, "lam": 0.25, "predicted": {"mean": 0.6},
        "realised": {"mean": 0.7, "low": 0.6, "high": 0.8}, "policy_mean": {"mean": -0.8, "low": -1.2, "high": -0.4},
        "verdict": "undecided", "prompts_to_decide": 340,
    }  # fmt: skip
    report = {
        "constraints": [row], "reward": {"predicted": None, "realised": row["realised"]}, "num_test_prompts": 9,
        "kl": {"realised": {"mean": 0.1}}, "warnings": [], "unpredicted": None,
    }  # fmt: skip
    facts = {
        "title": "A", "method": "MoCAN", "base": "", "is_hub_model": False, "beta": 0.1, "lam": None, "made_from": [],
    }  # fmt: skip
    asked, found = "+0.5 (mean at least -1)", "+0.7 [+0.6, +0.8]; mean -0.8 [-1.2, -0.4]"
    verdict = "undecided (about 340 held-out prompts would decide 4 times in 5, were this the true mean)"
    line = f"| calm | {asked} | 0.25 | +0.6 | {found} | {verdict} |"
    assert line in model_card(facts, report, adapter=False)


@pytest.mark.parametrize(("token", "said"), [(None, "no login for the hub is found"), (SECRET, "did not take it")])
def test_a_push_without_login_or_network_is_refused_and_names_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, said: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(EnvironmentProblem, match=said) as refused:
        push(tmp_path, "someone/something")
    assert SECRET not in str(refused.value)


PUSH = (
    "import sys, pathlib; from can_dist.outcomes.export import push; "
    "print(push(pathlib.Path(sys.argv[1]), sys.argv[2]))"
)


def pushed(endpoint: str, directory: Path, repository: str) -> subprocess.CompletedProcess[str]:
    """Push in a process of its own: huggingface_hub reads the hub's address when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": SECRET, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", PUSH, str(directory), repository]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    make_tiny_lm(tmp_path / "policy", WORDS)
    (tmp_path / "policy" / "README.md").write_text("---\nlibrary_name: transformers\n---\nA policy.\n")
    return tmp_path / "policy"


def test_push_uploads_every_file_to_a_private_repository(exported: Path) -> None:
    with serving_hub() as hub:
        done = pushed(hub.url, exported, "someone/safer")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"{hub.url}/someone/safer"
    assert hub.private == {"someone/safer": True}
    assert hub.logins == {f"Bearer {SECRET}"}
    files = {file.name: file.read_bytes() for file in exported.iterdir()}
    assert hub.files == files
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys()
    assert SECRET not in done.stdout + done.stderr


def test_push_to_a_public_repository_uploads_nothing(exported: Path) -> None:
    with serving_hub() as hub:
        hub.private["someone/known"] = False
        done = pushed(hub.url, exported, "someone/known")
    assert "EnvironmentProblem: --push someone/known: this repository is there and is public. Nothing" in done.stderr
    assert hub.files == {}


def test_push_says_when_the_hub_cannot_be_reached_or_the_name_is_none(exported: Path) -> None:
    with serving_hub() as hub:
        closed = hub.url
    done = pushed(closed, exported, "someone/safer")
    assert "EnvironmentProblem: --push someone/safer: the hub did not take it ([Errno 111]" in done.stderr
    done = pushed(closed, exported, "a/b/c")
    assert "ConfigError: --push a/b/c: expected a name such as user/name. Repo id must be in the form" in done.stderr
