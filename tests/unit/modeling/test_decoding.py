"""Responses decoded together are those that each would be alone: the same draws, to the token, in float32.

The oracles are transformers' ``generate`` on whole batches, and a pass over the whole text for every token.
"""

from __future__ import annotations

from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import make_tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from can_dist.config.sections import Generate
from can_dist.modeling import decoding, sampling

WORDS = [f"w{i}" for i in range(27)]
END, PAD = 4, 0
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 32},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "phi": {},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
LONG = 16


def model_of(kind: str, **options: Any) -> Any:
    """A random model whose next tokens depend much on what is before them, and where."""
    sizes = {} if kind == "gpt2" else SIZES
    config = AutoConfig.for_model(kind, **{**sizes, **ARCHITECTURES.get(kind, {}), **options})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, END, PAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            weight.data.normal_(std=0.6 if weight.dim() > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(directory, WORDS)
    return AutoTokenizer.from_pretrained(directory)


def asked_for(num_prompts: int, num_responses: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 1 to 12 tokens, each as often as it has responses, and the seeds."""
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 13, (num_prompts,), generator=random).tolist()
    prompts = [torch.randint(5, 32, (length,), generator=random).tolist() for length in lengths]
    pairs = [(p, k) for p in range(num_prompts) for k in range(num_responses)]
    return [prompts[p] for p, _ in pairs], [sampling.row_seed(7, str(p), k) for p, k in pairs]


def by_generate(model: Any, tokenizer: Any, prompts: Any, seeds: Any, options: Generate) -> Any:
    """What ``generate`` gives, in batches of whole prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "serves", lambda _: False)
        return sampling.sample(model, tokenizer, prompts, seeds, options, [END])


def assert_same(model: Any, tokenizer: Any, options: Generate, num_prompts: int = 12) -> list[tuple[list[int], str]]:
    assert decoding.serves(model)
    prompts, seeds = asked_for(num_prompts, options.num_responses)
    expected = by_generate(model, tokenizer, prompts, seeds, options)
    samples = sampling.sample(model, tokenizer, prompts, seeds, options, [END])
    assert samples == expected
    return samples


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_draws_of_every_architecture_are_those_of_generate(kind: str, tokenizer: Any) -> None:
    model = model_of(kind)
    if "prepare_inputs_for_generation" in vars(type(model)):
        pytest.skip(f"this version of transformers prepares the inputs of {kind} in a way of its own")
    with torch.no_grad():
        spread = float(model(torch.arange(5, 25)[None]).logits.std())
    options = Generate(num_responses=10, batch_prompts=4, max_new_tokens=LONG, temperature=min(spread / 2, 10))
    lengths = [len(tokens) for tokens, _ in assert_same(model, tokenizer, options)]
    assert len(set(lengths)) > LONG / 4, "the lengths must differ for rows to come and go"


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.3},
        {"top_p": 0.5},
        {"temperature": 1.7, "top_p": 0.9},
        {"stop": ("w3", "w5 w9")},
        {"max_new_tokens": 1},
        {"num_responses": 1, "batch_prompts": 8},
        {"tokens_at_once": 200},
        {"tokens_at_once": 1},
    ],
    ids=str,
)
def test_draws_are_those_of_generate_with_every_option(changes: dict[str, Any], tokenizer: Any) -> None:
    options = Generate(**{"num_responses": 10, "batch_prompts": 4, "max_new_tokens": LONG, **changes})
    samples = assert_same(model_of("llama"), tokenizer, options, num_prompts=2 if options.tokens_at_once == 1 else 12)
    if options.stop:
        texts = [tokenizer.decode(tokens) for tokens, _ in samples]
        assert sum("w3" in text or "w5 w9" in text for text in texts) > 10


def test_draws_are_those_of_one_whole_pass_per_token(tokenizer: Any) -> None:
    """No keys and values are kept, nothing is padded, and the noise is written out."""
    model, options = model_of("llama"), Generate(num_responses=4, batch_prompts=2, max_new_tokens=LONG)
    prompts, seeds = asked_for(4, 4)
    samples = sampling.sample(model, tokenizer, prompts, seeds, options, [END])
    for prompt, seed, (tokens, _) in zip(prompts, seeds, samples, strict=True):
        generator, expected = torch.Generator().manual_seed(seed), list[int]()
        while len(expected) < LONG and END not in expected:
            with torch.no_grad():
                logits_V = model(torch.tensor([prompt + expected])).logits[0, -1]
            exponential_V = torch.empty(len(logits_V)).exponential_(generator=generator)
            expected.append(int((logits_V - exponential_V.log()).argmax()))
        assert tokens == expected


