"""Adapters on a base in 4 bits: real bitsandbytes kernels, two gloo ranks, ZeRO-3 and ZeRO-2 (extra [qlora])."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import ray
import torch
import train_world as tw
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from can_dist import Run, mocan
from can_dist.config import Model, validate_config
from can_dist.errors import ConfigError
from can_dist.modeling.loading import load_causal_lm
from can_dist.modeling.quantized import whole_weight
from can_dist.tables.artifacts import load_artifact

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'can-dist[qlora]'")
pytestmark = pytest.mark.slow

LORA = {"r": 2, "alpha": 8, "dropout": 0.0}
# QLoRA, appendix E
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip
OPTIONS = {"learning_rate": 2e-2, "checkpoint_every": 2}


def make_reference(directory: Path, width: int, inner: int) -> Path:
    """The tiny Llama of the other tests with another width; its tokenizer too."""
    tw.make_tiny_lm(directory, tw.WORDS)
    config = AutoConfig.from_pretrained(directory)
    config.hidden_size, config.intermediate_size = width, inner
    config.head_dim = width // config.num_attention_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def dequantized(reference: Path, out: Path) -> Path:
    """The model whose weights are the numbers that a 4-bit base computes with: the oracle, in plain layers."""
    model = AutoModelForCausalLM.from_pretrained(reference)
    base = dict(load_causal_lm(Model(model=str(reference)), "fp32", "nf4").named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = whole_weight(base[name]).clone()
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(reference).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[tw.World, tw.World]:
    """A world whose pairs have ln π_ref of the 4-bit base, and that of the oracle."""
    root = tmp_path_factory.mktemp("qlora")
    reference = make_reference(root / "reference", 64, 128)
    oracle = dequantized(reference, root / "oracle")
    rows = tw.fill_reference(tw.make_rows(), oracle)
    return tw.World(root, reference, rows), tw.World(root, oracle, rows)


def test_base_is_rounded_to_four_bits(worlds: tuple[tw.World, tw.World]) -> None:
    whole, rounded = (tw.load_whole(world.reference).state_dict() for world in worlds)
    changed = {name for name in whole if not torch.equal(whole[name], rounded[name])}
    assert changed == {name for name in whole if "_proj" in name}
    for name in changed:
        blocks, values = whole[name].view(-1, 64), rounded[name].view(-1, 64)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        nearest = NF4[((blocks / scale)[..., None] - NF4).abs().argmin(dim=-1)] * scale
        torch.testing.assert_close(values, nearest, atol=1e-6, rtol=1e-5)


def test_width_that_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    narrow = tw.make_tiny_lm(tmp_path / "narrow", tw.WORDS)
    with pytest.raises(
        ConfigError, match=r"train\.lora\.quantize: .*q_proj .* has rows of 32 weights, which blocks of 64"
    ):
        load_causal_lm(Model(model=str(narrow)), "fp32", "nf4")


@pytest.mark.parametrize("file", ["zero3_cpu.json", "zero2_lora.json"])
def test_adapters_on_a_base_in_4_bits_train_as_on_its_numbers_in_full(
    worlds: tuple[tw.World, tw.World], file: str
) -> None:
    """Losses, gradient norms and the policy are those of the dequantized oracle; killed and resumed too."""
    world, oracle = worlds
    options = {**OPTIONS, "ds_config": str(tw.ROOT / "ds_configs" / file)}
    four_bit = {**options, "lora": {**LORA, "quantize": "nf4"}}
    spec, killed = world.spec(f"q-{file}", **four_bit), world.spec(f"q-killed-{file}", **four_bit)
    expected = oracle.spec(f"full-{file}", **options, lora=LORA)
    for one in (spec, expected):
        outcome = tw.launch(one)
        assert outcome.codes == [0, 0], outcome.output
    losses = tw.read_metrics(spec)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "adapters start as the identity on the 4-bit base"
    assert losses[max(losses)] < math.log(2) - 0.02
    for key in ("loss", "grad_norm", "eval_loss"):
        assert tw.read_metrics(spec, key) == pytest.approx(tw.read_metrics(expected, key), rel=1e-4)
    assert tw.launch(killed, hook="kill:1:4").codes[1] == -9
    outcome = tw.launch(killed)
    assert outcome.codes == [0, 0], outcome.output
    assert tw.policy_bytes(killed) == tw.policy_bytes(spec)

    policy, plain = (tw.load_whole(tw.policy_dir(one)) for one in (spec, expected))
    assert getattr(policy.config, "quantization_config", None) is None
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], weight, atol=2e-5, rtol=1e-3)
    # the adapter belongs to the 4-bit base
    base = AutoModelForCausalLM.from_pretrained(oracle.reference).eval()
    ids = torch.tensor([[tw.USER, 7, 8, tw.ASSISTANT, 9, tw.END]])
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(base, tw.policy_dir(spec).parent / "adapter").eval()(ids).logits
        torch.testing.assert_close(loaded, policy(ids).logits, atol=1e-5, rtol=1e-4)


def test_log_probs_of_the_whole_reference_are_found_out_before_the_first_step(
    worlds: tuple[tw.World, tw.World],
) -> None:
    world, _ = worlds
    rows = tw.fill_reference(tw.make_rows(), world.reference)
    outcome = tw.launch(world.spec("wrong", rows=rows, lora={**LORA, "quantize": "nf4"}, **OPTIONS))
    assert outcome.codes == [5, 5], outcome.output
    assert "the stored reference log-probabilities are not those of this model" in outcome.output


def test_files_of_the_policy_are_no_larger_than_asked(worlds: tuple[tw.World, tw.World]) -> None:
    world, _ = worlds
    wide = make_reference(world.root / "wide", 64, 4096)
    its = tw.World(world.root, wide, tw.fill_reference(tw.make_rows(6, 2), dequantized(wide, world.root / "wide-full")))
    spec = its.spec("wide-policy", lora={**LORA, "quantize": "nf4"}, max_shard_size_mb=1, num_epochs=1)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    files = sorted(tw.policy_dir(spec).glob("*.safetensors"))
    sizes = json.loads((tw.policy_dir(spec) / "model.safetensors.index.json").read_text())
    assert sum(file.stat().st_size for file in files) >= sizes["metadata"]["total_size"]
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        assert file.stat().st_size < 1.1e6 or len(names) == 1, names


def test_whole_run_scores_and_trains_on_the_same_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray actors compute ln π_ref in 4 bits; the ranks check before their first step that it is theirs."""
    make_reference(tmp_path / "lm", 64, 128)
    prompts = [{"prompt": f"w{a} w{b}"} for a in range(4) for b in range(8, 12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    monkeypatch.chdir(tmp_path)
    config = validate_config(
        {
            "beta": 0.5,
            "prompts": {"source": "prompts.jsonl", "num_test": 4, "num_validation": 0},
            "strength": 1,
            "reference": {"model": "lm"},
            "reward": {"kind": "callable", "function": "scorers:num_words"},
            "constraints": {"safety": {"scorer": {"kind": "callable", "function": "scorers:num_calm"}, "margin": 0.1}},
            "generate": {"num_responses": 4, "max_new_tokens": 6},
            "train": {"learning_rate": 3e-3, "batch_size": 8, "max_steps": 2, "lora": {**LORA, "quantize": "nf4"}},
        }
    )
    try:
        with Run("run", config) as run:
            asked = {name: getattr(config, name) for name in ("reference", "reward", "constraints", "beta")}
            policy = mocan(run, prompts=run.prompts(), **asked)
    finally:
        ray.shutdown()
    assert (policy.path / "policy" / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((policy.path / "policy" / "config.json").read_text())
    oracle = tw.load_whole(dequantized(tmp_path / "lm", tmp_path / "oracle"))
    (preferences,) = tmp_path.glob("run/label-*")
    for row in load_artifact(preferences).table.to_pylist()[:5]:
        for tokens, logp in zip(row["token_ids"], row["logp_ref"], strict=True):
            with torch.no_grad():
                assert tw.logp_one(oracle, tw.prompt_tokens(row), tokens).item() == pytest.approx(logp, rel=1e-4)
