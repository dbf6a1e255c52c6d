"""Packs: shared = plain = padded = every sequence alone through plain Hugging Face, log-probabilities and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    CONFIGS,
    HEADS,
    LLAMA,
    SMALL,
    VOCAB,
    alone,
    assert_equal_gradients,
    gradients,
    make_groups,
    make_model,
    relative_error,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    DogeConfig,
    FalconH1Config,
    Gemma2Config,
    GPTNeoConfig,
    GraniteConfig,
    Llama4TextConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from can_dist.modeling import logprobs, packs
from can_dist.modeling.logprobs import ResponseModel, choose_layout, response_logp
from can_dist.modeling.packs import LAYOUTS, balanced, balanced_within, groups_in_order, make_pack
from can_dist.modeling.segments import segment_attention, segment_table
from can_dist.training.batches import Example, Slot, collate
from can_dist.training.objective import pack_losses

SDPA = f"attention by sdpa, segment by segment, of torch {torch.__version__} (the kernels for packs need a GPU)"


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_is_plain_hugging_face(name: str, layout: str, chunked: bool) -> None:
    lm, groups = make_model(CONFIGS[name]), make_groups()
    expected = alone(lm, groups)
    expected_gradients = gradients(lm, expected)
    model = ResponseModel(lm)
    model.head_bytes = 3 * 4 * VOCAB if chunked else logprobs.HEAD_BYTES  # three rows in a chunk
    logp_R = response_logp(model, groups, layout, "cpu")
    assert logp_R.dtype == torch.float32
    assert relative_error(logp_R, expected) < 1e-5
    torch.testing.assert_close(logp_R, expected, atol=1e-4, rtol=1e-5)
    assert_equal_gradients(gradients(lm, logp_R), expected_gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_changes_nothing(layout: str) -> None:
    lm, groups = make_model(LLAMA), make_groups()
    expected = gradients(lm, alone(lm, groups))
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    lm.enable_input_require_grads()
    model = ResponseModel(lm).train()
    model.head_bytes = 5 * 4 * VOCAB
    assert_equal_gradients(gradients(lm, response_logp(model, groups, layout, "cpu")), expected)


def test_adapters_have_the_same_gradients() -> None:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        lm = get_peft_model(make_model(LLAMA), options).eval()
    groups = make_groups()

    def adapters(logp_R: torch.Tensor) -> dict[str, torch.Tensor]:
        lm.zero_grad()
        (logp_R * torch.linspace(-1, 1.5, len(logp_R))).sum().backward()
        return {name: p.grad.clone() for name, p in lm.named_parameters() if p.requires_grad}

    expected = adapters(alone(lm, groups))
    model = ResponseModel(lm)
    for head_bytes in (logprobs.HEAD_BYTES, 3 * 4 * VOCAB):
        model.head_bytes = head_bytes
        found = adapters(response_logp(model, groups, "shared", "cpu"))
        assert found.keys() == expected.keys()
        assert_equal_gradients(found, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_a_response_has_the_same_value_whatever_else_is_in_the_pack(seed: int, sizes: list[int]) -> None:
    model, groups = ResponseModel(make_model(LLAMA)), make_groups(seed, tuple(sizes))
    with torch.no_grad():
        together = response_logp(model, groups, "shared", "cpu")
        apart = [response_logp(model, [(p, [r])], "shared", "cpu") for p, responses in groups for r in responses]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-4, rtol=1e-5)


def test_bf16_is_near_float32_and_its_sums_are_float32() -> None:
    groups = make_groups()
    expected = alone(make_model(LLAMA), groups)
    logp_R = response_logp(ResponseModel(make_model(LLAMA).to(torch.bfloat16)), groups, "shared", "cpu")
    assert logp_R.dtype == torch.float32
    assert relative_error(logp_R, expected) < 3e-2


def test_f18_empty_response_has_probability_one() -> None:
    model = ResponseModel(make_model(LLAMA))
    groups = [([5, 6, 7], [[8, 9], []]), ([4], [[]]), ([3, 2], [[6, 6, 6]])]
    logp_R = response_logp(model, groups, "shared", "cpu")
    assert logp_R[1:3].tolist() == [0.0, 0.0]
    torch.testing.assert_close(logp_R[[0, 3]], alone(make_model(LLAMA), [([5, 6, 7], [[8, 9]]), groups[2]]))


# ------------------------------------------------------------------------------- what a pass makes and waits for


class Watch(TorchDispatchMode):
    """Notes the operations and the largest result of a block, the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_no_matrix_of_all_rows_by_the_vocabulary_exists() -> None:
    config = copy.deepcopy(LLAMA)
    config.vocab_size = 5000
    model, groups = ResponseModel(make_model(config)), make_groups(0, (2,) * 10)
    num_rows, weights = len(make_pack(groups, "shared").rows_N), 5000 * 32
    assert num_rows > 2 * 32
    seen = {}
    for rows_in_chunk in (num_rows, 8):
        model.head_bytes = rows_in_chunk * 4 * 5000
        with Watch() as watch:
            response_logp(model, groups, "shared", "cpu").sum().backward()
        seen[rows_in_chunk] = watch.largest
    assert seen == {num_rows: num_rows * 5000, 8: weights}


