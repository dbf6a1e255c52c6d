"""The weighted mean of two policies: against a state dict merged in memory, its memory, and every refusal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from can_dist.errors import ConfigError, DataError
from can_dist.training import merge
from can_dist.training.merge import merge_policies, merged_tensor

WORDS = ("tea", "lock", "bomb", "no", "yes")


@pytest.fixture
def policies(tmp_path: Path) -> tuple[Path, Path]:
    return make_tiny_lm(tmp_path / "helpful", WORDS, seed=1), make_tiny_lm(tmp_path / "safe", WORDS, seed=2)


def state(policy: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(policy.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


# ----------------------------------------------------------------------------------------------------------- result


@pytest.mark.parametrize("shard_mb", [4000, 1])
def test_merged_policy_loads_and_has_the_logits_of_the_merged_state(
    policies: tuple[Path, Path], tmp_path: Path, shard_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shard_mb == 1:  # the tiny model has less than 1 MB
        write_shards = merge.write_shards
        monkeypatch.setattr(merge, "write_shards", lambda out, sizes, _, read: write_shards(out, sizes, 1, read))
    out = merge_policies(*policies, tmp_path / "merged", 0.25, shard_mb)
    a, b = state(policies[0]), state(policies[1])
    expected = AutoModelForCausalLM.from_pretrained(policies[0])
    expected.load_state_dict({name: 0.25 * a[name] + 0.75 * b[name] for name in a})
    found, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=0, atol=0)
    assert (
        AutoTokenizer.from_pretrained(out)("tea lock").input_ids
        == AutoTokenizer.from_pretrained(policies[0])("tea lock").input_ids
    )
    assert (out / "model.safetensors.index.json").exists() is (shard_mb == 1)
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize(("q", "which"), [(1.0, 0), (0.0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends_are_the_inputs_to_the_bit(
    policies: tuple[Path, Path], tmp_path: Path, q: float, which: int, dtype: torch.dtype
) -> None:
    for policy in policies:
        tensors = {name: t.to(dtype) for name, t in state(policy).items()}
        tensors["model.norm.weight"][:2] = torch.tensor([-0.0, 65504.0])
        save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
    out = merge_policies(*policies, tmp_path / "merged", q)
    assert bits(state(out)) == bits(state(policies[which]))


def test_arithmetic_is_wider_than_bfloat16() -> None:
    a, b = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)
    assert merged_tensor(a, b, 0.4).dtype == torch.bfloat16
    assert merged_tensor(a, b, 0.4).item() == 1.0078125  # 1.0047 rounds up; in bf16 0.4 + 0.6047 gives 1.0
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1000, generator=generator).bfloat16() for _ in range(2))
    exact = (0.3 * x.double() + 0.7 * y.double()).bfloat16()
    assert (merged_tensor(x, y, 0.3) == exact).float().mean() > 0.998


def test_fp64_stays_exact() -> None:
    a, b = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0 + 2**-40], dtype=torch.float64)
    assert merged_tensor(a, b, 0.5).item() == 1.0 + 2**-41


def test_sharded_inputs_merge_with_whole_ones(policies: tuple[Path, Path], tmp_path: Path) -> None:
    whole = merge_policies(*policies, tmp_path / "whole", 0.5)
    model = AutoModelForCausalLM.from_pretrained(policies[1])
    shutil.rmtree(policies[1])
    shutil.copytree(policies[0], policies[1])
    (policies[1] / "model.safetensors").unlink()
    model.save_pretrained(policies[1], max_shard_size="20KB")
    assert len(list(policies[1].glob("*.safetensors"))) > 2
    assert bits(state(merge_policies(*policies, tmp_path / "sharded", 0.5))) == bits(state(whole))


def test_tied_weight_is_written_once_even_where_one_policy_stores_it_twice(tmp_path: Path) -> None:
    policies = []
    for seed in (1, 2):
        policy = make_tiny_lm(tmp_path / f"p{seed}", WORDS, seed=seed)
        edit_json(policy / "config.json", tie_word_embeddings=True)
        tensors = state(policy)
        del tensors["lm_head.weight"]
        save_file(tensors, policy / "model.safetensors", metadata={"format": "pt"})
        policies.append(policy)
    tensors = state(policies[1])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, policies[1] / "model.safetensors", metadata={"format": "pt"})
    out = merge_policies(policies[0], policies[1], tmp_path / "merged", 0.5)
    assert "lm_head.weight" not in state(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    tensors["lm_head.weight"] += 1
    save_file(tensors, policies[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied by config\.json and"
    ):
        merge_policies(policies[0], policies[1], tmp_path / "other", 0.5)


def test_peak_memory_is_a_shard_not_a_model(tmp_path: Path) -> None:
    """Two models of 202 MB each; the peak of the whole merge, in a process of its own, above what it had before."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1376, num_hidden_layers=16, num_attention_heads=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    small = [make_tiny_lm(tmp_path / f"small{seed}", WORDS, seed=seed) for seed in (1, 2)]
    for name in ("a", "b"):
        shutil.copytree(small[0], tmp_path / name)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    model_mb = (tmp_path / "a" / "model.safetensors").stat().st_size / 1e6
    code = f"""
import re
from pathlib import Path
from can_dist.training.merge import merge_policies

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

root = Path({str(tmp_path)!r})
merge_policies(root / "small1", root / "small2", root / "warm-up", 0.5)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
merge_policies(root / "a", root / "b", root / "merged", 0.5, max_shard_size_mb=20)
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert model_mb > 190
    assert float(done.stdout) < 80, f"peak {done.stdout} MB above the start for models of {model_mb:.0f} MB"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) >= 10


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("q", [float("inf"), float("nan")])
def test_q_that_is_no_number_is_refused(policies: tuple[Path, Path], tmp_path: Path, q: float) -> None:
    with pytest.raises(ConfigError, match=rf"q = {q}: expected a finite number, the weight of the first policy\."):
        merge_policies(*policies, tmp_path / "merged", q)


def test_existing_or_homeless_result_is_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"safe: already exists\. Give a new directory inside an existing one\."):
        merge_policies(*policies, policies[1], 0.5)
    with pytest.raises(ConfigError, match=r"has no parent directory\. Give a new directory"):
        merge_policies(*policies, tmp_path / "no" / "where", 0.5)


def test_pickled_weights_are_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    (policies[1] / "model.safetensors").rename(policies[1] / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"safe: only pickled weights \(pytorch_model\.bin\), which are not loaded\."):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_adapter_is_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    (policies[1] / "config.json").rename(policies[1] / "adapter_config.json")
    with pytest.raises(
        DataError, match=r"safe': an adapter .* not a model\. It is an adapter: merge it into its base model first,"
    ):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_different_keys_shapes_and_dtypes_are_shown_side_by_side(policies: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = state(policies[1])
    tensors["model.extra"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    tensors["model.embed_tokens.weight"] = torch.zeros(3, 32)
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.zeros(1)
    save_file(tensors, policies[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="tensors differ, so the policies have no weighted mean") as caught:
        merge_policies(*policies, tmp_path / "merged", 0.5)
    text = str(caught.value)
    assert "\n  lm_head.weight: F32 [10, 32] | BF16 [10, 32]\n" in text
    assert "\n  model.embed_tokens.weight: F32 [10, 32] | F32 [3, 32]\n" in text
    assert "\n  model.extra: absent | F32 [2]\n" in text
    assert "\n  and 1 more\n" in text
    assert not (tmp_path / "merged").exists()


def test_different_architectures_are_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    edit_json(policies[1] / "config.json", num_attention_heads=4, transformers_version="1")
    with pytest.raises(
        DataError, match=r"config\.json differ, .*:\n  num_attention_heads: 2 \| 4\n  Merge two policies"
    ):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_different_tokenizers_are_refused_and_padding_is_not_a_difference(
    policies: tuple[Path, Path], tmp_path: Path
) -> None:
    edit_json(policies[1] / "tokenizer.json", padding={"strategy": "BatchLongest"})
    assert merge_policies(*policies, tmp_path / "merged", 0.5).is_dir()
    tokenizer = json.loads((policies[1] / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["tea"], vocabulary["lock"] = vocabulary["lock"], vocabulary["tea"]
    (policies[1] / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match=r"tokenizer differ, .*\n  tokenizer\.json: model\.vocab\.lock: 6 \| 5\n"):
        merge_policies(*policies, tmp_path / "other", 0.5)


def test_different_chat_templates_are_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    (policies[1] / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(DataError, match=r"tokenizer differ, .*\n  chat_template\.jinja: sha256"):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_quantised_policies_are_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    for policy in policies:
        edit_json(policy / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(
        DataError, match=r"quantised weights can be neither added nor scaled\. Give policies in bf16, fp16 or fp32"
    ):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_damaged_files_are_named(policies: tuple[Path, Path], tmp_path: Path) -> None:
    weights = policies[1] / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(DataError, match=r"model\.safetensors: not a readable safetensors file .*Copy it again\."):
        merge_policies(*policies, tmp_path / "merged", 0.5)
    weights.write_bytes(content)
    (policies[1] / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json: not JSON .*Copy it again\."):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_missing_shard_is_named(policies: tuple[Path, Path], tmp_path: Path) -> None:
    index = {
        "metadata": {},
        "weight_map": {"model.norm.weight": "model.safetensors", "model.lost": "model-2.safetensors"},
    }
    (policies[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        DataError, match=r"index\.json lists 1 file\(s\) that are not there, the first is model-2\.safetensors\. Copy"
    ):
        merge_policies(*policies, tmp_path / "merged", 0.5)


def test_nan_is_refused_and_nothing_is_left(policies: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = state(policies[1])
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, policies[1] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"model\.norm\.weight holds NaN\. One of the policies is broken\."):
        merge_policies(*policies, tmp_path / "merged", 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["helpful", "safe"]


def test_tensors_that_are_no_part_of_the_model_are_refused(policies: tuple[Path, Path], tmp_path: Path) -> None:
    for policy in policies:
        save_file(
            state(policy) | {"value_head": torch.zeros(2)}, policy / "model.safetensors", metadata={"format": "pt"}
        )
    with pytest.raises(DataError, match=r"helpful: the exported policy is not whole: value_head: not part"):
        merge_policies(*policies, tmp_path / "merged", 0.5)
    assert not (tmp_path / "merged").exists()
