"""The plan's arithmetic against numbers made by hand, its budget, and the command as its users meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from can_dist.cli import plan as cli_plan
from can_dist.config import Config
from can_dist.config.sections import Train
from can_dist.errors import ConfigError, DataError
from can_dist.training import memory as m
from can_dist.training.deepspeed_config import build_ds_config
from can_dist.training.plan import MOST_COUNTED, rank_memory

SIZES = m.Parameters(trained=(1000, 10, 7), frozen=())
CONFIG = """\
prompts: {{source: THIS_FILE, num_test: 2, num_validation: 0}}
strength: 1
reference: {{model: {model}}}
reward: {{kind: callable, function: "builtins:len"}}
constraints: {{safety: {{scorer: {{kind: callable, function: "builtins:len"}}, margin: 1.0}}}}
generate: {{max_new_tokens: 500}}
train: {{tokens_per_pack: 128}}
""".replace("THIS_FILE", __file__)  # the plan looks whether the prompts exist, no more


def zero(num_ranks: int = 4, on_gpu: bool = True, precision: str = "bf16", **options: object) -> m.Zero:
    ds_config = build_ds_config({"zero_optimization": {"stage": 3, **options}}, Train(), precision)
    return m.Zero.of(ds_config, num_ranks=num_ranks, on_gpu=on_gpu, precision=precision)


def test_every_tensor_is_divided_and_padded_alone() -> None:
    assert m.share(SIZES.trained, 4) == 250 + 3 + 2


def test_bf16_states_are_eighteen_bytes_of_a_parameter() -> None:
    found = m.states(SIZES, zero()).device
    sizes = {name: found[name] // 255 for name in ("parameters", "master", "optimizer", "gradients")}
    assert sizes == {"parameters": 2, "master": 4, "optimizer": 8, "gradients": 4}


def test_adapters_alone_have_gradients_and_optimizer_states() -> None:
    found = m.states(m.Parameters(trained=(8,), frozen=(1000,)), zero()).device
    assert (found["parameters"], found["master"], found["optimizer"], found["gradients"]) == (504, 8, 16, 8)


def in_bf16(**options: object) -> m.Zero:
    """A user's file that lets gradients add up in bf16."""
    base = {"zero_optimization": {"stage": 3, **options}, "data_types": {"grad_accum_dtype": "bf16"}}
    return m.Zero.of(build_ds_config(base, Train(), "bf16"), num_ranks=4, on_gpu=True, precision="bf16")


def test_gradients_that_add_up_in_float32_take_more() -> None:
    assert m.gradients(SIZES, zero()) == 2 * m.gradients(SIZES, in_bf16())


def test_zero_2_is_not_counted() -> None:
    ds_config = build_ds_config({"zero_optimization": {"stage": 2}}, Train(lora={}), "bf16")
    with pytest.raises(ConfigError, match=r"plan: train.ds_config is for ZeRO-2; only ZeRO-3 is counted"):
        m.Zero.of(ds_config, num_ranks=4, on_gpu=True, precision="bf16")


def test_one_rank_gathers_nothing() -> None:
    assert m.live(SIZES, zero(num_ranks=1)) == m.gathered(SIZES, zero(num_ranks=1)) == 0


@pytest.mark.parametrize(("distance", "live"), [(10**9, 1017), (100, 50 + 1000), (0, 1000)])
def test_parameters_are_kept_for_half_the_reuse_distance(distance: int, live: int) -> None:
    options = {"stage3_max_reuse_distance": distance, "stage3_param_persistence_threshold": 0}
    assert m.live(SIZES, zero(**options)) == min(live, SIZES.total)


def test_small_parameters_persist() -> None:
    assert m.persistent(SIZES, zero(stage3_param_persistence_threshold=10)) == 17


def test_a_gpu_holds_the_whole_bucket_and_a_cpu_what_was_written() -> None:
    assert m.buckets(SIZES, in_bf16(reduce_bucket_size=5000)) == 2 * (5000 + 1017)
    # and this rank's quarter once more, as it is added up
    assert m.buckets(SIZES, zero(reduce_bucket_size=5000)) == 2 * (5000 + 1017) + 4 * 255
    assert m.buckets(SIZES, zero(reduce_bucket_size=5000, on_gpu=False, precision="fp32")) == 4 * 2 * 1017