@pytest.mark.parametrize("loss", ["sigmoid", "pairwise", "regression", "listwise", "kto"])
@pytest.mark.parametrize("rows_in_chunk", [7, 10**6])
def test_a_pass_never_waits_for_the_device(loss: str, rows_in_chunk: int) -> None:
    """On a GPU, a value that Python asks for, or a shape that depends on values, stops the queue."""
    model = ResponseModel(make_model(LLAMA))
    model.head_bytes = rows_in_chunk * 4 * VOCAB
    sizes, baseline = ((1, 1, 1), torch.tensor(0.1)) if loss == "kto" else ((2, 2, 2), None)
    if loss in ("pairwise", "listwise"):
        sizes = (3, 2, 4)
    examples = [
        Example("e", prompt, responses, [-1.0] * len(responses), [0.5] * max(2, len(responses)), 1.0)
        for prompt, responses in make_groups(0, sizes)
    ]
    batch = collate([Slot(example, 1.0) for example in examples], "shared")
    with Watch() as watch:
        loss_B, _ = pack_losses(model, batch, loss=loss, beta=0.1, baseline=baseline)
        loss_B.sum().backward()
    assert "mm" in watch.names
    assert not watch.names & {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"}


# ----------------------------------------------------------------------------- layouts that are silently wrong


@pytest.mark.parametrize(
    "naive",
    [
        lambda lm, pack: lm(
            pack.input_ids_BT,
            position_ids=pack.position_ids_BT,
            attention_mask=torch.ones_like(pack.input_ids_BT),
            use_cache=False,
        ),
        lambda lm, pack: lm(pack.input_ids_BT, position_ids=pack.position_ids_BT),  # use_cache is true by default
    ],
    ids=["mask of ones", "cache by default"],
)
def test_plain_packs_through_transformers_leak_where_ours_do_not(naive: Callable) -> None:
    lm, groups = make_model(LLAMA), make_groups()
    expected = alone(lm, groups)
    pack = make_pack(groups, "plain")
    logp_TV = naive(lm, pack).logits[0].log_softmax(dim=-1)
    logp_N = logp_TV[pack.rows_N].gather(1, pack.targets_N[:, None])[:, 0]
    wrong = torch.stack([part.sum() for part in logp_N.split(pack.num_targets_R.tolist())])
    assert relative_error(wrong, expected) > 1e-2
    assert relative_error(ResponseModel(lm)(pack), expected) < 1e-5


def test_shared_packs_by_position_ids_alone_leak_where_ours_do_not() -> None:
    lm, groups = make_model(LLAMA), make_groups()
    expected = alone(lm, groups)
    pack = make_pack(groups, "shared")
    logits_TV = lm(pack.input_ids_BT, position_ids=pack.position_ids_BT, use_cache=False).logits[0]
    logp_N = logits_TV.log_softmax(dim=-1)[pack.rows_N].gather(1, pack.targets_N[:, None])[:, 0]
    wrong = torch.stack([part.sum() for part in logp_N.split(pack.num_targets_R.tolist())])
    assert relative_error(wrong, expected) > 1e-2
    assert relative_error(ResponseModel(lm)(pack), expected) < 1e-5


# ----------------------------------------------------------------------------------------------------- the probe


def probe(config: PreTrainedConfig) -> tuple[str, str, ResponseModel]:
    model, said = ResponseModel(make_model(config)), []
    return choose_layout(model, model, said.append), "; ".join(said), model


@pytest.mark.parametrize("name", CONFIGS)
def test_models_that_share_prompts_are_found_by_numbers(name: str) -> None:
    layout, said, model = probe(CONFIGS[name])
    assert (layout, said) == ("shared", f"packs that share prompts, {SDPA}")
    assert model.chunked_head


WINDOW = {"sliding_window": 24, "num_key_value_heads": 2}  # longer than every sequence of the probe
NOT_PACKED = {
    "bloom": (
        BloomConfig(**SMALL, hidden_size=32, n_layer=2, n_head=2),
        "attention by segments is not possible: its attention is its own and cannot be set",
    ),
    # its causal mask is a table, shorter than a pack may be
    "gpt_neo": (
        GPTNeoConfig(
            **SMALL,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=24,
            max_position_embeddings=128,
        ),
        "attention by segments is not possible: its attention is its own and cannot be set",
    ),
    "gemma2": (
        Gemma2Config(**SMALL, **HEADS, num_key_value_heads=2, head_dim=8),
        "shared packs are not exact for this model (softcap",
    ),
    # these put the window into the mask alone
    "phimoe": (
        PhimoeConfig(**SMALL, **HEADS, **WINDOW, num_local_experts=4),
        "shared packs are not exact for this model (a window of 24 tokens)",
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**SMALL, **HEADS, **WINDOW, use_sliding_window=True, max_window_layers=2, num_experts=4),
        "shared packs are not exact for this model (a window of 24 tokens)",
    ),
    # chunks, and a temperature that counts the rows of a pack; its decoder returns logits
    "llama4": (
        Llama4TextConfig(
            **SMALL,
            **HEADS,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size_mlp=48,
            num_local_experts=2,
            attention_chunk_size=24,
            layer_types=["chunked_attention", "full_attention"],
            no_rope_layers=[1, 0],
        ),
        "shared packs are not exact for this model (a window of 24 tokens)",
    ),
    "doge": (
        DogeConfig(**SMALL, **HEADS),
        "shared packs are not exact for this model (attention_mask)",
    ),
    "falcon_h1": (
        FalconH1Config(
            **SMALL, **HEADS, num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
        ),
        "shared packs are not exact for this model (log-probabilities off by",
    ),
}
# what transformers 5.0 says
OLDER = {"falcon_h1": "attention by segments is not possible: its layers do not hand on the table of segments"}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_models_that_do_not_are_padded_and_that_is_said(name: str) -> None:
    config, reason = NOT_PACKED[name]
    layout, said, model = probe(config)
    assert layout == "padded"
    assert reason in said or OLDER.get(name, reason) in said
    assert "padded batches: slower" in said
    if name == "doge" and "warning: padded batches are not exact either" in said:
        return  # transformers 5.0 pads it wrongly
    groups = [*make_groups(), (list(range(2, 42)), [list(range(3, 33)), list(range(9, 22))])]
    expected = alone(make_model(config), groups)
    torch.testing.assert_close(response_logp(model, groups, layout, "cpu"), expected, atol=1e-3, rtol=1e-5)


