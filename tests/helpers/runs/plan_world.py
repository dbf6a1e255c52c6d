"""Real trainings whose peak memory is measured, of random Llamas of a few shapes: for what `plan` predicts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny import make_tiny_tokenizer
from train_world import WORDS, World, launch, make_rows, token_ids

PROMPT_WORDS = 30  # with the two tokens of the template: the prompt that the plan assumes
RESPONSE_TOKENS = 120
PAIRS = 2  # of a pack


def make_model(directory: Path, vocab: int, hidden: int, layers: int, heads: int, key_heads: int, inner: int) -> Path:
    """Write a random Llama whose vocabulary is larger than its tokenizer's; return its directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_tokenizer(directory, WORDS)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def long_rows(num_pairs: int) -> list[dict]:
    """Pairs whose tokens are nearly all in their responses; nothing is learnt, so ln π_ref may be anything."""
    rows = make_rows(num_pairs, 0)
    for number, row in enumerate(rows):
        row["messages"] = [{"role": "user", "content": " ".join(WORDS[:1] * PROMPT_WORDS)}]
        words = [WORDS[(number + position) % len(WORDS)] for position in range(RESPONSE_TOKENS)]
        row["token_ids"] = [token_ids(words), token_ids(words[::-1])]
        row["texts"] = [" ".join(words), " ".join(words[::-1])]
        row["logp_ref"] = [0.0, 0.0]
    return rows


def measured_peaks(root: Path, reference: Path, num_ranks: int, **train: object) -> list[int]:
    """Train two steps; return the peak of every rank in bytes, above the rank before it loads the model."""
    start = root / "start"  # another path than the reference's: the check of the first loss does not apply
    start.symlink_to(reference)
    world = World(root, reference, long_rows(2 * PAIRS * num_ranks))
    spec = world.spec(
        "measured",
        start=start,
        learning_rate=1e-6,
        num_epochs=1,
        batch_size=PAIRS * num_ranks,
        tokens_per_pack=PAIRS * tokens_of_a_pair(),
        **train,
    )
    file = root / "measured" / "peak"
    outcome = launch(spec, num_ranks, hook=f"memory:{file}", timeout=400)
    assert outcome.codes == [0] * num_ranks, outcome.output
    return [json.loads(Path(f"{file}{rank}").read_text())["peak"] for rank in range(num_ranks)]


def tokens_of_a_pair() -> int:
    return PROMPT_WORDS + 2 + 2 * RESPONSE_TOKENS
