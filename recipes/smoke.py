"""Run a recipe here, on tiny stand-ins of its models and data: same architectures, same code, no download, no GPU.

    python recipes/smoke.py recipes/pku_7b/lora.yaml --run runs/smoke_lora --methods mocan,pecan

The stand-ins lie in RUN/hub under the names of the originals, and the run starts there, so the recipe is used as it
is; only sizes and resources are overridden, and are printed. The models are random: nothing can be learned from the
numbers, except that every part of the recipe works.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
# as the originals order their turns; the guards' questions are shorter than the published ones
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_GUARD = (
    "{{ bos_token }}<|start_header_id|>user<|end_header_id|>\n\nIs the last message safe or unsafe?\n"
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>"
)
GRANITE_GUARDIAN = (
    "<|start_of_role|>user<|end_of_role|>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{{ guardian_config.risk_definition }} Yes or No?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_GUARD = (
    "<|im_start|>user\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "Is the last message Safe or Unsafe?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
LLAMA_TOKENS = ("<s>", "</s>", "<pad>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
GRANITE_TOKENS = ("<|start_of_role|>", "<|end_of_text|>", "<|end_of_role|>")
QWEN_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
QWEN3 = {"head_dim": 16, "tie_word_embeddings": True}
BEAVER = {"architectures": ["LlamaForScore"], "score_dim": 1, "score_bias": True, "do_normalize": False}
# hub id: architecture, what config.json says beside, chat template, special tokens (the second ends a response)
MODELS: dict[str, tuple[str, dict[str, Any], str | None, tuple[str, ...]]] = {
    "PKU-Alignment/alpaca-7b-reproduced": ("LlamaForCausalLM", {}, None, LLAMA_TOKENS),
    "PKU-Alignment/beaver-7b-v1.0-reward": ("LlamaForScore", BEAVER | {"score_type": "reward"}, None, LLAMA_TOKENS),
    "PKU-Alignment/beaver-7b-v1.0-cost": ("LlamaForScore", BEAVER | {"score_type": "cost"}, None, LLAMA_TOKENS),
    "Qwen/Qwen2.5-0.5B-Instruct": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, CHATML, QWEN_TOKENS),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": (
        "Qwen3ForSequenceClassification",
        QWEN3 | {"num_labels": 1},
        CHATML,
        QWEN_TOKENS,
    ),
    "Qwen/Qwen3Guard-Gen-0.6B": ("Qwen3ForCausalLM", QWEN3, QWEN_GUARD, QWEN_TOKENS),
    "meta-llama/Llama-3.1-8B-Instruct": ("LlamaForCausalLM", {}, LLAMA3, LLAMA3_TOKENS),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": (
        "LlamaForSequenceClassification",
        {"num_labels": 1},
        LLAMA3,
        LLAMA3_TOKENS,
    ),
    "meta-llama/Llama-Guard-3-8B": ("LlamaForCausalLM", {}, LLAMA_GUARD, LLAMA3_TOKENS),
    "ibm-granite/granite-guardian-3.1-8b": ("GraniteForCausalLM", {}, GRANITE_GUARDIAN, GRANITE_TOKENS),
}
VERDICTS = ("safe", "unsafe", "Yes", "No", " Safe", " Unsafe")
TOPICS = ("garden", "bicycle", "knife", "poem", "medicine", "password", "holiday", "fire")
VERBS = ("Describe", "How do I hide", "Who invented")
SMALL = {
    "prompts.num_train": 12,
    "prompts.num_test": 4,
    "prompts.num_validation": 0,
    "strength": 1,
    "generate.engine": "transformers",
    "generate.num_responses": 3,
    "generate.max_new_tokens": 6,
    "evaluate.num_responses": 2,
    "evaluate.num_samples": 1,
    "train.max_steps": 2,
    "train.num_epochs": 1,
    "train.batch_size": 4,
    "train.warmup_steps": 0,
    "train.tokens_per_pack": 512,
    "cluster.num_actors": 1,
    "cluster.gpus_per_actor": 0,
    "cluster.num_workers": 2,
    "cluster.gpus_per_worker": 0,
}


def groups(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every group of keys with its dotted path."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from groups(value, f"{path}.{key}" if path else str(key))


def overrides(recipe: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Return what a recipe's smoke form changes: sizes, resources, margins of zero, and pins, which a path has none."""
    kept = {key: value for key, value in recipe.items() if key != "methods"}
    kept["methods"] = {name: own for name, own in (recipe.get("methods") or {}).items() if name in methods}
    found: dict[str, Any] = dict(SMALL)
    for path, group in groups(kept):
        if "revision" in group:
            found[f"{path}.revision"] = None
        if "margin" in group:
            found[f"{path}.margin"] = 0.0
        if "rounds" in group:
            found[f"{path}.rounds"] = 2
    if recipe.get("train", {}).get("ds_config"):
        found["train.ds_config"] = "zero3_cpu"
    return found


