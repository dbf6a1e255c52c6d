"""Scoring beside transformers' text-classification pipeline and the official CAN code's habit: 16 responses per prompt.

    python benchmarks/score_vs_pipeline.py                 # one core; benchmarks/results/score_vs_pipeline.*
    python benchmarks/score_vs_pipeline.py --device cuda --model random-7b --num-prompts 512

All in one process, in turn, on the same texts and the same weights, tokenising included except for the last:

- ours: the product's scorer, ``load_scorer(spec, precision).score(responses)``;
- pipeline: texts sorted by length, the best batch size of a search by CPU seconds;
- padded to 512: every text padded to 512 tokens, batches of 16;
- bare: the model's forward alone over as many tokens as are left with each prompt once, in full rows, ready made.

The scores of the first three must agree, else the comparison is void. ``--device cuda`` (bf16) is the same program and
a section of ``gpu.sh``; it has not been run, and there are no numbers for it. There wall seconds decide.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from machine import machine
from meter import alternate
from models import SMALL, language_model, write_classifier
from pairs import SHAPES, random_lengths, words_of

from can_dist.config import SequenceClassifier
from can_dist.modeling.formatter import Formatter
from can_dist.modeling.loading import load_tokenizer
from can_dist.scoring.kinds import load_scorer
from can_dist.scoring.protocol import Response

RESULTS = Path(__file__).parent / "results" / "score_vs_pipeline.json"
NUM_RESPONSES, HABIT_LENGTH, HABIT_BATCH = 16, 512, 16
TOLERANCE = {"cpu": 1e-4, "cuda": 5e-2}  # of a score, relative to the largest
TARGETS = {"pipeline": 1.7, "padded to 512": 3.0}


@dataclass(frozen=True)
class Texts:
    """Responses, the whole conversations as strings, and their tokens counted with each prompt per text and once."""

    responses: list[Response]
    whole: list[str]
    num_tokens: int
    num_shared: int


def make_texts(shape: str, num_prompts: int, formatter: Formatter, context: int) -> Texts:
    """Return random words in the lengths of a shape."""
    words, random = words_of(formatter), np.random.default_rng(1)
    prompt_P, response_PK, _ = random_lengths(*SHAPES[shape], num_prompts, NUM_RESPONSES, context - 16, seed=1)
    responses, shared = [], 0
    for p in range(num_prompts):
        messages = [{"role": "user", "content": " ".join(random.choice(words, size=prompt_P[p]).tolist())}]
        shared += len(formatter.prompt_ids(messages))
        for k in range(NUM_RESPONSES):
            text = " ".join(random.choice(words, size=response_PK[p, k]).tolist())
            ids = formatter.response_ids(messages, text)
            shared += len(ids)
            responses.append(Response(f"{p}/{k}", messages, text, ids))
    whole = [
        formatter.tokenizer.apply_chat_template(
            [*response.messages, {"role": "assistant", "content": response.text}], tokenize=False
        )
        for response in responses
    ]
    total = sum(len(formatter.full_ids(response.messages, response.text)) for response in responses)
    return Texts(responses, whole, total, shared)


def pipeline_scorer(directory: str, texts: Sequence[str], device: str) -> Callable[[int], np.ndarray]:
    """Return a function of the batch size that scores the texts by the pipeline, sorted by length."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
    classify = pipeline(
        "text-classification", model=directory, tokenizer=tokenizer, device=device, dtype=dtype_of(device)
    )

    def score(batch_size: int) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))  # the longest first, as it advises
        outputs = classify(
            [texts[row] for row in order],
            batch_size=batch_size,
            function_to_apply="none",
            add_special_tokens=False,  # the template holds them
        )
        scores = np.empty(len(texts))
        scores[order] = [output["score"] for output in outputs]
        return scores

    return score


