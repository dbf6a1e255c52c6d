"""Losses, batches, DeepSpeed's configuration, log-probabilities and the export: the parts of training, one by one."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import make_tiny_lm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from can_dist.cli import main
from can_dist.cluster import connection as cluster
from can_dist.config import Model
from can_dist.config.sections import Lora, Train
from can_dist.console import interruptible
from can_dist.errors import ConfigError, DataError, Interrupted
from can_dist.modeling.loading import check_trainable, context_length
from can_dist.modeling.logprobs import ResponseModel, response_logp
from can_dist.training.batches import Example, about_long, global_batch, is_evaluated, num_steps, rank_packs, stream
from can_dist.training.deepspeed_config import NOT_OFFERED, OWNED, accumulation, build_ds_config, read_ds_config
from can_dist.training.export import _weights, check_shapes, write_shards
from can_dist.training.heartbeat import describe_hang
from can_dist.training.metrics import MetricsLog, loss_above_start, read_metrics, training_curve
from can_dist.training.trainable import adapt

DS_CONFIGS = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))

# ---------------------------------------------------------------------------------------------- batches


def make_examples(sizes: list[int]) -> list[Example]:
    """Examples of 4 tokens and more: the prompt and the second response have one, the first has the rest."""
    pair = ([0.0, 0.0], [0.5, 0.5], 1.0)
    return [Example(f"p{i}", [1], [[2] * (size - 2), [3]], *pair) for i, size in enumerate(sizes)]


@settings(max_examples=80)
@given(
    sizes=st.lists(st.integers(4, 60), min_size=1, max_size=40),
    batch_size=st.integers(1, 20),
    budget=st.integers(1, 120),
    world_size=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
@example(sizes=[9] * 22, batch_size=9, budget=20, world_size=2, epoch=1)
@example(sizes=[50], batch_size=8, budget=10, world_size=4, epoch=0)
def test_every_example_counts_once_per_epoch_and_no_pack_is_too_large(
    sizes: list[int], batch_size: int, budget: int, world_size: int, epoch: int
) -> None:
    examples = make_examples(sizes)
    steps = num_steps(len(sizes), batch_size, 1, None)
    weights: dict[str, float] = dict.fromkeys((one.example_id for one in examples), 0.0)
    for step in range(epoch * steps, (epoch + 1) * steps):
        chosen = [examples[index] for index in global_batch(len(sizes), batch_size, 7, step).tolist()]
        of_ranks = [rank_packs(chosen, budget, rank, world_size) for rank in range(world_size)]
        assert len({len(packs) for packs in of_ranks}) == 1, "all ranks take part in all passes"
        slots = [slot for packs in of_ranks for pack in packs for slot in pack]
        assert sum(slot.share for slot in slots) == len(chosen)
        for pack in (pack for packs in of_ranks for pack in packs):
            assert pack
            assert len(pack) == 1 or sum(slot.example.num_tokens for slot in pack) <= budget
        for slot in slots:
            weights[slot.example.example_id] += slot.share
            assert slot.share in (0.0, 1.0)
    assert set(weights.values()) == {1.0}


def test_ranks_and_packs_are_balanced_by_tokens_and_there_are_no_more_passes_than_needed() -> None:
    random = np.random.default_rng(0)
    examples = make_examples(random.integers(20, 400, size=256).tolist())
    total = sum(example.num_tokens for example in examples)
    of_ranks = [rank_packs(examples, 2048, rank, 4) for rank in range(4)]
    loads = [[sum(slot.example.num_tokens for slot in pack) for pack in packs] for packs in of_ranks]
    assert [len(packs) for packs in of_ranks] == [-(-total // (4 * 2048))] * 4
    assert max(map(sum, loads)) < 1.01 * min(map(sum, loads))
    assert all(max(of_rank) < 1.05 * min(of_rank) for of_rank in loads)
    assert rank_packs(examples, 2048, 1, 4) == of_ranks[1]


def test_a_filler_is_the_shortest_example_and_has_no_share() -> None:
    examples = make_examples([30, 9, 40])
    packs = rank_packs(examples, 50, 3, 4)
    assert [[(slot.example.example_id, slot.share) for slot in pack] for pack in packs] == [[("p1", 0.0)]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_and_leave_the_random_stream_alone(num_workers: int) -> None:
    packs = rank_packs(make_examples([30, 9, 40, 7, 7]), 41, 0, 1)
    before = torch.get_rng_state()
    batches = list(stream(packs, "shared", num_workers, pin=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert [batch.example_ids for batch in batches] == [[slot.example.example_id for slot in pack] for pack in packs]
    for batch, pack in zip(batches, packs, strict=True):
        assert batch.num_tokens == batch.pack.input_ids_BT.shape[1] == sum(slot.example.num_tokens for slot in pack)
        assert batch.num_responses == [2] * len(pack)


def test_order_follows_seed_and_epoch_and_the_last_batch_is_short() -> None:
    batches = [global_batch(10, 4, 0, step) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert first.tolist() != np.concatenate([global_batch(10, 4, 1, step) for step in range(3)]).tolist()
    np.testing.assert_array_equal(batches[4], global_batch(10, 4, 0, 4))


def test_number_of_steps() -> None:
    assert num_steps(10, 4, num_epochs=3, max_steps=None) == 9
    assert num_steps(10, 4, num_epochs=3, max_steps=5) == 5
    assert num_steps(10, 4, num_epochs=1, max_steps=5) == 3
    assert num_steps(3, 8, num_epochs=1, max_steps=None) == 1


@pytest.mark.parametrize(
    ("total", "every", "steps"),
    [(62, 50, [62]), (75, 50, [50, 75]), (100, 50, [50, 100]), (9, 3, [3, 6, 9]), (7, 2, [2, 4, 6, 7]), (1, 50, [1])],
)
def test_a_training_is_evaluated_at_its_end_and_not_just_before(total: int, every: int, steps: list[int]) -> None:
    assert [done for done in range(1, total + 1) if is_evaluated(done, total, every)] == steps


def test_examples_longer_than_a_pass_are_counted_and_said_and_not_cut() -> None:
    examples = make_examples([10, 30, 41, 55])
    assert about_long(examples, 55) == about_long([], 1) == ""
    said = about_long(examples, 40)
    assert said.startswith("2 of 4 examples have more than train.tokens_per_pack=40 tokens, at most 55. Nothing is cut")
    assert all(len(pack) == 1 for pack in rank_packs(examples[2:], 40, 0, 1))


def test_tokens_of_an_example_count_its_prompt_once() -> None:
    assert Example("p", [1, 2, 3], [[4], [5, 6]], [0.0, 0.0], [0.5, 0.5], 1.0).num_tokens == 3 + 1 + 2


# -------------------------------------------------------------------------------------- DeepSpeed configuration


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_f44_owned_keys_are_refused_by_name(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 3}, **dict.fromkeys(OWNED, "auto")}
    with pytest.raises(ConfigError) as error:
        read_ds_config(written(tmp_path / "ds.json", config))
    for key, instead in OWNED.items():
        assert f"{key} (set {instead} instead)" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected a JSON object, found list"),
        ({"zero_optimization": {"stage": 1}}, "stage must be 3, or 2 with train.lora, found {'stage': 1}"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "not valid JSON: stage: given twice."),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size: 'auto'",
        ),
    ],
)
def test_f44_unusable_file_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_ds_config(written(tmp_path / "ds.json", content))


class OneBlock(PreTrainedModel):
    """A model of its own code, whose layers transformers cannot tell from each other."""

    config_class = LlamaConfig
    supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__(LlamaConfig())
        self.embedding = torch.nn.Embedding(8, 4)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding


def test_every_nth_layer_is_refused_where_layers_are_not_told_from_each_other() -> None:
    assert adapt(OneBlock(), Train(activation_checkpointing=True)).gradient_checkpointing
    with pytest.raises(ConfigError, match=r"activation_checkpointing: 2: OneBlock recomputes all .* Set true\."):
        adapt(OneBlock(), Train(activation_checkpointing=2))


@pytest.mark.parametrize("key", NOT_OFFERED)
def test_what_would_train_something_else_is_refused_in_words(tmp_path: Path, key: str) -> None:
    reason, remedy = NOT_OFFERED[key]
    with pytest.raises(ConfigError, match=re.escape(f"ds.json: {key} is not offered: {reason}. {remedy}")):
        read_ds_config(written(tmp_path / "ds.json", {"zero_optimization": {"stage": 3}, key: 2}))


def test_quantized_reference_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is stored quantized \(bitsandbytes\)\. .*train\.lora\.quantize: nf4"):
        check_trainable(Model(model=str(tmp_path)))


def test_dropout_before_experts_is_refused_with_what_to_do() -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_local_experts": 2}
    config = MixtralConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"experts are one parameter here: set .*\[q_proj, k_proj, v_proj, o_pr"):
        adapt(model, Train(lora=Lora(dropout=0.05)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a reader of the log is told of no name that only libraries know
        adapt(model, Train(lora=Lora(dropout=0.05, target_modules=("q_proj", "v_proj"))))


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=1,
            ffn_dim=8,
            num_attention_heads=1,
            word_embed_proj_dim=8,
            dropout=0.5,
            layerdrop=0.5,
        ),
        BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=1, hidden_dropout=0.5, attention_dropout=0.5),
        MixtralConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_local_experts=2,
            attention_dropout=0.5,
        ),
    ],
    ids=["opt", "bloom", "mixtral"],
)
def test_a_model_in_training_has_no_dropout_of_its_own(config: PreTrainedConfig) -> None:
    """Also that of functions, which is no module: log-ratios would be noise around zero before the first step."""
    model, ids = adapt(AutoModelForCausalLM.from_config(config), Train()), torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.eval()(ids).logits
        for _ in range(3):
            torch.testing.assert_close(model.train()(ids).logits, expected)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
        ({"rope_type": "yarn", "original_max_position_embeddings": 32, "factor": 8.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "default"}, 256),
    ],
)
def test_a_text_whose_length_changes_its_neighbours_is_longer_than_the_context(rope: dict, longest: int) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if rope["rope_type"] == "longrope" else {}
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 1e4, **rope, **factors},
    )
    assert context_length(config) == longest
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        short = response_logp(ResponseModel(model), [([3], [[4, 5, 6]])], "shared", "cpu")
        groups = [([3], [[4, 5, 6]]), ([7], [[8] * (longest - 1)])]
        together = response_logp(ResponseModel(model), groups, "shared", "cpu")
    torch.testing.assert_close(together[:1], short)


def test_the_context_of_a_model_of_several_parts_is_that_of_its_text() -> None:
    config = Gemma3Config(text_config={"max_position_embeddings": 77})
    assert context_length(config) == 77


def test_missing_file_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere.json: no such file. .* comes with can-dist: zero2_lora, zero3_bf16, "
    ):
        read_ds_config("nowhere.json")


def test_f44_unknown_zero_key_is_refused_by_name(tmp_path: Path) -> None:
    base = read_ds_config(written(tmp_path / "ds.json", {"zero_optimization": {"stage": 3, "ofload_param": 1}}))
    with pytest.raises(ConfigError, match="ofload_param: Extra inputs are not permitted"):
        build_ds_config(base, Train(), "fp32")


@pytest.mark.parametrize(
    ("key", "nearest"), [("zero_optimisation", "zero_optimization"), ("wall_clock_brakdown", "wall_clock_breakdown")]
)
def test_f44_key_that_deepspeed_never_reads_is_refused(tmp_path: Path, key: str, nearest: str) -> None:
    file = written(tmp_path / "ds.json", {key: {}})
    message = f"train.ds_config: {file}: {key}: DeepSpeed knows no such key. Did you mean '{nearest}'?"
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_ds_config(read_ds_config(file), Train(ds_config=file), "fp32")


@pytest.mark.parametrize("key", ["activation_checkpointing", "flops_profiler", "comms_logger", "aio", "data_types"])
def test_f44_key_that_deepspeed_reads_is_left_to_it(tmp_path: Path, key: str) -> None:
    file = written(tmp_path / "ds.json", {key: {}})
    assert key in build_ds_config(read_ds_config(file), Train(ds_config=file), "fp32")


def test_f44_zero_2_is_for_adapters() -> None:
    file = str(DS_CONFIGS[0].parent / "zero2_lora.json")
    assert build_ds_config(read_ds_config(file), Train(ds_config=file, lora={}), "bf16")
    with pytest.raises(ConfigError, match=r"stage 2 keeps every weight on every rank.* Set train.lora, or stage 3"):
        build_ds_config(read_ds_config(file), Train(ds_config=file), "bf16")


def test_default_is_plain_zero_3(tmp_path: Path) -> None:
    assert read_ds_config(None) == {"zero_optimization": {"stage": 3}}
    base = read_ds_config(written(tmp_path / "ds.json", {"communication_data_type": "fp32"}))
    assert base == {"communication_data_type": "fp32", "zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_files_are_read_by_deepspeeds_own_parser(path: Path, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    train = Train(batch_size=32, learning_rate=2e-5, max_grad_norm=0.5, weight_decay=0.1, lora={})
    parsed = DeepSpeedConfig(build_ds_config(read_ds_config(str(path)), train, precision))
    assert parsed.gradient_accumulation_steps == 1, "DeepSpeed divides no loss: it is a mean already"
    assert parsed.zero_config.stage == int(path.name[4])
    assert parsed.gradient_clipping == 0.5
    assert parsed.bfloat16_config.enabled == (precision == "bf16")
    assert parsed.optimizer_name == "adamw"
    assert parsed.optimizer_params["lr"] == 2e-5
    assert parsed.optimizer_params["torch_adam"]
    offloads = parsed.zero_config.offload_optimizer is not None
    assert offloads == (path.name in ("zero3_offload.json", "zero3_nvme.json"))


def test_readme_of_the_files_names_each_and_every_owned_key() -> None:
    text = (DS_CONFIGS[0].parent / "README.md").read_text(encoding="utf-8")
    assert len(DS_CONFIGS) == 6
    for name in [*(path.name for path in DS_CONFIGS), *(f"`{key}`" for key in [*OWNED, *NOT_OFFERED])]:
        assert name in text, name


# ------------------------------------------------------------------------------------------------------- heartbeat


def place(rank: int, beats: int) -> dict[str, object]:
    return {
        "host": f"node{rank}",
        "pid": 100 + rank,
        "ticks": 3,
        "beats": beats,
        "at": f"step {beats}",
        "code": "x.py:1 f",
    }


@pytest.mark.parametrize(
    ("beats", "silent", "told"),
    [
        ([5, 5, 5], [1], "rank 1 (process 101 on node1): step 5, in x.py:1 f; it gave no sign of life since then"),
        (
            [5, 4, 5],
            [],
            "rank 1 (process 101 on node1): step 4, in x.py:1 f; it is behind the others. The others wait, at",
        ),
        ([5, 4, 5], [2], "rank 2 (process 102 on node2): step 5, in x.py:1 f; it gave no sign of life"),
        ([5, 5, 5], [], "rank 2 (process 102 on node2): step 5, in x.py:1 f; it is as far as all others: a collective"),
    ],
    ids=["silent", "behind", "silent before behind", "all equal"],
)
def test_f32_hang_is_blamed_on_the_silent_rank_else_on_the_last(beats: list[int], silent: list[int], told: str) -> None:
    message = describe_hang([place(rank, count) for rank, count in enumerate(beats)], silent, 7.0)
    assert message.startswith("training made no progress for cluster.hang_timeout_s = 7 s. rank ")
    assert told in message
    assert ("rank 0 (" in message) is (told.endswith("collective"))


@pytest.mark.parametrize("signals", [1, 2], ids=["grace is over", "second signal"])
def test_f40_what_does_not_end_by_itself_in_time_is_interrupted(signals: int) -> None:
    asked: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    start = time.monotonic()

    def work() -> None:
        with interruptible(lambda: asked.append(True), grace_s=0.2 if signals == 1 else 60):
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    with pytest.raises(Interrupted, match=r"stopped by SIGTERM; finished work is kept, run again"):
        work()
    assert asked == [True]
    assert time.monotonic() - start < 20
    assert signal.getsignal(signal.SIGTERM) is before


def test_f40_what_ends_within_the_grace_is_not_interrupted() -> None:
    asked: list[bool] = []
    with interruptible(lambda: asked.append(True), grace_s=60):
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked == [True]


def test_f40_signal_at_any_moment_of_a_command_ends_it_with_code_75(capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        with cluster._own_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # what ray.init does
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    arguments, sys.argv = sys.argv, ["can-dist"]
    try:
        with pytest.raises(SystemExit) as ended:
            main(command)
    finally:
        sys.argv = arguments
    assert ended.value.code == 75
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_f40_signal_while_ray_deserialises_is_no_system_error() -> None:
    """Ray's compiled code raises what a signal handler raised as the cause of a SystemError (seen with 2.60)."""
    for cause, error in ((Interrupted("stopped by SIGTERM"), Interrupted), (ValueError("other"), SystemError)):
        with pytest.raises(error), interruptible():
            raise SystemError("returned a result with an exception set") from cause


WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_lm(tmp_path_factory.mktemp("lm"), WORDS)


# ---------------------------------------------------------------------------------------------- export and metrics


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 80))
def test_shards_hold_every_tensor_once_and_are_not_too_large(sizes: list[int], limit: int) -> None:
    named = {f"t{index}": torch.full((size,), index, dtype=torch.uint8) for index, size in enumerate(sizes)}
    with tempfile.TemporaryDirectory() as directory:
        write_shards(Path(directory), {name: tensor.nbytes for name, tensor in named.items()}, limit, named.get)
        files = {path.name: load_file(path) for path in sorted(Path(directory).glob("*.safetensors"))}
        index = Path(directory) / "model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    places = {name: file for file, tensors in files.items() for name in tensors}
    assert sum(map(len, files.values())) == len(named)
    assert all(torch.equal(files[places[name]][name], tensor) for name, tensor in named.items())
    assert all(sum(map(torch.numel, shard.values())) <= limit or len(shard) == 1 for shard in files.values())
    assert weight_map == (places if len(files) > 1 else {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight: missing, expected (32,)"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(0)}), "lm_head.weight: (0,), expected (25, 32)"),
        (lambda t: t.update({"lora_A": torch.zeros(2)}), "lora_A: not part of the model"),
    ],
    ids=["missing", "empty", "unknown"],
)
def test_exported_tensors_must_be_those_of_the_architecture(
    reference: Path, tmp_path: Path, change: object, message: str
) -> None:
    tensors = load_file(reference / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    AutoConfig.from_pretrained(reference).save_pretrained(tmp_path)
    check_shapes(tmp_path, AutoConfig.from_pretrained(reference))
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=re.escape(message)):
        check_shapes(tmp_path, AutoConfig.from_pretrained(reference))


