"""Training as it really is: DeepSpeed ZeRO-3 on two gloo ranks, every parameter partitioned."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
import train_world as tw
from plain_losses import HEADS, LORA, SMALL, log_ratios, pair_losses
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from can_dist.tables.artifacts import MANIFEST
from can_dist.training.batches import global_batch

NUM_TRAIN, BATCH_SIZE, TOTAL = 22, 9, 6  # batches of 9, 9, 4, twice


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tw.World:
    return tw.make_world(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def undisturbed(world: tw.World) -> str:
    """Two ranks, full fine-tuning, from start to end."""
    spec = world.spec("undisturbed", checkpoint_every=2)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    return spec


def regression_losses(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """(z − (s_a − s_b))² of each row."""
    ratios = [log_ratios(model, row) for row in rows]
    gaps = [row["target"][0] - row["target"][1] for row in rows]
    return torch.stack([(tw.BETA * (a - b) - gap) ** 2 for (a, b), gap in zip(ratios, gaps, strict=True)])


def list_losses(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """−Σ t ln softmax(ratios) of each row."""
    ratios = [torch.stack(log_ratios(model, row)) for row in rows]
    targets = [torch.tensor(row["target"]) for row in rows]
    return torch.stack([-(t * ratio.log_softmax(dim=0)).sum() for t, ratio in zip(targets, ratios, strict=True)])


def kto_losses(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """λ(1 − σ(±β(own ratio − z_ref))), z_ref the mean ratio of the batch's other responses."""
    own, other = (torch.stack(column) for column in zip(*(log_ratios(model, row) for row in rows), strict=True))
    baseline = other.mean().detach().clamp(min=0)
    sign = torch.tensor([1.0 if row["target"][0] else -1.0 for row in rows])
    weight = torch.tensor([row["weight"] for row in rows])
    return weight * (1 - torch.sigmoid(sign * tw.BETA * (own - baseline)))


def rows_for(loss: str, world: tw.World) -> list[dict]:
    """The world's rows with the targets, and for lists the numbers of responses, of another loss."""
    rows = [dict(row) for row in world.rows]
    random = np.random.default_rng(9)
    for index, row in enumerate(rows):
        if loss == "regression":
            row["target"] = row["scores"]
        elif loss == "kto":
            row["target"], row["weight"] = ([1.0, 0.0], 1.0) if index % 3 else ([0.0, 1.0], 1.7)
        else:
            others = [rows[(index + k) % len(rows)]["token_ids"][0] for k in range(1, 1 + index % 4)]
            row["token_ids"] = row["token_ids"][:2] + others
            row["target"] = random.dirichlet(np.ones(len(row["token_ids"]))).tolist()
            row["texts"] = row["response_ids"] = [f"{row['prompt_id']}/{k}" for k in range(len(row["token_ids"]))]
    return tw.fill_reference(rows, world.reference)


