"""A base in 4 bits: what is refused before any work, and what its log-probabilities are known by.

tests/integration/test_qlora.py trains on one, where bitsandbytes is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_tiny_lm

from can_dist.config import Config, Model, validate_config
from can_dist.doctor.preflight import preflight
from can_dist.errors import ConfigError
from can_dist.modeling import quantized
from can_dist.outcomes.export import adapters_text
from can_dist.run import Run
from can_dist.scoring.kinds import scorer_identity
from can_dist.scoring.protocol import LogProb
from can_dist.tables.artifacts import open_stage
from can_dist.training.plan import make_plan

CALLABLE = {"kind": "callable", "function": "scorers:num_words"}


def configuration(root: Path, **changes: Any) -> Config:
    (root / "prompts.jsonl").write_text('{"prompt": "w1 w2"}\n' * 3, encoding="utf-8")
    base: dict[str, Any] = {
        "prompts": {"source": str(root / "prompts.jsonl"), "num_validation": 0},
        "strength": 1,
        "reference": {"model": str(make_tiny_lm(root / "lm", ["w1", "w2"]))},
        "reward": CALLABLE,
        "constraints": {"safety": {"scorer": CALLABLE, "margin": 0.1}},
        "train": {"lora": {"quantize": "nf4"}},
    }
    return validate_config(base | changes)


def test_missing_package_names_its_extra_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.lora\.quantize: .*'bitsandbytes'.* pip install 'can-dist\[qlora\]'"):
        preflight(configuration(tmp_path))


def test_log_ratios_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: object())
    ratio = {"kind": "log_ratio", "beta": 0.5, "model": {"model": str(tmp_path / "lm")}}
    config = configuration(tmp_path, method="pecan", reward=ratio, constraints={"calm": {"scorer": ratio, "margin": 1}})
    with pytest.raises(
        ConfigError, match=r"quantize: not offered with log-ratios \(reward, constraints\.calm\.scorer\)"
    ):
        preflight(config)


@pytest.mark.parametrize("method", ["sacpo", "p_sacpo", "caid"])
def test_methods_that_train_on_from_a_policy_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda name: object())
    label = {} if method == "caid" else {"preferences": {"source": str(tmp_path / "prompts.jsonl")}}
    with pytest.raises(
        ConfigError, match=rf"quantize: method {method} trains on from a policy that it trained\. Rounded"
    ):
        preflight(configuration(tmp_path, method=method, label=label))


def test_training_from_a_trained_policy_is_refused(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    policy = open_stage(tmp_path / "run", "train", "policy", {}, {}).commit()
    preferences = open_stage(tmp_path / "run", "label", "preferences", {}, {}).commit()
    with Run(tmp_path / "run", config) as run:
        for policies in ({"reference": policy}, {"reference": config.reference, "start": policy}):
            with pytest.raises(ConfigError, match=r"quantize: this training starts from a trained policy\. Rounded"):
                run.train(preferences=preferences, beta=0.1, **policies)


def test_plan_says_that_it_does_not_count_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plan: train\.lora\.quantize is not counted"):
        make_plan(configuration(tmp_path), 10**9)


def test_reference_log_probs_are_of_the_weights_that_are_trained(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    with Run(tmp_path / "run", config) as run:
        assert run._log_prob(config.reference) == LogProb(model=config.reference, quantize="nf4")
        policy = open_stage(tmp_path / "run", "train", "policy", {}, {}).commit()
        assert run._log_prob(policy).quantize is None, "a trained policy is read as it was written"
    whole = configuration(tmp_path, train={"lora": {}})
    with Run(tmp_path / "run", whole) as run:
        assert run._log_prob(whole.reference).quantize is None


def test_log_probs_of_four_bits_are_another_column_and_the_others_keep_their_name(tmp_path: Path) -> None:
    model = Model(model=str(make_tiny_lm(tmp_path / "lm", ["w1"])))
    whole = scorer_identity(LogProb(model=model), "fp32")
    assert "quantize" not in whole, "finished scores of earlier versions are found again"
    assert scorer_identity(LogProb(model=model, quantize="nf4"), "fp32") == whole | {"quantize": "nf4"}


def test_model_card_says_which_base_the_adapters_fit() -> None:
    assert adapters_text({"r": 8, "quantize": "nf4"}).startswith(
        "LoRA r = 8, trained on (and fitting) the base in 4 bits"
    )
    assert adapters_text({"r": 8}) == adapters_text({"r": 8, "quantize": None}) == "LoRA r = 8, merged"
    assert adapters_text(None) == "none, every weight"