def habit_scorer(directory: str, texts: Sequence[str], device: str) -> Callable[[], np.ndarray]:
    """Return a function that scores as the official CAN code does: every text padded to 512 tokens."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype_of(device)).eval().to(device)

    @torch.inference_mode()
    def score() -> np.ndarray:
        parts = []
        for start in range(0, len(texts), HABIT_BATCH):
            inputs = tokenizer(
                list(texts[start : start + HABIT_BATCH]),
                padding="max_length",
                max_length=HABIT_LENGTH,
                truncation=True,
                add_special_tokens=False,
                return_tensors="pt",
            ).to(device)
            logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
            parts.append(logits[:, 0].float().cpu().numpy())
        return np.concatenate(parts)

    return score


def bare_forward(directory: str, num_tokens: int, device: str, length: int) -> Callable[[], None]:
    """Return a function that runs the model over ``num_tokens`` tokens in full rows of ``length``."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype_of(device)).eval().to(device)
    rows = max(1, 8192 // length)
    ids_NT = torch.randint(3, 4000, (-(-num_tokens // length), length), device=device)
    last = num_tokens - (len(ids_NT) - 1) * length

    @torch.inference_mode()
    def run() -> None:
        for batch in (*ids_NT[:-1].split(rows), ids_NT[-1:, :last]):
            if len(batch):
                model.model(input_ids=batch, use_cache=False).last_hidden_state.sum().item()  # waits for a GPU

    return run


def dtype_of(device: str) -> torch.dtype:
    """Return what our precision 'auto' is on a device."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def compare(directory: str, shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the row of one shape."""
    spec = SequenceClassifier(model=directory)
    formatter = Formatter(load_tokenizer(spec))
    texts = make_texts(shape, arguments.num_prompts, formatter, arguments.context)
    scorer = load_scorer(spec, "bf16" if arguments.device == "cuda" else "fp32")
    by_pipeline = pipeline_scorer(directory, texts.whole, arguments.device)
    habit = habit_scorer(directory, texts.whole, arguments.device)
    scores_of = {"ours": scorer.score(texts.responses), "pipeline": by_pipeline(16), "padded to 512": habit()}
    differences = require_same_scores(scores_of, TOLERANCE[arguments.device])
    search = {size: alternate({"once": lambda size=size: by_pipeline(size)}, 1)["once"] for size in arguments.batches}
    best = min(search, key=lambda size: search[size][arguments.device == "cpu"])
    times = alternate(
        {
            "ours": lambda: scorer.score(texts.responses),
            "pipeline": lambda: by_pipeline(best),
            "padded to 512": habit,
            "bare": bare_forward(directory, texts.num_shared, arguments.device, arguments.context),
        },
        arguments.rounds,
    )
    return {
        "shape": shape,
        "texts": len(texts.responses),
        "tokens_unshared_over_shared": texts.num_tokens / texts.num_shared,
        "pipeline_batch": best,
        "pipeline_search_cpu_seconds": {size: cpu for size, (_, cpu) in search.items()},
        "largest_relative_difference": differences,
        "wall_seconds": {name: wall for name, (wall, _) in times.items()},
        "cpu_seconds": {name: cpu for name, (_, cpu) in times.items()},
    }


def require_same_scores(scores_of: dict[str, np.ndarray], tolerance: float) -> float:
    """Return the largest difference of a score from ours, relative to the largest score, or stop."""
    ours = scores_of["ours"]
    worst = max(float(np.abs(other - ours).max() / np.abs(ours).max()) for other in scores_of.values())
    if not worst <= tolerance:
        sys.exit(f"void: the scores differ by {worst:.2g} of the largest, more than {tolerance:g}")
    return worst


def table(record: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    about, on_cpu = record["machine"], record["device"] == "cpu"
    hardware = f"{about['cpu']}, one core, one thread, float32" if on_cpu else f"{about['gpu']}, bf16"
    kind, other = ("CPU", "wall") if on_cpu else ("wall", "CPU")
    lines = [
        "# Scoring beside transformers' pipeline",
        "",
        f"{about['date'][:10]}; {hardware}; torch {about['torch']}, transformers {about['transformers']}; load average "
        f"{about['load_average']:.0f} on {about['cores']} cores, so the ratios of {kind} seconds are the ones to read "
        f"({other} behind them). "
        f"{record['num_prompts']} prompts × {NUM_RESPONSES} responses, medians of {record['rounds']} rounds in turn. "
        "Written by `benchmarks/score_vs_pipeline.py`.",
        "",
        f"| texts | tokens: unshared/shared | ours {kind} s | pipeline, best batch | **faster** (target 1.7×) "
        "| padded to 512 | **faster** (target 3×) | bare forward | ours/bare (target 1.15) | largest difference |",
        "|" + "---|" * 10,
    ]
    for row in record["rows"]:
        first, second = (row[f"{name.lower()}_seconds"] for name in (kind, other))

        def over(name: str, first: dict[str, float] = first, second: dict[str, float] = second) -> str:
            return f"**{first[name] / first['ours']:.2f}×** ({second[name] / second['ours']:.2f}×)"

        lines.append(
            f"| {row['shape']} | {row['tokens_unshared_over_shared']:.2f} | {first['ours']:.2f} "
            f"| {first['pipeline']:.2f} ({row['pipeline_batch']}) | {over('pipeline')} "
            f"| {first['padded to 512']:.2f} | {over('padded to 512')} | {first['bare']:.2f} "
            f"| {first['ours'] / first['bare']:.2f} | {row['largest_relative_difference']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["pku-like", "hh-like"])
    parser.add_argument("--model", default=str(SMALL), help="directory of a language model, or random-7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--core", type=int, default=1, help="the core that the run is pinned to (CPU)")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64], help="batch sizes for the pipeline")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.sched_setaffinity(0, {arguments.core})
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model = language_model(arguments.model, Path(scratch) / "lm", arguments.device)
        directory = write_classifier(model, Path(scratch) / "classifier")
        rows = [compare(directory, shape, arguments) for shape in arguments.shapes]
    record = {
        "machine": machine("torch", "transformers"),
        "model": Path(arguments.model).name,
        **{name: getattr(arguments, name) for name in ("device", "num_prompts", "context", "rounds")},
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(table(record))
    print(table(record))


if __name__ == "__main__":
    main()