def test_offload_moves_states_to_the_host() -> None:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    found = m.states(SIZES, zero(**offload))
    assert set(found.host) == {"parameters", "master", "optimizer", "gradients"}
    assert set(found.device) == {"buckets", "gathered"}
    assert m.states(SIZES, zero(**offload, on_gpu=False, precision="fp32")).host == {}  # one memory


def test_nvme_moves_states_to_the_disk_and_leaves_buffers() -> None:
    found = m.states(SIZES, zero(offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}))
    assert set(found.disk) == {"master", "optimizer"}
    assert found.host["swap_buffers"] == 4 * 255 * 4


def test_the_budget_lies_on_the_line() -> None:
    # 100 bytes and 2 per token; a tenth is kept free
    assert m.largest_budget(1000, {50: 200, 100: 300}, step=500) == 400
    assert m.largest_budget(100, {50: 200, 100: 300}, step=50) == 0
    assert m.largest_budget(1000, {50: 200, 100: 300}, step=901) == 0


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose model is a config.json and nothing else."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("plan")
    LlamaConfig(
        vocab_size=2000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(root / "lm")
    (root / "run.yaml").write_text(CONFIG.format(model=root / "lm"))
    return root / "run.yaml"


def plan(config: Path, *arguments: str) -> dict:
    done = CliRunner().invoke(
        cli_plan.plan, [str(config), "--json", "--memory", "1GB", *arguments], standalone_mode=False
    )
    assert done.exception is None, done.exception
    return json.loads(done.stdout)


def test_of_few_words_no_pack_of_millions_is_counted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from can_dist.training.activations import Pass, Shell

    counted = []

    def count(_: Shell, tokens: int, *__: Any, **___: Any) -> Pass:
        counted.append(tokens)
        return Pass(tokens, 8 * tokens, 10 * tokens)

    monkeypatch.setattr(Shell, "count", count)
    written = json.loads((config.parent / "lm" / "config.json").read_text())
    (config.parent / "few").mkdir()
    (config.parent / "few" / "config.json").write_text(json.dumps(written | {"vocab_size": 6}))
    planned = plan(config, "--shape", str(config.parent / "few" / "config.json"))
    assert max(counted) == MOST_COUNTED
    assert planned["largest_tokens_per_pack"] > 8 * MOST_COUNTED


def test_counts_are_exact_without_weights(config: Path) -> None:
    found = plan(config)
    layer = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32
    assert found["elements"] == found["trained_elements"] == 2 * 2000 * 32 + 2 * layer + 32
    assert found["pass_bytes"] > found["step_bytes"] > 0
    assert found["kept_bytes_per_token"] > found["other_kept_bytes_per_token"]  # the other: with checkpointing
    assert found["logits_bytes"] == 128 * 2000 * 4


def test_the_largest_pack_fits_and_a_larger_one_does_not(config: Path) -> None:
    memory = 200_000_000
    found = plan(config, "--memory", "200MB")
    largest = found["largest_tokens_per_pack"]
    assert largest > 128
    assert plan(config, "--set", f"train.tokens_per_pack={largest}")["pass_bytes"] <= 0.9 * memory
    assert plan(config, "--set", f"train.tokens_per_pack={largest * 11 // 10}")["pass_bytes"] > 0.9 * memory


def test_recomputing_every_second_layer_keeps_less_than_none_and_more_than_all(config: Path) -> None:
    kept = [
        plan(config, "--set", f"train.activation_checkpointing={every}")["kept_bytes"] for every in ("true", 2, "false")
    ]
    assert kept == sorted(set(kept))
    done = CliRunner().invoke(
        cli_plan.plan, [str(config), "--memory", "1GB", "--set", "train.activation_checkpointing=2"]
    )
    assert "activations with checkpointing (one layer in 2)" in done.output


def test_adapters_train_few_parameters_and_keep_activations(config: Path) -> None:
    found = plan(config, "--set", "train.lora={r: 2}")
    assert 0 < found["trained_elements"] < found["elements"] / 10


def no_product_of_groups(model: object) -> None:
    """What transformers says before torch 2.9; it computes one expert after the other then."""
    raise ImportError("grouped_mm requires PyTorch>=2.9.")


@pytest.mark.parametrize(("precision", "torch_has_it"), [("fp32", True), ("bf16", True), ("bf16", False)])
def test_experts_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, torch_has_it: bool
) -> None:
    from transformers import MixtralConfig, PreTrainedModel

    if not torch_has_it:
        monkeypatch.setattr(PreTrainedModel, "_grouped_mm_can_dispatch", no_product_of_groups)
    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4).save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tmp_path))
    found = plan(tmp_path / "run.yaml", "--set", f"precision={precision}")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 4 * 3 * 32 * 64 + 4 * 32 + 2 * 32
    assert found["elements"] == 2 * 2000 * 32 + 2 * layer + 32
    assert found["pass_bytes"] > found["step_bytes"] > 0