def test_a_decoder_without_hidden_states_is_not_asked_for_them() -> None:
    layout, said, model = probe(
        ModernBertDecoderConfig(**{**SMALL, "bos_token_id": 2}, **HEADS)
    )  # its decoder is its output layer
    assert (layout, model.chunked_head) == ("shared", False), said


@pytest.mark.parametrize("window", [None, 24])
def test_a_window_that_the_attention_is_told_of_keeps_packs(window: int | None) -> None:
    config = MistralConfig(**SMALL, **HEADS, num_key_value_heads=2, sliding_window=window)
    layout, said, model = probe(config)
    assert layout == "shared", said
    groups = [(list(range(2, 42)), [list(range(3, 33)), list(range(9, 22))])]
    torch.testing.assert_close(
        response_logp(model, groups, layout, "cpu"), alone(make_model(config), groups), atol=1e-3, rtol=1e-5
    )


def test_keys_of_another_number_than_queries_are_no_segments() -> None:
    query, keys = torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 6, 4)
    with pytest.raises(TypeError, match="its attention has 6 keys for 5 queries"):
        segment_attention(torch.nn.Identity(), query, keys, keys, None, segments=segment_table([(3, [2])]))


def test_plain_packs_come_before_padded_batches() -> None:
    model, said = ResponseModel(make_model(LLAMA)), []

    def no_sharing(pack: logprobs.Pack) -> torch.Tensor:
        shares = pack.segments is not None and max(pack.segments.prefixes) >= 0
        return model(pack) + float(shares)

    assert choose_layout(model, no_sharing, said.append) == "plain"
    (sentence,) = said
    assert sentence.startswith("shared packs are not exact for this model (log-probabilities off by ")
    assert sentence.endswith(f"; packs of separate sequences, {SDPA}")


