"""PeCAN with real models, Ray and two DeepSpeed ranks: where the answer is known, and from people's labels alone."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import enumerable_world as world
import numpy as np
import pytest
from enumerated_run import BETA, LISTS, EnumeratedRun, align, configure, enumerate_responses
from people_run import WORDS, can_dist, user_folder
from ruamel.yaml import YAML
from tiny import make_tiny_lm

from can_dist.algorithms.pecan import pecan
from can_dist.config import Config, validate_config
from can_dist.stages.solve import load_solution
from can_dist.stages.train import POLICY
from can_dist.tables.artifacts import Artifact, load_artifact

# ------------------------------------------------------------------------------------------- where π* is enumerable

BETA_OF = {"reward": BETA, "harmless": 0.2}
MARGIN = 0.6


def aligned_policies(run_dir: Path, config: Config, reference: Path) -> dict[str, Path]:
    """Train π_r and π_g, each with its own β, on the exact scores: what people's labels would teach without end."""
    run_dir.mkdir()
    _, responses = enumerate_responses(run_dir, reference)
    with EnumeratedRun(run_dir, config) as run:
        scores = run.score(responses, config.reward, config.constraints, config.reference)
        return {
            name: run.train(config.reference, run.label(responses, scores, {}, beta, score=name), beta).path / POLICY
            for name, beta in BETA_OF.items()
        }


@pytest.mark.slow
def test_pecan_from_trained_policies_is_the_closed_form(tmp_path: Path) -> None:
    """Three trainings by the real trainer; the last one, on log-ratios alone, reaches π*."""
    reference = world.make_reference(tmp_path / "reference")
    scored = configure(
        reference, {"harmless": MARGIN}, {"learning_rate": 5e-3, "max_steps": 200, **LISTS}, "regression"
    )
    policies = aligned_policies(tmp_path / "aligning", scored, reference)

    raw = json.loads(scored.model_dump_json())
    scorers = {
        name: {"kind": "log_ratio", "beta": beta, "model": {"model": str(policies[name]), "template": "{prompt}"}}
        for name, beta in BETA_OF.items()
    }
    raw |= {
        "method": "pecan",
        "reward": scorers["reward"],
        "constraints": {"harmless": {"scorer": scorers["harmless"], "margin": MARGIN}},
        "label": {"labels": "soft", "validation_fraction": 0.0},
    }
    raw["train"]["max_steps"] = 300
    config = validate_config(raw)
    trained_PK, found = align(tmp_path / "pecan", config, pecan)
    ref_PK = world.probabilities(reference)
    lam, optimum_PK = world.optimal_policy(ref_PK, [world.HARMLESS_PK], [MARGIN], BETA)
    divergence, gain = world.kl(trained_PK, optimum_PK), world.gain(trained_PK, ref_PK, world.HARMLESS_PK)
    print(f"lam {found['harmless']:.6f}, exactly {lam[0]:.6f}; KL to the optimum {divergence:.2e}; gain {gain:.4f}")
    assert found["harmless"] == pytest.approx(lam[0], rel=0.01)
    assert divergence <= 0.01
    assert gain == pytest.approx(MARGIN, rel=0.02)


# -------------------------------------------------------------------------------------- from people's labels alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return user_folder(tmp_path_factory.mktemp("people"))


def artifacts(run: Path, stage: str) -> list[Artifact]:
    return [load_artifact(path.parent) for path in sorted(run.glob(f"{stage}-*/MANIFEST.json"))]