@pytest.mark.parametrize(
    ("kind", "why"),
    [("StableLmConfig", "its layers do not hand on the table of segments"), ("Gemma2Config", "softcap")],
)
def test_a_model_that_is_padded_is_not_counted(tmp_path: Path, kind: str, why: str) -> None:
    import transformers

    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    getattr(transformers, kind)(**sizes, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tmp_path))
    done = CliRunner().invoke(cli_plan.plan, [str(tmp_path / "run.yaml"), "--memory", "1GB"], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert f"takes no segments ({why}), so it is trained in padded batches" in str(done.exception)


def test_the_table_of_memory_ends_in_a_verdict_and_the_work_follows(config: Path) -> None:
    done = CliRunner().invoke(cli_plan.plan, [str(config), "--memory", "1MB"], standalone_mode=False)
    memory, work = done.stdout.split("\n\n")
    assert memory.splitlines()[-1].startswith("verdict     nothing fits")
    assert work.startswith("work        ")


@pytest.mark.parametrize("size", ["lots", "140", "3 parsecs", "-1GB"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match=rf"--memory {size}: expected a number with MB, GB, TB"):
        rank_memory(Config.model_construct(), size)


@pytest.mark.parametrize(("text", "size"), [("140GB", 140 * 10**9), ("1.5 GiB", 3 * 2**29), ("80gb", 80 * 10**9)])
def test_sizes(text: str, size: int) -> None:
    assert rank_memory(Config.model_construct(), text) == size


@pytest.mark.parametrize("options", ["{}", "{activation_checkpointing: true}", "{lora: {r: 2}}"])
def test_alike_layers_are_counted_by_a_few_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    from transformers import LlamaConfig

    from can_dist.training import plan as training_plan

    sizes = {"vocab_size": 2000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=tmp_path))
    set_train = ("--set", f"train={options}", "--set", "train.tokens_per_pack=500", "--set", "precision=bf16")
    by_a_few = plan(tmp_path / "run.yaml", *set_train)
    followed = []
    with_layers = training_plan._with_layers
    monkeypatch.setattr(training_plan, "_with_layers", lambda *counted: followed.append(with_layers(*counted)))
    assert plan(tmp_path / "run.yaml", *set_train) == by_a_few, "all layers, counted"
    assert any(whole is not None for whole in followed), "some peak followed what the layers keep"


def test_a_shape_file_stands_for_a_hub_that_is_out_of_reach(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shape = config.parent / "lm" / "config.json"
    run = [str(config), "--memory", "1GB", "--set", "reference.model=nobody/has-this-model"]
    done = CliRunner().invoke(cli_plan.plan, run, standalone_mode=False)
    assert isinstance(done.exception, DataError)
    assert "Without reach of the hub give its config.json: --shape FILE." in str(done.exception)
    done = CliRunner().invoke(cli_plan.plan, [*run, "--shape", str(shape)], standalone_mode=False)
    assert done.exception is None, done.exception
    assert "verdict     train.tokens_per_pack=128" in done.output
    assert "work        " in done.output
    done = CliRunner().invoke(cli_plan.plan, [*run, "--shape", str(config)], standalone_mode=False)
    assert isinstance(done.exception, ConfigError)
    assert "expected a model's config.json" in str(done.exception)