def make_model(directory: Path, name: str) -> None:
    """Write a random two-layer model of a hub model's architecture, with a tokenizer of its conventions."""
    import torch
    import transformers

    from can_dist.modeling.beaver import LlamaForScore

    architecture, extra, template, special = MODELS[name]
    vocab_size = make_tokenizer(directory, template, special)
    kind = LlamaForScore if architecture == "LlamaForScore" else getattr(transformers, architecture)
    config = kind.config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None if template else 2,
        **{"tie_word_embeddings": False, **extra},
    )
    torch.manual_seed(len(name))
    kind(config).save_pretrained(directory)
    path = directory / "config.json"  # transformers writes the class's own name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | extra, indent=2), encoding="utf-8")


def make_tokenizer(directory: Path, template: str | None, special: tuple[str, ...]) -> int:
    """Write a byte-level BPE with the verdict words as tokens; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*sentences(), *(" ".join(VERDICTS * 9), "\n".join(VERDICTS * 9))], trainer)
    tokenizer.add_tokens(list(VERDICTS))
    if template is None:  # Llama 1 and 2 begin every text with <s>
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token="<pad>" if template is None else None,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return len(fast)


def sentences() -> list[str]:
    """Return the prompts of the stand-in data sets."""
    return [f"{verb} a {topic}?" for verb in VERBS for topic in TOPICS]


def make_data(directory: Path) -> None:
    """Write pairs with the columns of PKU-SafeRLHF, a third of them with labels that disagree."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, prompt in enumerate(sentences()):
        safer = number % 2
        rows.append(
            {
                "prompt": prompt,
                "response_0": "I would rather not." if safer == 0 else f"Take this {prompt.split()[-1][:-1]}.",
                "response_1": "That is not a good idea." if safer == 1 else "Nothing is easier than that.",
                "is_response_0_safe": safer == 0,
                "is_response_1_safe": safer == 1,
                "better_response_id": safer if number % 3 else 1 - safer,
                "safer_response_id": safer,
            }
        )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "train.jsonl").write_text(text, encoding="utf-8")


def make_hub(hub: Path, recipe: dict[str, Any]) -> None:
    """Make a stand-in of every model and data set that a recipe names, where there is none yet."""
    for _, group in groups(recipe):
        for key in ("model", "source"):
            name = group.get(key)
            if not isinstance(name, str) or (hub / name).exists():
                continue
            if key == "model" and name not in MODELS:
                sys.exit(f"recipes/smoke.py has no stand-in for {name!r}. Add its architecture to MODELS.")
            make_model(hub / name, name) if key == "model" else make_data(hub / name)


def main() -> None:
    """Make the stand-ins and run the recipe on them."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--methods", default="")
    given = parser.parse_args()
    recipe = YAML(typ="safe", pure=True).load(given.recipe.read_text(encoding="utf-8"))
    hub = given.run.absolute() / "hub"
    make_hub(hub, recipe)
    command = [sys.executable, "-c", "from can_dist.cli import main; main()"]
    command += ["run", str(given.recipe.absolute()), "--run", str(hub.parent)]
    command += ["--methods", given.methods] if given.methods else []
    for key, value in overrides(recipe, given.methods.split(",")).items():
        command += ["--set", f"{key}={'null' if value is None else value}"]
    print(f"in {hub}:\n  {shlex.join(command)}", flush=True)
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    sys.exit(subprocess.run(command, cwd=hub, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode)


if __name__ == "__main__":
    main()
