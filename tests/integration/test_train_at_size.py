"""Training what is not a small dense model: experts, adapters in half precision, a model of a billion parameters."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import train_world as tw
from plain_losses import HEADS, LORA, SMALL, pair_losses
from tiny import make_tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

pytestmark = pytest.mark.slow

EXPERTS = [
    MixtralConfig(**SMALL, **HEADS, num_key_value_heads=2, num_local_experts=4),
    Qwen3MoeConfig(
        **SMALL,
        **HEADS,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
]


def world_of(root: Path, config: PreTrainedConfig) -> tw.World:
    """A random model of an architecture, with the tests' tokenizer and pairs."""
    directory = root / "reference"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    make_tiny_tokenizer(directory, tw.WORDS)
    return tw.World(root, directory, tw.fill_reference(tw.make_rows(6, 2), directory, torch.float32))


ATTENTION = LORA | {"target_modules": ("q_proj", "k_proj", "v_proj", "o_proj")}
EVERYWHERE = LORA | {"dropout": 0.0}  # on the experts too, which are one fused parameter


@pytest.mark.parametrize("lora", [None, ATTENTION, EVERYWHERE], ids=["full", "attention", "everywhere"])
@pytest.mark.parametrize("config", EXPERTS, ids=lambda config: config.model_type)
def test_mixture_of_experts_trains_and_loads(tmp_path: Path, config: PreTrainedConfig, lora: dict | None) -> None:
    world = world_of(tmp_path, config)
    spec = world.spec("policy", batch_size=3, lora=lora, learning_rate=2e-2)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    losses = tw.read_metrics(spec)
    assert losses[1] == pytest.approx(math.log(2), abs=1e-5)
    policy, reference = (tw.load_whole(path) for path in (tw.policy_dir(spec), world.reference))
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, reference.get_parameter(n))}
    assert any("q_proj" in name for name in changed)
    if lora is None:
        assert any("experts" in name for name in changed), "the experts are trained"
    with torch.no_grad():
        expected = pair_losses(policy, world.rows[6:]).mean().item()
    assert tw.read_metrics(spec, "eval_loss")[4] == pytest.approx(expected, rel=1e-5)


def test_adapters_in_bf16_with_checkpointing_take_steps(tmp_path: Path) -> None:
    """Where PEFT and ZeRO-3 break: float32 adapters on bf16 weights, and non-reentrant checkpointing of frozen ones."""
    world = tw.make_world(tmp_path)
    spec = world.spec("policy", precision="bf16", lora=LORA, activation_checkpointing=True, max_steps=3)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    assert all(math.isfinite(loss) for loss in tw.read_metrics(spec).values())
    assert all(norm > 0 for step, norm in tw.read_metrics(spec, "grad_norm").items() if step > 0)


def test_a_billion_parameters_take_steps_on_a_cpu_with_offload(tmp_path: Path) -> None:
    """TinyLlama's shape, random weights, adapters: parameters and optimizer states wait in host memory.

    All weights would need 22 GB here (float32 weights, gradients and AdamW's three copies), which this machine has not.
    The export, which merges the adapters into a second copy, is left out; small models show it.
    """
    free = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "Available" in line)
    if free < 12 * 2**20:
        pytest.skip(f"{free / 2**20:.1f} GiB of memory are free; 12 are wanted to make, load and train 1.1 G weights")
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tw.END,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    reference = tmp_path / "reference"
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 1_100_048_384
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(reference)
    del model
    make_tiny_tokenizer(reference, tw.WORDS)
    rows = tw.make_rows(4, 0)
    for row in rows:
        row["logp_ref"] = [0.0, 0.0]
    start = tmp_path / "start"  # not the reference: the check of the first loss needs its log-probabilities
    start.symlink_to(reference)
    world = tw.World(tmp_path, reference, rows)
    offload = str(tw.ROOT / "ds_configs" / "zero3_offload.json")
    spec = world.spec(
        "policy", start=start, ds_config=offload, lora=LORA, batch_size=2, max_steps=2, activation_checkpointing=True
    )
    file = tmp_path / "peak"
    outcome = tw.launch(spec, 1, hook=f"memory:{file}", timeout=560)
    assert outcome.codes == [0], outcome.output
    shutil.rmtree(reference)  # 4.4 GB that pytest would keep
    losses = tw.read_metrics(spec)
    assert len(losses) >= 2
    assert all(math.isfinite(loss) for loss in losses.values())
    peak = json.loads(Path(f"{file}0").read_text())["peak"] / 1e9
    print(f"1.1 G parameters, LoRA, one CPU rank with offload: peak {peak:.1f} GB, {outcome.seconds:.0f} s in all")
    assert 4 < peak < 12, "the weights alone are 4.4 GB; a second copy of them, or states of all, would show"