def train_plainly(
    world: tw.World, rows: list[dict], losses_of: Callable = pair_losses
) -> tuple[dict[int, float], dict[int, float], dict[str, torch.Tensor]]:
    """The same training in one process of plain torch: AdamW, cosine with warm-up, clipping at 1."""
    rows = [row for row in rows if row["split"] == "train"]
    model = AutoModelForCausalLM.from_pretrained(world.reference, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.999), weight_decay=0.01)
    losses, norms = {}, {}
    for step in range(TOTAL):
        rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / (TOTAL - 2)))
        optimizer.param_groups[0]["lr"] = 3e-3 * rate
        chosen = global_batch(NUM_TRAIN, BATCH_SIZE, 3, step)
        loss = losses_of(model, [rows[index] for index in chosen]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms[step + 1] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        losses[step + 1] = loss.item()
    return losses, norms, model.state_dict()


def test_two_ranks_one_rank_and_plain_torch_train_alike(world: tw.World, undisturbed: str) -> None:
    alone = world.spec("alone", tokens_per_pack=90)
    assert tw.launch(alone, num_ranks=1).codes == [0]
    losses, norms, weights = train_plainly(world, world.rows)
    assert max(norms.values()) > 1 > min(norms.values()), "clipping must act in some steps and not in others"
    validation = [row for row in world.rows if row["split"] == "validation"]
    for spec in (undisturbed, alone):
        metrics = tw.read_metrics(spec)
        assert metrics.pop(0) == pytest.approx(math.log(2), abs=1e-5)
        assert metrics == pytest.approx(losses, rel=1e-4)
        assert tw.read_metrics(spec, "grad_norm") == pytest.approx(norms, rel=1e-3)
        assert losses[TOTAL] < math.log(2) - 0.02, "the training must move for its trajectory to mean something"
        model = tw.load_whole(tw.policy_dir(spec))
        for name, expected in weights.items():
            torch.testing.assert_close(model.state_dict()[name], expected, atol=2e-5, rtol=1e-3)
        with torch.no_grad():
            expected_eval = pair_losses(model, validation).mean().item()
        assert tw.read_metrics(spec, "eval_loss") == {
            0: pytest.approx(math.log(2), abs=1e-5),
            3: pytest.approx(math.log(2), abs=0.05),
            TOTAL: pytest.approx(expected_eval, rel=1e-5),
        }


@pytest.mark.parametrize(
    ("loss", "losses_of"), [("regression", regression_losses), ("listwise", list_losses), ("kto", kto_losses)]
)
def test_every_loss_trains_as_in_plain_torch(world: tw.World, loss: str, losses_of: Callable) -> None:
    rows = rows_for(loss, world)
    spec = world.spec(loss, rows=rows, loss=loss)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    losses, norms, weights = train_plainly(world, rows, losses_of)
    metrics = tw.read_metrics(spec)
    assert metrics.pop(0) == pytest.approx(tw.read_metrics(spec, "reference_loss")[0], rel=1e-4)
    assert metrics == pytest.approx(losses, rel=1e-4)
    assert tw.read_metrics(spec, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert losses[TOTAL] < tw.read_metrics(spec, "reference_loss")[TOTAL] - 0.01
    model = tw.load_whole(tw.policy_dir(spec))
    for name, expected in weights.items():
        torch.testing.assert_close(model.state_dict()[name], expected, atol=3e-5, rtol=1e-3)


def test_training_may_go_on_from_a_policy_relative_to_the_reference(world: tw.World, undisturbed: str) -> None:
    """Its first loss is the policy's on the pairs, not ln 2, and that is no error."""
    spec = world.spec("further", start=tw.policy_dir(undisturbed), learning_rate=1e-9)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    policy = tw.load_whole(tw.policy_dir(undisturbed))
    rows = [row for row in world.rows if row["split"] == "train"]
    with torch.no_grad():
        expected = pair_losses(policy, [rows[i] for i in global_batch(NUM_TRAIN, BATCH_SIZE, 3, 0)]).mean().item()
    assert expected < math.log(2) - 0.02
    assert tw.read_metrics(spec)[0] == pytest.approx(expected, rel=1e-5)
    assert tw.read_metrics(spec, "reference_loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def test_metrics_and_summary(world: tw.World, undisturbed: str) -> None:
    directory = tw.policy_dir(undisturbed).parent
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    fields = {"loss", "reference_loss", "fit_accuracy", "fit_margin", "fit_kl"}
    assert lines[0].keys() == {"step", *fields}
    assert lines[1].keys() == {"step", *(f"eval_{name}" for name in fields)}
    assert lines[-2].keys() == {"step", *fields, "grad_norm", "learning_rate", "tokens_per_second"}
    rates = tw.read_metrics(undisturbed, "learning_rate")
    cosine = [3e-3 * 0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert [rates[step] for step in range(1, 7)] == pytest.approx([0, 1.5e-3, *cosine])
    assert lines[-2]["fit_kl"] > 0.001 > lines[0]["fit_kl"] >= 0
    assert lines[-2]["fit_accuracy"] > 0.6
    assert lines[-2]["tokens_per_second"] > 1
    tokens = [
        len(tw.prompt_tokens(row)) + sum(len(tokens) for tokens in row["token_ids"])
        for row in world.rows
        if row["split"] == "train"
    ]
    summary = json.loads((directory / "summary.json").read_text())
    attention = (
        f"attention by sdpa, segment by segment, of torch {torch.__version__} (the kernels for packs need a GPU)"
    )
    assert summary == {
        "num_steps": TOTAL,
        "num_examples": NUM_TRAIN,
        "num_tokens": 2 * sum(tokens),
        "attention": f"packs that share prompts, {attention}",
    }


def test_f31_killed_training_goes_on_and_ends_with_the_same_bytes(world: tw.World, undisturbed: str) -> None:
    spec = world.spec("killed", checkpoint_every=2)
    killed = tw.launch(spec, hook="kill:1:4")
    assert killed.codes[1] == -9
    assert killed.codes[0] != 0, "the rank that is left must not think that it finished"
    directory = tw.policy_dir(spec).parent
    assert not (directory / "policy").exists()
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    resumed = tw.launch(spec)
    assert resumed.codes == [0, 0], resumed.output
    assert "going on from checkpoint step-000004" in resumed.output
    assert tw.policy_bytes(spec) == tw.policy_bytes(undisturbed)
    for key in ("loss", "grad_norm", "eval_loss", "fit_margin", "learning_rate"):
        assert tw.read_metrics(spec, key) == tw.read_metrics(undisturbed, key)


def test_f33_non_finite_loss_stops_all_ranks_before_the_update(world: tw.World) -> None:
    batch = global_batch(NUM_TRAIN, BATCH_SIZE, 3, 2)
    rows = [dict(row) for row in world.rows]
    of_rank_1 = tw.pairs_of_rank(rows, batch.tolist(), 1)
    assert 1 < len(of_rank_1) < len(batch)
    rows[of_rank_1[0]]["target"] = [math.inf, 0.0]
    spec = world.spec("poisoned", rows=rows, checkpoint_every=1)
    outcome = tw.launch(spec)
    assert outcome.codes == [5, 5], outcome.output
    assert (
        "NumericalError: step 3: the loss is not finite; no update was made. "
        f"rank 1: examples pair-{of_rank_1[0]}." in outcome.output
    )
    directory = tw.policy_dir(spec).parent
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert max(tw.read_metrics(spec)) == 2
    assert not (directory / "policy").exists()


@pytest.mark.parametrize("stale", ["one", "both", pytest.param("template", marks=pytest.mark.slow)])
def test_f46_stale_reference_is_refused_before_the_first_step(world: tw.World, stale: str) -> None:
    other = 0.5 if stale == "both" else 0.0  # the loss of a pair sees the difference alone
    rows = [{**row, "logp_ref": [row["logp_ref"][0] + 0.5, row["logp_ref"][1] + other]} for row in world.rows]
    if stale in ("one", "both"):
        spec = world.spec("stale", rows=rows, tokens_per_pack=20)
    else:
        spec = world.spec("stale-template", template="w0 {prompt} w1")
    outcome = tw.launch(spec)
    assert outcome.codes == [5, 5], outcome.output
    assert "the stored reference log-probabilities are not those of this model" in outcome.output
    assert ("examples have more than train.tokens_per_pack=20 tokens" in outcome.output) == (stale != "template")
    assert tw.read_metrics(spec) == {}
    assert not tw.policy_dir(spec).exists()


def test_f33_f42_failures_of_one_rank_do_not_hang_the_other(world: tw.World) -> None:
    spec = world.spec("raised")
    raised = tw.launch(spec, hook="raise:1:2")
    assert raised.codes == [1, 1], raised.output
    assert "RuntimeError: out of memory, say" in raised.output
    gradient = tw.launch(spec, hook="nan_gradient")
    assert gradient.codes == [5, 5], gradient.output
    assert "NumericalError: step 1: the gradient was not finite and DeepSpeed skipped the update" in gradient.output
    different = tw.launch(spec, last_spec=world.spec("raised", learning_rate=1e-4))
    assert different.codes == [6, 6], different.output
    assert "rank(s) [1] were started with another configuration than rank 0" in different.output
    assert not tw.policy_dir(spec).exists()


def test_adapters_train_resume_and_are_merged(world: tw.World) -> None:
    spec = world.spec("lora", lora=LORA, learning_rate=2e-2, checkpoint_every=3)
    assert tw.launch(spec).codes == [0, 0]
    losses = tw.read_metrics(spec)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5), "adapters start as the identity"
    assert losses[TOTAL] < math.log(2) - 0.02
    killed = world.spec("lora-killed", lora=LORA, learning_rate=2e-2, checkpoint_every=3)
    assert tw.launch(killed, hook="kill:1:4").codes[1] == -9
    assert tw.launch(killed).codes == [0, 0]
    assert tw.read_metrics(killed) == losses
    assert tw.policy_bytes(killed) == tw.policy_bytes(spec)

    policy, reference = tw.load_whole(tw.policy_dir(spec)), tw.load_whole(world.reference)
    for name, weight in policy.state_dict().items():
        change = weight - reference.state_dict()[name]
        if "_proj" in name:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= LORA["r"], name
        else:
            assert change.abs().max() == 0, f"{name} is frozen"
    # the engine measured base + adapters on the validation pairs; the merged policy must be the same function
    validation = [row for row in world.rows if row["split"] == "validation"]
    with torch.no_grad():
        merged = pair_losses(policy, validation).mean().item()
    assert tw.read_metrics(spec, "eval_loss")[TOTAL] == pytest.approx(merged, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, 2], ids=["all-layers", "every-second"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_activation_checkpointing_changes_nothing(world: tw.World, lora: dict | None, every: bool | int) -> None:
    name = f"{'lora' if lora else 'full'}-{every}"
    options = {"lora": lora, "learning_rate": 1e-2}
    off = world.spec(f"{name}-off", **options)
    on = world.spec(f"{name}-on", **options, activation_checkpointing=every)
    for spec in (off, on):
        outcome = tw.launch(spec)
        assert outcome.codes == [0, 0], outcome.output
    assert tw.read_metrics(on) == pytest.approx(tw.read_metrics(off), rel=1e-6)
    assert tw.read_metrics(on, "grad_norm") == pytest.approx(tw.read_metrics(off, "grad_norm"), rel=1e-5)


def first_gradients(
    world: tw.World, name: str, head_bytes: int, layout: str = "", num_ranks: int = 2, **train: object
) -> dict:
    file = world.root / f"{name}.safetensors"
    hook = f"gradients:{file}:{head_bytes}:{layout}"
    outcome = tw.launch(world.spec(name, max_steps=1, **train), num_ranks, hook=hook)
    assert outcome.codes == [0] * num_ranks, outcome.output
    assert "packs that share prompts, attention by sdpa" in outcome.output or layout
    return load_file(file)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 1e-5 * max(gradient.norm(), 0.01 * largest), name


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["head", "tied"])
def test_gradients_of_packs_on_two_ranks_are_those_of_every_sequence_alone(world: tw.World, tied: bool) -> None:
    """Several passes per rank, a head in chunks of two rows, activations computed anew."""
    if tied:
        directory, config = world.root / "tied-head", AutoConfig.from_pretrained(world.reference)
        config.tie_word_embeddings = True
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        AutoTokenizer.from_pretrained(world.reference).save_pretrained(directory)
        world = tw.World(world.root, directory, tw.fill_reference([dict(row) for row in world.rows], directory))
    name = "gradients-tied" if tied else "gradients"
    found = first_gradients(world, name, 2 * 4 * 25, activation_checkpointing=True, tokens_per_pack=40)
    model = AutoModelForCausalLM.from_pretrained(world.reference, dtype=torch.float32)
    rows = [row for row in world.rows if row["split"] == "train"]
    pair_losses(model, [rows[i] for i in global_batch(NUM_TRAIN, BATCH_SIZE, 3, 0)]).mean().backward()
    assert_same_gradients(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.slow
@pytest.mark.parametrize("head_bytes", [2 * 4 * 25, 2**28], ids=["chunks", "whole"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("lora", [None, {**LORA, "dropout": 0.0}], ids=["full", "lora"])
def test_packs_and_padded_batches_have_the_same_gradients(
    world: tw.World, lora: dict | None, recompute: bool, head_bytes: int
) -> None:
    name = f"layouts-{'lora' if lora else 'full'}-{recompute}-{head_bytes}"
    options = {"lora": lora, "activation_checkpointing": recompute}
    packed = first_gradients(world, name, head_bytes, **options)
    padded = first_gradients(world, f"{name}-padded", head_bytes, "padded", tokens_per_pack=10**6, **options)
    assert_same_gradients(packed, padded)


@pytest.mark.parametrize(
    ("lora", "file"),
    [
        (None, "zero3_cpu.json"),
        pytest.param(None, "zero3_offload.json", marks=pytest.mark.slow),
        pytest.param({"r": 4, "dropout": 0.0}, "zero3_cpu.json", marks=pytest.mark.slow),
        pytest.param({"r": 4, "dropout": 0.0}, "zero2_lora.json", marks=pytest.mark.slow),
    ],
    ids=["full", "offload", "adapters", "adapters-zero2"],
)
def test_a_gradient_in_bf16_does_not_depend_on_the_number_of_packs(
    world: tw.World, lora: dict | None, file: str
) -> None:
    """16 packs of the same pair add up to the gradient of one: powers of two scale without rounding, sums do not."""
    row = next(row for row in world.rows if row["split"] == "train")
    same = [row | {"example_id": f"same-{index}"} for index in range(16)]
    name, rows = (
        f"bf16-{file}-{'adapters' if lora else 'full'}",
        tw.fill_reference(same, world.reference, torch.bfloat16),
    )
    ds_config = str(tw.ROOT / "ds_configs" / file)
    options = {"precision": "bf16", "rows": rows, "lora": lora, "ds_config": ds_config}
    one = first_gradients(world, f"{name}-1", 10**9, num_ranks=1, batch_size=1, tokens_per_pack=1, **options)
    many = first_gradients(world, f"{name}-16", 10**9, num_ranks=1, batch_size=16, tokens_per_pack=1, **options)
    assert max(gradient.norm() for gradient in one.values()) > 0
    for parameter, gradient in one.items():
        assert (many[parameter] - gradient).norm() <= 1e-6 * gradient.norm(), parameter


@pytest.mark.slow
@pytest.mark.parametrize("file", ["zero3_bf16.json", "zero3_offload.json", "zero3_hpz.json"])
def test_shipped_files_train_alike(world: tw.World, undisturbed: str, file: str) -> None:
    content = json.loads((tw.ROOT / "ds_configs" / file).read_text())
    if file == "zero3_hpz.json":
        content["zero_optimization"]["zero_hpz_partition_size"] = 2  # the ranks of this node
    (world.root / file).write_text(json.dumps(content))
    spec = world.spec(file.partition(".")[0], ds_config=str(world.root / file))
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    assert tw.read_metrics(spec) == pytest.approx(tw.read_metrics(undisturbed), rel=1e-5)


@pytest.mark.slow
def test_adapters_train_alike_under_zero_2(world: tw.World) -> None:
    """The same trajectory as with partitioned weights; killed, resumed, and resumed by another number of ranks."""
    options = {"lora": {**LORA, "dropout": 0.0}, "learning_rate": 2e-2, "checkpoint_every": 2}
    zero_2 = {**options, "ds_config": str(tw.ROOT / "ds_configs" / "zero2_lora.json")}
    expected, spec = world.spec("lora-zero3", **options), world.spec("lora-zero2", **zero_2)
    killed, alone = world.spec("lora-zero2-killed", **zero_2), world.spec("lora-zero2-alone", **zero_2)
    assert tw.launch(expected).codes == [0, 0]
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    for key in ("loss", "grad_norm", "eval_loss"):
        assert tw.read_metrics(spec, key) == pytest.approx(tw.read_metrics(expected, key), rel=1e-4)
    weights, others = (tw.load_whole(tw.policy_dir(one)).state_dict() for one in (spec, expected))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-5, rtol=1e-3)
    assert tw.launch(killed, hook="kill:1:4").codes[1] == -9
    shutil.copytree(tw.policy_dir(killed).parent, tw.policy_dir(alone).parent, dirs_exist_ok=True)
    assert tw.launch(killed).codes == [0, 0]
    assert tw.policy_bytes(killed) == tw.policy_bytes(spec)
    outcome = tw.launch(alone, num_ranks=1)
    assert outcome.codes == [0], outcome.output
    assert tw.read_metrics(alone) == pytest.approx(tw.read_metrics(spec), rel=1e-4)


def test_export_of_tied_embeddings_in_several_files_in_bf16(world: tw.World) -> None:
    """The embedding of 2.6 MB stands alone; the reference has a generation config that save_pretrained refuses."""
    directory = world.root / "tied"
    config = AutoConfig.from_pretrained(world.reference)
    config.tie_word_embeddings, config.vocab_size = True, 40_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    # the step-0 tolerance is of bf16, and so is the reference
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(world.reference).save_pretrained(directory)
    generation = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": tw.END}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    tied = tw.World(world.root, directory, tw.fill_reference(tw.make_rows(6, 2), directory))
    spec = tied.spec("tied-policy", precision="bf16", max_shard_size_mb=1, num_epochs=1, batch_size=3)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    out = tw.policy_dir(spec)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in model.parameters()) * 2
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as tensors:
            assert tensors.get_slice(name).get_dtype() == "BF16"
    policy = tw.load_whole(out, dtype=torch.bfloat16)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert policy.config.tie_word_embeddings
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.9
    assert not torch.equal(policy.lm_head.weight, model.lm_head.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=2, n_positions=64),  # tied, with dropout and Conv1D
        Qwen3Config(**SMALL, **HEADS, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True),
        MixtralConfig(**SMALL, **HEADS, num_key_value_heads=2, num_local_experts=2),  # its experts are fused in memory
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_train_and_load(world: tw.World, config: PreTrainedConfig) -> None:
    directory = world.root / config.model_type
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(world.reference).save_pretrained(directory)
    other = tw.World(world.root, directory, tw.fill_reference(tw.make_rows(6, 2), directory, torch.float32))
    spec = other.spec(f"{config.model_type}-policy", batch_size=3)
    outcome = tw.launch(spec)
    assert outcome.codes == [0, 0], outcome.output
    assert tw.read_metrics(spec)[1] == pytest.approx(math.log(2), abs=1e-5), "no dropout before the first update"
    with torch.no_grad():
        expected = pair_losses(tw.load_whole(tw.policy_dir(spec)), other.rows[6:]).mean().item()
    assert tw.read_metrics(spec, "eval_loss")[4] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_committed_by_failures(world: tw.World) -> None:
    """Runs last: of all the trainings above, none left a manifest (the stage writes it, after the engine)."""
    assert not list(world.root.glob(f"*/policy/{MANIFEST}"))
    assert np.all([not (path / MANIFEST).exists() for path in world.root.iterdir() if "label" not in path.name])
