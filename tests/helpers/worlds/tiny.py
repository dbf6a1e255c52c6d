"""Tiny language models and classifiers, made in seconds without a download: for all that loads a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<user>{{ m['content'] }}{% else %}<assistant>{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL_TOKENS = ("<pad>", "<unk>", "<user>", "<assistant>", "</s>")


def make_tiny_lm(
    directory: Path, vocab_words: Sequence[str], context: int = 64, seed: int = 0, **config_options: int
) -> Path:
    """Write a 2-layer, 32-wide Llama with a tokenizer of ``vocab_words`` as a Hugging Face directory; return it."""
    from transformers import LlamaForCausalLM

    return _save(LlamaForCausalLM, directory, vocab_words, context, seed, **config_options)


def make_tiny_classifier(
    directory: Path,
    vocab_words: Sequence[str],
    context: int = 64,
    seed: int = 0,
    num_labels: int = 1,
    **config_options: int,
) -> Path:
    """Write a sequence classifier of the same size with ``num_labels`` outputs; return its directory."""
    from transformers import LlamaForSequenceClassification

    return _save(
        LlamaForSequenceClassification, directory, vocab_words, context, seed, num_labels=num_labels, **config_options
    )


def make_tiny_tokenizer(directory: Path, vocab_words: Sequence[str]) -> int:
    """Write a tokenizer that splits at spaces, one token per word, with a chat template; return its vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *vocab_words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return len(vocabulary)


def _save(
    kind: type, directory: Path, vocab_words: Sequence[str], context: int, seed: int, **config_options: int
) -> Path:
    import torch
    from transformers import LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    vocab_size = make_tiny_tokenizer(directory, vocab_words)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index("</s>"),
        tie_word_embeddings=False,
        **config_options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.save_pretrained(directory)
    return directory