class Passes:
    """The shapes of what a model is given: (rows, columns, columns before)."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int, int]] = []
        plain = model.forward

        @wraps(plain)
        def forward(input_ids: Any, **given: Any) -> Any:
            cache = given.get("cache", given.get("past_key_values"))  # the name before transformers 5.24
            self.shapes.append((*input_ids.shape, cache.get_seq_length()))
            return plain(input_ids=input_ids, **given)

        monkeypatch.setattr(model, "forward", forward)


@pytest.fixture
def passes(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = model_of("llama")
    return SimpleNamespace(model=model, seen=Passes(model, monkeypatch).shapes)


def test_prompt_is_read_once_and_rows_that_end_make_room(passes: Any, tokenizer: Any) -> None:
    """12 responses of a prompt at 8 at a time: the last 4 of a prompt enter with the first of the next."""
    options = Generate(num_responses=12, max_new_tokens=LONG, batch_prompts=1, tokens_at_once=8 * (12 + LONG))
    prompts, seeds = asked_for(10, 12)
    samples = sampling.sample(passes.model, tokenizer, prompts, seeds, options, [END])
    read = [(rows, columns) for rows, columns, before in passes.seen if before == 0]
    assert sum(rows for rows, _ in read) == 10
    stepped = [rows for rows, columns, before in passes.seen if before > 0]
    assert max(stepped) == 8
    kept = sum(len(tokens) - 1 for tokens, _ in samples)
    assert kept <= sum(stepped) < 1.2 * kept
    assert max(before for *_, before in passes.seen) < 12 + 2 * LONG, "columns of nobody are left out"


def test_stop_string_is_followed_by_no_end_token_where_padding_is_one(tokenizer: Any) -> None:
    """Llama 3's tokenizer has no padding token, so that it is the end token: ``generate`` writes it behind a stop."""
    padded = SimpleNamespace(pad_token_id=END, decode=tokenizer.decode, batch_decode=tokenizer.batch_decode)
    options = Generate(num_responses=10, batch_prompts=4, max_new_tokens=LONG, stop=("w3",))
    prompts, seeds = asked_for(10, 10)
    for sampled in (by_generate, lambda *given: sampling.sample(*given, [END])):
        samples = sampled(model_of("llama"), padded, prompts, seeds, options)
        stopped = [tokens for tokens, _ in samples if "w3" in tokenizer.decode(tokens)]
        assert len(stopped) > 10
        assert all(tokenizer.decode(tokens[-1:]) == "w3" for tokens in stopped)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("phi3", {}),  # inputs of its own
        ("mamba", {"state_size": 4}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("gemma3n_text", None),  # layers share keys
        ("t5", None),
    ],
)
def test_models_with_another_memory_are_left_to_generate(kind: str, options: Any) -> None:
    if options is None:
        config = AutoConfig.for_model(kind)
        from transformers import AutoModelForSeq2SeqLM

        auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
        with torch.device("meta"):
            model = auto.from_config(config)
    else:
        model = model_of(kind, **options)
    assert not decoding.serves(model)


def test_model_that_is_left_to_generate_is_sampled_batch_by_batch(tokenizer: Any) -> None:
    model, options = model_of("phi3"), Generate(num_responses=3, batch_prompts=2, max_new_tokens=LONG)
    prompts, seeds = asked_for(5, 3)
    together = sampling.sample(model, tokenizer, prompts, seeds, options, [END])
    for prompt, seed, response in zip(prompts, seeds, together, strict=True):
        assert sampling.sample(model, tokenizer, [prompt], [seed], options, [END]) == [response]


@pytest.mark.parametrize(("kind", "told"), [("llama", [1] * 15), ("phi3", [6, 6, 3])])
def test_responses_that_end_are_told(kind: str, told: list[int], tokenizer: Any) -> None:
    options = Generate(num_responses=3, batch_prompts=2, max_new_tokens=LONG)
    heard: list[int] = []
    sampling.sample(model_of(kind), tokenizer, *asked_for(5, 3), options, [END], told=heard.append)
    assert heard == told


def test_layer_that_was_copied_gives_its_memory_back_and_a_prompt_stays() -> None:
    rows, _ = decoding.Decoder(model_of("llama")).read([[5, 6, 7], [8]])
    first = decoding.gather([(rows, [0, 0, 1])])
    second = decoding.gather([(first, [2, 0]), (rows, [1])])
    assert [layer.keys.shape for layer in rows.layers] == [(2, 2, 3, 8)] * 2
    assert all(layer.keys.numel() == 0 and layer._memory[0].numel() == 0 for layer in first.layers)
    assert second.num_own_R.tolist() == [1, 3, 1]
    for layer, prompts in zip(second.layers, rows.layers, strict=True):
        assert torch.equal(layer.keys[1], prompts.keys[0])
        assert torch.equal(layer.values[[0, 2], :, -1], prompts.values[[1, 1], :, -1])


def test_rows_at_once_are_those_of_some_prompts_within_a_number_of_tokens() -> None:
    options = Generate(num_responses=128, batch_prompts=4, max_new_tokens=512)
    assert sampling.rows_at_once(options, 88) == 32768 // 600
    assert sampling.rows_at_once(options.model_copy(update={"num_responses": 8}), 88) == 32
