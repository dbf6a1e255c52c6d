"""A reader of the README with models and data of their own: for what its configuration and its commands do."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors.torch import load_file, save_file
from tiny import make_tiny_classifier, make_tiny_lm

WORDS = [f"w{i}" for i in range(12)]
NUM_PROMPTS = 90
README = Path(__file__).resolve().parents[3] / "README.md"


def widen_scores(directory: Path, factor: float = 120.0) -> None:
    """Give a random classifier scores whose spread is about one."""
    weights = load_file(directory / "model.safetensors")
    weights["score.weight"] *= factor
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def readme_block(language: str, number: int = 0) -> str:
    """Return the README's n-th fenced block of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)[number]


def reader_folder(folder: Path) -> Path:
    """Write tiny models and data under the README's names, and its configuration as ``my.yaml``; return the folder."""
    make_tiny_lm(folder / "my-model", WORDS, context=160)
    for name, seed in (("my-reward-model", 1), ("my-cost-model", 2)):
        widen_scores(make_tiny_classifier(folder / name, WORDS, context=160, seed=seed))
    prompts = [f"{a} {b}" for a in WORDS[:10] for b in WORDS[3:]]
    (folder / "my_prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (folder / "my.yaml").write_text(readme_block("yaml"))
    return folder
