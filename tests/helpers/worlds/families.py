"""Families of chat templates and tokenizers, made locally in milliseconds, each with what its model writes.

``reply`` says by hand what a model of the family samples after its prompt, around the text: the templates' makers say
so in their model cards, and no code of the product takes part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = [
    "the quick brown fox jumps over the lazy dog . how do I bake bread ? mix flour and water , then wait .",
    "user assistant system tool think answer safe unsafe yes no please I cannot help with that USER: ASSISTANT:",
] * 10
ALTERNATE = (
    "{% for m in messages[first:] %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}" + ALTERNATE + "{% for m in messages[first:] %}"
    "{% set c = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' + m['content'] if first and loop.first "
    "else m['content'] %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + c.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + c.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% set first = 0 %}{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_SYSTEM = (  # the system message goes into the last turn, if that is the user's
    "{% set first = 1 if messages[0]['role'] == 'system' else 0 %}{{ bos_token }}" + ALTERNATE +
    "{% for m in messages[first:] %}{% if m['role'] == 'user' %}{{ '[INST] ' + (messages[0]['content'] + '\n\n' "
    "if loop.last and first else '') + m['content'] + '[/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)  # fmt: skip
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
QWEN3 = (
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}{%- set thought = '' %}{%- set content = m.content %}{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}"
    "{{- content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = 1 if messages[0]['role'] == 'system' else 0 %}" + ALTERNATE +
    "{% for m in messages[first:] %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ (messages[0]['content'] + '\n\n' if first and loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
GEMMA2 = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + GEMMA
PHI3 = (
    "{% for m in messages %}{% if m['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' + '\n' }}{% endif %}{{ '\n' }}{% endfor %}"
)
ROLES = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
NO_SYSTEM = (  # what case 05 met: other roles are left out in silence
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A family: its tokenizer, its template, and by hand what its model writes.

    Attributes:
        kind: 'bytes' (byte-level BPE), 'pieces' (sentencepiece with byte fallback), 'unigram' (T5), 'words' (BERT).
        chat: The chat template; None with a plain ``template``.
        reply: What the model samples after its prompt; ``{}`` is the text.
        eos: The tokenizer's end token.
        ends: Further end tokens, named by generation_config.json.
        refuses: Conversations that must be refused, of :data:`CONVERSATIONS`.
    """

    kind: str
    chat: str | None
    reply: str
    eos: str = "</s>"
    bos: str | None = "<s>"
    pad: str | None = "<pad>"
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    adds_bos: bool = False
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    refuses: frozenset[str] = frozenset()


ONE_TURN = frozenset({"system", "multi-turn", "tool turn"})
FAMILIES = {
    "llama2": Family("pieces", LLAMA2, " {} </s>", refuses=frozenset({"tool turn"})),
    "llama3": Family(
        "bytes", LLAMA3, "{}<|eot_id|>", "<|end_of_text|>", "<|begin_of_text|>", adds_bos=True,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ends=("<|eot_id|>",),
    ),
    "mistral": Family("pieces", MISTRAL, " {}</s>", adds_bos=True, refuses=frozenset({"system", "tool turn"})),
    "mistral with system": Family("pieces", MISTRAL_SYSTEM, " {}</s>", refuses=frozenset({"tool turn"})),
    "chatml": Family("bytes", CHATML, "{}<|im_end|>", "<|im_end|>", None, "<|endoftext|>", special=("<|im_start|>",)),
    "chatml, end token not special": Family(
        "bytes", CHATML, "{}<|im_end|>", special=("<|im_start|>",), plain=("<|im_end|>",), ends=("<|im_end|>",)
    ),
    "qwen2": Family(
        "bytes", QWEN2, "{}<|im_end|>", "<|endoftext|>", None, "<|endoftext|>",
        special=("<|im_start|>", "<|im_end|>"), ends=("<|im_end|>",),
    ),
    "qwen3": Family(
        "bytes", QWEN3, "{}<|im_end|>", "<|im_end|>", None, "<|endoftext|>", special=("<|im_start|>",),
        plain=("<think>", "</think>"),
    ),
    "qwen3 without thinking": Family(
        "bytes", QWEN3, "{}<|im_end|>", "<|im_end|>", None, "<|endoftext|>", special=("<|im_start|>",),
        plain=("<think>", "</think>"), options={"enable_thinking": False},
    ),
    "gemma": Family(
        "pieces", GEMMA, "{}<end_of_turn>", "<eos>", "<bos>", special=("<start_of_turn>", "<end_of_turn>"),
        ends=("<end_of_turn>",), adds_bos=True, refuses=frozenset({"tool turn"}),
    ),
    "gemma2": Family(
        "pieces", GEMMA2, "{}<end_of_turn>", "<eos>", "<bos>", special=("<start_of_turn>", "<end_of_turn>"),
        ends=("<end_of_turn>",), adds_bos=True, refuses=frozenset({"system", "tool turn"}),
    ),
    "phi3": Family(
        "pieces", PHI3, "{}<|end|>", "<|endoftext|>", special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ends=("<|end|>",), refuses=frozenset({"tool turn"}),
    ),
    "deepseek-r1": Family(
        "bytes", DEEPSEEK_R1, "{}<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>",
        special=("<｜User｜>", "<｜Assistant｜>"), plain=("<think>", "</think>"), adds_bos=True,
        refuses=frozenset({"tool turn"}),
    ),
    "zephyr": Family("pieces", ZEPHYR, "{}</s>", refuses=frozenset({"tool turn"})),
    "vicuna": Family(
        "pieces", None, "{}</s>", adds_bos=True, template="USER: {prompt} ASSISTANT: ", refuses=ONE_TURN
    ),
    "vicuna, beginning spelled out": Family(
        "pieces", None, "{}</s>", adds_bos=True, template="<s>USER: {prompt} ASSISTANT: ", refuses=ONE_TURN
    ),
    "gpt2": Family(
        "bytes", None, "{}<|endoftext|>", "<|endoftext|>", "<|endoftext|>", None, template="{prompt}\n",
        refuses=ONE_TURN,
    ),
    "t5": Family("unigram", ROLES, " {}</s>", bos=None, refuses=frozenset({"emoji", "right to left"})),
    "no system": Family("bytes", NO_SYSTEM, "{}</s>", refuses=frozenset({"system", "tool turn"})),
}  # fmt: skip


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


