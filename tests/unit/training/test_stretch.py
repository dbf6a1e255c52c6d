"""θ_ref + α(θ − θ_ref): against a state dict stretched in memory, adapters by their scale, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM

from can_dist.errors import ConfigError, DataError
from can_dist.training.stretch import scale_adapter, stretch_policy

WORDS = ("tea", "lock", "bomb", "no", "yes")
TOKENS = torch.arange(8)[None]


@pytest.fixture
def ends(tmp_path: Path) -> tuple[Path, Path]:
    """A reference, and a policy whose every weight is off by a hundredth or so."""
    reference = make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    policy = tmp_path / "policy"
    shutil.copytree(reference, policy)
    random = torch.Generator().manual_seed(0)
    moved = {name: t + 0.01 * torch.randn(t.shape, generator=random) for name, t in state(reference).items()}
    save_file(moved, policy / "model.safetensors", metadata={"format": "pt"})
    return reference, policy


def state(policy: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(policy.glob("*.safetensors")) for name, t in load_file(file).items()}


@torch.no_grad()
def logits(model: Path | torch.nn.Module) -> torch.Tensor:
    module = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    return module.eval()(TOKENS).logits


@pytest.mark.parametrize("alpha", [0.4, 1.87, 5.0])
def test_stretched_policy_is_the_reference_plus_alpha_times_the_difference(
    ends: tuple[Path, Path], tmp_path: Path, alpha: float
) -> None:
    reference, policy = map(state, ends)
    found = state(stretch_policy(*ends, tmp_path / "out", alpha))
    assert found.keys() == policy.keys()
    for name, tensor in found.items():
        expected = reference[name].double() + alpha * (policy[name].double() - reference[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "out" / "config.json").read_text() == (ends[1] / "config.json").read_text()


@pytest.mark.parametrize(("alpha", "which"), [(1.0, 1), (0.0, 0)])
def test_ends_of_the_ray_are_policy_and_reference_to_the_bit(
    ends: tuple[Path, Path], tmp_path: Path, alpha: float, which: int
) -> None:
    found, expected = state(stretch_policy(*ends, tmp_path / "out", alpha)), state(ends[which])
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_reference_in_another_precision_is_rounded_to_the_policys_first(
    ends: tuple[Path, Path], tmp_path: Path
) -> None:
    """A bf16 training starts from the reference in bf16: what was not trained must not move at any strength."""
    reference, policy = ends
    moved = {name: tensor.bfloat16() for name, tensor in state(reference).items()}
    moved["model.norm.weight"] += 0.5
    save_file(moved, policy / "model.safetensors", metadata={"format": "pt"})
    found = state(stretch_policy(reference, policy, tmp_path / "out", 4.0))
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for name, tensor in found.items():
        expected = moved[name] if name != "model.norm.weight" else state(reference)[name].bfloat16() + 2.0
        assert torch.equal(tensor, expected), name


def test_adapter_of_a_strength_is_the_stretched_policy(tmp_path: Path) -> None:
    reference = make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    base = AutoModelForCausalLM.from_pretrained(reference)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], alpha_pattern={"down_proj": 6})
    model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(reference / name, tmp_path / "policy" / name)
    stretched = stretch_policy(reference, tmp_path / "policy", tmp_path / "whole", 2.5)
    scaled = scale_adapter(tmp_path / "adapter", tmp_path / "scaled", 2.5)
    base = AutoModelForCausalLM.from_pretrained(reference)
    with_adapter = logits(PeftModel.from_pretrained(base, scaled))
    torch.testing.assert_close(with_adapter, logits(stretched), rtol=1e-4, atol=1e-4)
    assert (with_adapter - logits(tmp_path / "policy")).abs().max() > 0.01


def test_adapter_that_is_not_linear_in_its_scale_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "use_dora": True, "lora_alpha": 4}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="an adapter of the kind DoRA, expected LORA"):
        scale_adapter(tmp_path / "adapter", tmp_path / "scaled", 2.0)
    assert not (tmp_path / "scaled").exists()


def test_policy_of_another_architecture_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_tiny_lm(tmp_path / "other", [*WORDS, "more"])
    with pytest.raises(DataError, match="tensors differ, so this policy is not the reference plus a difference"):
        stretch_policy(other, ends[1], tmp_path / "out", 2.0)
    assert not (tmp_path / "out").exists()


def test_quantised_reference_is_refused_in_words(ends: tuple[Path, Path], tmp_path: Path) -> None:
    path = ends[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"bits": 4}}))
    with pytest.raises(DataError, match="quantised weights can be neither added nor scaled"):
        stretch_policy(*ends, tmp_path / "out", 2.0)


def test_strength_beyond_the_range_of_the_dtype_is_refused(ends: tuple[Path, Path], tmp_path: Path) -> None:
    for end, value in zip(ends, (0.0, 60000.0), strict=True):
        tensors = {name: tensor.half() for name, tensor in state(end).items()}
        tensors["model.norm.weight"][0] = value
        save_file(tensors, end / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight leaves the range of F16 at strength 2\. Lower it"):
        stretch_policy(*ends, tmp_path / "out", 2.0)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_strength_that_is_no_number_is_refused(ends: tuple[Path, Path], tmp_path: Path, alpha: float) -> None:
    with pytest.raises(ConfigError, match="expected a finite number"):
        stretch_policy(*ends, tmp_path / "out", alpha)