def response_logp(model_dir: Path, row: dict[str, Any]) -> float:
    """ln π(y|x) of one row by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_dir), AutoModelForCausalLM.from_pretrained(model_dir)
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logp_TV = model(torch.tensor([prompt + row["token_ids"]])).logits[0].log_softmax(dim=-1)
    return sum(logp_TV[len(prompt) - 1 + t, token].item() for t, token in enumerate(row["token_ids"]))


@pytest.mark.slow
def test_pecan_from_a_preference_file_to_a_report(folder: Path) -> None:
    """Two DPOs on people's labels, a calibration, the dual on log-ratios, one more DPO, the evaluation."""
    done = can_dist(folder, "run", "my.yaml", "--run", "runs/pecan")
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "pecan"
    assert len(artifacts(run, "train")) == 3
    (calibration,) = artifacts(run, "calibrate")
    assert (calibration.path / "reliability.svg").is_file()
    assert calibration.info["scale"] > 0
    assert f"safety times a = {calibration.info['scale']:.4g} ± " in done.stderr
    (solution,) = artifacts(run, "solve")
    attainable = load_solution(solution).feasibility["attainable"]["safety"]
    nat = 0.1 * calibration.info["scale"]
    assert (
        f"safety: margin 0.1 is {0.1 / nat:.4g} nats of ln π/π_ref, at most {attainable:.4g} or "
        f"{attainable / nat:.4g} nats attainable (one nat is {nat:.4g} of the score)"
    ) in done.stderr

    report = json.loads((folder / done.stdout.strip() / "report.json").read_text())
    assert report["title"].startswith("PeCAN")
    assert report["constraints"][0]["lam"] > 0
    assert report["training"]["loss"][0][1] == pytest.approx(np.log(2), abs=1e-5)
    assert report["training"]["loss"][-1][1] < 0.692
    scores = solution.input("scores")
    scorers = scores.info["scorers"]
    assert scorers["reward"].items() >= {"kind": "log_ratio", "beta": 0.2, "scale": 1.0, "scale_se": None}.items()
    assert scorers["safety"]["scale"] == calibration.info["scale"]
    assert scorers["safety"]["scale_se"] == calibration.info["scale_se"]
    assert scorers["reward"]["reference"] == scorers["safety"]["reference"] == scorers["logp.reference"]["weights"]
    responses = scores.input("responses").table.to_pylist()
    for name, unit in (("reward", 0.2), ("safety", nat)):
        policy = scores.input(name).input("training").path / POLICY
        for row, value in list(zip(responses, scores.table.column(name).to_pylist(), strict=True))[::40]:
            expected = unit * (response_logp(policy, row) - response_logp(folder / "lm", row))
            assert value == pytest.approx(expected, abs=1e-4)
    verified = can_dist(folder, "verify", "runs/pecan")
    assert verified.returncode == 0, verified.stderr

    before = sorted(path.name for path in run.glob("*-*"))
    again = can_dist(folder, "run", "my.yaml", "--run", "runs/pecan")
    assert again.returncode == 0, again.stderr
    assert sorted(path.name for path in run.glob("*-*")) == before

    infeasible = can_dist(folder, "solve", "my.yaml", "--run", "runs/pecan", "--set", "constraints.safety.margin=40")
    assert infeasible.returncode == 4
    assert "safety: margin 40.00 requested, at most " in infeasible.stderr
    assert f"safety: margin 40 is {40 / nat:.4g} nats of ln π/π_ref, at most {attainable:.4g} or " in infeasible.stderr
    assert len(artifacts(run, "train")) == 3


def test_a_model_of_another_tokenizer_stops_before_anything_is_made(folder: Path) -> None:
    make_tiny_lm(folder / "other", [*WORDS, "w99"])
    given = [f"reward={json.dumps({'kind': 'log_ratio', 'beta': 0.1, 'model': {'model': 'other'}})}"]
    refused = can_dist(folder, "run", "my.yaml", "--run", "runs/other", "--set", *given)
    assert refused.returncode == 3, refused.stderr
    assert "model 'other': vocabulary: 'w99' is 17, in the reference's absent." in refused.stderr
    assert {path.name.split("-")[0] for path in (folder / "runs" / "other").glob("*-*")} <= {"prompts"}


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(2400)
def test_pecan_on_the_double_labels_of_pku_saferlhf(shared_data: Path, tmp_path: Path) -> None:
    """Real pairs, real text, a real small model: what holds whatever so little a model can learn from 400 pairs."""
    with gzip.open(shared_data / "preferences" / "pku_saferlhf_dual_500.jsonl.gz", "rb") as file:
        (tmp_path / "pairs.jsonl").write_bytes(file.read())
    config = {
        "method": "pecan",
        "beta": 0.1,
        "prompts": {"source": "pairs.jsonl", "num_train": 60, "num_test": 40, "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(shared_data / "models" / "stories3M-qa-sft")},
        "reward": {"kind": "log_ratio", "criterion": "helpful", "beta": 0.1},
        "constraints": {"safety": {"scorer": {"kind": "log_ratio", "criterion": "safe", "beta": 0.05}, "margin": 0.02}},
        "generate": {"num_responses": 8, "max_new_tokens": 24, "batch_prompts": 8},
        "label": {"preferences": {"source": "pairs.jsonl"}, "pairs_per_prompt": 8},
        "train": {"learning_rate": 5e-5, "warmup_steps": 5, "batch_size": 16},
        "evaluate": {"num_responses": 4},
    }
    with (tmp_path / "my.yaml").open("w") as file:
        YAML().dump(config, file)
    done = can_dist(tmp_path, "run", "my.yaml", "--run", "runs/pku", timeout=2000)
    assert done.returncode == 0, done.stderr
    assert re.search(r"safety: margin 0.02 is 0.4 nats of ln π/π_ref, at most \S+ or \S+ nats attainable", done.stderr)
    run = tmp_path / "runs" / "pku"
    (solution,) = artifacts(run, "solve")
    assert load_solution(solution).slack["safety"] >= -1e-6
    report = json.loads((tmp_path / done.stdout.strip() / "report.json").read_text())
    print(json.dumps({key: report[key] for key in ("constraints", "reward", "kl")}, indent=1))
    assert report["num_test_prompts"] == 40
    assert report["constraints"][0]["realised"]["mean"] > 0
    assert can_dist(tmp_path, "verify", "runs/pku").returncode == 0