CONVERSATIONS: dict[str, tuple[list[dict[str, str]], str]] = {
    "single turn": (_user("how do I bake bread ?"), "mix flour and water , then wait ."),
    "system": ([{"role": "system", "content": "answer yes or no"}, *_user("bread ?")], "yes"),
    "multi-turn": ([*_user("bread ?"), {"role": "assistant", "content": "yes"}, *_user("how ?")], "then wait ."),
    "tool turn": (
        [*_user("bread ?"), {"role": "assistant", "content": "wait"}, {"role": "tool", "content": "flour and water"}],
        "mix",
    ),
    "empty prompt": (_user(""), "I cannot help with that"),
    "special tokens": (_user("</s> <|im_end|> [INST] <|eot_id|> how ?"), "no , please wait"),
    "trailing spaces": (_user("how do I bake bread ?  "), "mix flour  "),
    "emoji": (_user("bread 🍞 ?"), "yes 👩‍🍳 !"),
    "right to left": (_user("كيف أخبز الخبز؟"), "اخلط الدقيق والماء"),
}


def make_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the family, trained on a few sentences."""
    special = list(dict.fromkeys(t for t in (family.pad, family.bos, family.eos, *family.special) if t))
    inner = {"bytes": _bytes, "pieces": _pieces, "unigram": _unigram}[family.kind](special)
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.plain])
    if family.adds_bos:
        number = inner.token_to_id(family.bos)
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=[(family.bos, number)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=family.bos, eos_token=family.eos, pad_token=family.pad,
        unk_token="<unk>" if family.kind != "bytes" else None, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = family.chat
    return tokenizer


def make_model(directory: Path, family: Family, kind: Any = LlamaForCausalLM, seed: int = 0, **config: Any) -> Path:
    """Write a tokenizer of the family and a random Llama of two layers; return the directory."""
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(directory)
    options = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(LlamaConfig(**{**options, **config}))
    model.save_pretrained(directory)
    if family.ends and kind is LlamaForCausalLM:
        ids = [tokenizer.eos_token_id, *map(tokenizer.convert_tokens_to_ids, family.ends)]
        GenerationConfig(eos_token_id=ids).save_pretrained(directory)
    return directory


def _bytes(special: Sequence[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False))
    return inner


def _pieces(special: Sequence[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False))
    trained = json.loads(inner.to_str())["model"]
    vocabulary = dict(trained["vocab"])
    for token in (f"<0x{number:02X}>" for number in range(256)):
        vocabulary[token] = len(vocabulary)
    merges = [tuple(merge) for merge in trained["merges"]]
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return inner


def _unigram(special: Sequence[str]) -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    inner.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    )
    return inner
