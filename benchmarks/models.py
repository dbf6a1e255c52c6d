"""Models of the benchmarks: a given directory, or a shape with random weights; and a classifier on its body.

python benchmarks/models.py random-7b --directory /dev/shm/models --device cuda
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pairs import DATA

SMALL = DATA / "models" / "stories3M-qa-sft"
# fields of LlamaConfig, and the dtype; a tokenizer with fewer ids than the vocabulary will do
RANDOM: dict[str, tuple[dict[str, int | bool], str]] = {
    "random-7b": ({"max_position_embeddings": 4096, "pad_token_id": 0}, "bfloat16"),  # Llama-2-7B
    "random-3b": (  # Llama-3.2-3B
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    "random-1b": (  # Llama-3.2-1B
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        "bfloat16",
    ),
    # the small model's body under a head of more weights than the body, as Gemma 3 270M has (62 %; here 57 %)
    "random-wide-head": (
        {
            "vocab_size": 16384,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        "float32",
    ),
    # nothing is learnt from its speed: the GPU's script on a CPU
    "random-tiny": (
        {
            "vocab_size": 6000,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": 0,
        },
        "float32",
    ),
}


def language_model(name: str, directory: Path, device: str = "cpu") -> str:
    """Return the directory of a model.

    Args:
        name: A directory, or a name of ``RANDOM``.
        directory: Where the latter is written.
        device: Draws the weights: 7B takes minutes on a CPU and a second on a GPU.
    """
    if name not in RANDOM:
        return name
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    fields, dtype = RANDOM[name]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.save_pretrained(directory / name)
    torch.set_default_dtype(torch.float32)
    AutoTokenizer.from_pretrained(SMALL).save_pretrained(directory / name)
    return str(directory / name)


def write_classifier(model: str, directory: Path) -> str:
    """Write the body of a causal language model with a random head of one output; return the directory."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, problem_type="regression", dtype="auto"
    )
    torch.nn.init.normal_(classifier.score.weight, std=0.1)
    classifier.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return str(directory)


def main() -> None:
    """Write models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=list(RANDOM), metavar="NAME")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    for name in arguments.names:
        print(language_model(name, arguments.directory, arguments.device))


if __name__ == "__main__":
    main()