def test_metrics_after_a_resumed_step_are_dropped(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')  # the process died here
    assert [line["step"] for line in read_metrics(log.path)] == [0, 1, 2, 3]
    MetricsLog(tmp_path, 2).write(3, {"loss": 9.0})
    assert read_metrics(log.path) == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "resumed_from": 2},
        {"step": 3, "loss": 9.0},
    ]
    assert read_metrics(MetricsLog(tmp_path, 0).path) == []


def test_curve_of_a_resumed_training_has_every_step_once_and_no_times(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step, loss in ((0, 0.7), (2, 0.6), (4, 0.5)):
        log.write(step, {"loss": loss, "reference_loss": 0.69, "tokens_per_second": 100.0 + step})
    log.write(2, {"eval_loss": 0.65})
    resumed = MetricsLog(tmp_path, 2)
    resumed.write(2, {"eval_loss": 0.65})
    resumed.write(4, {"loss": 0.75, "reference_loss": 0.69, "tokens_per_second": 9.0})
    curve = training_curve(tmp_path)
    assert curve == {
        "loss": [[0, 0.7], [2, 0.6], [4, 0.75]],
        "reference_loss": [[0, 0.69], [2, 0.69], [4, 0.69]],
        "eval_loss": [[2, 0.65]],
    }
    assert loss_above_start(curve) == 0.75
    assert loss_above_start({**curve, "loss": [[0, 0.7], [4, 0.5]]}) is None
    assert loss_above_start({"loss": [], "reference_loss": [], "eval_loss": []}) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2),
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                    tie_word_embeddings=True, attention_bias=True),
        GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=32),  # its layers are transposed
        MixtralConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=4),  # two parameters of one module are wrapped
    ],
    ids=["llama", "tied-bias", "gpt2", "experts"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_adapters_merged_tensor_by_tensor_are_those_merged_by_peft(
    config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    merged = {name: weight.gathered("default", True) for name, weight in _weights(adapted).items()}
    expected = dict(adapted.merge_and_unload().named_parameters())
    assert merged.keys() == expected.keys()
    changed = 0
    for name, tensor in merged.items():
        assert tensor is not None
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
        changed += "proj" in name or "c_" in name
    assert changed >= 4


def test_only_bf16_gets_a_wider_sum_of_gradients_and_a_new_identity() -> None:
    wider = {"data_types": {"grad_accum_dtype": "fp32"}}
    base = {"zero_optimization": {"stage": 3}}
    assert accumulation(base, "bf16") == wider
    assert accumulation(base, "fp32") == {}, "whose identity is as before"
    own = {**base, "data_types": {"grad_accum_dtype": "bf16"}}
    assert accumulation(own, "bf16") == {}, "the user's file decides"
    assert build_ds_config(base, Train(), "bf16")["data_types"] == wider["data_types"]
    assert build_ds_config(own, Train(), "bf16")["data_types"] == own["data_types"]


def test_deepspeed_is_told_the_accelerator_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own detection warns; a plan imports it after this."""
    monkeypatch.setenv("DS_ACCELERATOR", "")
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build_ds_config(read_ds_config(None), Train(), "fp32")
    assert os.environ["DS_ACCELERATOR"] == "cpu"