def test_a_model_whose_padding_leaks_is_told_of() -> None:
    model, said = ResponseModel(make_model(LLAMA)), []
    assert choose_layout(model, lambda pack: model(pack) + len(pack.num_targets_R), said.append) == "padded"
    assert said[0].startswith("warning: padded batches are not exact either (log-probabilities off by")
    assert "company changes a text" in said[0]


def test_a_head_that_scales_its_logits_is_not_taken_in_chunks() -> None:
    config = GraniteConfig(**SMALL, **HEADS, num_key_value_heads=2, logits_scaling=4.0)
    layout, said, model = probe(config)
    assert layout == "shared"
    assert "all logits of a pack at once, since the head is not plainly linear" in said
    model.head_bytes = 1
    groups = make_groups()
    expected = alone(make_model(config), groups)
    torch.testing.assert_close(response_logp(model, groups, layout, "cpu"), expected, atol=1e-4, rtol=1e-5)


def test_a_soft_cap_far_above_the_logits_is_no_linear_head_either() -> None:
    config = Gemma2Config(**SMALL, **HEADS, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=None)
    model = ResponseModel(make_model(config).to(torch.bfloat16))
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.mul_(0.01)
    assert choose_layout(model, model, [].append) == "shared"
    assert not model.chunked_head, "training lets logits grow"


# ----------------------------------------------------------------------------------------------------- the tables


def test_table_of_two_groups() -> None:
    table = segment_table([(3, [2, 1]), (2, [2])])
    assert table.lengths == (3, 2, 1, 4)
    assert table.prefixes == (-1, 0, 0, -1)
    assert table.query_offsets.tolist() == [0, 3, 5, 6, 10]
    assert table.key_offsets.tolist() == [0, 3, 8, 12, 16]
    assert table.key_rows.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9]
    assert (table.longest_query, table.longest_key) == (4, 5)


def test_pack_of_a_pair() -> None:
    pack = make_pack([([10, 11, 12], [[20, 21], [30]])], "shared")
    assert pack.input_ids_BT.tolist() == [[10, 11, 12, 20, 21, 30]]
    assert pack.position_ids_BT.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert pack.rows_N.tolist() == [2, 3, 2], "the last row of the prompt predicts the first token of both"
    assert pack.targets_N.tolist() == [20, 21, 30]
    assert pack.num_targets_R.tolist() == [2, 1]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 300), st.integers(1, 4))
def test_items_are_divided_once_each_within_the_budget(sizes: list[int], budget: int, at_least: int) -> None:
    bins = balanced_within(sizes, budget, at_least)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    assert len(bins) >= at_least
    assert all(len(items) < 2 or sum(sizes[item] for item in items) <= budget for items in bins)


def test_long_pairs_are_divided_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(packs, "balanced", lambda sizes, n: [tried.append(n), balanced(sizes, n)][1])
    assert len(balanced_within([2100] * 300, 4096)) == 300
    assert tried == [300]


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), min_size=1, max_size=40),
    st.integers(1, 200),
)
def test_responses_are_scored_once_each_with_their_prompt(rows: list[tuple[int, int]], budget: int) -> None:
    sizes = [(10 + prompt, size) for prompt, size in rows]
    packs = groups_in_order([prompt for prompt, _ in rows], sizes, budget)
    assert sorted(row for pack in packs for group in pack for row in group) == list(range(len(rows)))
    for pack in packs:
        assert all(len({rows[row][0] for row in group}) == 1 for group in pack)
        tokens = sum(sizes[group[0]][0] + sum(sizes[row][1] for row in group) for group in pack)
        assert tokens <= budget or len([row for group in pack for row in group]) == 1
    groups = [group for pack in packs for group in pack]
    if budget > 40 + 14:  # a prompt is repeated only where a pack ends
        assert len(groups) <= len({prompt for prompt, _ in rows}) + len(packs)
        assert all(len(a) < len(rows) for a, _ in pairwise(groups))
