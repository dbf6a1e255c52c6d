"""θ_ref + Σ a_i (θ_i − θ_ref): against arithmetic in double precision, adapters as peft loads them, every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM

from can_dist.errors import ConfigError, DataError
from can_dist.training.mixture import mix_adapters, mix_policies

WORDS = ("tea", "lock", "bomb", "no", "yes")
COEFFICIENT = {"s": 1.7, "g": -0.6}


def state(policy: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(policy.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.fixture
def basis(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A reference, and two policies whose every weight is off by a hundredth or so."""
    reference = make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    policies = {}
    for seed, name in enumerate(COEFFICIENT):
        policies[name] = tmp_path / name
        shutil.copytree(reference, policies[name])
        random = torch.Generator().manual_seed(seed)
        moved = {key: t + 0.01 * torch.randn(t.shape, generator=random) for key, t in state(reference).items()}
        save_file(moved, policies[name] / "model.safetensors", metadata={"format": "pt"})
    return reference, policies


def test_mixed_weights_are_the_reference_plus_weighted_differences(
    basis: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    reference, policies = basis
    mixed = state(mix_policies(reference, policies, COEFFICIENT, tmp_path / "out"))
    start = state(reference)
    assert mixed.keys() == start.keys()
    for name, tensor in mixed.items():
        moves = [a * (state(policies[key])[name].double() - start[name].double()) for key, a in COEFFICIENT.items()]
        torch.testing.assert_close(tensor.double(), start[name].double() + sum(moves), rtol=1e-6, atol=1e-7)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size > 0
    assert not list(tmp_path.glob(".tmp-*"))


def test_reference_in_another_precision_is_rounded_to_the_policies_first(
    basis: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    """What was not trained must not move by any mixture."""
    reference, policies = basis
    rounded = {name: tensor.bfloat16() for name, tensor in state(reference).items()}
    for step, policy in zip((0.5, 0.25), policies.values(), strict=True):
        moved = {name: tensor + step if name == "model.norm.weight" else tensor for name, tensor in rounded.items()}
        save_file(moved, policy / "model.safetensors", metadata={"format": "pt"})
    mixed = state(mix_policies(reference, policies, {"s": 3.0, "g": -2.0}, tmp_path / "out"))
    for name, tensor in mixed.items():
        assert tensor.dtype == torch.bfloat16
        expected = rounded[name] + 1.0 if name == "model.norm.weight" else rounded[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("other", ["shape", "tokenizer", "precision"])
def test_policies_that_are_not_alike_are_refused(
    basis: tuple[Path, dict[str, Path]], tmp_path: Path, other: str
) -> None:
    reference, policies = basis
    tensors, path = state(policies["g"]), policies["g"] / "model.safetensors"
    if other == "shape":
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].contiguous()
    elif other == "precision":
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    if other == "tokenizer":
        shutil.copyfile(
            make_tiny_lm(tmp_path / "turned", WORDS[::-1], seed=1) / "tokenizer.json", policies["g"] / "tokenizer.json"
        )
    with pytest.raises(DataError, match="tokenizer differ" if other == "tokenizer" else "tensors differ") as caught:
        mix_policies(reference, policies, COEFFICIENT, tmp_path / "out")
    assert str(policies["g"]) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("coefficient", "message"),
    [
        ({"s": 1.0}, "coefficients of s for policies s, g"),
        ({"s": 1.0, "g": float("nan")}, "coefficient of g = nan: expected a finite number"),
    ],
)
def test_coefficients_that_fit_no_mixture_are_refused(
    basis: tuple[Path, dict[str, Path]], tmp_path: Path, coefficient: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        mix_policies(*basis, coefficient, tmp_path / "out")


def test_weights_beyond_the_range_of_their_dtype_are_refused(
    basis: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    reference, policies = basis
    for policy in policies.values():
        tensors = {name: tensor.half() for name, tensor in state(policy).items()}
        tensors["model.norm.weight"][0] = 60000.0
        save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight leaves the range of F16 in the mixture s \+1, g \+1"):
        mix_policies(reference, policies, {"s": 1.0, "g": 1.0}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- adapters

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 2, "lora_alpha": 4},
    "patterns": {"r": 3, "lora_alpha": 5, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"layers.1.*q_proj": 7}},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
}


def adapter(tmp_path: Path, seed: int, **options: Any) -> Path:
    """Write an adapter of the reference with factors in double precision, as peft saves it."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], **options)).double()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / f"adapter{seed}")
    return tmp_path / f"adapter{seed}"


def products(tmp_path: Path, directory: Path) -> dict[str, torch.Tensor]:
    """What peft adds to the weight of each module."""
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "reference", dtype=torch.float64)
    model = PeftModel.from_pretrained(base, directory, autocast_adapter_dtype=False).double()
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(("first", "second"), [("plain", "plain"), ("plain", "patterns"), ("patterns", "rslora")])
def test_product_of_mixed_adapters_is_the_sum_of_their_products(tmp_path: Path, first: str, second: str) -> None:
    make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    adapters = {"s": adapter(tmp_path, 1, **KINDS[first]), "g": adapter(tmp_path, 2, **KINDS[second])}
    mixed = products(tmp_path, mix_adapters(adapters, COEFFICIENT, tmp_path / "mixed"))
    parts = {name: products(tmp_path, path) for name, path in adapters.items()}
    assert mixed.keys() == parts["s"].keys()
    assert len(mixed) == 4
    for module, product in mixed.items():
        expected = sum(a * parts[name][module] for name, a in COEFFICIENT.items())
        torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-13)
    config = json.loads((tmp_path / "mixed" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == KINDS[first]["r"] + KINDS[second]["r"]
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "an adapter of the kind DoRA, expected LORA"),
        ({"bias": "lora_only"}, "bias is 'lora_only', so the adapter is not a product"),
        ({"lora_bias": True}, "lora_bias is True, so the adapter is not a product"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], so the adapter is not a product"),
    ],
)
def test_adapters_that_are_more_than_products_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    adapters = {"s": adapter(tmp_path, 1, r=2), "g": adapter(tmp_path, 2, r=2)}
    path = adapters["g"] / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(DataError, match=message):
        mix_adapters(adapters, COEFFICIENT, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_adapters_of_other_modules_or_with_other_tensors_are_refused(tmp_path: Path) -> None:
    make_tiny_lm(tmp_path / "reference", WORDS, seed=1)
    adapters = {"s": adapter(tmp_path, 1, r=2), "g": adapter(tmp_path, 2, r=2)}
    file = adapters["g"] / "adapter_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}  # mapped from the file that is written next
    save_file({name: t for name, t in tensors.items() if "layers.1" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="adapters differ, so their products cannot be added up"):
        mix_adapters(adapters, COEFFICIENT, tmp_path / "mixed")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"base_model\.model\.lm_head\.weight is no factor of a low-rank product"):
        mix_adapters(adapters, COEFFICIENT, tmp_path / "mixed")
